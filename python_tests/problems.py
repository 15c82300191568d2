"""Problems to try an op on, the one way to compare its backends, and the laws that every op keeps."""

import math

import torch

import unrolled_kernels as uk
import unrolled_kernels.functional as F
from unrolled_kernels.ops.rnn.reference import weight_shapes
from unrolled_kernels.testing import assert_as_close_as_eager, poisoned_memory, random_quadratic

DTYPES = {"f64": torch.float64, "f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Problem:
    """Leaf tensors of one call, and the call as a function of them on any backend and in any dtype."""

    # leaves that are held in the dtype that is computed in
    in_compute_dtype: tuple = ()

    def __init__(self, structure, batch, d, k, *, shared=False, trajectory=False, device="cpu", seed=0):
        self.k, self.trajectory, self.device, self.cotangent = k, trajectory, device, None
        self.gradients = {}  # options that say which
        leaves, self.make_Q, b = random_quadratic(
            structure, batch, d, symmetric=False, shared=shared, dtype=torch.float64, seed=seed
        )
        self.generator = torch.Generator().manual_seed(seed + 1)
        self.leaves = {}
        self.add({f"Q{i}": x for i, x in enumerate(leaves)} | {"b": b})

    def add(self, leaves):
        """Leaves, rounded once for all dtypes: the reference sees what the low-precision run sees."""
        self.leaves |= {name: x.bfloat16().double().to(self.device) for name, x in leaves.items()}

    def normal(self, *shape):
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def uniform(self, *shape):
        return torch.rand(*shape, generator=self.generator, dtype=torch.float64)

    def cast(self, dtype):
        compute = torch.promote_types(dtype, torch.float32)
        return {n: x.to(compute if n.startswith(self.in_compute_dtype) else dtype) for n, x in self.leaves.items()}

    def arguments(self, leaves):
        """Q and b, and the options of every op."""
        Q = self.make_Q(*(x for n, x in leaves.items() if n.startswith("Q")))
        return (Q, leaves["b"]), {"y0": leaves.get("y0"), "return_trajectory": self.trajectory, **self.gradients}

    def call(self, backend, leaves):
        raise NotImplementedError

    def scale(self, name, exact):
        """Size of the terms that the leaf's gradient sums, where they may cancel; 0 where they do not."""
        return 0.0

    def run(self, backend, dtype, cotangent=None, without=(), create_graph=False):
        """The output and the gradient of every leaf not in ``without``, as ``{name: tensor}``."""
        leaves = {n: x.detach().clone().requires_grad_(n not in without) for n, x in self.cast(dtype).items()}
        y = self.call(backend, leaves)
        if self.cotangent is None:
            generator = torch.Generator().manual_seed(7)
            self.cotangent = torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16().double()
        g = self.cotangent.to(y) if cotangent is None else cotangent(y)
        wanted = [n for n in leaves if n not in without]
        if not y.requires_grad:
            return {"y": y.detach()} | {n: None for n in wanted}
        grads = torch.autograd.grad(y, [leaves[n] for n in wanted], g, allow_unused=True, create_graph=create_graph)
        return {"y": y.detach()} | {n: g if g is None else g.detach() for n, g in zip(wanted, grads, strict=True)}


class MomentumProblem(Problem):
    """Gradient descent or momentum; ``form`` says how the coefficients vary, ``prox`` which map ends a step."""

    in_compute_dtype = ("phi", "beta", "gamma", "lower", "upper", "weight", "threshold")

    def __init__(self, structure, batch, d, k, *, method="momentum", form="both", warm=True, prox=None, **options):
        super().__init__(structure, batch, d, k, **options)
        self.method, self.prox = method, prox
        shape = {"scalar": (), "step": (k,), "sample": (*batch, 1), "both": (*batch, k)}[form]
        if warm:
            self.add({"y0": self.normal(*batch, d)})
        self.add({"phi": 0.3 + 0.7 * self.uniform(shape)})
        if method == "momentum":
            self.add({"beta": 0.7 * self.uniform(shape), "gamma": 0.7 * self.uniform(shape)})
        if prox in ("box", "lower"):
            self.add({"lower": -0.3 * self.uniform(*batch, d)})
        if prox == "box":
            self.add({"upper": 0.3 * self.uniform(d)})
        if prox == "l1":
            self.add({"weight": 0.2 * self.uniform(*batch, d)})
        if prox == "soft_threshold":
            self.add({"threshold": 0.1 * self.uniform(shape)})

    def call(self, backend, leaves):
        arguments, options = self.arguments(leaves)
        options["backend"] = backend
        if self.prox is not None:
            cls = {"l1": uk.prox.L1, "soft_threshold": uk.prox.SoftThreshold}.get(self.prox, uk.prox.Box)
            options["prox"] = cls(**{n: leaves[n] for n in cls.__dataclass_fields__ if n in leaves})
        if self.method == "gd":
            return F.gradient_descent(*arguments, leaves["phi"], self.k, **options)
        return F.momentum(*arguments, leaves["phi"], leaves["beta"], leaves["gamma"], self.k, **options)

    def scale(self, name, exact):
        if name not in ("phi", "beta", "gamma", "threshold"):
            return 0.0
        # a coefficient's gradient sums wᵀz + aᵀb over samples and steps, which cancels near the minimizer, where z
        # is up to L/μ = 10 times as long as b, and by chance elsewhere; autograd forms the small Qz + b first.
        # The terms aᵀb are those of b̄ = -Σ φ_t a
        terms = 0.0 if exact.get("b") is None else (exact["b"] * self.leaves["b"]).abs().sum().item()
        if name == "threshold" and exact.get("b") is not None:
            # a sum of ± a, as b̄ is one of φ_t a
            terms = (exact["b"].abs().sum() / self.leaves["phi"].min()).item()
        return max(10 * exact[name].abs().max().item() if exact[name].numel() else 0.0, terms)


def canonical_structure(structure, leaves):
    """``(matrix, diagonal, observed)`` of a structure's leaves as the ops of ``momentum`` take them."""
    matrix = {"dense": leaves[0], "spectral": leaves[-1]}.get(structure)
    if matrix is not None and matrix.dim() == 2:
        matrix = matrix.unsqueeze(0)
    return matrix, None if structure == "dense" else leaves[0], leaves[1] if structure == "tikhonov" else None


def random_weights(hidden_dims, d, generator):
    """W₁, W₂, W² … Wᴸ, V that keep the size of the states about what it is."""
    for i, (rows, columns) in enumerate(weight_shapes(hidden_dims, d)):
        inputs = 2 * columns if i < 2 else columns
        yield torch.randn(rows, columns, generator=generator, dtype=torch.float64) * (1.5 / inputs) ** 0.5


def nested(matrices):
    """``(W1, W2, [W^2 … W^L], V)``."""
    W1, W2, *inner, V = matrices
    return W1, W2, inner, V


class RnnProblem(Problem):
    """The RNN with layers of ``hidden_dims``."""

    in_compute_dtype = ("W",)

    def __init__(self, structure, batch, d, k, hidden_dims=(10, 7, 12), *, warm=True, **options):
        super().__init__(structure, batch, d, k, **options)
        if warm:
            self.add({"y0": self.normal(*batch, d)})
        self.add({f"W{i}": W for i, W in enumerate(random_weights(hidden_dims, d, self.generator))})

    def call(self, backend, leaves):
        arguments, options = self.arguments(leaves)
        weights = nested([x for n, x in leaves.items() if n.startswith("W")])
        return F.rnn(*arguments, weights, self.k, backend=backend, **options)

    def scale(self, name, exact):
        # Q̄ = Σ_t b̄_t y_tᵀ over the terms of b̄ = Σ_t b̄_t, which cancel where the states are nearly the same
        if name != "Q0" or exact.get("b") is None or not exact["b"].numel():
            return 0.0
        return (exact["b"].abs().max() * exact["y"].abs().max()).item()


def assert_all_close(actual, exact, eager, what="", scale=lambda name: 0.0):
    """Results by name, of which some may be None, each as close to the exact one as eager's."""
    for name in exact:
        if exact[name] is None:
            # autograd leaves out what does not reach the output; a kernel may return zeros for it
            assert actual[name] is None or not actual[name].any(), name
            continue
        got = torch.zeros_like(eager[name]) if actual[name] is None else actual[name]
        assert_as_close_as_eager(got, exact[name], eager[name], f"{what} {name}", scale(name))


def compare(problem, backend, dtype, **options):
    """A backend against the float64 reference; returns what it computed."""
    exact = problem.run("eager", torch.float64, **options)
    eager = problem.run("eager", torch.float32 if dtype == torch.float64 else dtype, **options)
    actual = problem.run(backend, dtype, **options)
    assert_all_close(actual, exact, eager, backend, lambda name: problem.scale(name, exact))
    return actual


def _transposed(x):
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def _sliced(x):
    wide = torch.nn.functional.pad(x, (2, 1), value=math.nan)
    return wide[..., 2 : 2 + x.shape[-1]]


def _every_other(x):
    return torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0]


