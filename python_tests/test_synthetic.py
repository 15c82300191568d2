"""The synthetic experiment: its data, its two trainers, its runs and what they refuse, and the authors' numbers."""

import dataclasses
import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from unrolled_kernels import Spectral, available_backends, use_backend
from unrolled_kernels import functional as F
from unrolled_kernels.experiments import checkpoint, cli
from unrolled_kernels.experiments import report as written
from unrolled_kernels.experiments.run_directory import RunDirectory, atomic_path
from unrolled_kernels.experiments.study import fingerprint
from unrolled_kernels.experiments.synthetic import (
    beyond,
    choice,
    claims,
    data,
    ensemble,
    figures,
    golden,
    grid,
    report,
    runner,
    statistics,
    train,
    transfer,
)
from unrolled_kernels.experiments.synthetic.comparison import REGIME_OF_HIDDEN
from unrolled_kernels.experiments.synthetic.evaluation import distance, spectrum_errors
from unrolled_kernels.experiments.synthetic.grid import Training, Trial
from unrolled_kernels.experiments.synthetic.model import MINIMIZER, SCHEDULES
from unrolled_kernels.theory.bounds import predicted_gap
from unrolled_kernels.theory.properties import convergence_rate

ROOT = Path(__file__).parents[1]
REFERENCE = Path(__file__).parents[2] / "shared" / "data" / "reference_synthetic"
needs_reference = pytest.mark.skipif(
    not (REFERENCE / "reference.npz").is_file(), reason=f"the authors' data are not in {REFERENCE}"
)
# everything about a run but its wall time
TIMELESS = [*Trial.__dataclass_fields__, "epochs", "best_epoch", "train", "test", "gap", "qspec_test", "qfro2_train"]


@pytest.fixture(scope="module")
def task():
    return data.generate(seed=2, num_samples=1000)


