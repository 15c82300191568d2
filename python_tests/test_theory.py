"""The theory against the layers: bounds hold and are attained, printed numbers come out, advice is sound."""

import argparse
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unrolled_kernels import Diagonal, Spectral, UnrolledGD, UnrolledMomentum, UnrolledNAG, prox, schedules, theory
from unrolled_kernels import functional as F
from unrolled_kernels.testing import random_quadratic
from unrolled_kernels.theory.bounds import REGIMES
from unrolled_kernels.theory.design import GAP_FACTORS
from unrolled_kernels.theory.empirical import make_layer
from unrolled_kernels.theory.properties import ALGORITHMS

MU, L, PHI = 0.1, 1.0, 1.0
SLACK = 1 + 1e-11

algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)
bounded_time = settings(max_examples=15, deadline=None, derandomize=True)
spectra = st.tuples(st.floats(1e-3, 1.0), st.floats(1.01, 100.0)).map(lambda x: (x[0], x[0] * x[1]))
fractions = st.floats(0.01, 1.0)
seeds = st.integers(0, 2**31)


# k: Cvg, Stab_b, Stab_Q, |∂φ y| for μ = 0.1, L = 1, φ = 1, ‖b‖ = 1, with the digits that were printed
ANCHORS = {
    "gd": {
        1: (".9000", "1.000", "0.00", "1.0000"),
        5: (".5905", "4.095", "8.15", "3.2805"),
        10: (".3487", "6.513", "26.39", "3.8742"),
        20: (".1216", "8.784", "60.83", "2.7017"),
        30: (".0424", "9.576", "81.63", "1.4130"),
    },
    "nag": {
        1: (".900000", "1.000", "0.00", "1.00000"),
        5: (".385806", "6.142", "18.13", "3.27897"),
        10: (".092992", "9.070", "59.78", "1.79707"),
        20: (".003656", "9.963", "95.77", ".15330"),
        30: (".000117", "9.999", "99.74", ".00758"),
    },
}


