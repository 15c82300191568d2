"""The modules: what they compute, what they learn, what they keep in a stable region, and how they survive a save."""

import pytest
import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels import schedules, theory
from unrolled_kernels.testing import random_quadratic


@pytest.fixture
def problem():
    (Q,), _, b = random_quadratic("dense", (4,), 5, dtype=torch.float64)
    return Q, b


def nesterov_as_in_the_paper(Q, b, step_size, mu, k):
    """Eq. 9 word for word, with the two sequences y and z."""
    beta = (1 - (mu * step_size) ** 0.5) / (1 + (mu * step_size) ** 0.5)
    y = z = torch.zeros_like(b)
    for _ in range(k):
        y_next = z - step_size * (torch.einsum("bij,bj->bi", Q, z) + b)
        z = y_next + beta * (y_next - y)
        y = y_next
    return y


def test_gd_is_the_papers(problem):
    Q, b = problem
    y = torch.zeros_like(b)
    for _ in range(7):
        y = y - 0.8 * (torch.einsum("bij,bj->bi", Q, y) + b)
    torch.testing.assert_close(uk.UnrolledGD(7, 0.8)(Q, b), y)


def test_nag_is_the_papers(problem):
    Q, b = problem
    torch.testing.assert_close(uk.UnrolledNAG(7, 0.8, 0.1)(Q, b), nesterov_as_in_the_paper(Q, b, 0.8, 0.1, 7))


def test_nag_takes_mu_from_each_sample(problem):
    Q, b = problem
    Q = Q.clone().requires_grad_()
    mu = torch.linalg.eigvalsh(Q.detach())[:, :1]
    y = uk.UnrolledNAG(7, 0.8, mu=None)(Q, b)
    torch.testing.assert_close(y, nesterov_as_in_the_paper(Q, b, 0.8, mu, 7))
    expected = torch.autograd.grad(nesterov_as_in_the_paper(Q, b, 0.8, mu, 7).sum(), Q)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), Q), expected)
    for structure in ("diagonal", "spectral"):
        leaves, make_Q, _ = random_quadratic(structure, (4,), 5, dtype=torch.float64)
        structured = make_Q(*leaves)
        actual = F.nesterov(structured, b, 0.8, None, 7)
        torch.testing.assert_close(actual, F.nesterov(structured.to_dense(), b, 0.8, None, 7))


def test_mu_of_what_is_not_positive_definite():
    """The symmetric part's, and a small positive number where that is not one: no NaN, and the theory says so."""
    skewed = torch.tensor([[1.0, 0.8], [0.0, 1.0]]).double()
    b = torch.ones(2).double()
    mu = torch.linalg.eigvalsh((skewed + skewed.mT) / 2)[0]
    torch.testing.assert_close(F.nesterov(skewed, b, 0.3, None, 4), F.nesterov(skewed, b, 0.3, mu.item(), 4))
    layer = uk.UnrolledNAG(4, 0.3, mu=None)
    for low in (-0.1, 0.0):
        q = torch.tensor([low, 1.0]).double()
        for Q in (torch.diag(q), uk.Diagonal(q), uk.Spectral(q, torch.eye(2).double())):
            y = layer(Q, b)
            torch.testing.assert_close(y, F.nesterov(Q, b, 0.3, 1e-6, 4))
            assert y.isfinite().all()
            assert not theory.check(layer, Q).stable


def test_structures_agree_with_dense():
    for structure in ("diagonal", "spectral"):
        leaves, make_Q, b = random_quadratic(structure, (4,), 6, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in leaves]
        Q = make_Q(*leaves)
        y0 = torch.randn_like(b)
        for k in (0, 1, 9):
            structured, dense = (
                F.nesterov(q, b, 0.6, 0.1, k, y0=y0, return_trajectory=True) for q in (Q, Q.to_dense())
            )
            torch.testing.assert_close(structured, dense)
        torch.testing.assert_close(Q.matvec(b), (Q.to_dense() @ b.unsqueeze(-1)).squeeze(-1))
        torch.testing.assert_close(Q.solve(b), torch.linalg.solve(Q.to_dense(), b))
        low, high = Q.spectrum_bounds()
        assert (low.min().item(), high.max().item()) == pytest.approx((0.1, 1.0))
        # λ (or q) alone: R is data in a spectral energy, free variations of it leave the orthogonal matrices
        grads = (
            torch.autograd.grad(F.nesterov(q, b, 0.6, 0.1, 9, y0=y0).square().sum(), leaves[0])[0]
            for q in (Q, Q.to_dense())
        )
        torch.testing.assert_close(*grads)