@pytest.fixture(scope="module")
def exact_task(task):
    """The task in float64: rotations and spectra that are exact beyond float32's rounding."""
    task = task.to(torch.float64)
    U, _, Vh = torch.linalg.svd(task.R)
    eigenvalues = task.eigenvalues.clone()
    eigenvalues[:, 0], eigenvalues[:, -1] = data.L, data.MU
    return dataclasses.replace(task, R=U @ Vh, eigenvalues=eigenvalues)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A finished run of the command, and its directory."""
    out = tmp_path_factory.mktemp("synthetic") / "run"
    assert cli.main(command(out)) == 0
    return out


def command(out, *more):
    fixed = "synthetic --depths 1 2 4 --hidden 0 8 --seeds 2 --epochs 300 --workers 1 --no-speed --device cpu --out"
    return [*fixed.split(), str(out), *map(str, more)]


def assert_same_table(a, b):
    keys = list(Trial.__dataclass_fields__)
    a, b = (pd.read_parquet(x / "results.parquet").sort_values(keys)[TIMELESS].reset_index(drop=True) for x in (a, b))
    pd.testing.assert_frame_equal(a, b, check_exact=True)


# -- data


def test_data_is_the_task_of_the_paper(task):
    assert task.x.abs().max() <= 5
    assert task.b.abs().max() <= 5
    identity = torch.eye(5).expand(1000, 5, 5)
    torch.testing.assert_close(task.R @ task.R.mT, identity, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.linalg.det(task.R), torch.ones(1000))
    e = task.eigenvalues
    assert torch.all((e >= data.MU - 1e-6) & (e <= data.L + 1e-6))
    torch.testing.assert_close(e[:, 0], torch.ones(1000))
    torch.testing.assert_close(e[:, -1], torch.full((1000,), 0.1))
    torch.testing.assert_close(e[:, 1:-1].sum(1), torch.full((1000,), 3 * 0.1 + 0.9))
    # the spectrum is a function of x and not a constant, or there is nothing to learn
    assert torch.all(e[:, 1:-1].std(0) > 0.05)


def test_y_star_is_the_minimizer(task):
    Q = Spectral(task.eigenvalues.double(), task.R.double())
    gradient = Q.matvec(task.y_star.double()) + task.b.double()
    assert gradient.abs().max() < 1e-4


def test_rotations_are_haar():
    # the entries of a Haar rotation have mean 0 and variance 1/d, and the trace has variance 1
    R = data.generate(seed=5, num_samples=10_000).R
    assert R.mean(0).abs().max() < 0.02
    torch.testing.assert_close(R.var(0), torch.full((5, 5), 0.2), atol=0.012, rtol=0)
    trace = R.diagonal(dim1=1, dim2=2).sum(1)
    assert trace.mean().abs() < 0.05
    assert abs(trace.var() - 1) < 0.06


def test_equal_seeds_give_equal_data(task):
    again, other = data.generate(2, 1000), data.generate(3, 1000)
    assert torch.equal(task.x, again.x)
    assert torch.equal(task.R, again.R)
    assert not torch.equal(task.x, other.x)


def test_subsets_weights_and_orders_are_functions_of_the_seed(task):
    index = task.train_index(100)
    assert index.unique().numel() == data.NUM_TRAIN
    assert torch.equal(index, task.train_index(100))
    assert not torch.equal(index, task.train_index(101))
    (w1, b1), (w2, b2) = task.initial_weights(16, 100)
    assert w1.shape == (16, 10)
    assert w2.shape == (3, 16)
    assert not b1.any()
    assert not b2.any()
    assert w1.abs().max() <= (6 / 26) ** 0.5
    orders = task.minibatch_orders(100, block=3)
    assert torch.equal(orders.sort(1).values, torch.arange(100).expand(256, 100))
    assert not torch.equal(orders[0], orders[1])
    assert not torch.equal(orders, task.minibatch_orders(100, block=4))


@needs_reference
def test_reference_agrees_with_its_own_true_network():
    task = data.load_reference(REFERENCE)
    torch.testing.assert_close(
        F.minimize(Spectral(task.eigenvalues, task.R), task.b), task.y_star, atol=1e-4, rtol=1e-4
    )


def test_more_or_fewer_samples_and_what_varies_with_the_seed():
    task = data.generate(3, 500, num_train=30)
    assert len(task.train_index(100)) == 30
    assert torch.equal(task.minibatch_orders(100, 0).sort().values, torch.arange(30).expand(256, -1))
    assert not torch.equal(task.initial_weights(0, 100)[0][0], task.initial_weights(0, 101)[0][0])
    same = data.generate(3, 500, num_train=30, same_start=True)
    assert torch.equal(same.initial_weights(0, 100)[0][0], same.initial_weights(0, 101)[0][0])
    assert torch.equal(same.minibatch_orders(100, 1), same.minibatch_orders(107, 1))
    # the first seed is the same in both, and the samples vary in both
    assert torch.equal(same.initial_weights(0, 100)[0][0], task.initial_weights(0, 100)[0][0])
    assert not torch.equal(same.train_index(100), same.train_index(101))
    (row,) = ensemble.train_chunk(same, [Trial(8, "adam", "nag", 4, 100, 1e-2)], Training(20, batch_size=15))
    assert row["train"] < row["init_train"]


# -- the two trainers


def test_loss_and_q_error_are_invariant_under_the_rotation(exact_task):
    task = exact_task
    trial = Trial(8, "adam", "nag", 7, 100, 1e-2)
    model = train.make_model(task, trial, Training(0))
    with torch.no_grad():
        losses = distance(model(task.x, task.R, task.b), task.y_star)
        eigenvalues = model.network(task.x)
    together = ensemble.Ensemble(task, [trial], Training(0))
    with torch.no_grad():
        on_true = distance(model.layer(Spectral(task.eigenvalues, task.R), task.b), task.y_star)
    test, true, spectral, frobenius2 = together.evaluate()
    torch.testing.assert_close(test[0], losses, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(true[0], on_true, rtol=1e-9, atol=1e-9)
    difference = Spectral(eigenvalues - task.eigenvalues, task.R).to_dense()
    torch.testing.assert_close(spectral[0], torch.linalg.matrix_norm(difference, 2), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(frobenius2[0], difference.square().sum((1, 2)), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(spectrum_errors(eigenvalues, task.eigenvalues, -1)[0], spectral[0])


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("hidden", [0, 8], ids="h{}".format)
def test_ensemble_trains_each_model_as_if_alone(exact_task, hidden, optimizer, learned, backend):
    training = Training(epochs=20, learn_step_size=learned)
    # algorithms, depths, seeds and learning rates all differ within the chunk
    settings = [("gd", 1, 100, 1e-2), ("nag", 3, 101, 1e-3), ("nag", 6, 100, 5e-3), ("gd", 6, 101, 1e-2)]
    trials = [Trial(hidden, optimizer, *point) for point in settings]
    with use_backend(backend):
        together = ensemble.train_chunk(exact_task, trials, training)
    for trial, row in zip(trials, together, strict=True):
        alone = train.train_one(exact_task, trial, training)
        assert row.keys() == alone.keys()
        for name in row.keys() - {"seconds", "best_epoch"}:
            assert row[name] == (alone[name] if isinstance(row[name], str) else pytest.approx(alone[name], rel=1e-8)), (
                name
            )
        # with k = 1 and a fixed step nothing can improve, and which equal loss is lowest is a matter of rounding
        if trial.num_steps > 1 or learned:
            assert row["best_epoch"] == alone["best_epoch"]
        if learned and trial.num_steps > 1:
            assert row["step_size"] != 1.0


def test_every_schedule_trains_as_if_alone(exact_task):
    axes = {"depths": (1, 5), "hidden": (8,), "optimizers": ("adam",), "learning_rates": (1e-2,)}
    trials = grid.Grid(**axes, seeds=1, epochs=0, algorithms=(*SCHEDULES, MINIMIZER)).trials()
    assert [t.num_steps for t in trials if t.algorithm == MINIMIZER] == [0]
    training = Training(epochs=5)
    names = ["train", "test", "true_train", "true_test", "qfro2_test"]
    for trial, row in zip(trials, ensemble.train_chunk(exact_task, trials, training), strict=True):
        alone = train.train_one(exact_task, trial, training)
        # the minimizer's error on the true Q* is rounding
        assert [row[name] for name in names] == pytest.approx([alone[name] for name in names], rel=1e-8, abs=1e-5), (
            trial
        )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("learned", [False, True], ids=["fixed", "learned"])
def test_captured_epochs_equal_those_of_the_cpu(exact_task, learned):
    training = Training(epochs=10, learn_step_size=learned)
    trials = [Trial(8, "adam", *point) for point in (("gd", 3, 100, 1e-2), ("nag", 6, 101, 1e-3))]
    cpu = ensemble.train_chunk(exact_task, trials, training)
    cuda = ensemble.train_chunk(exact_task.to("cuda"), trials, training)
    names = ["best_epoch", "train", "test", "qfro2_test", "step_size"]
    for a, b in zip(cpu, cuda, strict=True):
        assert [a[name] for name in names] == pytest.approx([b[name] for name in names], rel=1e-8)


def test_training_lowers_the_error_and_keeps_the_best_epoch(task):
    trial = Trial(8, "adam", "nag", 6, 100, 1e-2)
    (row,) = ensemble.train_chunk(task, [trial], Training(epochs=200))
    assert row["train"] < 0.7 * row["init_train"]
    assert row["test"] < 0.8 * row["init_test"]
    assert 1 <= row["best_epoch"] <= 200
    assert row["gap"] == row["test"] - row["train"]
    longer = ensemble.train_chunk(task, [trial], Training(epochs=400))[0]
    assert longer["train"] <= row["train"]


def test_a_model_that_diverges_says_so_and_is_not_chosen(task):
    trials = [Trial(8, "sgd", "gd", 3, 100, rate) for rate in (1e-2, 1e30)]
    rows = ensemble.train_chunk(task, trials, Training(epochs=3))
    alone = train.train_one(task, trials[1], Training(epochs=3))
    # the first epoch already ends in NaN
    assert [np.isnan(row["train"]) for row in (*rows, alone)] == [False, True, True]
    best = grid.select_best(pd.DataFrame(rows))
    assert best["learning_rate"].tolist() == [1e-2]


@pytest.mark.parametrize("backend", [name for name in ("cpu", "eager") if name in available_backends()])
def test_a_model_that_explodes_to_a_number_has_diverged(task, backend):
    """(1 - 100 λ)³ is a million, and finite, in the C++ loop of the ensemble, its torch and the one-model trainer."""
    training, trials = Training(epochs=3, step_size=100.0), [Trial(8, "adam", "gd", k, 100, 1e-2) for k in (3, 0)]
    with use_backend(backend):
        rows = [*ensemble.train_chunk(task, trials, training), train.train_one(task, trials[0], training)]
    assert rows[0]["init_train"] > 1e6
    assert np.isfinite(rows[0]["init_train"])
    for row in (rows[0], rows[2]):
        assert row["best_epoch"] == 0
        assert np.isnan([row[name] for name in ("train", "test", "gap", "test_squared")]).all()
    results = pd.DataFrame(rows[:2])
    assert grid.select_best(results)["num_steps"].tolist() == [0]
    assert written.diverged(results) == " 1 of them diverged and are left out."
    assert written.diverged(results[1:]) == ""


def test_chunks_hold_one_architecture_and_every_model_once():
    trials = grid.PRESETS["medium"].trials()
    assert len(trials) == 1020
    groups = grid.make_chunks(trials, 100)
    assert sorted(trial for chunk in groups for trial in chunk) == trials
    for chunk in groups:
        assert len(chunk) <= 100
        assert len({(t.hidden, t.optimizer) for t in chunk}) == 1
    assert len(grid.PRESETS["paper"].trials()) == 20_400


def test_selection_is_by_training_loss_over_optimizer_and_learning_rate():
    base = {"hidden": 0, "algorithm": "gd", "num_steps": 2, "seed": 100}
    rows = [
        base | {"optimizer": "adam", "learning_rate": 1e-2, "train": 2.0, "test": 1.0},
        base | {"optimizer": "sgd", "learning_rate": 1e-3, "train": 1.0, "test": 9.0},
        base | {"optimizer": "sgd", "learning_rate": 1e-2, "train": float("nan"), "test": 0.0},
        base | {"seed": 101, "optimizer": "adam", "learning_rate": 1e-3, "train": 5.0, "test": 5.0},
    ]
    assert grid.select_best(pd.DataFrame(rows))["test"].tolist() == [9.0, 5.0]


# -- runs


def test_run_writes_table_figures_and_report(small_run):
    results = pd.read_parquet(small_run / "results.parquet")
    assert len(results) == 3 * 2 * 2 * 2
    assert results.notna().all(axis=None)
    nag = results[(results.algorithm == "nag") & (results.num_steps == 4)].train.mean()
    gd = results[(results.algorithm == "gd") & (results.num_steps == 4)].train.mean()
    assert nag < gd
    for figure in small_run.glob("figure*.png"):
        assert figure.stat().st_size > 10_000
        assert figure.read_bytes().startswith(b"\x89PNG")
    assert sorted(figure.stem[:7] for figure in small_run.glob("*.png")) == ["figure3", "figure4", *["figure5"] * 2]
    text = (small_run / "report.md").read_text()
    assert "faster convergence" in text
    assert "| 8 | NAG | 4 |" in text
    assert not (small_run / "checkpoints").exists()
    assert json.loads((small_run / "config.json").read_text())["settings"]["depths"] == [1, 2, 4]


def test_finished_run_trains_nothing_again(small_run, monkeypatch):
    monkeypatch.setattr(runner, "train_chunk", lambda *_, **__: pytest.fail("trained again"))
    assert cli.main(command(small_run)) == 0


def test_interrupted_run_ends_with_the_same_table(small_run, tmp_path, monkeypatch, capsys):
    whole, ensembles = ensemble.Ensemble._train_natively, []

    def interrupted(self, orders):
        whole(self, orders)
        ensembles.append(self)
        # in the second chunk, after its second block of epochs and before they are counted
        if len({id(one) for one in ensembles}) == 2 and self.epoch:
            raise KeyboardInterrupt

    out = tmp_path / "run"
    monkeypatch.setattr(ensemble.Ensemble, "_train_natively", interrupted)
    assert cli.main(command(out)) == 130
    assert "continues" in capsys.readouterr().err
    assert len(pd.read_parquet(out / "results.parquet")) == len(ensembles[0].trials)
    assert len(list((out / "checkpoints").iterdir())) == 1

    resumed_at = []
    load = ensemble.Ensemble.load

    def recorded(self, file):
        load(self, file)
        resumed_at.append(self.epoch)

    monkeypatch.setattr(ensemble.Ensemble, "load", recorded)
    monkeypatch.setattr(ensemble.Ensemble, "_train_natively", whole)
    assert cli.main(command(out)) == 0
    assert resumed_at == [256]
    assert_same_table(out, small_run)


def test_killed_run_with_workers_ends_with_the_same_table(small_run, tmp_path):
    out = tmp_path / "run"
    arguments = command(out, "--workers", 2)
    code = f"import sys; from unrolled_kernels.experiments.cli import main; sys.exit(main({arguments!r}))"
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 300
    while not (out / "results.parquet").exists():
        assert run.poll() is None or (out / "results.parquet").exists(), "the run ended without results"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    assert len(pd.read_parquet(out / "results.parquet")) > 0
    assert cli.main(command(out)) == 0
    assert_same_table(out, small_run)


def test_killed_training_continues_exactly(task, tmp_path):
    file, training = tmp_path / "state.safetensors", Training(epochs=1024)
    trials = [Trial(8, "adam", "nag", k, 100, 1e-2) for k in (2, 5)]
    # torch ops are slow enough to be killed in between
    code = f"""
