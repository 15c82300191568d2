"""The layers of Figure 6 and their training: GD and NAG with a learned step size, and an RNN near GD."""

import math
import time

import torch

from unrolled_kernels import Spectral, UnrolledRNN
from unrolled_kernels.experiments.study import trial_columns
from unrolled_kernels.experiments.synthetic.data import DIM
from unrolled_kernels.experiments.synthetic.model import make_layer
from unrolled_kernels.experiments.synthetic.train import fit

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
    everything = (Spectral(task.eigenvalues, task.R).to_dense(), task.b, task.y_star)
    best_epoch, train, test = fit(layer, optimizer, task, trial.seed, everything, training, on_epochs)
    return trial_columns(trial) | {
        "epochs": training.epochs,
        "best_epoch": best_epoch,
        "train": train,
        "test": test,
        "gap": test - train,
        "step_size": math.nan if trial.algorithm == "rnn" else layer.step_size.item(),
        "seconds": time.perf_counter() - start,
    }
