"""The layers of Figure 6 and their training: GD and NAG with a learned step size, and an RNN near GD."""

import math
import time

import torch
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from unrolled_kernels import Spectral, UnrolledRNN
from unrolled_kernels.experiments import native
from unrolled_kernels.experiments.study import trial_columns
from unrolled_kernels.experiments.synthetic.data import DIM, MU, epoch_blocks
from unrolled_kernels.experiments.synthetic.model import make_layer
from unrolled_kernels.experiments.synthetic.train import fit, mean_loss

HIDDEN_DIMS = (20, 20, 20)


def make_trainable_layer(trial):
    """The untrained layer of a trial: GD or NAG with a step size learned from φ = 1, or an RNN.

    The RNN starts as GD with φ = 1 plus a tenth of Glorot-uniform weights, drawn from the trial's seed: without these,
    half of its units would have no gradient. Of three starts it trains to the lowest error. Seed 100, float32, the
    better of the learning rates 1e-2 and 1e-3 after 500 epochs, k = 2, 8 and 16: this start 1.30, 0.51 and 0.27, GD's
    weights alone 5.59, 1.05 and 0.41, Glorot's alone 1.80, 2.98 and 2.18.
    """
    if trial.algorithm != "rnn":
        return make_layer(trial.algorithm, trial.num_steps, learn_step_size=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        layer, glorot = (UnrolledRNN(trial.num_steps, DIM, HIDDEN_DIMS, init=init) for init in ("gd", "default"))
    with torch.no_grad():
        for parameter, noise in zip(layer.parameters(), glorot.parameters(), strict=True):
            parameter += 0.1 * noise
    return layer


def train_one(task, trial, training, on_epochs=lambda count: None):
    """Train one layer on the true energies of the training samples, and evaluate its epoch of lowest training loss.

    Args:
        task: the data, on the device to train on.
        trial: the layer.
        training: what all layers share.
        on_epochs: called now and then with the number of epochs done since the last call.
    Returns:
        The row of the results table, a dict; its losses are NaN if the layer diverged.
    """
    start = time.perf_counter()
    layer = make_trainable_layer(trial).to(task.x.device, task.x.dtype)
    adam = {"lr": trial.learning_rate, "weight_decay": training.weight_decay, "fused": True}
    optimizer = torch.optim.Adam(layer.parameters(), **adam)
    found = fit(layer, optimizer, task, trial.seed, _everything(task), training, on_epochs)
    return _row(trial, layer, training, found, time.perf_counter() - start)


def train_natively(task, trials, training, on_epochs=lambda count: None):
    """Train layers by a C++ op that runs their epochs, each as ``train_one`` would, in float32 or float64.

    Args:
        task, training, on_epochs: as in ``train_one``; the task is on the CPU.
        trials: layers of one seed, RNNs or others.
    Returns:
        The rows of the results table, a list of dicts.
    """
    start = time.perf_counter()
    (seed,) = {trial.seed for trial in trials}
    layers = [make_trainable_layer(trial).to(task.x.dtype) for trial in trials]
    theta = torch.stack([parameters_to_vector(_parameters(layer)) for layer in layers]).detach()  # [M, P]
    best_theta, best_epoch = theta.clone(), torch.zeros(len(trials), dtype=torch.int64)
    best_loss = theta.new_full([len(trials)], task.largest_loss)
    state = theta, torch.zeros_like(theta), torch.zeros_like(theta), best_theta, best_loss
    depths = torch.tensor([trial.num_steps for trial in trials])
    rates = theta.new_tensor([trial.learning_rate for trial in trials])
    train_epochs, *data = _rnn_training(task, seed) if trials[0].algorithm == "rnn" else _step_sizes(task, trials)
    epoch = 0
    for block, rows in epoch_blocks(0, training.epochs):
        orders = task.minibatch_orders(seed, block)[rows].unsqueeze(1).contiguous()  # [E, 1, n]
        shared = training.weight_decay, True, training.batch_size, epoch
        train_epochs(*state, best_epoch, torch.zeros_like(depths), orders, depths, rates, *shared, *data)
        epoch += len(orders)
        on_epochs(len(orders) * len(trials))
    seconds = (time.perf_counter() - start) / len(trials)
    everything, found = _everything(task), []
    samples = [tensor[task.train_index(seed)] for tensor in everything]
    for trial, layer, parameters, kept in zip(trials, layers, best_theta, best_epoch.tolist(), strict=True):
        with torch.no_grad():
            vector_to_parameters(parameters, _parameters(layer))
        losses = (mean_loss(layer, samples), mean_loss(layer, everything)) if kept else (math.nan, math.nan)
        found.append(_row(trial, layer, training, (kept, *losses), seconds))
    return found


def _parameters(layer):
    """Those of a layer in the order of the C++ ops: the logit of φ, or W1, W2, W^2 … W^L, V."""
    return [layer.W1, layer.W2, *layer.W, layer.V] if isinstance(layer, UnrolledRNN) else [layer.step_size_logit]


def _rnn_training(task, seed):
    """The op that trains RNNs, and its data."""
    samples = (tensor[task.train_index(seed)].unsqueeze(0).contiguous() for tensor in _everything(task))
    return native.op("rnn_training"), *samples, HIDDEN_DIMS


def _step_sizes(task, trials):
    """The op that trains step sizes, and its data: the samples in the eigenbasis of Q, and what each layer is."""
    index = task.train_index(trials[0].seed)
    b, y_star = (torch.einsum("nij,ni->jn", task.R[index], x[index]) for x in (task.b, task.y_star))  # [d, n]
    samples = torch.stack([task.eigenvalues[index].T, b, y_star]).unsqueeze(0)
    largest = [make_trainable_layer(trial).max_step_size for trial in trials]
    mu = [MU if trial.algorithm == "nag" else 0.0 for trial in trials]
    return native.op("step_size_training"), samples, b.new_tensor(largest), b.new_tensor(mu)


def _everything(task):
    """The inputs of a layer for all samples, and y*."""
    return Spectral(task.eigenvalues, task.R).to_dense(), task.b, task.y_star


def _row(trial, layer, training, found, seconds):
    best_epoch, train, test = found
    return trial_columns(trial) | {
        "epochs": training.epochs,
        "best_epoch": best_epoch,
        "train": train,
        "test": test,
        "gap": test - train,
        "step_size": math.nan if trial.algorithm == "rnn" else layer.step_size.item(),
        "seconds": seconds,
    }