@pytest.mark.parametrize(("algorithm", "k"), [(a, k) for a in ALGORITHMS for k in ANCHORS[a]])
def test_anchors(algorithm, k):
    stab = theory.stability(algorithm, k, PHI, MU)
    # the derivative at the eigenvalue μ, by autograd through the layer itself
    phi = torch.tensor(PHI, dtype=torch.float64, requires_grad=True)
    y = _run(algorithm, Diagonal(torch.tensor([MU], dtype=torch.float64)), torch.ones(1, dtype=torch.float64), phi, k)
    (slope,) = torch.autograd.grad(y.sum(), phi)
    numbers = theory.convergence_rate(algorithm, k, PHI, MU), stab.wrt_b, stab.wrt_Q, slope.abs()
    for number, printed in zip(numbers, ANCHORS[algorithm][k], strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{number.item():.{digits}f}".removeprefix("0") == printed.removeprefix("0")
    torch.testing.assert_close(slope.abs(), theory.sensitivity(algorithm, k, PHI, MU))


@algorithms
@pytest.mark.parametrize("fraction", [0.05, 0.5, 1.0])
@pytest.mark.parametrize(("mu", "L"), [(0.1, 1.0), (0.01, 1.0), (2.0, 3.0), (1.0, 1.0)])
def test_layers_converge_at_the_rate_of_the_theory(algorithm, fraction, mu, L):
    phi = fraction * theory.stable_region(algorithm, mu, L)[1]
    k = torch.arange(31)
    rate = theory.convergence_rate(algorithm, k, phi, mu)
    measured = theory.measure_convergence(algorithm, 30, phi, mu, L, num_samples=400)
    torch.testing.assert_close(measured, rate, rtol=1e-6, atol=1e-14)
    # as the layer is used: from zero, against the exact minimizer
    Q, b = theory.random_energies(400, mu, L)
    y_star = F.minimize(Q, b)
    ys = make_layer(algorithm, 30, phi, mu)(Q, b, return_trajectory=True)
    from_zero = ((ys - y_star).norm(dim=-1) / y_star.norm(dim=-1)).amax(-1)
    assert (from_zero - rate).abs().max() < 1e-6


@algorithms
def test_ten_thousand_pairs_that_do_not_commute(algorithm):
    pairs = theory.random_pairs(10_000, MU, L, seed=11)
    assert torch.linalg.matrix_norm(pairs.Q @ pairs.Q2 - pairs.Q2 @ pairs.Q).min() > 1e-10
    for Q in pairs[:2]:
        assert torch.linalg.eigvalsh(Q).min() > MU * (1 - 1e-9)
        assert torch.linalg.eigvalsh(Q).max() < L * SLACK
    generator = torch.Generator().manual_seed(12)
    phi = torch.rand(10_000, 1, generator=generator, dtype=torch.float64) * theory.stable_region(algorithm, MU, L)[1]
    ratio = theory.stability_ratio(algorithm, 20, phi, MU, pairs)
    assert ratio.shape == (20, 10_000)
    assert ratio.max() <= SLACK
    # the bound is not idle: it is nearly attained at every depth
    assert ratio.amax(-1).min() > 0.95


@algorithms
def test_ascent_finds_no_violation(algorithm):
    largest = theory.ascend_stability_ratio(algorithm, 8, PHI, MU, L)
    assert 0.9 < largest <= SLACK


@algorithms
def test_bounds_are_attained(algorithm):
    k = torch.arange(25)
    stab, measured = theory.stability(algorithm, k, PHI, MU), theory.measure_stability(algorithm, 24, PHI, MU, L)
    torch.testing.assert_close(measured.wrt_b, stab.wrt_b, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(measured.wrt_Q, stab.wrt_Q, rtol=1e-4, atol=1e-6)
    sens = theory.measure_sensitivity(algorithm, 24, 0.3, MU, L)
    torch.testing.assert_close(sens, theory.sensitivity(algorithm, k, 0.3, MU), rtol=1e-4, atol=1e-6)


@algorithms
@given(spectrum=spectra, fraction=fractions, k=st.integers(1, 25), dim=st.integers(2, 6), seed=seeds)
@bounded_time
def test_properties_hold_everywhere_in_the_class(algorithm, spectrum, fraction, k, dim, seed):
    mu, L = spectrum
    phi = fraction * theory.stable_region(algorithm, mu, L)[1]
    pairs = theory.random_pairs(32, mu, L, dim=dim, seed=seed)
    assert theory.stability_ratio(algorithm, k, phi, mu, pairs).max() <= SLACK
    steps = torch.arange(k + 1)
    cvg = theory.measure_convergence(algorithm, k, phi, mu, L, dim=dim, num_samples=32, seed=seed)
    assert (cvg <= theory.convergence_rate(algorithm, steps, phi, mu) * SLACK + 1e-14).all()
    stab = theory.stability(algorithm, steps, phi, mu)
    assert (stab.wrt_Q <= stab.wrt_b / mu * SLACK).all()
    c0 = 0.9 * phi
    sens = theory.measure_sensitivity(algorithm, k, c0, mu, L, dim=dim, num_samples=64, seed=seed)
    # of almost equal step sizes: the rounding of y, at most 1/μ, over 1e-7 of the region
    noise = 1e-8 / (mu * theory.stable_region(algorithm, mu, L)[1])
    assert (sens <= theory.sensitivity(algorithm, steps, c0, mu) * (1 + 1e-6) + noise).all()


@algorithms
def test_orders_in_k(algorithm):
    fits = theory.measured_orders(algorithm, PHI, MU, L)
    # Table 1 prints k^1 for Cvg of NAG and k^3 for its Sens; the layers show k^2
    powers = {"gd": (0, 0, 1), "nag": (1, 1, 2)}[algorithm]
    for (order, rate), power in zip(fits.values(), powers, strict=True):
        assert order.power == pytest.approx(power, abs=0.2)
        assert order.rate == pytest.approx(rate, rel=5e-3)


def test_fit_order_recovers_what_it_is_given():
    k = torch.arange(3, 40)
    order = theory.fit_order(k, 7 * k.double() ** 3 * 0.8**k)
    assert order == pytest.approx((3, 0.8), rel=1e-6)


@algorithms
def test_properties_are_differentiable_and_broadcast(algorithm):
    k = torch.tensor([[0], [1], [6]])
    phi = torch.tensor([0.2, 0.9], dtype=torch.float64, requires_grad=True)
    mu = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)

    def everything(phi, mu):
        stab = theory.stability(algorithm, k, phi, mu)
        return theory.convergence_rate(algorithm, k, phi, mu), *stab, theory.sensitivity(algorithm, k, phi, mu)

    assert all(x.shape == (3, 2) and x.dtype == torch.float64 for x in everything(phi, mu))
    assert torch.autograd.gradcheck(everything, (phi, mu))
    assert theory.convergence_rate(algorithm, 3, torch.tensor(0.5), 0.1).dtype == torch.float32
    assert theory.convergence_rate(algorithm, 0, 0.5, 0.1) == 1
    assert theory.stability(algorithm, 0, 0.5, 0.1) == (0, 0)


@algorithms
@pytest.mark.parametrize("mu", [1e-9, 1e-5, 0.4])
def test_stability_keeps_its_digits_for_small_mu(algorithm, mu):
    # the derivative in the eigenvalue, by autograd through the layer: no quotient that cancels
    q = torch.tensor([mu], dtype=torch.float64, requires_grad=True)
    b = torch.ones(1, dtype=torch.float64)
    y = make_layer(algorithm, 12, 0.7, mu)(Diagonal(q), b)
    (slope,) = torch.autograd.grad(y.sum(), q)
    wrt_Q = theory.stability(algorithm, 12, 0.7, mu).wrt_Q
    torch.testing.assert_close(wrt_Q, slope[0].abs(), rtol=1e-12, atol=0)


@algorithms
def test_stable_region_is_that_of_the_layers_and_bounded(algorithm):
    low, high = theory.stable_region(algorithm, MU, L)
    assert low == 0
    assert high == pytest.approx({"gd": 2 / 1.1, "nag": 4 / 3.1}[algorithm])
    layer = type(make_layer(algorithm, 3, 1.0, MU))(3, 1.0, learn_step_size=True, stable_region=(MU, L))
    assert layer.max_step_size == high
    Q = Diagonal(torch.linspace(MU, L, 50, dtype=torch.float64))
    y = make_layer(algorithm, 3000, high, MU)(Q, torch.ones(50, dtype=torch.float64))
    torch.testing.assert_close(y, -1 / Q.q)


# the RNN of Table 2


def rnn(weights, Q, b, num_steps):
    """y_{t+1} = V σ(Wᴸ … σ(W₁ y_t + W₂ (Q y_t + b))) from y_0 = 0 (paper, Eq. 20)."""
    W1, W2, inner, V = weights
    y = torch.zeros_like(b)
    for _ in range(num_steps):
        g = (Q @ y.unsqueeze(-1)).squeeze(-1) + b
        h = torch.relu(y @ W1.mT + g @ W2.mT)
        for W in inner:
            h = torch.relu(h @ W.mT)
        y = h @ V.mT
    return y


def random_weights(seed, depth, contraction, mu, L, dim=4, hidden=7):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    inner = [normal(hidden, hidden) for _ in range(depth)]
    weights = [normal(hidden, dim), normal(hidden, dim), inner, normal(dim, hidden)]
    weights[3] *= contraction / theory.rnn_contraction(weights, mu=mu, L=L)
    return weights


@given(spectrum=spectra, c=st.floats(0.1, 1.05), depth=st.integers(0, 2), k=st.integers(1, 12), seed=seeds)
@bounded_time
def test_rnn_bounds_hold(spectrum, c, depth, k, seed):
    mu, L = spectrum
    weights = random_weights(seed, depth, c, mu, L)
    Q, Q2, b, b2 = theory.random_pairs(64, mu, L, dim=4, seed=seed)
    assert theory.rnn_contraction(weights, Q=Q) <= c * SLACK
    norm = b.norm(dim=-1).max().item()
    stab = theory.rnn_stability(weights, k, mu=mu, L=L, b_norm=norm)
    y = rnn(weights, Q, b, k)
    rounding = 1e-12 * float(stab.wrt_b)
    assert (y.norm(dim=-1) <= stab.wrt_b * b.norm(dim=-1) * SLACK).all()
    in_b = (y - rnn(weights, Q, b2, k)).norm(dim=-1)
    assert (in_b <= stab.wrt_b * (b - b2).norm(dim=-1) * SLACK + rounding).all()
    in_Q = (y - rnn(weights, Q2, b, k)).norm(dim=-1)
    assert (in_Q <= stab.wrt_Q * torch.linalg.matrix_norm(Q - Q2, 2) * SLACK + rounding).all()
    # weights in the ball around φ: the bound holds for every two of them
    radius, generator = 0.1, torch.Generator().manual_seed(seed)
    flat, tree = torch.utils._pytree.tree_flatten(weights)
    sens = theory.rnn_sensitivity(weights, k, mu=mu, L=L, radius=radius, b_norm=norm)
    near = []
    for scale in (1.0, -0.5):
        moves = [torch.randn(W.shape, generator=generator, dtype=W.dtype) for W in flat]
        size = scale * radius / torch.cat([m.flatten() for m in moves]).norm()
        near.append([W + size * m for W, m in zip(flat, moves, strict=True)])
    distance = torch.cat([(A - B).flatten() for A, B in zip(*near, strict=True)]).norm()
    outputs = [rnn(torch.utils._pytree.tree_unflatten(x, tree), Q, b, k) for x in near]
    assert ((outputs[0] - outputs[1]).norm(dim=-1) <= sens * distance * SLACK + rounding).all()


def gd_cell(dim, phi):
    eye = torch.eye(dim, dtype=torch.float64)
    W1 = torch.cat([eye, -eye])
    return W1, -phi * W1, [torch.eye(2 * dim, dtype=torch.float64)], W1.mT.clone()


def test_rnn_can_be_gradient_descent_and_need_not_converge():
    Q, b = theory.random_energies(64, MU, L, dim=4)
    phi = theory.stable_region("gd", MU, L)[1]
    weights = gd_cell(4, phi)
    torch.testing.assert_close(rnn(weights, Q, b, 9), F.gradient_descent(Q, b, phi, 9))
    best = theory.rnn_best_convergence_rate(9, MU, L)
    assert best == pytest.approx((0.9 / 1.1) ** 9)
    y_star = F.minimize(Q, b)
    error = lambda w: ((rnn(w, Q, b, 9) - y_star).norm(dim=-1) / y_star.norm(dim=-1)).max()
    assert error(weights) <= best * SLACK
    # stable in the sense of Table 2 with outputs that are nowhere near the minimizer, and the other way round
    away = [W1, W2, inner, V] = random_weights(0, 1, 0.5, MU, L)
    assert theory.rnn_contraction(away, mu=MU, L=L) == pytest.approx(0.5)
    assert error((W1, W2, inner, V)) > 0.5
    assert theory.rnn_contraction(weights, Q=Q) == pytest.approx(2 * (1 - phi * MU))


def test_rnn_stability_is_differentiable():
    weights = random_weights(3, 1, 0.8, MU, L)
    leaves = [W.requires_grad_() for W in (weights[0], weights[1], weights[2][0], weights[3])]
    bound = lambda W1, W2, W, V: theory.rnn_stability((W1, W2, [W], V), torch.tensor([1, 4]), mu=MU, L=L)
    assert torch.autograd.gradcheck(lambda *w: tuple(bound(*w)), leaves)


# approximation: Lemmas 4.1 and 4.2


@pytest.fixture(scope="module")
def trained():
    """GD and NAG models of several depths on one task, trained for a moment: losses and matrices by (name, k)."""
    torch.manual_seed(0)
    n, d = 400, 4
    x = torch.rand(n, 3, dtype=torch.float64) * 2 - 1
    b = torch.rand(n, d, dtype=torch.float64) * 10 - 5
    R = torch.linalg.qr(torch.randn(n, d, d, dtype=torch.float64))[0]

    def spectrum(network):
        inner = MU + (L - MU) * torch.sigmoid(network(x))
        edge = torch.ones(n, 1, dtype=torch.float64)
        return torch.cat([L * edge, inner, MU * edge], -1)

    truth = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh(), torch.nn.Linear(3, d - 2)).double()
    Q_star = Spectral(spectrum(truth).detach(), R)
    y_star = F.minimize(Q_star, b)
    models = {}
    for algorithm, k in itertools.product(ALGORITHMS, (1, 4, 12)):
        torch.manual_seed(1)
        network = torch.nn.Linear(3, d - 2).double()
        layer = make_layer(algorithm, k, PHI, MU)
        optimizer = torch.optim.Adam(network.parameters(), lr=0.05)
        for _ in range(40):
            loss = (layer(Spectral(spectrum(network), R), b) - y_star).norm(dim=-1)
            optimizer.zero_grad()
            loss.mean().backward()
            optimizer.step()
        Q_theta = Spectral(spectrum(network).detach(), R)
        models[algorithm, k] = (layer(Q_theta, b) - y_star).norm(dim=-1), Q_theta
    return models, Q_star, b


