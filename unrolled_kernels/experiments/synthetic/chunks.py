"""A grid in chunks: models that are trained together, with a checkpoint of the state between blocks of epochs."""

import itertools
import math

from unrolled_kernels.experiments import checkpoint
from unrolled_kernels.experiments.synthetic.data import epoch_blocks
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.grid import fingerprint


def make_chunks(trials, models_per_chunk):
    """Split trials into the chunks that are trained together: one architecture each, and depths as equal as may be.

    Args:
        trials: sorted list of ``Trial``, all of a grid (a resumed run must get the same chunks).
        models_per_chunk: the size of the largest chunk.
    Returns:
        Lists of trials.
    """
    families = {}
    for trial in trials:
        families.setdefault((trial.hidden, trial.optimizer), []).append(trial)
    chunks = []
    for family in families.values():
        by_depth = sorted(family, key=lambda trial: (trial.num_steps, trial))
        count = math.ceil(len(by_depth) / models_per_chunk)
        bounds = [round(i * len(by_depth) / count) for i in range(count + 1)]
        chunks += [by_depth[lo:hi] for lo, hi in itertools.pairwise(bounds)]
    return chunks


def train_chunk(task, trials, training, *, checkpoint_file=None, checkpoint_seconds=120, on_epochs=lambda count: None):
    """Train the models of one chunk together.

    Args:
        task: the data, on the device to train on.
        trials: models of one hidden size and optimizer.
        training: what all models share.
        checkpoint_file: what keeps the state of unfinished training; continued from if it is there.
        checkpoint_seconds: how often it is written.
        on_epochs: called now and then with the number of epochs done since the last call.
    Returns:
        The rows of the results table, one dict for each trial.
    Raises:
        ValueError: the checkpoint is damaged or belongs to other models; the message names it.
    """
    ensemble = Ensemble(task, trials, training)
    if checkpoint_file is not None and checkpoint_file.exists():
        ensemble.load(checkpoint_file)
        on_epochs(ensemble.epoch)
    with checkpoint.kept(checkpoint_file, fingerprint(trials), checkpoint_seconds) as keep:
        for block, rows in epoch_blocks(ensemble.epoch, training.epochs):
            ensemble.train(ensemble.minibatch_orders(block)[rows])
            keep(ensemble.state)
            on_epochs(rows.stop - rows.start)
    return ensemble.results()