def _interleaved(x):
    return torch.stack([x, torch.full_like(x, math.nan)], -1)[..., 0]


def _offset(x):
    storage = x.new_full((x.numel() + 4,), math.nan)
    storage[3 : 3 + x.numel()] = x.flatten()
    return storage[3 : 3 + x.numel()].view(x.shape)


# strides: each returns the values of x elsewhere in memory, with NaN between
LAYOUTS = {
    "transposed": _transposed,
    "sliced": _sliced,
    "every_other": _every_other,
    "interleaved": _interleaved,
    "offset": _offset,
}

# from values to a cotangent of fewer: that of y.sum(), and ones expanded in a dimension
COTANGENTS = {
    "one_number": lambda g: torch.ones((), dtype=g.dtype, device=g.device).expand(g.shape),
    "one_of_a_row": lambda g: g[..., :1].expand(g.shape),
    "one_row": lambda g: g[..., :1, :].expand(g.shape) if g.dim() > 1 and g.shape[-2] else g,
}


def cotangents():
    """Functions from y to a cotangent of it, in every layout: the same values at every call."""
    for layout in (LAYOUTS | COTANGENTS).values():

        def cotangent(y, layout=layout):
            return layout(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y))

        yield cotangent


def assert_gradients_pass_gradcheck(problem, backend, *, second=True):
    """Gradients, and theirs, along random directions through all entries at once instead of entry by entry."""
    names = list(problem.leaves)
    leaves = [problem.leaves[n].requires_grad_() for n in names]
    function = lambda *xs: problem.call(backend, dict(zip(names, xs, strict=True)))
    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    if second:
        assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def assert_second_order_is_that_of_eager(problem, backend):
    """A Hessian-vector product through ``create_graph`` equals eager's: nothing is silently dropped."""
    results = []
    for name in ("eager", backend):
        leaves = {n: x.clone().requires_grad_() for n, x in problem.leaves.items()}
        y = problem.call(name, leaves)
        # truncated gradients leave out y0
        options = {"allow_unused": True, "materialize_grads": True}
        first = torch.autograd.grad(y.pow(3).sum(), list(leaves.values()), create_graph=True, **options)
        results.append(torch.autograd.grad(sum(g.square().sum() for g in first), list(leaves.values()), **options))
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected)