def test_gradient_of_eigenvectors_along_rotations():
    """R̄ agrees with the dense path in every direction that keeps R orthogonal: R exp(tS), S skew."""
    (values, vectors), _, b = random_quadratic("spectral", (4,), 6, dtype=torch.float64)
    y0 = torch.randn_like(b)
    skew = torch.randn(4, 6, 6, dtype=torch.float64)
    skew = skew - skew.mT
    t = torch.zeros((), dtype=torch.float64, requires_grad=True)
    rotated = vectors @ torch.matrix_exp(t * skew)
    slopes = []
    for Q in (uk.Spectral(values, rotated), uk.Spectral(values, rotated).to_dense()):
        y = F.nesterov(Q, b, 0.6, 0.1, 9, y0=y0, return_trajectory=True)
        slopes.append(torch.autograd.grad(y.pow(3).sum(), t, retain_graph=True)[0])
    torch.testing.assert_close(*slopes)


def test_minimize_is_where_the_gradient_vanishes():
    for structure in ("dense", "diagonal", "spectral"):
        leaves, make_Q, b = random_quadratic(structure, (2, 3), 5, dtype=torch.float64)
        leaves = [x.requires_grad_() for x in leaves]
        Q = make_Q(*leaves)
        y = F.minimize(Q, b)
        dense = Q if structure == "dense" else Q.to_dense()
        torch.testing.assert_close((dense @ y.unsqueeze(-1)).squeeze(-1), -b)
        torch.testing.assert_close(y, F.nesterov(Q, b, 1.0, 0.1, 400))
        torch.autograd.grad(y.sum(), leaves[0])


def test_minimize_in_half_precision():
    (Q,), _, b = random_quadratic("dense", (3,), 5, dtype=torch.float32)
    y = F.minimize(Q.bfloat16(), b.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), F.minimize(Q.bfloat16().float(), b.bfloat16().float()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("layer", "schedule"),
    [
        (uk.UnrolledMomentum.gd(6, 0.8), schedules.gd(6, 0.8)),
        (uk.UnrolledMomentum.nag(6, 0.8, 0.1), schedules.nag(6, 0.8, 0.1)),
        (uk.UnrolledMomentum.heavy_ball(6, 0.8, 0.4), schedules.heavy_ball(6, 0.8, 0.4)),
        (uk.UnrolledMomentum.fista(6, 0.8), schedules.fista(6, 0.8)),
        (uk.UnrolledMomentum.chebyshev(6, 0.1, 1.0, learnable=False), schedules.chebyshev(6, 0.1, 1.0)),
    ],
    ids=["gd", "nag", "heavy_ball", "fista", "chebyshev"],
)
def test_momentum_layer_starts_on_its_schedule(problem, layer, schedule):
    Q, b = problem
    expected = F.momentum(Q, b, *schedule, 6)
    torch.testing.assert_close(layer(Q, b), expected, rtol=1e-6, atol=1e-6)
    assert len(list(layer.parameters())) == (0 if "fixed" in repr(layer) else 3)


def test_schedules_coincide_with_the_layers(problem):
    Q, b = problem
    torch.testing.assert_close(F.momentum(Q, b, *schedules.gd(6, 0.8), 6), uk.UnrolledGD(6, 0.8)(Q, b))
    torch.testing.assert_close(F.momentum(Q, b, *schedules.nag(6, 0.8, 0.1), 6), uk.UnrolledNAG(6, 0.8, 0.1)(Q, b))


