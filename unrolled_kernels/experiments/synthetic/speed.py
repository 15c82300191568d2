"""How much faster the fused layer makes this task, measured in turns with the eager loop once both compute the same.

Each row has a ``(call, outcome)``: what is repeated, and what its first run leaves behind as one tensor, which is to be
as close to float64's as the eager loop's.
"""

import torch

from unrolled_kernels import functional as F
from unrolled_kernels import use_backend
from unrolled_kernels.experiments.synthetic.data import FIRST_SEED, MU, NUM_TRAIN
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.evaluation import distance
from unrolled_kernels.experiments.synthetic.grid import Training, Trial
from unrolled_kernels.experiments.synthetic.train import make_model, make_optimizer, train_step
from unrolled_kernels.experiments.timing import in_turns
from unrolled_kernels.testing import assert_as_close_as_eager

BATCH, NUM_STEPS, HIDDEN, MODELS, EPOCHS = 50, 30, 16, 256, 2


def measure(task, backend="auto", rounds=5):
    """Time the layer and the training step of one model: NAG, k = 30, minibatch 50, float32, hidden 16, one CPU thread.

    Args:
        task: the data, on the device to measure on.
        backend: what is compared with ``"eager"``, on the same form of Q in every row.
        rounds: turns of each.
    Returns:
        A list of dicts ``{"what", "eager_us", "fused_us"}``, medians in microseconds. A training step of one of many
        models is an epoch of the ensemble, half for each of its two steps, evaluation included.
    """
    threads = torch.get_num_threads()
    # as the workers have: a minibatch is too small to share
    torch.set_num_threads(1)
    try:
        return [_row(task, what, make, backend, rounds) for what, make in _STEPS.items()]
    finally:
        torch.set_num_threads(threads)


def _row(task, what, make, backend, rounds):
    outcomes = {}
    for name, dtype in ((backend, torch.float32), ("eager", torch.float64), ("eager", torch.float32)):
        call, outcome = make(task.to(dtype))
        _under(name, call)()
        outcomes[name, dtype] = outcome()
    assert_as_close_as_eager(*outcomes.values(), what=what)
    calls = {name: _under(name, make(task)[0]) for name in ("eager", backend)}
    timings = in_turns(calls, task.x.device, rounds=rounds)
    scale = 1e6 / (2 * EPOCHS * MODELS) if make is _ensemble else 1e6
    return {"what": what, "eager_us": scale * timings["eager"].p50, "fused_us": scale * timings[backend].p50}


def _under(backend, call):
    def run():
        with use_backend(backend):
            call()

    return run


def _minibatch(task):
    index = task.train_index(FIRST_SEED)[:BATCH].to(task.x.device)
    return index, *(tensor[index] for tensor in (task.x, task.R, task.b, task.y_star))


def _model(task):
    trial, training = _TRIAL, Training(epochs=0)
    model = make_model(task, trial, training)
    return model, make_optimizer(model, trial, training)


def _layer(task):
    index, _, R, b, y_star = _minibatch(task)
    Q = (R * task.eigenvalues[index].unsqueeze(1) @ R.mT).requires_grad_()
    b = b.clone().requires_grad_()
    loss = lambda: distance(F.nesterov(Q, b, 1.0, MU, NUM_STEPS), y_star).mean()
    call = lambda: torch.autograd.grad(loss(), (Q, b))
    return call, lambda: _flat(call())


def _dense_step(task):
    _, x, R, b, y_star = _minibatch(task)
    model, optimizer = _model(task)

    def step():
        optimizer.zero_grad()
        Q = (R * model.network(x).unsqueeze(1)) @ R.mT
        distance(model.layer(Q, b), y_star).mean().backward()
        optimizer.step()

    return step, _gradients(model)


def _spectral_step(task):
    _, *samples = _minibatch(task)
    model, optimizer = _model(task)
    return lambda: train_step(model, optimizer, *samples), _gradients(model)


def _ensemble(task):
    ensemble = Ensemble(task, [_TRIAL] * MODELS, Training(epochs=0))
    orders = torch.arange(NUM_TRAIN, device=task.x.device).expand(EPOCHS, 1, -1)
    return lambda: ensemble.train(orders), ensemble.training_loss


def _gradients(model):
    return lambda: _flat(parameter.grad for parameter in model.parameters())


def _flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


_TRIAL = Trial(HIDDEN, "adam", "nag", NUM_STEPS, FIRST_SEED, 1e-2)
# the task gives Q as R diag(λ) Rᵀ; the trainers never form it
_STEPS = {
    "layer, forward and backward, Q dense": _layer,
    "training step of one model, Q dense": _dense_step,
    "training step of one model, Q spectral": _spectral_step,
    f"training step of one of {MODELS} models, Q spectral": _ensemble,
}
