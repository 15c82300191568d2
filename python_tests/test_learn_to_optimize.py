"""Learning to optimize: its layers' training, its runs and what they refuse, and the claims of its report."""

import itertools
import math

import pandas as pd
import pytest
import torch

from unrolled_kernels import Spectral, UnrolledRNN, available_backends, use_backend
from unrolled_kernels import functional as F
from unrolled_kernels.experiments import cli
from unrolled_kernels.experiments.learn_to_optimize import claims, layers
from unrolled_kernels.experiments.learn_to_optimize import command as study
from unrolled_kernels.experiments.learn_to_optimize.grid import ALGORITHMS, Trial
from unrolled_kernels.experiments.learn_to_optimize.layers import make_trainable_layer, train_natively, train_one
from unrolled_kernels.experiments.synthetic import data
from unrolled_kernels.experiments.synthetic.data import MU, L
from unrolled_kernels.experiments.synthetic.evaluation import distance
from unrolled_kernels.experiments.synthetic.grid import Training, select_best
from unrolled_kernels.testing import assert_as_close_as_eager

needs_op = pytest.mark.skipif("cpu" not in available_backends(), reason="the extension is not built")
TRAINING = Training(epochs=5, learn_step_size=True)
DEPTHS, SEEDS = (1, 3), (100, 101)


@pytest.fixture(scope="module")
def task():
    return data.generate(seed=2, num_samples=500)


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("learn-to-optimize") / "run"
    assert cli.main(command(out)) == 0
    return out


def command(out, *more):
    fixed = "learn-to-optimize --depths 1 3 --seeds 2 --epochs 5 --learning-rates 1e-2 --workers 1 --device"
    return [*fixed.split(), "cpu", "--out", str(out), *map(str, more)]


def table(train, gap):
    """A made-up table: the training error and the gap of each algorithm at each k, equal for both seeds."""
    columns = ["algorithm", "num_steps", "seed", "train", "gap", "test"]
    points = itertools.product(ALGORITHMS, DEPTHS, SEEDS)
    rows = [(*point, train[point[:2]], gap[point[:2]], train[point[:2]] + gap[point[:2]]) for point in points]
    return pd.DataFrame(rows, columns=columns)


# -- training


@needs_op
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fused_layers_train_as_eager_ones(task, algorithm):
    def losses(backend, dtype):
        with use_backend(backend):
            row = train_one(task.to(dtype), Trial(algorithm, 4, 100, 1e-2), TRAINING)
        return torch.tensor([row["train"], row["test"]], dtype=dtype)

    # in float64: float32's rounding may decide which units are active
    runs = (("cpu", torch.float64), ("eager", torch.float64), ("eager", torch.float32))
    assert_as_close_as_eager(*(losses(*run) for run in runs), what=algorithm)


@needs_op
@pytest.mark.parametrize("algorithms", [("gd", "nag"), ("rnn",)], ids="-".join)
def test_op_trains_each_layer_as_torch_does(task, algorithms):
    # the last minibatch of an epoch is smaller, and fills no vector
    training = Training(epochs=5, learn_step_size=True, batch_size=30)
    trials = [Trial(*point) for point in itertools.product(algorithms, (1, 4, 9), (101,), (1e-2, 1e-3))]

    def losses(rows, dtype):
        assert [row["best_epoch"] for row in rows] == [5] * len(trials)
        return torch.tensor([[row["train"], row["test"]] for row in rows], dtype=dtype)

    def trained(dtype, backend):
        with use_backend(backend):
            return losses([train_one(task.to(dtype), trial, training) for trial in trials], dtype)

    exact = trained(torch.float64, "cpu")
    # the energies' eigenvectors are rotations to float32 only
    actual = losses(train_natively(task.to(torch.float64), trials, training), torch.float64)
    torch.testing.assert_close(actual, exact, rtol=1e-9, atol=0)
    actual = losses(train_natively(task, trials, training), torch.float32)
    assert_as_close_as_eager(actual, exact, trained(torch.float32, "eager"), what="losses")


@needs_op
@pytest.mark.parametrize("algorithm", ["nag", "rnn"])
def test_threads_and_company_change_nothing(task, algorithm):
    trials = [Trial(algorithm, k, 100, rate) for k in (2, 7) for rate in (1e-2, 1e-3)]
    columns = [name for name in train_one(task, trials[0], TRAINING) if name != "seconds"]
    take = lambda rows: [[str(row[name]) for name in columns] for row in rows]
    alone = [row for trial in trials for row in train_natively(task, [trial], TRAINING)]
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = train_natively(task, trials, TRAINING)
    finally:
        torch.set_num_threads(threads)
    assert take(together) == take(alone)