def test_lemmas_hold_for_trained_models(trained):
    models, Q_star, b = trained
    sigma_b, M = theory.problem_constants(b, MU)
    assert sigma_b == pytest.approx(5 / math.sqrt(3), rel=0.05)
    for (algorithm, k), (losses, Q_theta) in models.items():
        cvg = theory.convergence_rate(algorithm, k, PHI, MU)
        first, second = theory.check_lemmas(losses, Q_theta, Q_star, cvg, mu=MU, L=L, sigma_b=sigma_b, M=M)
        assert first.left == pytest.approx(losses.mean().item())
        assert first.right == pytest.approx(sum(first.addends))
        assert second.right == pytest.approx(sum(second.addends) ** 2)
        assert first.holds, (algorithm, k, first)
        assert second.holds, (algorithm, k, second)
        assert first.slack == first.right / first.left


def test_figures_3_and_4_follow_from_convergence(trained):
    models, Q_star, _ = trained
    loss = {key: losses.mean().item() for key, (losses, _) in models.items()}
    q_error = {
        key: (Q.to_dense() - Q_star.to_dense()).square().sum((-1, -2)).mean().item() for key, (_, Q) in models.items()
    }
    for k in (4, 12):
        assert loss["nag", k] < loss["gd", k]
    for algorithm in ALGORITHMS:
        depths = [loss[algorithm, k] for k in (1, 4, 12)]
        assert depths == sorted(depths, reverse=True)
        assert q_error[algorithm, 12] < q_error[algorithm, 1]


def test_lemma_41_with_the_exact_optimizer_needs_only_the_neural_term():
    generator = torch.Generator().manual_seed(5)
    n, d = 20_000, 3
    (Q,), _, _ = random_quadratic("dense", (n,), d, dtype=torch.float64, seed=1)
    (Q2,), _, _ = random_quadratic("dense", (n,), d, dtype=torch.float64, seed=2)
    b = torch.randn(n, d, generator=generator, dtype=torch.float64)
    losses = (F.minimize(Q, b) - F.minimize(Q2, b)).norm(dim=-1)
    sigma_b, M = theory.problem_constants(b, MU)
    first, second = theory.check_lemmas(losses, Q, Q2, 0.0, mu=MU, L=L, sigma_b=sigma_b, M=M)
    assert first.holds
    assert second.holds
    assert first.addends[1] == 0


# generalization: Theorem 5.1, Eq. 19, Rademacher complexities


def finite_class(models=40, n=60, seed=0):
    """Random neural modules Q_m(x_i), with Q*, b, and the losses of NAG layers on them."""
    generator = torch.Generator().manual_seed(seed)
    d = 3
    (Q_star,), _, _ = random_quadratic("dense", (n,), d, dtype=torch.float64, seed=seed)
    (other,), _, _ = random_quadratic("dense", (models, n), d, dtype=torch.float64, seed=seed + 1)
    mix = torch.rand(models, 1, 1, 1, generator=generator, dtype=torch.float64) ** 2
    Q = (1 - mix) * Q_star + mix * other  # the class is convex: [m, n, d, d]
    b = torch.rand(n, d, generator=generator, dtype=torch.float64) * 2 - 1
    return Q, Q_star, b


def test_theorem_51_bounds_the_local_complexity():
    Q, Q_star, b = finite_class()
    m, n, d = Q.shape[:3]
    sigma_b, M = theory.problem_constants(b, MU)
    q_losses = torch.linalg.matrix_norm(Q - Q_star)
    losses = {k: (UnrolledNAG(k, PHI, MU)(Q, b) - F.minimize(Q_star, b)).norm(dim=-1) for k in (2, 10)}
    for radius in (0.05, 1.0, 1e3):
        for k, values in losses.items():
            measured = theory.local_rademacher_complexity(values, radius)
            bound = theory.model_bound(
                "nag",
                k,
                PHI,
                num_samples=n,
                radius=radius,
                log_covering=math.log(m),
                dim=d,
                mu=MU,
                L=L,
                sigma_b=sigma_b,
                M=M,
            )
            assert measured.value <= bound.total
            assert bound.perception == bound.total
            # the step of the derivation that is ours: local complexity of ℓ_Q at level r_q
            r_q = (math.sqrt(radius) + M * theory.convergence_rate("nag", k, PHI, MU).item()) ** 2 * L**4 / sigma_b**2
            neural = theory.local_rademacher_complexity(q_losses, r_q)
            root = math.sqrt(bound.convergence_part + bound.C2 + bound.C3 + 4)
            assert neural.value <= root / math.sqrt(n)


