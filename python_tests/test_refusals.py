"""Bad input is refused before any kernel starts, by a message that names the argument, what was got and expected."""

import asyncio
import fractions
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels import schedules

Q, b = torch.eye(4).expand(3, 4, 4), torch.ones(3, 4)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: F.gradient_descent(Q[..., :3], b, 1.0, 2),
            ValueError,
            r"Q: expected square matrices .* got shape \[3, 4, 3\]",
        ),
        (
            lambda: F.gradient_descent(b[0], b, 1.0, 2),
            ValueError,
            r"Q: expected square .* wrap a diagonal in unrolled_kernels.Diagonal",
        ),
        (
            lambda: F.gradient_descent([1.0], b, 1.0, 2),
            TypeError,
            "Q: expected a tensor, Diagonal, Spectral or Tikhonov, got list",
        ),
        (
            lambda: F.gradient_descent(Q, b[:, :3], 1.0, 2),
            ValueError,
            r"b: expected last dimension d = 4 .* got shape \[3, 3\]",
        ),
        (
            lambda: F.gradient_descent(Q, torch.ones(2, 4), 1.0, 2),
            ValueError,
            r"Q, b: batch dimensions do not broadcast: Q is of shape \[3, 4, 4\], b has shape \[2, 4\]",
        ),
        (lambda: F.gradient_descent(Q, torch.tensor(1.0), 1.0, 2), ValueError, "b: expected .*scalar"),
        (lambda: F.gradient_descent(Q, None, 1.0, 2), TypeError, "b: expected a tensor, got NoneType"),
        (
            lambda: F.gradient_descent(Q, b.double(), 1.0, 2),
            ValueError,
            "dtype: Q has torch.float32 but b has torch.float64",
        ),
        (lambda: F.gradient_descent(Q, b.to("meta"), 1.0, 2), ValueError, "device: Q is on cpu but b is on meta"),
        (
            lambda: F.gradient_descent(Q, b, torch.tensor(0.1, device="meta"), 2),
            ValueError,
            "device: b is on cpu but step_size is on meta; move one of them",
        ),
        (
            lambda: F.nesterov(Q, b, 1.0, torch.tensor(0.1, device="meta"), 2),
            ValueError,
            "device: b is on cpu but mu is on meta; move one of them",
        ),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, prox=uk.prox.Box(torch.tensor(0.1, device="meta"))),
            ValueError,
            "device: b is on cpu but lower is on meta; move one of them",
        ),
        *(
            (
                call,
                TypeError,
                rf"{name}: expected a dense tensor, got layout torch.sparse_coo; take {name}.to_dense\(\)",
            )
            for name, call in (
                ("Q", lambda: F.gradient_descent(Q.to_sparse(), b, 1.0, 2)),
                ("Q", lambda: F.gradient_descent(uk.Diagonal(b.to_sparse()), b, 1.0, 2)),
                ("Q", lambda: F.rnn(Q.to_sparse(), b, (b, b, [], b.mT), 2)),
                ("b", lambda: F.gradient_descent(Q, b.to_sparse(), 1.0, 2)),
                ("b", lambda: F.minimize(Q, b.to_sparse())),
                ("y0", lambda: F.gradient_descent(Q, b, 1.0, 2, y0=b.to_sparse())),
                ("step_size", lambda: F.gradient_descent(Q, b, torch.ones(2).to_sparse(), 2)),
                ("mu", lambda: F.nesterov(Q, b, 1.0, torch.ones(2).to_sparse(), 2)),
                ("Q", lambda: F.nesterov(Q.to_sparse(), b, 1.0, None, 2)),
                ("Q", lambda: F.gradient_descent(Q.to_sparse(), b, 1.0, 2, tolerance=0.1)),
                ("weight", lambda: uk.prox.L1(b.to_sparse())),
                ("W2 of weights", lambda: F.rnn(Q, b, (b, b.to_sparse(), [], b.mT), 2)),
            )
        ),
        (
            lambda: F.gradient_descent(Q.int(), b.int(), 1.0, 2),
            TypeError,
            "Q: expected dtype float16, bfloat16, float32 or float64, got torch.int32",
        ),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, y0=torch.ones(5, 4)),
            ValueError,
            r"y0: shape \[5, 4\] does not broadcast to \(\*batch, d\) = \[3, 4\]",
        ),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, y0=b.double()),
            ValueError,
            "dtype: Q has torch.float32 but y0 has torch.float64",
        ),
        (lambda: F.gradient_descent(Q, b, 1.0, -1), ValueError, "num_steps: expected a non-negative int, got -1"),
        (lambda: F.gradient_descent(Q, b, 1.0, 2.0), TypeError, "num_steps: expected a non-negative int, got 2.0"),
        (lambda: F.gradient_descent(Q, b, 1.0, True), TypeError, "num_steps: expected a non-negative int, got True"),
        (
            lambda: F.gradient_descent(Q, b, "1", 2),
            TypeError,
            "step_size: expected a float or a floating-point tensor, got '1'",
        ),
        (lambda: F.gradient_descent(Q, b, torch.tensor(1), 2), TypeError, "step_size: expected .* dtype torch.int64"),
        (lambda: F.gradient_descent(Q, b, np.ones(2), 2), TypeError, r"step_size: expected .* got array\(\[1., 1.\]\)"),
        (lambda: F.gradient_descent(np.eye(4), b, 1.0, 2), TypeError, "Q: expected a tensor, .* got ndarray"),
        (lambda: F.gradient_descent(Q, np.ones(4), 1.0, 2), TypeError, "b: expected a tensor, got ndarray"),
        (
            lambda: F.gradient_descent(Q, b, torch.ones(3), 2),
            ValueError,
            r"step_size: shape \[3\] does not broadcast to \(\*batch, num_steps\) = \[3, 2\]",
        ),
        (
            lambda: F.momentum(Q, b, 1.0, torch.ones(2, 2), 0.0, 2),
            ValueError,
            r"momentum: shape \[2, 2\] does not broadcast",
        ),
        (
            lambda: F.momentum(Q, b, 1.0, 0.0, torch.ones(7), 2),
            ValueError,
            r"extrapolation: shape \[7\] does not broadcast",
        ),
        (
            lambda: F.momentum(Q, b, torch.ones(7), 0.0, 0.0, 2),
            ValueError,
            r"step_sizes: shape \[7\] does not broadcast",
        ),
        (lambda: F.momentum(Q, b, 1.0, None, 0.0, 2), TypeError, "momentum: expected a float"),
        (lambda: F.nesterov(Q, b, 1.0, 0.0, 2), ValueError, "mu: expected a number > 0, got 0.0"),
        (lambda: F.nesterov(Q, b, 1.0, -0.1, 2), ValueError, "mu: expected a number > 0, got -0.1"),
        (lambda: F.nesterov(Q, b, 1.0, np.float32(-1), 2), ValueError, "mu: expected a number > 0, got -1.0"),
        (lambda: F.nesterov(Q, b, 1.0, torch.ones(7), 2), ValueError, r"mu: shape \[7\] does not broadcast"),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, backend="gpu"),
            ValueError,
            r"backend: expected one of \('auto', 'eager', .* got 'gpu'",
        ),
        (lambda: F.gradient_descent(Q, b, 1.0, 2, backend=["cpu"]), ValueError, r"backend: expected .* got \['cpu'\]"),
        (lambda: uk.UnrolledGD(2, backend=["cpu"]), ValueError, r"backend: expected .* got \['cpu'\]"),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, return_trajectory=1),
            TypeError,
            "return_trajectory: expected a bool, got 1",
        ),
        (lambda: F.minimize(Q, b[:, :3]), ValueError, "b: expected last dimension d = 4"),
        (lambda: uk.Diagonal([1.0]), TypeError, "q: expected a floating-point tensor, got list"),
        (
            lambda: uk.Diagonal(torch.ones(3, dtype=torch.int32)),
            TypeError,
            "q: expected a floating-point tensor, got a tensor of dtype torch.int32",
        ),
        (lambda: uk.Diagonal(torch.tensor(1.0)), ValueError, r"q: expected at least one dimension"),
        (
            lambda: uk.Spectral(torch.ones(3), torch.eye(4)),
            ValueError,
            r"eigenvectors: expected \[\*batch, d, d\] .* got shape \[4, 4\]",
        ),
        (
            lambda: F.gradient_descent(uk.Spectral(b, Q.double()), b, 1.0, 2),
            ValueError,
            r"dtype: Q \(eigenvalues\) has torch.float32 but Q \(eigenvectors\)",
        ),
        (
            lambda: F.gradient_descent(uk.Diagonal(b), torch.ones(3, 5), 1.0, 2),
            ValueError,
            r"b: expected last dimension d = 4 to fit Q Diagonal of shape \[3, 4\]",
        ),
        (lambda: uk.UnrolledGD(-1), ValueError, "num_steps: expected a non-negative int, got -1"),
        (lambda: uk.UnrolledGD(3, step_size=None), TypeError, "step_size: expected a float"),
        (lambda: uk.UnrolledGD(3, backend="nope"), ValueError, "backend: expected one of"),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, backward="phantom"),
            ValueError,
            "backward: expected 'unrolled' or 'implicit', got 'phantom'",
        ),
        (
            lambda: F.nesterov(Q, b, 1.0, 0.1, 2, backward_steps=0),
            ValueError,
            "backward_steps: expected an int >= 1 or None, got 0",
        ),
        (
            lambda: F.momentum(Q, b, 1.0, 0.1, 0.1, 2, backward_steps=1.0),
            TypeError,
            r"backward_steps: expected an int >= 1 or None, got 1.0 \(float\)",
        ),
        (
            lambda: uk.UnrolledNAG(3, backward="implicit", backward_steps=2),
            ValueError,
            "backward_steps: backward='implicit' differentiates no steps, got 2",
        ),
        (lambda: uk.UnrolledRNN(3, 4, backward_steps=-1), ValueError, "backward_steps: expected an int >= 1"),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, backward="implicit", return_trajectory=True),
            ValueError,
            "return_trajectory: backward='implicit' takes the last iterate for the minimizer .* got True",
        ),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, tolerance=-1e-3),
            ValueError,
            "tolerance: expected a float >= 0 or None, got -0.001",
        ),
        (
            lambda: uk.UnrolledGD(3, tolerance=float("nan")),
            ValueError,
            "tolerance: expected a float >= 0 or None, got nan",
        ),
        (
            lambda: F.nesterov(Q, b, 1.0, 0.1, 2, tolerance="small"),
            TypeError,
            "tolerance: expected a float >= 0 or None",
        ),
        (
            lambda: F.gradient_descent(Q, b, 1.0, 2, tolerance=0.1, backward_steps=1),
            ValueError,
            "backward_steps: expected None beside tolerance=0.1, where samples end at different steps, got 1",
        ),
        (lambda: F.gradient_descent(Q, b, 1.0, 2, return_info=1), TypeError, "return_info: expected a bool, got 1"),
        (lambda: uk.UnrolledNAG(3, mu=0), ValueError, "mu: expected a number > 0, got 0"),
        (lambda: uk.UnrolledNAG(3, mu=None, learn_mu=True), ValueError, "mu: learn_mu=True needs a number"),
        (
            lambda: uk.UnrolledGD(3, stable_region=(1.0, 0.1)),
            ValueError,
            "stable_region: expected 0 < mu <= L, got mu=1.0, L=0.1",
        ),
        (lambda: uk.UnrolledGD(3, stable_region=1.0), TypeError, r"stable_region: expected a pair \(mu, L\), got 1.0"),
        (lambda: uk.UnrolledMomentum(3, 1.0, "a", 0.0), TypeError, "momentum: expected a float"),
        (lambda: schedules.chebyshev(3, 0.0, 1.0), ValueError, "mu, L: expected 0 < mu <= L, got mu=0.0, L=1.0"),
    ],
)
def test_message(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_numpy_integers_count_as_steps():
    torch.testing.assert_close(F.gradient_descent(Q, b, 1.0, np.int64(2)), F.gradient_descent(Q, b, 1.0, 2))


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.int32, fractions.Fraction])
def test_real_numbers_of_other_libraries_are_coefficients(kind):
    number = kind(1)
    same = []
    for x in (number, 1.0):
        layer = uk.UnrolledNAG(2, x, x, learn_step_size=True, learn_mu=True)
        assert layer.step_size.dtype == torch.float32
        same.append(
            [F.gradient_descent(Q, b, x, 2), F.nesterov(Q / 2, b, x, x, 2), F.momentum(Q, b, x, x, x, 2), layer(Q, b)]
            + [F.gradient_descent(Q, b, 0.3, 2, prox=g, tolerance=x) for g in (uk.prox.L1(x), uk.prox.Box(-x, x))]
        )
    torch.testing.assert_close(*same, rtol=0, atol=0)