def assert_forward_mode_agrees(loss, point):
    """The derivative along a direction is the gradient's product with it; the Hessian is that of reverse mode."""
    direction = [torch.randn_like(x) for x in point]
    along = torch.func.jvp(loss, tuple(point), tuple(direction))[1]
    gradient = torch.func.grad(loss, tuple(range(len(point))))(*point)
    torch.testing.assert_close(along, sum((g * v).sum() for g, v in zip(gradient, direction, strict=True)))
    hessian = torch.func.hessian(loss, 0)(*point)
    torch.testing.assert_close(hessian, torch.func.jacrev(torch.func.jacrev(loss))(*point))


def assert_compiled_transforms_agree(problem, backend):
    """Transforms of torch.func inside torch.compile, with respect to b."""
    loss = lambda b: problem.call(backend, problem.leaves | {"b": b}).square().sum()
    along = lambda b: torch.func.jvp(loss, (b,), (torch.ones_like(b),))[1]
    b = problem.leaves["b"]
    over_several = torch.func.vmap(torch.func.grad(loss)), torch.stack([b, -b])
    for transformed, point in ((torch.func.grad(loss), b), over_several, (along, b), (torch.func.hessian(loss), b)):
        torch._dynamo.reset()
        compiled = torch.compile(transformed, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(point), transformed(point))


def ties(dtype, count):
    """``count`` numbers above 1 halfway between neighbours in ``dtype``: to nearest even, every other one goes down."""
    return 1 + torch.finfo(dtype).eps * (torch.arange(count, dtype=torch.float64) % 64 + 0.5)