def scalar_class(n, k, q=(0.1, 1.0)):
    """All 2ⁿ models of a scalar energy with q_θ(x_i) in {q* ± .45}, q* = .55, b = 1: their q and their GD losses."""
    q = torch.tensor(list(itertools.product(q, repeat=n)), dtype=torch.float64)  # [2ⁿ, n]
    y = UnrolledGD(k, PHI)(Diagonal(q.unsqueeze(-1)), torch.ones(*q.shape, 1, dtype=torch.float64))
    return q, (y.squeeze(-1) + 1 / 0.55).abs()


def test_theorem_51_as_printed_has_a_counterexample():
    n, k = 6, 10
    q, losses = scalar_class(n, k)
    norms = (q - 0.55).abs()
    # ℓ_Q has one element: its covering number is 1, its complexity is 0, and so are C_1, C_2 and C_3 ...
    assert norms.std() < 1e-15
    assert theory.rademacher_complexity(norms, num_signs=None).value < 1e-15
    measured = theory.rademacher_complexity(losses, num_signs=None).value
    assert measured == pytest.approx(1.938, abs=1e-3)
    # ... which holds for every n, while 4 under the root falls like 1/√n
    problem = {"radius": losses.square().max().item(), "dim": 1, "mu": MU, "L": L, "sigma_b": 1.0, "M": 1 / MU}
    for samples, printed in ((100, 7.46), (10_000, 0.746), (1_000_000, 0.0746)):
        of_norms = theory.model_bound("gd", k, PHI, num_samples=samples, log_covering=0.0, **problem).total
        assert of_norms == pytest.approx(printed, rel=1e-3)
        # with N of the matrix-valued class the theorem says so much more that it is true
        of_matrices = theory.model_bound(
            "gd", k, PHI, num_samples=samples, log_covering=samples * math.log(2), **problem
        )
        assert of_matrices.total > measured
    assert theory.model_bound("gd", k, PHI, num_samples=10_000, log_covering=0.0, **problem).total < measured


def test_vector_contraction_of_eq_18():
    n, k = 6, 10
    q, losses = scalar_class(n, k)
    stab = theory.stability("gd", k, PHI, MU).wrt_Q.item()
    of_matrices = theory.rademacher_complexity(q, num_signs=None).value
    assert theory.rademacher_complexity(losses, num_signs=None).value <= math.sqrt(2) * stab * of_matrices


def test_theorem_51_has_three_regimes():
    problem = {"num_samples": 100, "radius": 0.0, "dim": 5, "mu": MU, "L": L, "sigma_b": 5 / 3**0.5, "M": 111.8}
    total = lambda name, k, log_n: theory.model_bound(name, k, PHI, log_covering=log_n, **problem)
    # two functions, the smallest class that there is: the constant 4 decides where the layer has converged
    two = math.log(2)
    assert [total("gd", k, two).regime for k in (1, 10, 20, 30)] == ["about_right", "about_right", "under", "under"]
    assert [total("nag", k, two).regime for k in (1, 10)] == ["about_right", "under"]
    # a linear network's 33 parameters, and 451
    linear, wide = (theory.log_covering_parametric(0.1, p, 5.0, 5.0) for p in (33, 451))
    assert [total("gd", k, linear).regime for k in (5, 30)] == ["about_right", "over"]
    assert {total(name, k, wide).regime for name in ALGORITHMS for k in (1, 30)} == {"over"}
    # where Cvg decides, the bound falls with k in the end; else it grows, and NAG's is the larger
    for log_covering, falls in ((two, False), (wide, False)):
        assert (total("nag", 30, log_covering).total < total("nag", 15, log_covering).total) == falls
        assert total("nag", 15, log_covering).total > total("gd", 15, log_covering).total
    values = [total("gd", 8, log_n).total for log_n in (0, 1, 10, 100)]
    assert values == sorted(values)
    with_phi = theory.local_rademacher_bound(
        100,
        0.0,
        1.0,
        stability=2.0,
        convergence=0.5,
        sensitivity=3.0,
        step_size_range=0.4,
        dim=5,
        mu=MU,
        L=L,
        sigma_b=1.0,
        M=10.0,
    )
    assert with_phi.sensitivity == pytest.approx(0.6)
    assert with_phi.total == pytest.approx(with_phi.perception + 0.6)


@algorithms
def test_covering_number_of_eq_19(algorithm):
    Q, Q_star, b = finite_class(models=30)
    phis = torch.linspace(0.5, 1.2, 7, dtype=torch.float64)
    k, y_star = 6, F.minimize(Q_star, b)
    losses = torch.stack([(make_layer(algorithm, k, phi, MU)(Q, b) - y_star).norm(dim=-1) for phi in phis.tolist()])
    stab = theory.stability(algorithm, k, phis, MU, b_norm=b.norm(dim=-1).max()).wrt_Q.max().item()
    sens = theory.sensitivity(algorithm, k, 0.5, MU, b_norm=b.norm(dim=-1).max()).item()
    # L₂(P_n): root mean square over the samples
    between_Q = torch.linalg.matrix_norm(Q[:, None] - Q, 2).square().mean(-1).sqrt()
    between_phi = (phis[:, None] - phis).abs()
    for radius in (0.05, 0.5, 2.0):
        centres_Q = theory.cover(between_Q, radius / (2 * stab))
        centres_phi = theory.cover(between_phi, radius / (2 * sens))
        # Eq. 17 makes the product of the covers a cover of the losses
        centres = losses[centres_phi][:, centres_Q].flatten(0, 1)
        distance = (losses.flatten(0, 1)[:, None] - centres).square().mean(-1).sqrt()
        assert distance.amin(1).max() <= radius * SLACK
        bound = theory.log_covering_bound(
            radius,
            stability=stab,
            sensitivity=sens,
            log_covering_Q=lambda eps: math.log(len(theory.cover(between_Q, eps))),
            log_covering_step_size=lambda eps: math.log(len(theory.cover(between_phi, eps))),
        )
        assert bound == pytest.approx(math.log(len(centres)))


def test_covering_numbers():
    assert theory.log_covering_interval(0.1, 0.0, 1.0) == pytest.approx(math.log(5))
    assert theory.log_covering_interval(math.inf, 0.0, 1.0) == 0
    assert theory.log_covering_parametric(0.5, 10, 2.0, 3.0) == pytest.approx(10 * math.log(25))
    # a fixed step size and an algorithm that is less stable: NAG's bound is the larger one
    classes = {"log_covering_Q": lambda eps: theory.log_covering_parametric(eps, 33, 1.0, 1.0)}
    classes["log_covering_step_size"] = lambda eps: 0.0
    stab = {name: theory.stability(name, 10, PHI, MU).wrt_Q for name in ALGORITHMS}
    gd, nag = (theory.log_covering_bound(0.1, stability=stab[n], sensitivity=0.0, **classes) for n in ALGORITHMS)
    assert nag > gd
    points = torch.tensor([0.0, 1.0, 2.0, 10.0])
    assert sorted(theory.cover((points[:, None] - points).abs(), 2.0)) == [0, 3]
    assert theory.cover(torch.zeros(0, 0), 1.0) == []