def test_a_coefficient_that_fits_the_batch_in_two_ways():
    """[B, 1] on B images of height B is one a row, as tensors broadcast, and may not be what is meant."""
    images = torch.randn(4, 1, 4, 5)
    Q, steps = uk.Diagonal(torch.rand(4, 1, 4, 5)), torch.rand(4, 1)
    message = r"step_size: shape \[4, 1\] .* write \[1, 1, 4, 1\] for the last, \[4, 1, 1, 1\] for the first"
    with pytest.warns(UserWarning, match=message):
        rows = F.gradient_descent(Q, images, steps, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(rows, F.gradient_descent(Q, images, steps.reshape(1, 1, 4, 1), 3))
        of_images = F.gradient_descent(Q, images, steps.reshape(4, 1, 1, 1), 3)
        for i in range(4):
            torch.testing.assert_close(of_images[i], F.gradient_descent(uk.Diagonal(Q.q[i]), images[i], steps[i, 0], 3))
        # one reading alone, or two that are the same
        F.gradient_descent(uk.Diagonal(torch.rand(4, 1, 3, 5)), images[:, :, :3], torch.rand(3, 1), 3)
        F.gradient_descent(Q, images, torch.rand(1, 1), 3)
        F.gradient_descent(Q, images, torch.rand(3), 3)
        F.gradient_descent(uk.Diagonal(torch.rand(4, 5)), images[:, 0, 0], steps, 3)
    with pytest.raises(ValueError, match=r"step_size: shape \[4, 1\] does not broadcast"):
        F.gradient_descent(uk.Diagonal(torch.rand(4, 1, 3, 5)), images[:, :, :3], steps, 3)


@pytest.mark.parametrize("name", ["mu", "momentum", "extrapolation", "threshold", "weight", "lower", "upper"])
@pytest.mark.parametrize("structure", ["diagonal", "tikhonov"])
def test_every_value_that_fits_the_batch_in_two_ways(name, structure):
    images, values = torch.randn(4, 1, 4, 5), torch.rand(4, 1)
    Q = uk.Diagonal(torch.rand(4, 1, 4, 5)) if structure == "diagonal" else uk.Tikhonov(images / 2, images)
    proxes = {
        "threshold": uk.prox.SoftThreshold,
        "weight": uk.prox.L1,
        "lower": lambda x: uk.prox.Box(-x, None),
        "upper": lambda x: uk.prox.Box(None, x),
    }

    def run(x):
        if name == "mu":
            return F.nesterov(Q, images, 0.3, x, 3)
        if name in proxes:
            return F.gradient_descent(Q, images, 0.3, 3, prox=proxes[name](x))
        return F.momentum(Q, images, 0.3, *((x, 0.1) if name == "momentum" else (0.1, x)), 3)

    message = rf"{name}: shape \[4, 1\] .* write \[1, 1, 4, 1\] for the last, \[4, 1, 1, 1\] for the first"
    with pytest.warns(UserWarning, match=message):
        rows = run(values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(rows, run(values.reshape(1, 1, 4, 1)))
        run(values.reshape(4, 1, 1, 1))
        if name in ("weight", "lower", "upper"):
            # an image that all share
            run(torch.rand(4, 5))


def test_unavailable_backend_says_how_to_get_it():
    for name in ("cpu", "cuda", "triton"):
        if name not in uk.available_backends():
            with pytest.raises(ValueError, match=rf"backend: '{name}' is not available here: .+"):
                F.gradient_descent(Q, b, 1.0, 2, backend=name)
            with pytest.raises(ValueError, match="is not available here"), uk.use_backend(name):
                pass


def test_backend_on_the_wrong_device():
    meta = torch.device("meta")
    if "cpu" in uk.available_backends():
        with pytest.raises(ValueError, match="backend: 'cpu' runs on cpu tensors, got tensors on device 'meta'"):
            F.gradient_descent(Q.to(meta), b.to(meta), 1.0, 2, backend="cpu")


def test_use_backend_nests_and_restores():
    from unrolled_kernels import _backend

    cpu = torch.device("cpu")
    before = _backend.resolve(None, cpu)
    with uk.use_backend("eager"):
        assert _backend.resolve(None, cpu) == "eager"
        with uk.use_backend("auto"):
            assert _backend.resolve(None, cpu) == before
        assert _backend.resolve("auto", cpu) == "eager"
    assert _backend.resolve(None, cpu) == before


def test_auto_takes_what_is_fastest_for_the_work(monkeypatch):
    """As if everything were available: one large Q for many samples goes to torch's products, on a GPU only."""
    from unrolled_kernels import _backend

    monkeypatch.setattr(_backend, "unavailable_reason", lambda name: None)
    choose = _backend._choose.__wrapped__
    for kind in ("dense", "diagonal", "spectral", "rnn"):
        assert choose("auto", "cuda", kind) == "cuda"
    assert choose("auto", "cuda", "products") == "eager"
    assert choose("cuda", "cuda", "products") == "cuda"
    assert choose("auto", "cpu", "products") == "cpu"
    assert choose("auto", "meta", "dense") == "eager"
    asked = []

    def decide(backend, device_type, kind="dense"):
        asked.append(kind)
        return "eager"

    monkeypatch.setattr(_backend, "decide", decide)
    cases = (
        ((130, 130), 200, "products"),
        ((130, 130), 100, "dense"),
        ((128, 128), 200, "dense"),
        ((200, 130, 130), 200, "dense"),
    )
    for Q_shape, batch, kind in cases:
        F.gradient_descent(torch.zeros(Q_shape), torch.zeros(batch, Q_shape[-1]), 0.5, 1)
        # whoever asks last has looked at the shapes
        assert asked[-1] == kind
    for Q, b, kind in (
        (uk.Diagonal(torch.zeros(3)), torch.zeros(3), "diagonal"),
        (uk.Tikhonov(torch.zeros(3), torch.zeros(3)), torch.zeros(3), "diagonal"),
        (uk.Spectral(torch.zeros(3), torch.eye(3)), torch.zeros(3), "spectral"),
    ):
        F.gradient_descent(Q, b, 0.5, 0)
        assert asked[-1] == kind


def test_use_backend_is_its_threads_own():
    """Blocks of two threads that overlap, the first to enter the first to leave, end where they began."""
    from unrolled_kernels import _backend

    cpu = torch.device("cpu")
    before = _backend.resolve(None, cpu)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    seen = {}

    def first():
        with uk.use_backend("eager"):
            first_in.set()
            second_in.wait(10)
            seen["first"] = _backend.resolve(None, cpu)
        seen["first after"] = _backend.resolve(None, cpu)
        first_out.set()

    def second():
        first_in.wait(10)
        seen["second before"] = _backend.resolve(None, cpu)
        with uk.use_backend("auto"):
            second_in.set()
            first_out.wait(10)
            seen["second"] = _backend.resolve(None, cpu)
        seen["second after"] = _backend.resolve(None, cpu)

    threads = [threading.Thread(target=f) for f in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen.pop("first") == "eager"
    assert set(seen.values()) == {before} == {_backend.resolve(None, cpu)}


def test_use_backend_is_its_tasks_own():
    """Tasks of one thread in blocks that overlap; and a block that an exception leaves."""
    from unrolled_kernels import _backend

    chosen = lambda: _backend.resolve(None, torch.device("cpu"))
    before = chosen()

    async def task(name, waits):
        with uk.use_backend(name):
            await asyncio.sleep(0.01 * waits)
            inside = chosen()
            await asyncio.sleep(0.01 * waits)
        return inside, chosen()

    async def tasks():
        return await asyncio.gather(task("eager", 1), task("auto", 2), task("eager", 3))

    assert asyncio.run(tasks()) == [("eager", before), (before, before), ("eager", before)]
    with pytest.raises(KeyError), uk.use_backend("eager"):
        raise KeyError
    assert chosen() == before
    assert uk.use_backend("eager")(chosen)() == "eager"
    assert chosen() == before


def test_a_compiled_graph_keeps_its_backend():
    compiled = torch.compile(lambda Q, b: F.gradient_descent(Q, b, 0.5, 3), fullgraph=True, backend=counting)
    counting.graphs.clear()
    with uk.use_backend("eager"):
        compiled(Q, b)
    compiled(Q, b)
    (graph,) = counting.graphs
    assert not any("unrolled_kernels" in str(node.target) for node in graph.graph.nodes)


def counting(graph, inputs):
    """A torch.compile backend that keeps what it is given."""
    counting.graphs.append(graph)
    return graph.forward


counting.graphs = []


def test_environment_variable_chooses_the_backend():
    code = "import torch, unrolled_kernels._backend as b; print(b.resolve(None, torch.device('cpu')))"
    run = lambda value: subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"UNROLLED_KERNELS_BACKEND": value, "PATH": ""},
    )
    assert run("eager").stdout.strip() == "eager"
    assert "backend: expected one of" in run("nope").stderr
