"""The ensemble's epochs on the CPU as one call: the C++ op that trains each model on a core of its own."""

import torch

from unrolled_kernels.experiments import native
from unrolled_kernels.experiments.synthetic.data import MU, L
from unrolled_kernels.schedules import nesterov_momentum


def can_train(ensemble):
    """Whether the op serves this ensemble: backend "cpu", a fixed step size, float32 or float64."""
    return not ensemble.learned and ensemble.dtype in (torch.float32, torch.float64) and native.runs_on(ensemble.device)


def train(ensemble, orders):
    """Train for the epochs of ``orders`` ``[E, S, n]``, changing the ensemble's state in place; see ``Ensemble.train``.

    The result is the same bit for bit whatever the number of threads.
    """
    training = ensemble.training
    torch.ops.unrolled_kernels.synthetic_training(
        ensemble.theta,
        ensemble.first_moment,
        ensemble.second_moment,
        ensemble.best_theta,
        ensemble.best_loss,
        ensemble.best_epoch,
        ensemble.samples,
        ensemble.fixed_samples,
        ensemble.seed_of_model,
        orders.contiguous(),
        ensemble.depths.flatten().long(),
        ensemble.accelerated.flatten().bool(),
        ensemble.learning_rates.flatten(),
        ensemble.trials[0].hidden,
        training.step_size,
        nesterov_momentum(training.step_size, MU),
        MU,
        L,
        training.weight_decay,
        ensemble.adam,
        training.batch_size,
        ensemble.epoch,
    )
