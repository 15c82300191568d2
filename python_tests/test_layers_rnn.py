"""The module UnrolledRNN: what it starts as, what its stable region holds, and what it refuses."""

import pytest
import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.testing import random_quadratic


@pytest.fixture
def problem():
    (Q,), _, b = random_quadratic("dense", (4,), 5, dtype=torch.float64)
    return Q, b


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_it_is_the_papers_cell(problem):
    """Eq. 20 word for word."""
    Q, b = problem
    layer = uk.UnrolledRNN(3, 5, (8, 6, 7)).double()
    y = torch.zeros_like(b)
    for _ in range(3):
        g = torch.einsum("bij,bj->bi", Q, y) + b
        h = torch.relu(torch.einsum("hi,bi->bh", layer.W1, y) + torch.einsum("hi,bi->bh", layer.W2, g))
        for W in layer.W:
            h = torch.relu(torch.einsum("hi,bi->bh", W, h))
        y = torch.einsum("ih,bh->bi", layer.V, h)
    torch.testing.assert_close(layer(Q, b), y)


@pytest.mark.parametrize("hidden_dims", [(10,), (10, 10, 10), (13, 10, 17)], ids=str)
def test_gd_start_is_gradient_descent(double, problem, hidden_dims):
    Q, b = problem
    y0 = torch.randn_like(b)
    layer = uk.UnrolledRNN(9, 5, hidden_dims, init="gd", step_size=0.7)
    actual = layer(Q, b, y0=y0, return_trajectory=True)
    expected = F.gradient_descent(Q, b, 0.7, 9, y0=y0, return_trajectory=True)
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=1e-14)


def test_gd_start_trains(problem):
    Q, b = problem
    Q, b = Q.float(), b.float()
    target = F.minimize(Q, b)
    for layer in (uk.UnrolledRNN(4, 5, init="gd", step_size=0.5), uk.UnrolledRNN(4, 5, stable_region=(0.1, 1.0))):
        optimizer = torch.optim.Adam(layer.parameters(), 0.005)
        losses = []
        for _ in range(120):
            optimizer.zero_grad()
            loss = (layer(Q, b) - target).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.7 * losses[0]


def test_default_start_is_glorot_uniform():
    layer = uk.UnrolledRNN(2, 50, (200, 100))
    for W in (layer.W1, layer.W2, *layer.W, layer.V):
        limit = (6 / sum(W.shape)) ** 0.5
        assert 0.98 * limit < W.abs().max() <= limit
        assert W.std().item() == pytest.approx(limit / 3**0.5, rel=0.05)


def test_contraction_factor(double, problem):
    """The supremum over the batch, by its definition; structured Q gives what dense gives."""
    Q, _ = problem
    layer = uk.UnrolledRNN(2, 5, (8, 6))
    norm = lambda x: torch.linalg.svdvals(x)[..., 0]
    expected = norm(layer.V) * norm(layer.W[0]) * torch.stack([norm(layer.W1 + layer.W2 @ q) for q in Q]).max()
    torch.testing.assert_close(layer.contraction_factor(Q), expected)
    q = torch.rand(3, 5)
    torch.testing.assert_close(
        layer.contraction_factor(uk.Diagonal(q)), layer.contraction_factor(uk.Diagonal(q).to_dense())
    )


def test_stable_region_holds_whatever_is_learned(double, problem):
    Q, b = problem
    layer = uk.UnrolledRNN(60, 5, (12, 9), stable_region=(0.1, 1.0))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    starts = torch.randn(2, *b.shape)
    for _ in range(20):
        optimizer.zero_grad()
        # a loss that pushes every weight up
        (-sum(p.square().sum() for p in layer.parameters())).backward()
        optimizer.step()
        c = layer.contraction_factor(Q).item()
        assert c < 1
        ends = [layer(Q, b, y0=y0) for y0 in starts]
        apart = (ends[0] - ends[1]).norm(dim=-1)
        assert (apart <= c**60 * (starts[0] - starts[1]).norm(dim=-1) + 1e-12 * ends[0].norm(dim=-1)).all()
    assert uk.UnrolledRNN(1, 5, (12, 9)).contraction_factor(Q) > 0


