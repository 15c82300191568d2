"""How much faster the fused layer makes this task, measured against the eager loop in the same run."""

import torch
from torch.utils.benchmark import Timer

from unrolled_kernels import functional as F
from unrolled_kernels import use_backend
from unrolled_kernels.experiments.synthetic.data import FIRST_SEED, MU, NUM_TRAIN
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.evaluation import distance
from unrolled_kernels.experiments.synthetic.grid import Training, Trial
from unrolled_kernels.experiments.synthetic.train import make_model, make_optimizer, train_step

BATCH, NUM_STEPS, HIDDEN, MODELS, EPOCHS = 50, 30, 16, 256, 8


def measure(task, backend="auto", seconds=1.0):
    """Time the layer and the training step of one model: NAG, k = 30, minibatch 50, float32, hidden 16, one CPU thread.

    Args:
        task: the data, on the device to measure on.
        backend: what is compared with ``"eager"``.
        seconds: how long each timing goes on.
    Returns:
        A list of dicts ``{"what", "eager_us", "fused_us"}``, medians in microseconds. The eager training step makes
        the matrix Q_θ and loops over k products with it; the others use the spectral form, as the trainers do.
    """
    training = Training(epochs=0)
    trial = Trial(HIDDEN, "adam", "nag", NUM_STEPS, FIRST_SEED, 1e-2)
    index = task.train_index(trial.seed)[:BATCH].to(task.x.device)
    x, R, b, y_star = (tensor[index] for tensor in (task.x, task.R, task.b, task.y_star))
    Q = (R * task.eigenvalues[index].unsqueeze(1) @ R.mT).requires_grad_()
    b_leaf = b.clone().requires_grad_()

    def layer():
        y = F.nesterov(Q, b_leaf, 1.0, MU, NUM_STEPS)
        torch.autograd.grad(distance(y, y_star).mean(), (Q, b_leaf))

    def dense_step(model, optimizer):
        # what the task costs without structure: Q_θ in full, then the loop
        optimizer.zero_grad()
        full = (R * model.network(x).unsqueeze(1)) @ R.mT
        distance(model.layer(full, b), y_star).mean().backward()
        optimizer.step()

    model = make_model(task, trial, training)
    optimizer = make_optimizer(model, trial, training)
    with use_backend("eager"):
        eager_layer = _median_us(layer, seconds)
        eager_step = _median_us(lambda: dense_step(model, optimizer), seconds)
    with use_backend(backend):
        fused_layer = _median_us(layer, seconds)
        fused_step = _median_us(lambda: train_step(model, optimizer, x, R, b, y_star), seconds)
        ensemble = Ensemble(task, [trial] * MODELS, training)
        orders = torch.arange(NUM_TRAIN, device=task.x.device).expand(EPOCHS, 1, -1)
        # an epoch is two steps and one evaluation; all of it is counted here
        ensemble_step = _median_us(lambda: ensemble.train(orders), seconds) / (2 * EPOCHS * MODELS)
    return [
        {"what": "layer, forward and backward", "eager_us": eager_layer, "fused_us": fused_layer},
        {"what": "training step, one model", "eager_us": eager_step, "fused_us": fused_step},
        {"what": f"training step, one of {MODELS} models", "eager_us": eager_step, "fused_us": ensemble_step},
    ]


def _median_us(function, seconds):
    # one thread, as the workers have: a minibatch is too small to share
    timer = Timer("function()", globals={"function": function}, num_threads=1)
    return timer.blocked_autorange(min_run_time=seconds).median * 1e6