def test_chebyshev_reaches_its_optimal_factor():
    """After k steps no eigenvalue in [μ, L] keeps more than 1/T_k((L+μ)/(L-μ)) of its error, and one keeps that."""
    mu, L, k = 0.1, 1.0, 9
    q = torch.linspace(mu, L, 4001, dtype=torch.float64).reshape(-1, 1)
    b = torch.ones_like(q)
    y = F.momentum(uk.Diagonal(q), b, *schedules.chebyshev(k, mu, L), k)
    factor = ((y + b / q) * q).abs().max().item()
    optimum = 1 / torch.special.chebyshev_polynomial_t(torch.tensor((L + mu) / (L - mu), dtype=torch.float64), k).item()
    assert factor == pytest.approx(optimum, rel=1e-9)
    for phi, beta, gamma in (schedules.chebyshev(4, 1.0, 1.0), schedules.chebyshev(0, 0.1, 1.0)):
        assert phi.isfinite().all()
        assert beta.isfinite().all()
        assert len(phi) == len(beta) == len(gamma)


def test_fista_momentum_is_the_published_sequence():
    _, beta, gamma = schedules.fista(5, 1.0)
    # s_1 ... s_5 = 1, 1.6180, 2.1935, 2.7498, 3.2949: there is no y_0 - y_(-1) for β_0, and β_1 = (s_1 - 1)/s_2
    torch.testing.assert_close(
        beta, torch.tensor([0.0, 0.0, 0.28175, 0.43402, 0.53106], dtype=torch.float64), rtol=1e-4, atol=0
    )
    torch.testing.assert_close(beta, gamma)


def test_learned_step_size_trains(problem):
    Q, b = problem
    target = F.minimize(Q, b)
    for layer in (
        uk.UnrolledGD(5, 0.3, learn_step_size=True),
        uk.UnrolledGD(5, 0.3, learn_step_size=True, per_step=True),
        uk.UnrolledNAG(5, 0.3, learn_step_size=True, learn_mu=True),
        uk.UnrolledMomentum.heavy_ball(5, 0.3, 0.1),
    ):
        optimizer = torch.optim.Adam(layer.parameters(), 0.02)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = (layer(Q, b) - target).square().sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(("cls", "largest"), [(uk.UnrolledGD, 2 / 1.1), (uk.UnrolledNAG, 4 / 3.1)], ids=["gd", "nag"])
def test_stable_region_holds_the_step_size(problem, cls, largest):
    Q, b = problem
    layer = cls(20, 1.0, learn_step_size=True, stable_region=(0.1, 1.0))
    assert layer.max_step_size == pytest.approx(largest)
    assert layer.step_size.item() == pytest.approx(1.0)
    optimizer = torch.optim.SGD(layer.parameters(), 100.0)
    for _ in range(30):
        optimizer.zero_grad()
        # a loss that pushes the step size up without end
        (-layer.step_size + 0.0 * layer(Q, b).sum()).backward()
        optimizer.step()
    # float32 rounds the end of the open interval
    assert 0 < layer.step_size.item() <= largest * (1 + 1e-6)
    assert layer(Q, b).isfinite().all()
    assert f"step_size={layer.step_size.item():.6g} (learned)" in repr(layer)
    with pytest.raises(ValueError, match=r"step_size: expected a value inside the stable region \(0, "):
        cls(20, 2.0, stable_region=(0.1, 1.0))
    per_step = cls(6, 1.0, learn_step_size=True, per_step=True, stable_region=(0.1, 1.0))
    assert per_step.step_size.shape == (6,)


def computed():
    """Layers with a value that is held in other coordinates: its name, the parameter's, and a value to assign."""
    region = {"learn_step_size": True, "stable_region": (0.1, 2.0)}
    return [
        (uk.UnrolledGD(4, 0.5, **region), "step_size", "step_size_logit", 0.1),
        (uk.UnrolledGD(4, 0.5, per_step=True, **region), "step_size", "step_size_logit", torch.linspace(0.1, 0.4, 4)),
        (uk.UnrolledNAG(4, 0.5, **region), "step_size", "step_size_logit", torch.tensor(0.2)),
        (uk.UnrolledNAG(4, 0.5, learn_mu=True), "mu", "mu_log", 0.3),
        (uk.UnrolledNAG(4, 0.5, per_step=True, learn_mu=True, **region), "step_size", "step_size_logit", 0.1),
    ]