def test_stable_region_leaves_what_is_inside(problem):
    layer = uk.UnrolledRNN(3, 5, (12, 9), stable_region=(0.1, 1.0))
    with torch.no_grad():
        layer.V.mul_(1e-3)
    assert torch.equal(layer.weights[-1], layer.V)


def test_repr():
    assert repr(uk.UnrolledRNN(3, 5, (7,))).startswith("UnrolledRNN(\n  num_steps=3, dim=5, hidden_dims=(7,), backend=")


Q, b = torch.eye(4).expand(3, 4, 4), torch.ones(3, 4)
W1, W2, W, V = torch.ones(6, 4), torch.ones(6, 4), torch.ones(5, 6), torch.ones(4, 5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: F.rnn(Q, b, (W1, W2, V), 2),
            TypeError,
            r"weights: expected \(W1, W2, .* V\), got tuple",
        ),
        (lambda: F.rnn(Q, b, (W1, W2, [W], None), 2), ValueError, "weights: expected a matrix for V, got NoneType"),
        (lambda: F.rnn(Q, b, (W1, W2[:5], [W], V), 2), ValueError, r"expected shape \[6, 4\] for W2, .* got \[5, 4\]"),
        (lambda: F.rnn(Q, b, (W1, W2, [W[:, :3]], V), 2), ValueError, r"expected shape \[5, 6\] for W\^2, .* \[5, 3\]"),
        (lambda: F.rnn(Q, b, (W1, W2, [], V), 2), ValueError, r"weights: expected shape \[4, 6\] for V, .* \[4, 5\]"),
        (
            lambda: F.rnn(torch.eye(3), b[:, :3], (W1, W2, [W], V), 2),
            ValueError,
            r"weights: expected W1, W2 \[h_1, d\] and V \[d, h_L\] with d = 3 .* got d = 4",
        ),
        (
            lambda: F.rnn(Q, b, (W1, W2, [W.double()], V), 2),
            ValueError,
            r"dtype: b has torch.float32 but W\^2 of weights has torch.float64",
        ),
        (lambda: F.rnn(Q, b, (W1.to("meta"), W2, [W], V), 2), ValueError, "device: b is on cpu but W1 of weights is"),
        (lambda: F.rnn(Q, b[:, :3], (W1, W2, [W], V), 2), ValueError, "b: expected last dimension d = 4"),
        (lambda: F.rnn(Q, b, (W1, W2, [W], V), -1), ValueError, "num_steps: expected a non-negative int, got -1"),
        (lambda: F.rnn(Q, b, (W1, W2, [W], V), 2, y0=torch.ones(5, 4)), ValueError, "y0: shape .* does not broadcast"),
        (
            lambda: F.rnn(Q, b, (W1, W2, [W], V), 2, return_trajectory=1),
            TypeError,
            "return_trajectory: expected a bool",
        ),
        (lambda: F.rnn(Q, b, (W1, W2, [W], V), 2, backend="nope"), ValueError, "backend: expected one of"),
        (lambda: uk.UnrolledRNN(2, 0), ValueError, "dim: expected a positive int, got 0"),
        (lambda: uk.UnrolledRNN(2, 5, ()), ValueError, r"hidden_dims: expected a non-empty tuple .* got \(\)"),
        (lambda: uk.UnrolledRNN(2, 5, (3, 0)), ValueError, r"hidden_dims: expected .* positive ints, got \(3, 0\)"),
        (lambda: uk.UnrolledRNN(2, 5, init="x"), ValueError, "init: expected 'default' or 'gd', got 'x'"),
        (
            lambda: uk.UnrolledRNN(2, 5, (10, 9), init="gd"),
            ValueError,
            r"hidden_dims: init='gd' needs widths of at least 2 dim = 10, got \(10, 9\)",
        ),
        (
            lambda: uk.UnrolledRNN(2, 5, init="gd", stable_region=(0.1, 1.0)),
            ValueError,
            "init: gradient descent as an RNN has c_φ",
        ),
        (lambda: uk.UnrolledRNN(2, 5, stable_region=(1.0, 0.1)), ValueError, "stable_region: expected 0 < mu <= L"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()