@needs_op
def test_training_goes_on_in_the_next_block_of_epochs(task):
    # an op call runs at most 256 epochs, and Adam counts on
    trial, training = Trial("gd", 3, 100, 1e-3), Training(epochs=300, learn_step_size=True)
    (row,) = train_natively(task.to(torch.float64), [trial], training)
    assert row["step_size"] == pytest.approx(train_one(task.to(torch.float64), trial, training)["step_size"], rel=1e-9)


@needs_op
def test_op_refuses_what_it_would_misread(task, monkeypatch):
    trials = [Trial("rnn", 2, 100, 1e-2)]
    monkeypatch.setattr(layers, "HIDDEN_DIMS", (20, 20))
    monkeypatch.setattr(layers, "make_trainable_layer", lambda trial: UnrolledRNN(2, 5, (20, 20, 20)))
    with pytest.raises(RuntimeError, match="theta: not of the shape"):
        train_natively(task, trials, TRAINING)
    monkeypatch.setattr(layers, "HIDDEN_DIMS", (20, 200))
    with pytest.raises(RuntimeError, match="hidden_dims: out of range"):
        train_natively(task, trials, TRAINING)


@pytest.mark.parametrize("algorithm", ["gd", "nag"])
def test_losses_are_those_of_the_reported_step_size(task, algorithm):
    exact = task.to(torch.float64)
    trial = Trial(algorithm, 3, 101, 1e-2)
    row = train_one(exact, trial, TRAINING)
    Q, phi = Spectral(exact.eigenvalues, exact.R).to_dense(), row["step_size"]
    y = F.gradient_descent(Q, exact.b, phi, 3) if algorithm == "gd" else F.nesterov(Q, exact.b, phi, MU, 3)
    losses = distance(y, exact.y_star)
    assert row["train"] == pytest.approx(losses[exact.train_index(101)].mean().item(), rel=1e-12)
    assert row["test"] == pytest.approx(losses.mean().item(), rel=1e-12)
    # three steps fall short of the minimizer: longer ones help
    assert 1 < phi < {"gd": 2 / (MU + L), "nag": 4 / (MU + 3 * L)}[algorithm]


def test_rnn_starts_near_gd_and_no_unit_is_dead(task):
    layer = make_trainable_layer(Trial("rnn", 3, 100, 1e-2)).to(torch.float64)
    exact = task.to(torch.float64)
    Q = Spectral(exact.eigenvalues, exact.R).to_dense()
    y = layer(Q, exact.b)
    plain = F.gradient_descent(Q, exact.b, 1.0, 3)
    assert distance(y, plain).mean() < 0.5 * distance(plain, exact.y_star).mean()
    distance(y, exact.y_star).mean().backward()
    for weight in (layer.W1, layer.W2, *layer.W):
        assert weight.grad.abs().amax(1).min() > 0
    assert layer.V.grad.abs().amax(0).min() > 0


def test_start_depends_on_the_seed_alone():
    def start(seed):
        return torch.cat([p.flatten() for p in make_trainable_layer(Trial("rnn", 3, seed, 1e-2)).parameters()])

    state = torch.get_rng_state()
    first = start(100)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    assert torch.equal(start(100), first)
    assert not torch.equal(start(101), first)


@pytest.mark.parametrize(
    "train",
    [
        pytest.param(lambda task, trial: train_one(task, trial, TRAINING), id="torch"),
        pytest.param(lambda task, trial: train_natively(task, [trial], TRAINING)[0], id="op", marks=needs_op),
    ],
)
def test_diverged_layer_is_not_chosen(task, train):
    # the last explodes to a number: in some 10 Adam steps of 10 its weights are 100
    rows = [train(task, Trial("rnn", 3, 100, rate)) for rate in (1e-2, 1e30, 10.0)]
    for row in rows[1:]:
        assert row["best_epoch"] == 0
        assert all(math.isnan(row[column]) for column in ("train", "test", "gap"))
    assert select_best(pd.DataFrame(rows))["learning_rate"].tolist() == [1e-2]


# -- runs


