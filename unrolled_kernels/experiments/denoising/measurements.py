"""What the report says beyond the trained models: the speed of a training step, its memory, and the guard at work."""

import copy
import dataclasses
import functools
import math

import torch

from unrolled_kernels.experiments.denoising.grid import Training, Trial
from unrolled_kernels.experiments.denoising.model import energy_layer
from unrolled_kernels.experiments.denoising.train import Trainer
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import assert_as_close_as_eager, bytes_kept_for_backward

_BATCH, _ROUNDS = 10, 5
_DEPTHS = (3, 12, 48)


def speed(task, device="cpu", backend="auto"):
    """Time the layer and the training step of the about-right model at k = 12 against the eager loop, in turns.

    Args:
        task: the images; batches of 10 whole ones are trained on.
        device, backend: where, and what is compared with ``"eager"``.
    Returns:
        A list of dicts ``{"what", "eager_ms", "fused_ms"}``, medians.
    """
    clean = task.clean[torch.arange(_BATCH) % len(task.clean)].to(device)
    rows = []
    for algorithm in ("gd", "nag"):
        trainers = {
            name: Trainer(task, Trial("about-right", algorithm, 12, 0), Training(epochs=1), device, name)
            for name in ("eager", backend)
        }
        _check_gradients(trainers, clean)
        steps = {name: lambda trainer=t: trainer.train_step(clean, clean, _BATCH) for name, t in trainers.items()}
        layers = {name: _layer_call(clean, algorithm, 12, name) for name in ("eager", backend)}
        for what, calls in (("layer", layers), ("training step", steps)):
            timings = in_turns(calls, device, rounds=_ROUNDS)
            eager, fused = (1e3 * timings[name].p50 for name in ("eager", backend))
            rows.append({"what": f"{algorithm.upper()}, {what}", "eager_ms": eager, "fused_ms": fused})
    return rows


def _check_gradients(trainers, clean):
    """What is timed is right: the parameters' gradients are as close to float64's as the eager loop's."""
    eager, fused = (trainer.model for trainer in trainers.values())
    gradients = []
    for model, dtype in ((fused, torch.float32), (eager, torch.float64), (eager, torch.float32)):
        # a copy: the statistics of batch norms are not to move
        model, images = copy.deepcopy(model).to(dtype).train(), clean.to(dtype)
        loss = (model(0.9 * images) - images).square().mean()
        gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(loss, list(model.parameters()))]))
    assert_as_close_as_eager(*gradients, what=f"gradients of {trainers['eager'].trial.name}")


def saved_for_backward(task, backend="auto"):
    """Bytes that the layer keeps for its backward pass at k = 3, 12 and 48, batch 10, for eager and ``backend``.

    Returns:
        A dict from the backend's name to ``{k: bytes}``.
    """
    clean = task.clean[torch.arange(_BATCH) % len(task.clean)]
    table = {}
    for name in ("eager", backend):
        table[name] = {}
        for num_steps in _DEPTHS:
            f, g = (clean.clone().requires_grad_() for _ in range(2))
            layer = functools.partial(
                energy_layer, f, g, clean, algorithm="gd", num_steps=num_steps, step_size=0.5, backend=name
            )
            table[name][num_steps] = bytes_kept_for_backward(layer)
    return table


def guard(task, training, epochs=3, num_steps=30):
    """Train the over-parameterized GD³⁰ from φ = 1 without a guard, and guarded, on the same batches.

    Returns:
        A dict from the kind of step size to the mean loss of each epoch; the last is not finite where it diverged.
    """
    trial, losses = Trial("over", "gd", num_steps, 0), {}
    for kind in ("learned", "guarded"):
        changed = dataclasses.replace(
            training, epochs=epochs, step_size=kind, step_size_start=1.0, crop=min(training.crop, 32)
        )
        trainer = Trainer(task, trial, changed)
        while trainer.epoch < epochs and not trainer.lost:
            trainer.train_epoch()
        losses[kind] = [loss if math.isfinite(loss) else math.inf for loss in trainer.losses]
    return losses


def _layer_call(clean, algorithm, num_steps, backend):
    f, g = (clean.clone().requires_grad_() for _ in range(2))

    def call():
        y = energy_layer(f, g, clean, algorithm=algorithm, num_steps=num_steps, step_size=0.5, backend=backend)
        torch.autograd.grad(y.square().mean(), (f, g))

    return call