def test_rademacher_complexity():
    # f and -f: E |Σ σ_i f_i|/n, for f = 1 and n = 2 it is (2 + 0 + 0 + 2)/4/2
    pair = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    assert theory.rademacher_complexity(pair, num_signs=None) == (0.5, 0.0)
    losses = torch.rand(6, 10, generator=torch.Generator().manual_seed(0))
    exact = theory.rademacher_complexity(losses, num_signs=None)
    sampled = theory.rademacher_complexity(losses, num_signs=20_000, seed=1)
    assert abs(sampled.value - exact.value) < 5 * sampled.standard_error < 0.02
    assert theory.rademacher_complexity(losses, num_signs=20_000, seed=1) == sampled
    massart = losses.square().mean(1).max().sqrt() * math.sqrt(2 * math.log(6) / 10)
    assert 0 < exact.value <= massart


def test_local_complexity_grows_with_the_level():
    losses = torch.rand(50, 12, generator=torch.Generator().manual_seed(0)) * torch.linspace(0, 1, 50)[:, None]
    values = [theory.local_rademacher_complexity(losses, r, num_signs=None).value for r in (0.0, 0.01, 0.1, 1.0)]
    assert values == sorted(values)
    assert values[0] == 0
    assert values[-1] == theory.rademacher_complexity(losses, num_signs=None).value
    assert theory.local_rademacher_complexity(losses, 0.5, second_moments=torch.ones(50)).value == 0


def test_predicted_order_of_gd_and_nag():
    k = torch.tensor([1, 2, 5, 10, 30])
    for regime in ("under", "over"):
        # NAG is the less stable one at every depth; the first step is the same
        assert theory.predicted_order(k, regime, PHI, MU).tolist() == [0, 1, 1, 1, 1]
    depths = torch.arange(1, 31)
    order = theory.predicted_order(depths, "about_right", PHI, MU)
    assert depths[order > 0].tolist() == [2, 3, 4, 5, 6, 7]
    assert depths[order == 0].tolist() == [1]
    # after one step from zero nothing depends on Q
    assert theory.predicted_gap("nag", 1, "over", PHI, MU) == 0
    product = theory.predicted_gap("nag", torch.arange(31), "about_right", PHI, MU)
    assert 0 < product.argmax() < 10
    assert product[-1] < 0.01 * product.max()


# any schedule