def momentum_at_ties(structure, d, dtype, *, shared=False, **options):
    """A step of which every result is exact in float32 and most lie between two numbers of ``dtype``.

    Q = 2 I, b = 0, y_0 = e_i and φ = -v_i for sample i: y_1 = ȳ_0 = (1 + 2 v_i) e_i, b̄ = v_i and Q̄ = v_i 1 e_iᵀ.
    """
    problem = MomentumProblem(structure, (d,), d, 1, form="sample", shared=shared, **options)
    one, zero = torch.ones(d, d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64)
    identity = torch.eye(d, dtype=torch.float64).expand(*([] if shared else [d]), d, d)
    operands = {
        "dense": (2 * identity,),
        "diagonal": (2 * one,),
        "spectral": (2 * one, identity),
        "tikhonov": (one, zero),  # 1 + f²
    }[structure]
    leaves = {f"Q{i}": x for i, x in enumerate(operands)} | {"b": zero, "y0": torch.eye(d, dtype=torch.float64)}
    problem.leaves |= {n: x.to(problem.device) for n, x in (leaves | {"phi": -ties(dtype, d)[:, None]}).items()}
    return problem


def rnn_at_ties(structure, d, dtype, *, B=3, **options):
    """The same of a cell: W₁ = 0, W₂ = I and V = diag(v); Q = 2 I, b = 0 and y_0 = 1, so that y_1 = ȳ_0 = 2 v."""
    problem = RnnProblem(structure, (B,), d, 1, (d,), **options)
    one, identity = torch.ones(d, dtype=torch.float64), torch.eye(d, dtype=torch.float64)
    Q = 2 * (one if structure == "diagonal" else identity)
    leaves = {"b": 0 * one, "y0": one}
    leaves = {n: x.expand(problem.leaves[n].shape) for n, x in (leaves | {"Q0": Q}).items()}
    leaves |= {"W0": 0 * identity, "W1": identity, "W2": torch.diag(ties(dtype, d))}
    problem.leaves |= {n: x.to(problem.device) for n, x in leaves.items()}
    return problem


def assert_rounded_once(problem, backend, dtype):
    """What is stored in ``dtype`` is the exact result rounded to nearest even: half of the ties go down."""
    ones = lambda y: torch.ones_like(y)
    exact = problem.run("eager", torch.float64, ones)
    actual = problem.run(backend, dtype, ones)
    assert_nearest_even(actual, exact, dtype)


def assert_nearest_even(actual, exact, dtype):
    """Results by name against the exact ones, bit for bit where they are of ``dtype``."""
    rounded = 0
    for name, x in actual.items():
        if x is not None and x.dtype == dtype:
            expected = exact[name].to(dtype)
            assert torch.equal(x, expected), f"{name}: {(x != expected).sum()} of {x.numel()} not to nearest even"
            rounded += int((expected.double() != exact[name]).sum())
    assert rounded > len(actual)


def assert_reruns_are_bit_equal(problem, backend):
    """Outputs and gradients, run to run and for any number of threads."""
    results, before = [], torch.get_num_threads()
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        results.append(problem.run(backend, torch.float32))
    torch.set_num_threads(before)
    for name in results[0]:
        # eager's own reductions may depend on the number of threads; the kernels' do not
        for other in results[1 : 2 if backend == "manual" else 3]:
            assert torch.equal(results[0][name], other[name]), name


def assert_nothing_unwritten_is_read(problem, backend):
    """Memory that comes full of NaN changes nothing."""
    clean = problem.run(backend, torch.float32)
    with poisoned_memory():
        poisoned = problem.run(backend, torch.float32)
    for name in clean:
        assert torch.equal(clean[name], poisoned[name]), name


def assert_bad_values_stay_in_their_row(problem, backend, names, values=(math.nan, math.inf)):
    """NaN and infinity in row 4 of b show in row 4 of y, and in no other row of the tensors ``names``."""
    clean = problem.run(backend, torch.float32)
    for bad in values:
        problem.leaves["b"][4, 2] = bad
        spoiled = problem.run(backend, torch.float32)
        assert not spoiled["y"][4].isfinite().all()
        others = [i for i in range(len(problem.leaves["b"])) if i != 4]
        for name in names:
            assert torch.equal(spoiled[name][others], clean[name][others]), name