def test_run_writes_table_figure_and_report(small_run):
    results = pd.read_parquet(small_run / "results.parquet")
    points = set(results[["algorithm", "num_steps", "seed"]].itertuples(index=False, name=None))
    assert points == set(itertools.product(ALGORITHMS, DEPTHS, SEEDS))
    assert (results["gap"] == results["test"] - results["train"]).all()
    assert results["best_epoch"].between(1, 5).all()
    assert (results["step_size"].isna() == (results["algorithm"] == "rnn")).all()
    assert (small_run / "figure6.png").read_bytes()[:4] == b"\x89PNG"
    text = (small_run / "report.md").read_text()
    assert "figure6.png" in text
    assert "| RNN | 3 |" in text
    assert "| 6 | Q and b given | RNN against GD | represents better: lower training error |" in text


def test_interrupted_run_ends_with_the_same_table(small_run, tmp_path, monkeypatch):
    started, train = [], study.Setup.train

    def interrupted(setup, task, job, on_epochs):
        started.append(job.trials)
        if len(started) == 3:
            raise KeyboardInterrupt
        return train(setup, task, job, on_epochs)

    out = tmp_path / "run"
    monkeypatch.setattr(study.Setup, "train", interrupted)
    assert cli.main(command(out)) == 130
    assert len(pd.read_parquet(out / "results.parquet")) == len(started[0]) + len(started[1])
    assert cli.main(command(out)) == 0
    # what was interrupted is trained again, what came before is not
    assert started[3] == started[2]
    assert sum(map(len, started)) == 12 + len(started[2])

    keys = ["algorithm", "num_steps", "seed"]
    tables = (pd.read_parquet(path / "results.parquet").sort_values(keys) for path in (out, small_run))
    again, whole = (table.drop(columns="seconds").reset_index(drop=True) for table in tables)
    pd.testing.assert_frame_equal(again, whole, check_exact=True)


def test_directory_of_the_study_is_refused(small_run, capsys):
    assert cli.main(["synthetic", *command(small_run)[1:]]) == 1
    assert "study (there learn-to-optimize, asked synthetic)" in capsys.readouterr().err


# -- what is said of a table


def test_claims_where_the_finding_holds():
    train = {(name, k): value / k for name, value in zip(ALGORITHMS, (3, 2, 1), strict=True) for k in DEPTHS}
    gap = {(name, k): value for name, value in zip(ALGORITHMS, (0.1, 0.2, 5), strict=True) for k in DEPTHS}
    checked = claims.check(table(train, gap))
    assert [claim.algorithm for claim in checked] == ["RNN against GD"] * 3 + ["RNN against NAG"] * 3
    assert {claim.measured for claim in checked} == {"in 100% of 4 pairs [100%, 100%], in most seeds at every k"}
    assert {claim.verdict for claim in checked} == {"holds"}


def test_claims_where_it_does_not():
    train = {(name, k): 1.0 for name in ALGORITHMS for k in DEPTHS} | {("rnn", 1): 2.0, ("rnn", 3): 0.5}
    gap = {(name, k): 1.0 for name in ALGORITHMS for k in DEPTHS} | {("rnn", 1): 0.0, ("rnn", 3): 0.5}
    represents, generalizes, tests = claims.check(table(train, gap))[:3]
    assert represents.measured == "in 50% of 4 pairs [50%, 50%], in most seeds at k = 3"
    assert generalizes.measured == "in 0% of 4 pairs [0%, 0%], in most seeds at no k"
    assert {claim.verdict for claim in (represents, generalizes, tests)} == {"does not hold"}


def test_pairs_are_of_one_seed():
    # one bad seed at k = 1 outweighs the others in a mean, and is one of four pairs
    train = {(name, k): 1.0 for name in ALGORITHMS for k in DEPTHS}
    best = table(train, train)
    best.loc[best["algorithm"] == "rnn", "train"] = [0.9, 9.0, 0.9, 0.9]
    represents = claims.check(best)[0]
    assert represents.measured.startswith("in 75% of 4 pairs [50%, 100%], in most seeds at k = 3")
    assert represents.verdict == "undecided"


def test_figure_and_claims_of_a_table_without_rnn():
    ones = {(name, k): 1.0 for name in ALGORITHMS for k in DEPTHS}
    best = table(ones, ones)
    best = best[best["algorithm"] != "rnn"]
    assert claims.check(best) == []
    assert len(study.figure6(best).axes) == 2