@algorithms
def test_schedules_of_gd_and_nag_have_the_closed_forms(algorithm):
    k = 40
    schedule = schedules.gd(k, PHI) if algorithm == "gd" else schedules.nag(k, PHI, MU)
    depths = torch.arange(k + 1)
    closed, grid = theory.stability(algorithm, depths, PHI, MU), theory.schedule_stability(schedule, MU, L)
    torch.testing.assert_close(grid.wrt_Q, closed.wrt_Q, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(grid.wrt_b, closed.wrt_b, rtol=1e-9, atol=1e-12)
    rate = theory.convergence_rate(algorithm, depths, PHI, MU)
    torch.testing.assert_close(theory.schedule_convergence(schedule, MU, L), rate, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["heavy_ball", "fista", "chebyshev", "random"])
def test_schedules_bound_what_their_layers_do(name):
    k, generator = 12, torch.Generator().manual_seed(3)
    schedule = {
        "heavy_ball": lambda: schedules.heavy_ball(k, 1.2, 0.4),
        "fista": lambda: schedules.fista(k, 1.0),
        "chebyshev": lambda: schedules.chebyshev(k, MU, L),
        "random": lambda: tuple(torch.rand(3, k, generator=generator, dtype=torch.float64)),
    }[name]()
    layer = UnrolledMomentum(k, *schedule, learnable=False)
    Q, Q2, b, b2 = theory.random_pairs(400, MU, L, seed=4)
    y, y2 = layer(Q, b, return_trajectory=True), layer(Q2, b2, return_trajectory=True)
    stab = theory.schedule_stability(schedule, MU, L)
    norm = torch.minimum(b.norm(dim=-1), b2.norm(dim=-1))
    right = stab.wrt_Q[:, None] * norm * torch.linalg.matrix_norm(Q - Q2, 2) + stab.wrt_b[:, None] * (b - b2).norm(
        dim=-1
    )
    assert ((y - y2).norm(dim=-1) <= right * (1 + 1e-6) + 1e-12).all()
    start = torch.ones_like(b)
    error = layer(Q, torch.zeros_like(b), y0=start, return_trajectory=True).norm(dim=-1) / start.norm(dim=-1)
    cvg = theory.schedule_convergence(schedule, MU, L)
    assert (error.amax(-1) <= cvg * (1 + 1e-6)).all()
    # and not by far: one energy attains it
    assert (error.amax(-1) >= 0.3 * cvg).all()


# attacks: independent recurrences in search of a counterexample


def scalar_run(algorithm, phi, mu, eigenvalues, k, start=0.0, b=1.0):
    """y_0 … y_k and dy/dφ on scalar energies, written down without the package: two ``[k + 1, n]`` tensors."""
    s = math.sqrt(phi * mu)
    beta, slope = ((1 - s) / (1 + s), -mu / (s * (1 + s) ** 2)) if algorithm == "nag" else (0.0, 0.0)
    y = before = torch.full_like(eigenvalues, start)
    d = d_before = torch.zeros_like(y)
    states, tangents = [y], [d]
    for _ in range(k):
        z, dz = y + beta * (y - before), d + beta * (d - d_before) + slope * (y - before)
        gradient = eigenvalues * z + b
        before, y = y, z - phi * gradient
        d_before, d = d, dz - gradient - phi * eigenvalues * dz
        states.append(y)
        tangents.append(d)
    return torch.stack(states), torch.stack(tangents)


@pytest.mark.slow
@algorithms
def test_random_search_finds_no_violation_of_table_1(algorithm):
    k, random = 60, torch.Generator().manual_seed(0)
    draw = lambda low, high: low + (high - low) * torch.rand((), generator=random).item()
    depths = torch.arange(k + 1)
    for trial in range(1500):
        L = 10 ** draw(-2, 2)
        mu = L / 10 ** draw(0, 4)
        part = (1.0, 1 - 1e-9, draw(0.001, 1), 10 ** draw(-4, 0))[trial % 4]
        phi = part * theory.stable_region(algorithm, mu, L)[1]
        points = (1 - torch.linspace(0, math.pi, 161, dtype=torch.float64).cos()) / 2
        inside = torch.rand(60, generator=random, dtype=torch.float64)
        grid = mu + (L - mu) * torch.cat([points, inside, torch.logspace(-4, 0, 60, dtype=torch.float64)])
        errors, _ = scalar_run(algorithm, phi, mu, grid, k, start=1.0, b=0.0)
        cvg = theory.convergence_rate(algorithm, depths, phi, mu)
        assert (errors.abs().amax(1) <= cvg * (1 + 1e-9) + 1e-280).all(), (mu, L, phi)
        states, tangents = scalar_run(algorithm, phi, mu, grid, k)
        stab = theory.stability(algorithm, depths, phi, mu)
        assert (states.abs().amax(1) <= stab.wrt_b * (1 + 1e-7)).all(), (mu, L, phi)
        bound = theory.sensitivity(algorithm, depths, phi, mu)
        # deep enough, rounding of the states is all that is left of the tangent
        assert (tangents.abs().amax(1) <= bound * (1 + 1e-6) + 1e-9 * bound.max()).all(), (mu, L, phi)


@pytest.mark.slow
@algorithms
def test_random_search_finds_no_violation_of_eq_7(algorithm):
    random = torch.Generator().manual_seed(1)
    draw = lambda: torch.rand((), generator=random, dtype=torch.float64).item()
    for trial in range(120):
        d, L = 1 + trial % 6, 10 ** (4 * draw() - 2)
        mu = L / 10 ** (0.01 + 3.5 * draw())
        phi = theory.stable_region(algorithm, mu, L)[1] * (1.0 if trial % 3 == 0 else draw() ** 2 + 1e-3)
        phi = min(phi, theory.stable_region(algorithm, mu, L)[1])
        pairs = theory.random_pairs(400, mu, L, dim=d, seed=trial)
        ratio = theory.stability_ratio(algorithm, 40, phi, mu, pairs)
        # pairs that differ by less than rounding tell nothing
        told = torch.linalg.matrix_norm(pairs.Q - pairs.Q2, 2) > 1e-7 * L
        assert ratio[:, told].amax() <= 1 + 1e-6, (mu, L, phi)


@pytest.mark.slow
@algorithms
def test_random_search_finds_no_violation_of_the_repaired_theorem(algorithm):
    for seed in range(12):
        Q, Q_star, b = finite_class(models=24, n=20, seed=10 + seed)
        m, n, d = Q.shape[:3]
        sigma_b, M = theory.problem_constants(b, MU)
        k = 2 + seed
        values = (make_layer(algorithm, k, PHI, MU)(Q, b) - F.minimize(Q_star, b)).norm(dim=-1)
        for radius in (0.02, 0.5, 1e3):
            measured = theory.local_rademacher_complexity(values, radius, seed=seed)
            bound = theory.model_bound(algorithm, k, PHI, num_samples=n, radius=radius, log_covering=math.log(m),
                                       dim=d, mu=MU, L=L, sigma_b=sigma_b, M=M)  # fmt: skip
            assert measured.value <= bound.total


# design help


def test_spectrum_bounds_of_every_structure():
    for structure in ("dense", "diagonal", "spectral"):
        leaves, make_Q, _ = random_quadratic(structure, (2, 3), 6, dtype=torch.float64)
        low, high = theory.spectrum_bounds(make_Q(*leaves))
        torch.testing.assert_close(low, torch.full((2, 3), MU, dtype=torch.float64))
        torch.testing.assert_close(high, torch.full((2, 3), L, dtype=torch.float64))
    low, _ = theory.spectrum_bounds(torch.eye(3, dtype=torch.bfloat16))
    assert low.dtype == torch.float32
    assert theory.spectrum_bounds(torch.zeros(0, 4, 4))[0].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_bounds_the_spectrum(dtype):
    for d in (1, 2, 30, 150):
        (Q,), _, _ = random_quadratic("dense", (2,), d, dtype=dtype, seed=d)
        low, high = theory.spectrum_bounds(Q, method="lanczos")
        exact = theory.spectrum_bounds(Q, method="exact")
        rounding = 50 * torch.finfo(dtype).eps
        assert (low <= exact[0] + rounding).all()
        assert (high >= exact[1] - rounding).all()
        torch.testing.assert_close(low, exact[0], rtol=3e-3, atol=0)
        torch.testing.assert_close(high, exact[1], rtol=3e-3, atol=0)
    # invariant subspaces end the iteration early
    Q = torch.stack([0.3 * torch.eye(40, dtype=dtype), torch.diag(torch.linspace(1, 2, 4, dtype=dtype).repeat(10))])
    low, high = theory.spectrum_bounds(Q, method="lanczos")
    torch.testing.assert_close(low, torch.tensor([0.3, 1.0], dtype=dtype))
    torch.testing.assert_close(high, torch.tensor([0.3, 2.0], dtype=dtype))


@pytest.mark.parametrize("structure", ["dense", "diagonal", "spectral"])
def test_check_sees_stable_and_unstable_layers(structure):
    leaves, make_Q, _ = random_quadratic(structure, (3,), 6, dtype=torch.float64)
    Q = make_Q(*leaves)
    for algorithm in ALGORITHMS:
        report = theory.check(make_layer(algorithm, 10, PHI, MU), Q)
        assert report.stable.all()
        assert report.in_stable_region.all()
        expected = theory.convergence_rate(algorithm, 10, PHI, MU).expand(3)
        torch.testing.assert_close(report.error_factor, expected, rtol=1e-9, atol=0)
        largest = theory.stable_region(algorithm, MU, L)[1]
        torch.testing.assert_close(report.largest_step_size, torch.full((3,), largest, dtype=torch.float64))
    # stable up to 2/L, beyond the paper's sufficient region; and no further
    between = theory.check(UnrolledGD(10, 1.95), Q)
    assert between.stable.all()
    assert not between.in_stable_region.any()
    beyond = theory.check(UnrolledGD(10, 2.1), Q)
    assert not beyond.stable.any()
    assert beyond.error_factor.min() == pytest.approx(1.1**10)
    assert "UNSTABLE on 3 of 3" in str(beyond)
    assert "stable" in str(between)


def test_check_predicts_what_every_schedule_does():
    (Q,), _, b = random_quadratic("dense", (40,), 6, dtype=torch.float64)
    b[0] = torch.linalg.eigh(Q[0])[1][:, 0]
    y_star = F.minimize(Q, b)
    layers = [
        UnrolledGD(7, torch.linspace(0.5, 1.5, 7)),
        UnrolledGD(7, torch.linspace(0.5, 1.5, 40, dtype=torch.float64).unsqueeze(-1)),
        UnrolledNAG(7, 1.0, None),
        UnrolledNAG(7, 1.0, learn_step_size=True, per_step=True),
        UnrolledMomentum.heavy_ball(7, 1.0, 0.5),
        UnrolledMomentum.chebyshev(7, MU, L),
        UnrolledMomentum.fista(7, 1.0),
        UnrolledGD(0),
    ]
    for layer in layers:
        report = theory.check(layer, Q)
        assert report.stable.all(), layer
        factor = (layer(Q, b) - y_star).norm(dim=-1) / y_star.norm(dim=-1)
        assert (factor <= report.error_factor * (1 + 1e-3)).all(), layer
    # the paper gives no region for a free schedule
    assert theory.check(layers[4], Q).in_stable_region is None
    # heavy ball contracts by √β for each step once it is oscillating everywhere
    assert theory.check(UnrolledMomentum.heavy_ball(5, 1.5, 0.9), Q).rate.max() == pytest.approx(0.9**0.5)
    assert not theory.check(UnrolledMomentum.heavy_ball(5, 1.5, 1.01), Q).stable.any()


PROXES = [prox.Box(-0.6, 0.4), prox.NonNegative(), prox.L1(0.3)]


def _constrained_energy(Q, b, g):
    """E(y) + g(y) for y inside the box."""
    weight = g.weight if isinstance(g, prox.L1) else 0.0
    return lambda y: (y * ((Q @ y.unsqueeze(-1)).squeeze(-1) / 2 + b) + weight * y.abs()).sum(-1)


@pytest.mark.parametrize("g", PROXES, ids=lambda g: type(g).__name__)
def test_proximal_steps_keep_their_contraction(g):
    """GD contracts by max |1 - φλ| a step; Nesterov's E + g falls by 1 - √(μφ) a step for φ ≤ 1/L."""
    (Q,), _, b = random_quadratic("dense", (40,), 6, dtype=torch.float64)
    k, phi = 25, torch.linspace(0.4, 1.8, 25, dtype=torch.float64)
    y_star = UnrolledNAG(3000, 1.0, MU, prox=g)(Q, 2 * b)
    layer = UnrolledGD(k, phi, prox=g)
    errors = (layer(Q, 2 * b, return_trajectory=True) - y_star).norm(dim=-1)
    steps = torch.maximum((1 - phi * MU).abs(), (1 - phi * L).abs())
    assert (errors[1:] <= errors[:-1] * steps.unsqueeze(-1) * (1 + 1e-12) + 1e-13).all()
    report = theory.check(layer, Q)
    torch.testing.assert_close(report.error_factor, steps.prod().expand(40), rtol=1e-6, atol=0)
    assert (errors[-1] <= errors[0] * report.error_factor * (1 + 1e-6)).all()

    energy = _constrained_energy(Q, 2 * b, g)
    ys = UnrolledNAG(k, 1 / L, MU, prox=g)(Q, 2 * b, return_trajectory=True)
    start = energy(ys[0]) - energy(y_star) + MU / 2 * errors[0].square()
    bound = (1 - math.sqrt(MU / L)) ** torch.arange(k + 1, dtype=torch.float64).unsqueeze(-1) * start
    assert (energy(ys) - energy(y_star) <= bound + 1e-13).all()


@pytest.mark.parametrize("g", PROXES, ids=lambda g: type(g).__name__)
def test_check_and_recommend_know_a_prox(g):
    (Q,), _, b = random_quadratic("dense", (40,), 6, dtype=torch.float64)
    y_star = UnrolledNAG(3000, 1.0, MU, prox=g)(Q, 2 * b)
    for layer, free in (
        (UnrolledNAG(60, 1.2, MU, prox=g), UnrolledNAG(60, 1.2, MU)),
        (UnrolledMomentum.heavy_ball(60, 1.0, 0.4, prox=g), UnrolledMomentum.heavy_ball(60, 1.0, 0.4)),
    ):
        report, expected = theory.check(layer, Q), theory.check(free, Q)
        assert torch.equal(report.stable, expected.stable)
        assert torch.equal(report.rate, expected.rate)
        assert report.error_factor.isnan().all()
        assert "no bound of the error factor" in str(report)
        # the rate of the long run: once the same entries are free
        errors = (layer(Q, 2 * b, return_trajectory=True) - y_star).norm(dim=-1)
        assert (errors[60] <= errors[30] * report.rate**30 * 20 + 1e-12).all()
    advice = theory.recommend(MU, L, 30, "over", prox=g)
    assert advice.algorithm == "nag"
    assert advice.step_size == 1 / L
    assert type(advice.make_layer().prox) is type(g)
    assert theory.recommend(MU, L, 1, "over", prox=g).make_layer()(Q, b).isfinite().all()


def test_check_of_energies_that_are_not_convex():
    report = theory.check(UnrolledGD(3, 1.0), Diagonal(torch.tensor([[0.5, -0.1], [0.5, 0.1], [math.nan, 0.5]])))
    assert report.stable.tolist() == [False, True, False]


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_error_of_a_schedule_is_that_of_the_closed_form(algorithm, regime):
    schedule = schedules.gd(20, PHI) if algorithm == "gd" else schedules.nag(20, PHI, MU)
    k = torch.arange(1, 21)
    torch.testing.assert_close(
        theory.schedule_error(schedule, regime, MU, L, gap_factor=0.3)[1:],
        theory.predicted_error(algorithm, k, regime, PHI, MU, gap_factor=0.3),
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("regime", REGIMES)
def test_recommend_gives_a_layer_that_is_safe(regime):
    (Q,), _, _ = random_quadratic("dense", (5,), 6, dtype=torch.float64)
    for budget in (1, 4, 30):
        advice = theory.recommend(MU, L, budget, regime)
        assert 1 <= advice.num_steps <= budget
        layer = advice.make_layer()
        assert isinstance(
            layer, {"gd": UnrolledGD, "nag": UnrolledNAG, "chebyshev": UnrolledMomentum}[advice.algorithm]
        )
        report = theory.check(layer, Q)
        assert report.stable.all()
        torch.testing.assert_close(report.error_factor.max().item(), advice.error_factor, rtol=1e-6, atol=0)
        of_two = theory.recommend(MU, L, budget, regime, algorithms=ALGORITHMS)
        layer = of_two.make_layer()
        assert theory.check(layer, Q).in_stable_region.all()
        # a learned step size held in the region can start at the advice
        type(layer)(of_two.num_steps, of_two.step_size, learn_step_size=True, stable_region=(MU, L))
        # no choice within the budget is predicted to be better by more than the tolerance
        for algorithm in ALGORITHMS:
            phi = 0.99 * theory.stable_region(algorithm, MU, L)[1]
            k = torch.arange(1, budget + 1)
            others = theory.predicted_error(algorithm, k, regime, phi, MU, gap_factor=GAP_FACTORS[regime])
            assert of_two.predicted_error <= 2 * others.min() * SLACK
        schedule = schedules.chebyshev(budget, MU, L)
        chebyshev = theory.schedule_error(schedule, regime, MU, L, gap_factor=GAP_FACTORS[regime])[1:]
        assert advice.predicted_error <= 2 * min(of_two.predicted_error, chebyshev.min()) * SLACK
    # a network that adds nothing: as deep as need be; one that adds much: the gap stops it early
    deep, early = (theory.recommend(MU, L, 60, "over", gap_factor=g, tolerance=0) for g in (0.0, 2.0))
    assert deep.algorithm == "chebyshev"
    assert deep.num_steps == 60
    assert early.num_steps < 10
    assert "leave" in early.reason


REFUSALS = [
    (lambda: theory.convergence_rate("adam", 3, 1.0, 0.1), ValueError, "algorithm: expected one of"),
    (lambda: theory.convergence_rate("gd", -1, 1.0, 0.1), ValueError, "num_steps"),
    (lambda: theory.convergence_rate("gd", torch.tensor([1.5]), 1.0, 0.1), TypeError, "num_steps"),
    (lambda: theory.convergence_rate("gd", 3, 1.0, 0.0), ValueError, "mu: expected a number > 0"),
    (lambda: theory.convergence_rate("gd", 3, 11.0, 0.1), ValueError, "step_size: expected a value in the stable"),
    (lambda: theory.sensitivity("gd", 3, "1", 0.1), TypeError, "smallest_step_size"),
    (lambda: theory.stable_region("gd", 2.0, 1.0), ValueError, "mu, L: expected 0 < mu <= L"),
    (lambda: theory.rnn_contraction(gd_cell(2, 1.0)), ValueError, "either Q or both"),
    (lambda: theory.rnn_contraction(3, mu=0.1, L=1.0), TypeError, "weights"),
    (lambda: theory.rnn_stability((torch.ones(2), None, [], None), 3, mu=0.1, L=1.0), ValueError, "matrix for W1"),
    (lambda: theory.rnn_sensitivity(gd_cell(2, 1.0), 3, mu=0.1, L=1.0, radius=-1.0), ValueError, "radius"),
    (lambda: theory.measure_sensitivity("gd", 3, 5.0, 0.1, 1.0), ValueError, "smallest_step_size"),
    (lambda: theory.fit_order(torch.arange(1, 3), torch.ones(2)), ValueError, "length ≥ 3"),
    (lambda: theory.fit_order(torch.arange(3), torch.ones(3)), ValueError, "positive"),
    (lambda: theory.problem_constants(torch.ones(3), 0.1), ValueError, r"b: expected shape \[n, d\]"),
    (
        lambda: theory.check_lemmas(
            torch.ones(2), torch.ones(3, 2, 2), torch.ones(3, 2, 2), 0.1, mu=0.1, L=1.0, sigma_b=1.0, M=1.0
        ),
        ValueError,
        "one matrix for each of the 2 losses",
    ),
    (
        lambda: theory.model_bound(
            "gd", 3, 1.0, num_samples=0, radius=0.0, log_covering=0.0, dim=2, mu=0.1, L=1.0, sigma_b=1.0, M=1.0
        ),
        ValueError,
        "num_samples",
    ),
    (lambda: theory.log_covering_parametric(0.0, 1, 1.0, 1.0), ValueError, "radius"),
    (lambda: theory.predicted_gap("gd", 3, "fine", 1.0, 0.1), ValueError, "regime: expected one of"),
    (lambda: theory.rademacher_complexity(torch.ones(3)), ValueError, r"losses: expected shape \[m, n\]"),
    (lambda: theory.rademacher_complexity(torch.ones(2, 40), num_signs=None), ValueError, "n ≤ 16"),
    (
        lambda: theory.local_rademacher_complexity(torch.ones(2, 4), 1.0, second_moments=torch.ones(3)),
        ValueError,
        "second_moments",
    ),
    (lambda: theory.cover(torch.ones(2, 3), 1.0), ValueError, "distances"),
    (lambda: theory.spectrum_bounds(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), ValueError, "Q: expected symmetric"),
    (lambda: theory.spectrum_bounds(torch.eye(2), method="power"), ValueError, "method"),
    (lambda: theory.spectrum_bounds([[1.0]]), TypeError, "Q: expected a tensor"),
    (lambda: theory.check(torch.nn.Linear(2, 2), torch.eye(2)), TypeError, "layer: expected an UnrolledGD"),
    (lambda: theory.recommend(1.0, 0.1, 5, "under"), ValueError, "mu, L"),
    (lambda: theory.recommend(0.1, 1.0, 0, "under"), ValueError, "num_steps: expected at least 1"),
    (lambda: theory.recommend(0.1, 1.0, 5, "normal"), ValueError, "regime"),
    (lambda: theory.recommend(0.1, 1.0, 5, "over", tolerance=-0.1), ValueError, "tolerance"),
    (
        lambda: theory.recommend(0.1, 1.0, 5, "over", algorithms=("chebyshev",), prox=prox.L1(0.1)),
        ValueError,
        "with a prox, which Chebyshev",
    ),
    (lambda: theory.recommend(0.1, 1.0, 5, "over", algorithms=("adam",)), ValueError, "algorithms: expected some of"),
    (lambda: theory.recommend(0.1, 1.0, 5, "over", gap_factor=-1.0), ValueError, "gap_factor"),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS, ids=[message for *_, message in REFUSALS])
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# the command


def run_command(*options):
    command = pytest.importorskip("unrolled_kernels.experiments.theory.command")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = parser.parse_args([*map(str, options)])
    return arguments.run(arguments)


def results_frame():
    pd = pytest.importorskip("pandas")
    rows = []
    for hidden, algorithm, k, seed in itertools.product((0, 16, 32), ALGORITHMS, (1, 2, 10, 30), (100, 101)):
        cvg = theory.convergence_rate(algorithm, k, PHI, MU).item()
        regime = {0: "under", 16: "about_right", 32: "over"}[hidden]
        rows.append(
            {
                "hidden": hidden,
                "optimizer": "adam",
                "algorithm": algorithm,
                "num_steps": k,
                "seed": seed,
                "learning_rate": 1e-2,
                "train": 10 * cvg,
                "test": 11 * cvg,
                "qfro2_test": 0.1 + cvg,
                "step_size": PHI,
                "gap": theory.predicted_gap(algorithm, k, regime, PHI, MU).item(),
                "test_squared": 130 * cvg**2,
                "true_train": 10 * cvg,
                "true_test": 10 * cvg,
            }
        )
    return pd.DataFrame(rows)


def test_command_writes_its_files_and_continues(tmp_path, capsys):
    pd = pytest.importorskip("pandas")
    results_frame().to_parquet(tmp_path / "trained.parquet")
    options = ["--out", tmp_path / "run", "--samples", 64, "--num-steps", 30, "--results", tmp_path / "trained.parquet"]
    assert run_command(*options) == 0
    printed = capsys.readouterr().out
    assert "| NAG | 10 | 0.092992 | 0.092992 | 9.070 | 9.070 |" in printed
    assert "| Lemma 4.1 | all | both | left ≤ right | in 100% of 48 models" in printed
    assert "| Lemma 4.2 |" in printed
    for name in ("figure2_trends.png", "theorem_bound.png", "gaps.png"):
        assert str(tmp_path / "run" / name) in printed
        assert (tmp_path / "run" / name).stat().st_size > 10_000
    assert "## Table 1" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["settings"]["mu"] == MU
    table = pd.read_parquet(tmp_path / "run" / "results.parquet")
    assert len(table) == 2 * 31
    # finished measurements are not made again
    marked = table.assign(convergence_measured=0.5)
    marked.to_parquet(tmp_path / "run" / "results.parquet")
    assert run_command(*options) == 0
    assert "| NAG | 10 | 0.092992 | 0.500000 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mu", "2"], "--mu, --L"),
        (["--step-size", "1.5"], "--step-size"),
        (["--num-steps", "0"], "--num-steps"),
        (["--device", "abacus"], "--device"),
        (["--results", "/nowhere"], "/nowhere: no such file"),
    ],
    ids=["mu", "step-size", "num-steps", "device", "results"],
)
def test_command_refuses(options, message, tmp_path):
    with pytest.raises((ValueError, OSError), match=message):
        run_command("--out", tmp_path, *options)


def test_results_of_another_kind_are_refused(tmp_path):
    pd = pytest.importorskip("pandas")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "results.parquet")
    with pytest.raises(ValueError, match="lacks the columns algorithm"):
        run_command("--out", tmp_path / "out", "--results", tmp_path)
    (tmp_path / "results.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(ValueError, match="not a readable results table"):
        run_command("--out", tmp_path / "out", "--results", tmp_path)


def _run(algorithm, Q, b, step_size, num_steps):
    if algorithm == "gd":
        return F.gradient_descent(Q, b, step_size, num_steps)
    return F.nesterov(Q, b, step_size, MU, num_steps)
