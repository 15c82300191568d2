"""Which models are trained: the grid of the paper, its presets, and the choice of the best over the optimizers."""

import itertools
import math
from dataclasses import dataclass, replace

from unrolled_kernels.experiments.synthetic.data import FIRST_SEED
from unrolled_kernels.experiments.synthetic.model import ALGORITHMS, MINIMIZER

OPTIMIZERS = ("adam", "sgd")
PAPER_DEPTHS = (*range(1, 11), 12, 14, 16, 18, 20, 25, 30)
PAPER_LEARNING_RATES = (1e-2, 5e-3, 1e-3, 5e-4, 1e-4)


@dataclass(frozen=True, order=True)
class Trial:
    """One model to train; its fields are the columns that identify a row of the results."""

    hidden: int
    optimizer: str
    algorithm: str
    num_steps: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Training:
    """What all models of a run share.

    Attributes:
        epochs: passes over the training samples.
        step_size: φ, where a learned one starts.
        learn_step_size: train φ too.
        batch_size: samples of a minibatch.
        weight_decay: of both optimizers, coupled (added to the gradient).
    """

    epochs: int
    step_size: float = 1.0
    learn_step_size: bool = False
    batch_size: int = 50
    weight_decay: float = 1e-4


@dataclass(frozen=True)
class Grid:
    """The product of its axes; see ``PRESETS``."""

    depths: tuple
    hidden: tuple
    optimizers: tuple
    learning_rates: tuple
    seeds: int
    epochs: int
    algorithms: tuple = ALGORITHMS

    def trials(self):
        """Every model of the grid, sorted."""
        axes = (
            self.hidden,
            self.optimizers,
            self.algorithms,
            self.depths,
            range(FIRST_SEED, FIRST_SEED + self.seeds),
            self.learning_rates,
        )
        trials = {Trial(*point) for point in itertools.product(*axes)}
        # of which there is one, whatever the depths
        return sorted({replace(t, num_steps=0) if t.algorithm == MINIMIZER else t for t in trials})


PRESETS = {
    "quick": Grid((1, 2, 3, 4, 5, 6, 8, 10, 14, 20), (0, 16, 32), ("adam",), (1e-2,), seeds=5, epochs=1000),
    "medium": Grid(PAPER_DEPTHS, (0, 16, 32), ("adam",), (1e-2, 1e-3), seeds=5, epochs=5000),
    "paper": Grid(PAPER_DEPTHS, (0, 16, 32), OPTIMIZERS, PAPER_LEARNING_RATES, seeds=20, epochs=50_000),
}


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


def select_best(results):
    """The row of lowest training loss over optimizer and learning rate, for each other setting.

    Args:
        results: the results table, one row for each trained model.
    Returns:
        A DataFrame with one row for each (hidden, algorithm, num_steps, seed), as far as the table has these columns;
        models that diverged are never chosen.
    """
    keys = [name for name in ("hidden", "algorithm", "num_steps", "seed") if name in results]
    finite = results[results["train"].notna()]
    return finite.loc[finite.groupby(keys)["train"].idxmin()].sort_values(keys).reset_index(drop=True)
