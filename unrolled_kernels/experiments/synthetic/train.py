"""The one-model trainer: plain PyTorch around the drop-in layer."""

import copy
import math
import time

import pandas as pd
import torch

from unrolled_kernels import Spectral
from unrolled_kernels.experiments.study import trial_columns
from unrolled_kernels.experiments.synthetic import evaluation
from unrolled_kernels.experiments.synthetic.data import epoch_blocks
from unrolled_kernels.experiments.synthetic.model import SpectrumNetwork, SyntheticModel, make_layer


def make_model(task, trial, training, layer=make_layer):
    """The untrained model of a trial; ``layer`` makes its layer, see ``train_all``."""
    network = SpectrumNetwork(task.initial_weights(trial.hidden, trial.seed))
    layer = layer(trial.algorithm, trial.num_steps, training.step_size, training.learn_step_size)
    return SyntheticModel(network, layer).to(task.x.device, task.x.dtype)


def make_optimizer(model, trial, training):
    """Adam or SGD with coupled weight decay, as in ``torch.optim``."""
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[trial.optimizer]
    return kind(model.parameters(), lr=trial.learning_rate, weight_decay=training.weight_decay)


def train_step(model, optimizer, *samples):
    """One step on a minibatch: the model's inputs, and y* as the last."""
    optimizer.zero_grad()
    _loss(model, samples).backward()
    optimizer.step()


def fit(model, optimizer, task, seed, everything, training, on_epochs):
    """Train on the samples of a seed, and leave the model as it was after the epoch of lowest training loss.

    Args:
        model, optimizer: what to train.
        task: the data; gives the training samples and the order of the minibatches.
        seed: the training seed.
        everything: the model's inputs for all N samples, and y* as the last.
        training: epochs and batch size.
        on_epochs: called now and then with the number of epochs done since the last call.
    Returns:
        That epoch, counted from 1, and the training and the test loss there; 0 and NaNs if the model diverged.
    """
    index = task.train_index(seed).to(task.x.device)
    samples = [tensor[index] for tensor in everything]
    best_loss, best_epoch, best_state = task.largest_loss, 0, copy.deepcopy(model.state_dict())
    epoch = 0
    for block, rows in epoch_blocks(0, training.epochs):
        for order in task.minibatch_orders(seed, block)[rows].to(task.x.device):
            for batch in order.split(training.batch_size):
                train_step(model, optimizer, *(tensor[batch] for tensor in samples))
            epoch += 1
            loss = mean_loss(model, samples)
            if loss < best_loss:
                best_loss, best_epoch, best_state = loss, epoch, copy.deepcopy(model.state_dict())
        on_epochs(rows.stop - rows.start)
    model.load_state_dict(best_state)
    if training.epochs > 0 and best_epoch == 0:
        return 0, math.nan, math.nan
    return best_epoch, mean_loss(model, samples), mean_loss(model, everything)


def train_all(task, trials, training, *, layer=make_layer):
    """Train models one after the other.

    Args:
        task: the data, see ``data.generate``; its ``to`` chooses device and dtype.
        trials: the models, a list of ``Trial``.
        training: what all models share.
        layer: what makes the layer of a model, a function of the trial's algorithm and number of steps, φ, and whether
            φ is learned. The layer is a module that maps a ``Spectral`` Q and b ``[B, 5]`` to y ``[B, 5]``; the name of
            its algorithm is free. One with a learned φ has it as ``step_size``.
    Returns:
        A DataFrame with a row for each model, what ``select_best`` and ``draw`` take.
    """
    return pd.DataFrame([train_one(task, trial, training, layer=layer) for trial in trials])


def train_one(task, trial, training, on_epochs=lambda count: None, layer=make_layer):
    """Train one model and evaluate the epoch of lowest training loss.

    Args:
        task: the data, on the device to train on.
        trial: the model.
        training: what all models share.
        on_epochs: called now and then with the number of epochs done since the last call.
        layer: as in ``train_all``.
    Returns:
        The row of the results table, a dict.
    """
    start = time.perf_counter()
    model = make_model(task, trial, training, layer)
    optimizer = make_optimizer(model, trial, training)
    index = task.train_index(trial.seed).to(task.x.device)
    everything = (task.x, task.R, task.b, task.y_star)
    init = mean_loss(model, [tensor[index] for tensor in everything]), mean_loss(model, everything)
    best_epoch, train, test = fit(model, optimizer, task, trial.seed, everything, training, on_epochs)
    with torch.no_grad():
        on_true = evaluation.distance(model.layer(Spectral(task.eigenvalues, task.R), task.b), task.y_star)
        errors = evaluation.spectrum_errors(model.network(task.x), task.eigenvalues, dim=-1)
        test_squared = _losses(model, everything).square().mean().item()
    others = on_true, *errors
    return trial_columns(trial) | evaluation.result_columns(
        epochs=training.epochs,
        best_epoch=best_epoch,
        losses=(train, test, test_squared if math.isfinite(test) else math.nan),
        on_train=[x[index].mean().item() for x in others],
        on_test=[x.mean().item() for x in others],
        init=init,
        step_size=model.layer.step_size.item() if training.learn_step_size else training.step_size,
        seconds=time.perf_counter() - start,
        weights=torch.cat([p.detach().flatten().float().cpu() for p in _weights(model)]).numpy(),
    )


def _weights(model):
    """The parameters in the order of ``evaluation.result_columns``."""
    return [*model.network.parameters(), *model.layer.parameters()]


@torch.no_grad()
def mean_loss(model, samples):
    """The loss over the samples, the model's inputs and y* as the last, a float."""
    return _loss(model, samples).item()


def _loss(model, samples):
    return _losses(model, samples).mean()


def _losses(model, samples):
    *inputs, y_star = samples
    return evaluation.distance(model(*inputs), y_star)