@pytest.mark.parametrize("case", range(5))
def test_a_value_in_other_coordinates_is_assigned_as_what_it_is(problem, case):
    layer, name, held, value = computed()[case]
    parameter = getattr(layer, held)
    setattr(layer, name, value)
    assert getattr(layer, held) is parameter
    assert held in layer.state_dict()
    torch.testing.assert_close(getattr(layer, name).detach(), torch.as_tensor(value).expand(parameter.shape))
    # training goes on from there
    layer(*(x.float() for x in problem)).sum().backward()
    assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("case", range(5))
def test_a_computed_value_refuses_to_be_written_into(case):
    layer, name, held, _ = computed()[case]
    before = getattr(layer, held).detach().clone()
    writes = [
        lambda x: x.fill_(0.2),
        lambda x: x.copy_(torch.tensor(0.2)),
        lambda x: x.__setitem__(..., 0.2),
        lambda x: x.__iadd__(1),
        lambda x: torch.nn.init.constant_(x, 0.2),
    ]
    for write in writes:
        for grad in (True, False):
            with torch.set_grad_enabled(grad), pytest.raises(RuntimeError, match="assign to the layer's attribute"):
                write(getattr(layer, name))
    assert torch.equal(getattr(layer, held), before)
    # what is computed from it is a tensor like any other
    twice = getattr(layer, name) * 2
    assert type(twice) is torch.Tensor
    twice.detach().fill_(1.0)
    assert f"{getattr(layer, name).flatten()[0]:.3f}"


def test_assigned_values_are_checked():
    layer = uk.UnrolledGD(4, 0.5, learn_step_size=True, stable_region=(0.1, 2.0))
    with pytest.raises(ValueError, match=r"step_size: expected a value inside the stable region \(0, 0.952381\)"):
        layer.step_size = 1.0
    fixed = uk.UnrolledNAG(4, 0.5, stable_region=(0.1, 2.0))
    with pytest.raises(ValueError, match=r"step_size: expected a value inside the stable region \(0, 0.655738\)"):
        fixed.step_size = 1.0
    fixed.step_size = 0.6
    assert fixed.step_size == 0.6
    with pytest.raises(
        ValueError, match=r"step_size: shape \[3\] does not broadcast to the shape that the layer learns"
    ):
        layer.step_size = torch.full((3,), 0.5)
    layer = uk.UnrolledNAG(4, 0.5, learn_mu=True)
    with pytest.raises(ValueError, match="mu: expected a number > 0, got 0"):
        layer.mu = 0
    with pytest.raises(TypeError, match="mu: expected a float or a floating-point tensor, got None"):
        layer.mu = None


def test_learned_values_keep_their_dtype_and_device():
    mu = torch.tensor(0.1, dtype=torch.float64)
    layer = uk.UnrolledNAG(3, mu, mu, learn_step_size=True, learn_mu=True)
    assert layer.step_size.dtype == layer.mu_log.dtype == layer.mu.dtype == torch.float64
    assert layer.mu.item() == pytest.approx(0.1, rel=1e-15)
    layer = uk.UnrolledNAG(3, mu, mu, learn_step_size=True, learn_mu=True, stable_region=(0.1, 1.0))
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    region = {"learn_step_size": True, "per_step": True, "stable_region": (0.1, 1.0)}
    for layer in (
        uk.UnrolledNAG(3, mu, mu, learn_mu=True, **region),
        uk.UnrolledGD(3, mu, per_step=True),
        uk.UnrolledMomentum(3, mu, mu, mu),
        uk.UnrolledGD(3, mu, prox=uk.prox.L1(mu), learn_prox=True),
    ):
        assert {x.dtype for x in layer.state_dict().values()} == {torch.float64}


