"""The C++ training loop of the synthetic experiment against the ensemble's torch ops."""

import dataclasses
import functools
import os
import subprocess
import sys

import pytest
import torch

from unrolled_kernels import available_backends, use_backend
from unrolled_kernels.experiments.synthetic import data
from unrolled_kernels.experiments.synthetic.ensemble import Ensemble
from unrolled_kernels.experiments.synthetic.grid import Training, Trial
from unrolled_kernels.experiments.synthetic.model import MINIMIZER, SCHEDULES
from unrolled_kernels.testing import assert_as_close_as_eager

pytestmark = [
    pytest.mark.skipif("cpu" not in available_backends(), reason="the extension is not built"),
]
STATE = ("theta", "first_moment", "second_moment", "best_theta", "best_loss", "best_epoch")
# every depth, algorithm, seed and learning rate of a chunk may differ
SETTINGS = [("gd", 1, 100, 1e-2), ("gd", 7, 101, 1e-3), ("nag", 5, 100, 1e-2), ("nag", 20, 101, 5e-3)]

PLAIN = Training(0)


@pytest.fixture(scope="module")
def task():
    return data.generate(seed=2, num_samples=500)


def trained(task, hidden, optimizer, *, epochs=20, backend="cpu", training=PLAIN, settings=SETTINGS):
    trials = [Trial(hidden, optimizer, *point) for point in settings]
    with use_backend(backend):
        ensemble = Ensemble(task, trials, training)
        assert ensemble.runs_natively == (backend == "cpu")
        ensemble.train(ensemble.minibatch_orders(0)[:epochs])
    return ensemble


def assert_same_state(a, b, rows=slice(None)):
    for name in STATE:
        assert torch.equal(getattr(a, name)[rows], getattr(b, name)[rows]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("hidden", [0, 5, 16, 32], ids="h{}".format)
def test_loop_equals_torch_ops(task, hidden, optimizer, dtype):
    # the last minibatch of an epoch is smaller, and fills no vector
    training = Training(0, batch_size=30)
    # 12 steps: each amplifies the rounding of the one before, and with 32 hidden units 20 of them do so more than the
    # tolerance can know from a single run of eager
    run = functools.partial(trained, hidden=hidden, optimizer=optimizer, epochs=3, training=training)
    actual = run(task.to(dtype))
    exact, eager = (run(task.to(reference), backend="eager") for reference in (torch.float64, torch.float32))
    for name in ("theta", "best_theta", "best_loss"):
        values = (getattr(x, name) for x in (actual, exact, eager))
        assert_as_close_as_eager(*values, what=name)


def test_loop_runs_every_schedule(task):
    settings = [(name, k, 100, 1e-2) for name in SCHEDULES for k in (1, 6)] + [(MINIMIZER, 0, 100, 1e-2)]
    run = functools.partial(trained, hidden=5, optimizer="adam", epochs=3, settings=settings)
    actual = run(task)
    exact, eager = (run(task.to(reference), backend="eager") for reference in (torch.float64, torch.float32))
    assert_as_close_as_eager(actual.best_theta, exact.best_theta, eager.best_theta, what="theta")
    assert_as_close_as_eager(actual.best_loss, exact.best_loss, eager.best_loss, what="loss")


@pytest.mark.parametrize("level", ["baseline", pytest.param("avx2", marks=pytest.mark.slow)])
def test_every_instruction_set(level):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", "equals and (h0 or h5)"]
    environment = os.environ | {"UNROLLED_KERNELS_CPU_ISA": level}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize("hidden", [0, 16], ids="h{}".format)
def test_threads_and_calls_change_nothing(task, hidden):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = trained(task, hidden, "adam")
        torch.set_num_threads(3)
        assert_same_state(trained(task, hidden, "adam"), one)
    finally:
        torch.set_num_threads(threads)
    pieces = trained(task, hidden, "adam", epochs=7)
    pieces.train(pieces.minibatch_orders(0)[7:20])
    assert_same_state(pieces, one)


def test_a_model_that_diverges_leaves_the_next_one_alone(task):
    settings = [("gd", 3, 100, 1e30), ("nag", 4, 101, 1e-2)]
    together, alone = trained(task, 16, "sgd", settings=settings), trained(task, 16, "sgd", settings=settings[1:])
    assert together.theta[0].isnan().any()
    assert together.best_epoch[0] == 0
    assert_same_state(together, alone, rows=slice(-1, None))


def test_one_step_from_zero_learns_nothing(task):
    # y_1 = -φ b whatever Q: the gradient is zero exactly, or Adam would scale its rounding up
    settings = [("gd", 1, 100, 1e-2), ("nag", 1, 100, 1e-2)]
    training = Training(0, weight_decay=0.0)
    start = trained(task, 16, "adam", epochs=0, settings=settings, training=training)
    end = trained(task, 16, "adam", epochs=5, settings=settings, training=training)
    assert torch.equal(start.theta, end.theta)


def test_a_learned_step_size_is_left_to_torch(task):
    ensemble = Ensemble(task, [Trial(0, "adam", "gd", 2, 100, 1e-2)], Training(0, learn_step_size=True))
    assert not ensemble.runs_natively


def test_op_refuses_what_it_would_misread(task):
    ensemble = trained(task, 0, "adam", epochs=1)
    orders = ensemble.minibatch_orders(0)[:1]
    with pytest.raises(RuntimeError, match="orders: out of range"):
        ensemble._train_natively(orders + 1)
    with pytest.raises(RuntimeError, match="orders: not of the shape"):
        ensemble._train_natively(orders[:, :, :-1])
    ensemble.depths += 100
    with pytest.raises(RuntimeError, match="num_steps: more than"):
        ensemble._train_natively(orders)
    ensemble.depths -= 100
    ensemble.trials = [dataclasses.replace(trial, hidden=16) for trial in ensemble.trials]
    with pytest.raises(RuntimeError, match="theta: not of the shape"):
        ensemble._train_natively(orders)
