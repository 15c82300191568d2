"""Learning to optimize (paper, Sec. 7.1, "RNN"): Q* and b are given, only the algorithm is learned; Figure 6."""

import itertools
import math
import time
from dataclasses import dataclass

import torch

from unrolled_kernels import Spectral, UnrolledRNN
from unrolled_kernels.experiments.synthetic.data import DIM, FIRST_SEED
from unrolled_kernels.experiments.synthetic.grid import PAPER_DEPTHS, PAPER_LEARNING_RATES, trial_columns
from unrolled_kernels.experiments.synthetic.model import make_layer
from unrolled_kernels.experiments.synthetic.train import fit

ALGORITHMS = ("gd", "nag", "rnn")
HIDDEN_DIMS = (20, 20, 20)


@dataclass(frozen=True, order=True)
class Trial:
    """One layer to train; its fields are the columns that identify a row of the results."""

    algorithm: str
    num_steps: int
    seed: int
    learning_rate: float


@dataclass(frozen=True)
class Grid:
    """The product of its axes and the three algorithms; see ``PRESETS``."""

    depths: tuple
    learning_rates: tuple
    seeds: int
    epochs: int

    def trials(self):
        """Every layer of the grid, sorted."""
        seeds = range(FIRST_SEED, FIRST_SEED + self.seeds)
        return sorted(
            {Trial(*point) for point in itertools.product(ALGORITHMS, self.depths, seeds, self.learning_rates)}
        )


PRESETS = {
    "quick": Grid((1, 2, 4, 8, 14), (1e-2, 1e-3), seeds=3, epochs=300),
    "medium": Grid((1, 2, 3, 4, 6, 8, 10, 14, 20), (1e-2, 1e-3), seeds=3, epochs=800),
    "paper": Grid(PAPER_DEPTHS, PAPER_LEARNING_RATES, seeds=20, epochs=50_000),
}


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