def test_repr_on_the_meta_device():
    with torch.device("meta"):
        made = uk.UnrolledNAG(3, 0.5, learn_step_size=True, learn_mu=True)
    for layer in (made, uk.UnrolledNAG(3, 0.5, learn_step_size=True, learn_mu=True).to("meta")):
        assert "step_size=[] (learned), mu=[] (learned)" in repr(layer)
    make = (
        lambda: uk.UnrolledGD(3, 0.5, learn_step_size=True, stable_region=(0.1, 1.0)),
        lambda: uk.UnrolledMomentum.fista(3, 0.5, prox=uk.prox.L1(torch.tensor(0.1))),
        lambda: uk.UnrolledRNN(3, 4, stable_region=(0.1, 1.0)),
    )
    for layer in make:
        with torch.device("meta"):
            assert repr(layer()) == repr(layer().to("meta"))


@pytest.mark.parametrize("swap", [False, True], ids=["data", "swap"])
def test_conversion_while_a_finished_graph_is_referenced(swap):
    """As torch's own modules: an output that is kept does not stand in the way of ``half()``."""
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        layers = [uk.UnrolledGD(4, 0.5, learn_step_size=True), uk.UnrolledMomentum.fista(4, 0.3), uk.UnrolledRNN(3, 5)]
        region = {"stable_region": (0.1, 1.0)}
        layers += [
            uk.UnrolledNAG(4, 0.5, learn_step_size=True, learn_mu=True, **region),
            uk.UnrolledRNN(3, 5, **region),
        ]
        for layer in layers:
            b = torch.ones(2, 5, requires_grad=True)
            y = layer(0.5 * torch.eye(5).expand(2, 5, 5), b)
            y.sum().backward()
            layer.half()
            assert {p.dtype for p in layer.parameters()} == {torch.float16}
            assert layer(0.5 * torch.eye(5).half().expand(2, 5, 5), b.half()).dtype == torch.float16
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_warm_start_and_trajectory(problem):
    Q, b = problem
    layer = uk.UnrolledNAG(6, 0.8)
    y0 = torch.randn_like(b)
    ys = layer(Q, b, y0=y0, return_trajectory=True)
    assert ys.shape == (7, *b.shape)
    assert torch.equal(ys[0], y0)
    torch.testing.assert_close(ys[-1], layer(Q, b, y0=y0))


def test_no_steps_returns_the_start(problem):
    Q, b = problem
    y0 = torch.randn_like(b)
    y = uk.UnrolledGD(0)(Q, b, y0=y0)
    assert torch.equal(y, y0)
    assert y.data_ptr() != y0.data_ptr()
    assert not uk.UnrolledGD(0)(Q, b).any()


def test_unbatched(problem):
    Q, b = problem
    layer = uk.UnrolledNAG(6, 0.8)
    torch.testing.assert_close(layer(Q[1], b[1]), layer(Q, b)[1])


def test_fixed_floats_are_exact_in_double(problem):
    """A fixed step size never passes through float32 on its way into a float64 energy."""
    Q, b = problem
    torch.testing.assert_close(uk.UnrolledGD(3, 0.1)(Q, b), F.gradient_descent(Q, b, 0.1, 3), rtol=0, atol=0)
    exact = b * 0
    for _ in range(3):
        exact = exact - 0.1 * ((Q @ exact.unsqueeze(-1)).squeeze(-1) + b)
    torch.testing.assert_close(uk.UnrolledGD(3, 0.1)(Q, b), exact, rtol=1e-14, atol=1e-15)


def test_repr_says_what_is_learned():
    assert repr(uk.UnrolledGD(3, 0.5)) == "UnrolledGD(num_steps=3, step_size=0.5, backend='auto')"
    assert "backward='implicit', backend='auto'" in repr(uk.UnrolledMomentum.fista(3, 0.5, backward="implicit"))
    assert "backward_steps=2, backend='auto'" in repr(uk.UnrolledRNN(3, 4, backward_steps=2))
    assert "step_size=0.5 (learned), mu=0.1" in repr(uk.UnrolledNAG(3, 0.5, learn_step_size=True))
    assert "step_size=[3] (learned)" in repr(uk.UnrolledGD(3, 0.5, learn_step_size=True, per_step=True))
    assert ", stable_region=(0.1, 2.0), " in repr(uk.UnrolledGD(3, 0.5, stable_region=(0.1, 2)))