from pathlib import Path
from unrolled_kernels import use_backend
from unrolled_kernels.experiments.synthetic import data, ensemble
from unrolled_kernels.experiments.synthetic.grid import Training, Trial
task, file = data.generate(2, 1000), Path({str(file)!r})
with use_backend("eager"):
    ensemble.train_chunk(task, {trials}, {training}, checkpoint_file=file, checkpoint_seconds=0)
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 300
    while not file.exists():
        assert run.poll() is None, "the training ended without a checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    counts = []
    with use_backend("eager"):
        resumed = ensemble.train_chunk(task, trials, training, checkpoint_file=file, on_epochs=counts.append)
        whole = ensemble.train_chunk(task, trials, training)
    assert 0 < counts[0] < 1024
    names = [*TIMELESS, "qfro2_test"]
    pd.testing.assert_frame_equal(pd.DataFrame(resumed)[names], pd.DataFrame(whole)[names], check_exact=True)


def test_shards_end_with_the_table_of_one_process(small_run, tmp_path):
    out = tmp_path / "run"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    module = ["-m", "unrolled_kernels.experiments.cli"]
    run = subprocess.run([*torchrun, *module, *command(out)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "rank 0 of 2, models 12/12" in run.stderr
    assert [file.name for file in out.glob("*.parquet")] == ["results.parquet"]
    assert_same_table(out, small_run)


def test_part_of_a_killed_shard_is_taken_over(tmp_path):
    RunDirectory(tmp_path, {}).append([{"train": 1.0}])
    RunDirectory(tmp_path, {}, part="rank1").append([{"train": 2.0}])
    assert RunDirectory(tmp_path, {}).results()["train"].tolist() == [1.0, 2.0]
    assert pd.read_parquet(tmp_path / "results.parquet")["train"].tolist() == [1.0, 2.0]
    assert not (tmp_path / "results-rank1.parquet").exists()


def test_checkpoint_holds_the_whole_state(task, tmp_path):
    trials = [Trial(8, "adam", "nag", k, 100, 1e-2) for k in (2, 5)]
    training = Training(epochs=10)
    whole, first = ensemble.Ensemble(task, trials, training), ensemble.Ensemble(task, trials, training)
    orders = whole.minibatch_orders(0)
    whole.train(orders[:10])
    first.train(orders[:4])
    checkpoint.write(tmp_path / "state.safetensors", fingerprint(trials), *first.state())
    second = ensemble.Ensemble(task, trials, training)
    second.load(tmp_path / "state.safetensors")
    second.train(orders[second.epoch : 10])
    for name in ("theta", "first_moment", "second_moment", "best_theta", "best_loss", "best_epoch"):
        assert torch.equal(getattr(second, name), getattr(whole, name)), name


def test_single_trainer_runs(tmp_path):
    few = ["--depths", 2, "--hidden", 0, "--seeds", 1, "--epochs", 5, "--optimizers", "sgd"]
    assert cli.main(command(tmp_path / "run", *few, "--trainer", "single", "--learn-step-size")) == 0
    results = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert results.algorithm.tolist() == ["gd", "nag"]
    assert (results.step_size != 1).all()


def test_speed_of_the_layer_is_reported(task):
    from unrolled_kernels.experiments.synthetic import speed

    threads = torch.get_num_threads()
    rows = speed.measure(task, rounds=1)
    assert threads == torch.get_num_threads()
    assert all(row["eager_us"] > 0 and row["fused_us"] > 0 for row in rows)
    # many models at once are far cheaper than one by one, whatever the backend
    assert rows[-2]["eager_us"] > 4 * rows[-1]["eager_us"]
    assert report.speed_table(rows).count("×") == len(rows)


def test_figures_of_one_seed_and_one_algorithm(tmp_path):
    row = {"hidden": 4, "algorithm": "gd", "seed": 100, "qfro2_test": 0.1, "gap": -0.1, "true_train": 0, "true_test": 0}
    rows = [row | {"num_steps": k, "train": 1 / k} for k in (1, 2, 3)]
    assert len(figures.draw(pd.DataFrame(rows), tmp_path)) == 4


# -- statistics and claims

DEPTHS = (1, 2, 3, 4, 6, 8, 10, 14, 20, 30)


def table_after_theory(gap_of, seeds=range(100, 106), sampling=3.0):
    """Rows whose errors fall as Cvg(k) and whose gap is ``gap_of(hidden, algorithm, k)``.

    A seed moves the gap of all of its models, with the trained network and with Q*, by up to ``sampling``.
    """
    rows = []
    moved = dict(zip(seeds, np.random.default_rng(0).uniform(-sampling, sampling, len(seeds)), strict=True))
    for hidden, algorithm, k, seed in itertools.product((0, 16, 32), ("gd", "nag"), DEPTHS, seeds):
        cvg = convergence_rate(algorithm, k, 1.0, data.MU).item()
        row = {"hidden": hidden, "algorithm": algorithm, "num_steps": k, "seed": seed, "step_size": 1.0}
        row |= {"train": cvg, "test": cvg, "test_squared": 0.1 + cvg**2, "qfro2_test": 0.01 + cvg**1.5}
        row |= {"true_train": cvg, "true_test": cvg + moved[seed]}
        rows.append(row | {"gap": gap_of(hidden, algorithm, k) + moved[seed]})
    return pd.DataFrame(rows)


def test_claims_hold_where_the_run_follows_the_theory():
    def gap(hidden, algorithm, k):
        return predicted_gap(algorithm, k, REGIME_OF_HIDDEN[hidden], 1.0, data.MU).item()

    best = table_after_theory(gap)
    checked = claims.check(best)
    # per hidden size: Figure 3; Figure 4 twice; Figure 5's trend twice, order and law; and the two lemmas
    assert len(checked) == 3 * (1 + 2 + 4) + 2
    assert [claim for claim in checked if claim.verdict != "holds"] == []
    # the control variate has found what the seeds' spread of ±3 hides
    c, explained = claims.law(best[best["hidden"] == 16], "about_right")
    assert tuple(c) == pytest.approx((1, 1, 1), abs=1e-9)
    assert explained.low == pytest.approx(1, abs=1e-9)
    assert claims.table(checked).count("\n") == len(checked) + 1


def test_claims_say_where_they_do_not_hold():
    best = table_after_theory(lambda hidden, algorithm, k: -float(k))
    best["train"] = 1.0
    best["qfro2_test"] = 0.1
    checked = claims.check(best)
    assert {claim.verdict for claim in checked if claim.figure in "34"} == {"does not hold"}
    # a gap that falls with k is like neither prediction; that like Stab is the farther one
    trends = {
        claim.case: claim.verdict for claim in checked if "moves with k" in claim.claim and claim.algorithm == "NAG"
    }
    assert trends["0, under-parameterized"] == "does not hold"


def test_claims_are_about_the_papers_algorithms():
    rows = table_after_theory(lambda hidden, algorithm, k: 0.1 * k)
    others = rows.assign(algorithm="chebyshev")
    assert claims.check(pd.concat([rows, others])) == claims.check(rows)
    assert claims.check(others) == []


def test_law_of_two_algorithms_predicts_another():
    def gap(hidden, algorithm, k):
        return 0.2 * beyond.prediction(algorithm, [k])[0]

    rows = table_after_theory(gap)
    rows = rows[rows["hidden"] == 16]
    exact = rows[rows["algorithm"] == "nag"].copy()
    exact["gap"] += [gap(16, "fista", k) - gap(16, "nag", k) for k in exact["num_steps"]]
    rows = pd.concat([rows, exact.assign(algorithm="fista"), exact.assign(algorithm="minimizer", num_steps=0)])
    c, fits = beyond.law(rows)
    assert c == pytest.approx(0.2, rel=1e-6)
    assert sorted(fits) == ["fista", "gd", "nag"]
    for rank, explained in fits.values():
        assert (rank.value, explained) == pytest.approx((1, 1), abs=1e-6)
    text = beyond.table(rows)
    assert "| FISTA |" in text
    assert "| minimizer, k = ∞ |" in text


def test_claims_are_undecided_where_seeds_disagree():
    best = table_after_theory(lambda hidden, algorithm, k: 0.0)
    best["gap"] += np.random.default_rng(1).normal(0, 1, len(best))
    # NAG trains to a lower error in five seeds of six
    best.loc[(best["algorithm"] == "nag") & (best["seed"] == 100), "train"] = 9.0
    checked = claims.check(best)
    assert "undecided" in {claim.verdict for claim in checked if claim.figure == "5"}
    assert {claim.verdict for claim in checked if claim.figure == "3"} == {"undecided"}


def test_advice_fitted_to_one_table_and_chosen_for_another():
    def gap(hidden, algorithm, k):
        return predicted_gap(algorithm, k, REGIME_OF_HIDDEN[hidden], 1.0, data.MU).item()

    rows = table_after_theory(gap)
    cvg = [convergence_rate(a, k, 1.0, data.MU).item() for a, k in zip(rows.algorithm, rows.num_steps, strict=True)]
    rows["true_test"], rows["true_train"] = 40 * np.array(cvg), 40 * np.array(cvg)
    rows["gap"] = [gap(*point) for point in zip(rows.hidden, rows.algorithm, rows.num_steps, strict=True)]
    rows["test"] = rows["true_test"] + rows["gap"]
    for hidden, regime in REGIME_OF_HIDDEN.items():
        g = choice.gap_factor(rows[rows["hidden"] == hidden], regime)
        assert g == pytest.approx(1 / (40 * data.MU**2), rel=1e-6)
    for row in choice.validate(rows, rows):
        # within the tolerance of the best, and no worse than the deepest GD
        assert row["regrets"]["advice"] <= row["smallest"]
        assert row["regrets"]["advice"] <= row["regrets"]["gd"]
    # where the gap is large, all steps are too many
    over = choice.validate(rows, rows)[2]
    assert over["choices"]["advice"][1] < 30
    assert over["regrets"]["advice"] < over["regrets"]["nag"]
    # what needs fewer steps is taken where it was trained, and within the budget
    fast = rows[rows["algorithm"] == "nag"].assign(algorithm="chebyshev", test=lambda x: x["test"] / 2)
    about_right = choice.validate(rows, pd.concat([rows, fast]), budgets=(6,))[1]
    assert about_right["choices"]["advice"] == about_right["best"] == ("chebyshev", 6)
    assert about_right["choices"]["advice, GD and NAG"][0] in ("gd", "nag")
    assert about_right["choices"]["nag"] == ("nag", 6)
    # a quarter of the samples: twice the gap, and fewer steps
    assert choice.validate(rows, rows, num_train=25)[2]["g"] == pytest.approx(2 * over["g"])


def test_network_at_other_depths_is_the_kept_one(task):
    trials = [Trial(hidden, "adam", algorithm, 3, 100, 1e-2) for hidden in (0, 8) for algorithm in ("gd", "nag")]
    rows = [ensemble.train_chunk(task, [trial], Training(20))[0] for trial in trials]
    found = transfer.at_other_depths(task, pd.DataFrame(rows), (1, 3, 9))
    trained_for = found[found["run_steps"] == 3]
    assert trained_for["test"].tolist() == pytest.approx([row["test"] for row in rows], rel=1e-5)
    for row, (_, of_model) in zip(rows, found.groupby(["hidden", "algorithm"], sort=False), strict=True):
        model = train.make_model(task, Trial(row["hidden"], "adam", row["algorithm"], 9, 100, 1e-2), Training(0))
        torch.nn.utils.vector_to_parameters(torch.tensor(row["weights"]), model.network.parameters())
        with torch.no_grad():
            test = distance(model(task.x, task.R, task.b), task.y_star).mean().item()
        assert of_model["test"].tolist()[-1] == pytest.approx(test, rel=1e-5)


def test_statistics_against_known_values():
    values = np.array([[3.0, 1.0, 2.0], [1.0, 2.0, 2.0]])
    np.testing.assert_allclose(statistics.rank_correlation(values, [30, 10, 20]), [1, -np.sqrt(3) / 2])
    frame = pd.DataFrame(values.T)
    expected = [frame[i].corr(pd.Series([30, 10, 20]), method="spearman") for i in (0, 1)]
    np.testing.assert_allclose(statistics.rank_correlation(values, [30, 10, 20]), expected)
    k = np.array([2, 3, 5, 8, 13, 20])
    rates = np.array([0.5, 0.8, 0.9])[:, None]
    fitted = statistics.rate_above_floor(np.array([[0.0], [0.1], [0.02]]) + 3 * rates**k, k)
    np.testing.assert_allclose(fitted, rates[:, 0], atol=2.6e-3)
    # nothing falls: no rate is made up
    assert statistics.factor(np.array([2.0, 4.0]), np.array([1.0, 2.0])) == (2.0, 1.0)
    mean = statistics.resampled(np.arange(100.0), lambda x: x.mean(1))
    assert mean.value == 49.5
    # the standard error of the mean is 2.89
    assert (mean.high - mean.low) / 4 == pytest.approx(2.89, rel=0.1)
    assert str(statistics.Interval(1, 0.5, 2)) == "1.00 [0.50, 2.00]"


def test_published_numbers_are_those_of_the_tables():
    spec = importlib.util.spec_from_file_location("publish", ROOT / "docs" / "synthetic" / "publish.py")
    publish = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(publish)
    text = publish.sections()
    for page in (file.read_text(encoding="utf-8") for file in publish.PAGES):
        assert "<!-- generated: " in page
        assert publish.report.filled(page, text) == page
        for figure in re.findall(r"\]\((\S+\.png)\)", page):
            assert (publish.FOLDER / figure).is_file()
    # one row a model, as its run wrote it
    for name in ("authors", "second", "map", "beyond", "chebyshev", "learn_to_optimize"):
        table = publish.read(name)
        assert not table.duplicated(publish.identity(table)).any()
        np.testing.assert_allclose(table["gap"], table["test"] - table["train"], atol=1e-4)


# -- refusals


def test_directory_of_another_run_is_refused(small_run, capsys):
    assert cli.main(command(small_run, "--epochs", 7, "--seed", 3)) == 1
    message = capsys.readouterr().err
    assert str(small_run) in message
    assert "epochs (there 300, asked 7)" in message
    assert "data (there generated from seed 2, asked generated from seed 3)" in message
    assert "depths" not in message


@pytest.mark.parametrize("damage", ["truncated", "another kind"])
@pytest.mark.parametrize("name", ["results.parquet", "config.json"])
def test_damaged_run_names_the_file(small_run, tmp_path, name, damage, capsys):
    out = tmp_path / "run"
    out.mkdir()
    for file in ("results.parquet", "config.json"):
        content = (small_run / file).read_bytes()
        if file == name:
            content = content[: len(content) // 2] if damage == "truncated" else b"\x89PNG"
        (out / file).write_bytes(content)
    assert cli.main(command(out)) == 1
    message = capsys.readouterr().err
    assert str(out / name) in message
    assert "truncated, or of another kind" in message


def test_damaged_or_foreign_checkpoint_names_the_file(task, tmp_path):
    file = tmp_path / "state.safetensors"
    one, other = ([Trial(0, "adam", "gd", k, 100, 1e-2)] for k in (2, 3))
    checkpoint.write(file, fingerprint(one), *ensemble.Ensemble(task, one, Training(5)).state())
    with pytest.raises(ValueError, match=r"state\.safetensors: a checkpoint of model \w+, expected"):
        ensemble.train_chunk(task, other, Training(5), checkpoint_file=file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match=r"state\.safetensors: not a readable checkpoint \(truncated"):
        ensemble.train_chunk(task, one, Training(5), checkpoint_file=file)


def test_damaged_reference_names_the_file(tmp_path, capsys):
    out = tmp_path / "run"
    assert cli.main(command(out, "--reference", tmp_path)) == 1
    assert f"{tmp_path / 'reference.npz'}: no such file" in capsys.readouterr().err
    for content, expected in (
        (b"", "not a readable"),
        (b"PK\x03\x04 but no more", "not a readable"),
        (b"text", "not a"),
    ):
        (tmp_path / "reference.npz").write_bytes(content)
        with pytest.raises(ValueError, match=rf"reference\.npz: {expected}"):
            data.load_reference(tmp_path)
    np.savez(tmp_path / "reference.npz", x=np.zeros((3, 10), np.float32), R=np.zeros((3, 4, 4), np.float32))
    with pytest.raises(ValueError, match=r"reference\.npz: expected an array R of shape \[N, 5, 5\], got \(3, 4, 4\)"):
        data.load_reference(tmp_path)
    assert not out.exists()


@needs_reference
def test_reference_refuses_what_it_has_no_weights_for(tmp_path, capsys):
    assert cli.main(command(tmp_path / "run", "--reference", REFERENCE)) == 1
    assert "no initial weights for hidden size 8; there are [0, 16, 32]" in capsys.readouterr().err
    assert cli.main(command(tmp_path / "run", "--reference", REFERENCE, "--hidden", 0, "--seeds", 21)) == 1
    assert "no training indices for seed 120" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--depths", "0"], "argument --depths: expected an integer > 0, got '0'"),
        (["--hidden", "-1"], "argument --hidden: expected an integer ≥ 0, got '-1'"),
        (["--learning-rates", "nan"], "argument --learning-rates: expected a number > 0, got 'nan'"),
        (["--epochs", "1.5"], "argument --epochs: expected an integer > 0, got '1.5'"),
        (["--preset", "huge"], "argument --preset: invalid choice: 'huge'"),
    ],
    ids=["depths", "hidden", "learning-rates", "epochs", "preset"],
)
def test_bad_option_is_refused(option, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["synthetic", *option])
    assert message in capsys.readouterr().err


def test_bad_device_and_backend_are_refused(tmp_path, capsys):
    for name in ("tpu", "meta", "nonsense"):
        assert cli.main(command(tmp_path / "run", "--device", name)) == 1
        assert f"--device: expected auto, cpu, cuda or cuda:N, got '{name}'" in capsys.readouterr().err
    assert cli.main(command(tmp_path / "run", "--device", "cuda:77")) == 1
    assert "'cuda:77' is not there" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(command(tmp_path / "run", "--backend", "cuda")) == 1
        assert "backend: 'cuda'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_failed_write_leaves_the_old_file(tmp_path):
    file = tmp_path / "results.txt"
    file.write_text("old")

    def write():
        with atomic_path(file) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        write()
    assert file.read_text() == "old"
    assert [x.name for x in tmp_path.iterdir()] == ["results.txt"]


def test_an_interrupt_at_any_moment_of_a_write_leaves_nothing(tmp_path):
    def interrupted(moment):
        def trace(*_):
            nonlocal moment
            moment -= 1
            if moment == 0:
                raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            with atomic_path(tmp_path / "results.txt") as temporary:
                temporary.write_text("whole")
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    moment = 1
    while interrupted(moment):
        assert not list(tmp_path.glob(".*")), moment
        moment += 1
    assert moment > 20
    assert (tmp_path / "results.txt").read_text() == "whole"


def test_results_survive_reopening(tmp_path):
    settings = {"epochs": 3, "depths": (1, 2)}
    RunDirectory(tmp_path, settings).append([{"train": 1.0}])
    again = RunDirectory(tmp_path, settings)
    again.append([{"train": 2.0}])
    assert pd.read_parquet(tmp_path / "results.parquet")["train"].tolist() == [1.0, 2.0]


# -- the authors' numbers


@needs_reference
def test_golden_at_the_start():
    # all 60 configurations before training: data, signs, initial weights and both layers
    table = golden.load_golden(REFERENCE)
    assert len(table) == 60
    task = data.load_reference(REFERENCE)
    rows = []
    for chunk in grid.make_chunks(golden.golden_trials(table), 100):
        rows += ensemble.train_chunk(task, chunk, Training(0))
    both = table.merge(pd.DataFrame(rows), on=golden.KEYS, suffixes=("", "_got"), validate="one_to_one")
    np.testing.assert_allclose(both.init_train_got, both.init_train, rtol=1e-4)
    np.testing.assert_allclose(both.init_test_got, both.init_test, rtol=1e-4)


@needs_reference
@pytest.mark.parametrize(
    ("trainer", "algorithm", "hidden", "depths", "rate"),
    [("ensemble", "nag", 16, [1, 3, 5, 10], 1e-3), ("single", "gd", 0, [3], 1e-2)],
    ids=["ensemble", "single"],
)
def test_golden_after_training(trainer, algorithm, hidden, depths, rate):
    table = golden.load_golden(REFERENCE)
    table = table[(table.algorithm == algorithm) & (table.hidden == hidden) & (table.learning_rate == rate)]
    table = table[table.num_steps.isin(depths)]
    trials, training = golden.golden_trials(table), Training(golden.EPOCHS)
    task = data.load_reference(REFERENCE)
    if trainer == "ensemble":
        rows = ensemble.train_chunk(task, trials, training)
    else:
        rows = [train.train_one(task, trial, training) for trial in trials]
    errors = golden.compare(table, pd.DataFrame(rows))
    assert len(errors) == len(depths)
    assert errors["passed"].all(), errors.to_string()
