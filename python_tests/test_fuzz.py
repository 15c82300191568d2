"""Random problems: whatever shapes, strides, dtypes and arguments meet, a backend agrees with the float64 reference.

Hypothesis draws a ``Problem`` whose repr rebuilds it, and makes a failing one smaller. The suite runs the same problems
every time; `make fuzz` runs new ones, as many as UNROLLED_KERNELS_FUZZ_EXAMPLES says of each kind.
"""

import dataclasses
import math
import os
from unittest import mock

import pytest
import torch
from conftest import BACKENDS, device_of
from hypothesis import HealthCheck, Phase, assume, example, given, settings
from hypothesis import strategies as st
from problems import COTANGENTS, DTYPES, LAYOUTS

import unrolled_kernels.functional as F
from unrolled_kernels import prox
from unrolled_kernels.ops.momentum import manual, stopping
from unrolled_kernels.ops.momentum.reference import columns
from unrolled_kernels.testing import STRUCTURES, assert_as_close_as_eager

EXAMPLES = int(os.environ.get("UNROLLED_KERNELS_FUZZ_EXAMPLES", "0"))
SCHEDULE = ("phi", "mu", "beta", "gamma", "threshold")
METHODS = {"gd": ("phi",), "nesterov": ("phi", "mu"), "momentum": ("phi", "beta", "gamma"), "rnn": ()}
MAPS = {
    "box": (prox.Box, ("lower", "upper")),
    "lower": (prox.Box, ("lower",)),
    "upper": (prox.Box, ("upper",)),
    "l1": (prox.L1, ("weight",)),
    "soft_threshold": (prox.SoftThreshold, ("threshold",)),
}
PARTS = {
    "dense": ("matrix",),
    "diagonal": ("q",),
    "spectral": ("eigenvalues", "vectors"),
    "tikhonov": ("f", "observed"),
}
# elements of the matrices of a problem: what keeps thousands of problems cheap
MOST_ELEMENTS = 10_000

# Triton compiles, or interprets, for each shape: thousands of them take hours
backends = pytest.mark.parametrize("backend", [p for p in BACKENDS if p.values[0] in ("cpu", "cuda")])


def examples(number):
    """``number`` problems in the suite, the same every time; in `make fuzz` as many new ones as it asks for."""
    return settings(
        max_examples=EXAMPLES or number,
        derandomize=not EXAMPLES,
        print_blob=True,
        deadline=None,
        phases=[phase for phase in Phase if phase is not Phase.explain],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
    )


LAYOUTS = LAYOUTS | {
    "contiguous": lambda x: x.clone(memory_format=torch.contiguous_format),
    # one sample for all of the first dimension, where the values are alike
    "expanded": lambda x: x[:1].expand(x.shape) if x.dim() else x,
}

EXTREMES = {
    "denormal": lambda x, dtype: x * torch.finfo(dtype).tiny / 8,
    "huge": lambda x, dtype: x * (torch.finfo(dtype).max / 64),
    "large": lambda x, dtype: x * 1e4,
    "zero": lambda x, dtype: torch.zeros_like(x),
    "negative": lambda x, dtype: -x,
    "indefinite": lambda x, dtype: torch.where(torch.arange(x.shape[-1]) % 2 == 0, x, -x) if x.dim() else -x,
}

COTANGENTS = LAYOUTS | COTANGENTS


class Short:
    """A dataclass whose repr leaves out what has its default: it is read when a test has failed."""

    def __repr__(self):
        defaults = {f.name: {} if f.default_factory is dict else f.default for f in dataclasses.fields(self)}
        shown = (f"{name}={getattr(self, name)!r}" for name, x in defaults.items() if getattr(self, name) != x)
        return f"{type(self).__name__}({', '.join(shown)})"

    def _repr_pretty_(self, printer, cycle):
        # how hypothesis prints
        printer.text(repr(self))


@dataclasses.dataclass(frozen=True, repr=False)
class Leaf(Short):
    """A tensor argument: its shape before broadcasting, how it lies in memory, and whether its gradient is wanted."""

    shape: tuple
    layout: str = "contiguous"
    grad: bool = True


@dataclasses.dataclass(frozen=True, repr=False)
class Problem(Short):
    """One call: its arguments, which of them are leaves, and what becomes of the result."""

    method: str
    structure: str
    batch: tuple
    d: int
    k: int
    dtype: str
    leaves: dict
    numbers: dict = dataclasses.field(default_factory=dict)  # coefficients that are Python floats
    prox: str | None = None  # of MAPS
    trajectory: bool = False
    cotangent: str = "contiguous"
    gradients: dict = dataclasses.field(default_factory=dict)  # options that say which
    narrow: bool = False  # coefficients and weights in the dtype of b, not in the one that is computed in
    edits: dict = dataclasses.field(default_factory=dict)  # of EXTREMES, by leaf
    seed: int = 0

    def values(self):
        """float64 values of the leaves, by name; rounded, so that runs in all dtypes see the same."""
        generator = torch.Generator().manual_seed(self.seed)
        values = {n: self._draw(n, leaf, generator).bfloat16().double() for n, leaf in self.leaves.items()}
        for name, edit in self.edits.items():
            values[name] = EXTREMES[edit](values[name], DTYPES[self.dtype]).to(DTYPES[self.dtype]).double()
        return values

    def _draw(self, name, leaf, generator):
        shape = (min(1, leaf.shape[0]), *leaf.shape[1:]) if leaf.layout == "expanded" else leaf.shape
        if name in ("b", "y0", "observed", "vectors", "matrix") or name.startswith("W"):
            x = torch.randn(shape, generator=generator, dtype=torch.float64)
        else:
            x = torch.rand(shape, generator=generator, dtype=torch.float64)
        if name == "matrix":
            # neither symmetric nor diagonal, eigenvalues in a disc about 1/2
            x = 0.5 * torch.eye(self.d, dtype=torch.float64) + x * (0.3 / math.sqrt(self.d))
        elif name == "vectors":
            # the formulas hold for any R
            x = x / math.sqrt(self.d)
        elif name.startswith("W"):
            x = x * math.sqrt(1.5 / x.shape[-1])
        elif name in ("q", "eigenvalues"):
            x = 0.1 + 0.9 * x
        elif name == "phi":
            x = 0.3 + 0.7 * x
        elif name == "mu":
            x = 0.05 + 0.3 * x
        elif name in ("beta", "gamma"):
            x = 0.7 * x
        elif name in ("lower", "upper", "weight", "threshold"):
            # some of each sign: bounds that cross, and what counts as zero
            x = (0.4 * x - 0.05) * (-1 if name == "lower" else 1)
        return x.expand(leaf.shape)

    def full_shape(self, name):
        """What the leaf ``name`` broadcasts to."""
        if name in SCHEDULE:
            return (*self.batch, self.k)
        if name in ("matrix", "vectors"):
            return (*self.batch, self.d, self.d)
        if name.startswith("W"):
            return self.leaves[name].shape
        return (*self.batch, self.d)

    def has_rows(self, name):
        """Whether the leaf ``name`` has values of its own for every sample."""
        shape, full = self.leaves[name].shape, self.full_shape(name)
        return len(shape) == len(full) and shape[: len(self.batch)] == self.batch and not name.startswith("W")

    def call(self, backend, tensors):
        """The result for ``tensors``, by name."""
        arguments = tensors | self.numbers
        Q = STRUCTURES[self.structure](*(arguments[n] for n in PARTS[self.structure]))
        options = {"y0": arguments.get("y0"), "return_trajectory": self.trajectory, "backend": backend}
        options |= self.gradients
        if self.prox is not None:
            cls, names = MAPS[self.prox]
            options["prox"] = cls(**{n: arguments[n] for n in names})
        if self.method == "rnn":
            W1, W2, *inner, V = (x for n, x in arguments.items() if n.startswith("W"))
            return F.rnn(Q, arguments["b"], (W1, W2, inner, V), self.k, **options)
        function = {"gd": F.gradient_descent, "nesterov": F.nesterov, "momentum": F.momentum}[self.method]
        return function(Q, arguments["b"], *(arguments[n] for n in METHODS[self.method]), self.k, **options)

    def cotangent_values(self):
        generator = torch.Generator().manual_seed(self.seed + 1)
        shape = (*([self.k + 1] if self.trajectory else []), *self.batch, self.d)
        g = torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().double()
        return COTANGENTS[self.cotangent](g)

    def terms_of_schedule(self, values, db):
        """Size of the terms of a coefficient's gradient, aᵀb and wᵀz, which cancel near the minimizer."""
        b = values["b"].abs() + (values["observed"].abs() if "observed" in values else 0)
        return (db * b).abs().sum().item()

    def terms_of_steps(self, values):
        """Sizes of the terms that the gradients of b, y_0 and of Q's parts sum, by name.

        With A_t and Z_t of manual.py: Σ ∣A_t∣ for b, Σ ∣A_t∣ ∣Z_t∣ for a diagonal Q, Σ ∣A_t∣ ∣Z_t∣ᵀ for a dense one,
        over the steps; for y_0 the terms of the adjoint's last step, where what goes through m_0 and m_1 cancels.
        """
        sweeps, adjoints, sweep, through_prox = [], [], manual._adjoint_sweep, manual._through_prox
        with (
            mock.patch.object(manual, "_adjoint_sweep", lambda *x: sweeps.append((x[:7], sweep(*x))) or sweeps[-1][1]),
            mock.patch.object(manual, "_through_prox", lambda *x: adjoints.append(through_prox(*x)) or adjoints[-1]),
        ):
            self.run("manual", torch.float64, values, full=True)
        if not sweeps:  # no step, or gradients that are no sum over the steps
            return {}
        (*_, schedule, k, cotangents), (_, a, z, *_) = sweeps[-1]
        shaped = lambda x: x.abs().reshape(*x.shape[:-2], *self.batch, self.d)
        column = lambda x: x.abs().reshape(() if x.numel() == 1 else (*self.batch, 1))
        a, z = shaped(a), shaped(z)
        db, diagonal = a.sum(0), (a * z).sum(0)
        sizes = {"b": db, "observed": db, "q": diagonal, "eigenvalues": diagonal}
        y0 = shaped(cotangents[0])
        for t, (through, direct) in enumerate([(2, 1), (1, 0)][:k]):
            phi, beta, gamma = (0 if c is None else column(columns(c, k)[t]) for c in schedule)
            adjoint = shaped(adjoints[-1 - t][0])
            w = phi * self.absolute_transpose(values, adjoint)
            y0 = y0 + direct * (adjoint + w) + through * (beta * adjoint + gamma * w)
        sizes["y0"] = y0
        if self.structure == "dense":
            sizes["matrix"] = torch.einsum("t...i,t...j->...ij", a, z)
        elif self.structure == "tikhonov":
            sizes["f"] = 2 * values["f"].abs() * diagonal
        elif self.structure == "spectral":
            R = values["vectors"].abs().expand(self.full_shape("vectors"))
            rotated = lambda x: (R @ x.unsqueeze(-1)).squeeze(-1)
            sizes["b"] = rotated(db)
            ys = dataclasses.replace(self, trajectory=True, gradients={}).run("eager", torch.float64, values)["y"]
            cotangents = self.cotangent_values().abs().reshape(self.k + 1 if self.trajectory else 1, *db.shape)
            sizes["y0"] = rotated(y0) + (cotangents[0] if self.trajectory else 0)
            y_hat = (R.mT @ ys.abs().unsqueeze(-1)).squeeze(-1)[-len(cotangents) :]
            outer = lambda x, y: x.unsqueeze(-1) * y.unsqueeze(-2)
            sizes["vectors"] = outer(values["b"].abs(), db) + outer(cotangents, y_hat).sum(0)
        return sizes

    def absolute_transpose(self, values, x):
        """∣Qᵀ∣ x, in the eigenbasis of a spectral Q."""
        if self.structure == "dense":
            return (values["matrix"].abs().mT @ x.unsqueeze(-1)).squeeze(-1)
        if self.structure == "tikhonov":
            return (1 + values["f"].square()) * x
        return values[PARTS[self.structure][0]].abs() * x

    def terms_of_cells(self, values):
        """Sizes of the terms whose sums a network's results are, by name.

        With absolute values for all that is given, every sum of the network and of its backward pass is one of
        positive terms, no smaller than the sum of the absolute terms of the true one: a unit that is off has none.
        """
        absolute = {n: x.abs() for n, x in values.items()}
        return self.run("eager", torch.float64, absolute, full=True, cotangent=self.cotangent_values().abs())

    def run(self, backend, dtype, values, *, full=False, cotangent=None):
        """The result as ``"y"`` and the gradients that are wanted, by name.

        Args:
            full: every leaf broadcast first, so that each entry has a gradient of its own, and all of these. Else as
                the leaves lie.
        """
        compute = torch.promote_types(dtype, torch.float32)
        device = device_of(backend) if backend != "eager" else "cpu"
        tensors = {}
        for name, x in values.items():
            leaf = self.leaves[name]
            in_compute = (name in SCHEDULE or name.startswith("W")) and not self.narrow
            x = x.to(device, compute if in_compute else dtype)
            x = x.expand(self.full_shape(name)).clone() if full else LAYOUTS[leaf.layout](x)
            tensors[name] = x.detach().requires_grad_(leaf.grad or full)
        y = self.call(backend, tensors)
        wanted = {n: x for n, x in tensors.items() if x.requires_grad}
        if y.requires_grad:
            g = self.cotangent_values() if cotangent is None else cotangent
            g = COTANGENTS[self.cotangent](g.to(device, dtype))
            grads = torch.autograd.grad(y, list(wanted.values()), g, allow_unused=True)
        else:
            assert not wanted or self.k == 0 or "backward_steps" in self.gradients
            grads = [None] * len(wanted)
        # autograd leaves out what does not reach the result
        grads = {n: torch.zeros_like(x) if g is None else g for (n, x), g in zip(wanted.items(), grads, strict=True)}
        return {n: x.detach().cpu() for n, x in ({"y": y} | grads).items()}


# the gradient of y_0 is 0.005, and terms of its last sum are 0.1
CANCELS_IN_ITS_LAST_STEP = Problem(
    method="nesterov",
    structure="diagonal",
    batch=(),
    d=2,
    k=7,
    dtype="f64",
    leaves={"q": Leaf((2,)), "b": Leaf((2,)), "y0": Leaf((2,)), "mu": Leaf(())},
    numbers={"phi": 0.75},
    seed=2,
)

# the derivative by a y_0 is 1e40, and eager torch's own gradient of gamma NaN
START_OVERFLOWS = Problem(
    method="momentum",
    structure="tikhonov",
    batch=(),
    d=1,
    k=5,
    dtype="f32",
    leaves={n: Leaf((1,), grad=False) for n in ("f", "observed", "b")} | {"beta": Leaf((5,)), "gamma": Leaf(())},
    numbers={"phi": -1.0},
    edits={"f": "large", "observed": "denormal"},
)

# the derivative by 1 + f², 1e40, is above float32's largest before f, 1e-39, multiplies it: -inf in eager torch too
F_IS_TOO_SMALL = Problem(
    method="gd",
    structure="tikhonov",
    batch=(),
    d=1,
    k=5,
    dtype="bf16",
    leaves={n: Leaf((1,), grad=n == "f") for n in ("f", "observed", "b")} | {"phi": Leaf((), grad=False)},
    gradients={"backward": "implicit"},
    edits={"phi": "large", "f": "denormal"},
)

# Rᵀb, 1e40, is above float32's largest before φ = 0 multiplies it: NaN in eager torch too
EIGENBASIS_OVERFLOWS = Problem(
    method="gd",
    structure="spectral",
    batch=(),
    d=1,
    k=1,
    dtype="bf16",
    leaves={n: Leaf(shape, grad=False) for n, shape in {"eigenvalues": (1,), "vectors": (1, 1), "b": (1,)}.items()},
    numbers={"phi": 0.0},
    edits={"vectors": "large", "b": "huge"},
)


# the strategy


@st.composite
def problems(draw, methods=tuple(METHODS), least=0, maps=(None,)):
    """Any problem that the public functions take; ``least`` steps, and as many dimensions and samples in the batch."""
    method = draw(st.sampled_from(methods))
    structure = draw(st.sampled_from(sorted(STRUCTURES)))
    rnn = method == "rnn"
    d = draw(st.integers(1, 24 if rnn else 70))
    per_sample = d * d if structure in ("dense", "spectral") or rnn else d
    batch, most = [], max(1, (2_000 if rnn else MOST_ELEMENTS) // per_sample)
    for _ in range(draw(st.integers(least, 2))):
        batch.append(draw(st.integers(least, max(least, min(20, most)))))
        most = max(1, most // max(1, batch[-1]))
    batch = tuple(batch)
    k = draw(st.integers(least, 4 if rnn else 8))
    flag = st.booleans()
    layouts = {
        batched: st.sampled_from([n for n in LAYOUTS if batched or n != "expanded"]) for batched in (False, True)
    }

    def leaf(size, *core):
        return Leaf((*size, *core), draw(layouts[len(size) > 0]))

    def some_of(batch):
        """The batch, or what broadcasts to it."""
        return draw(st.sampled_from([batch, batch, (), (1,) * len(batch), (1, *batch[1:]) if batch else ()]))

    # Q and b together have the whole batch
    parts = PARTS[structure]
    whole = draw(st.sampled_from([*parts[:1], "b"]))
    own = {name: batch if name == whole else some_of(batch) for name in (*parts, "b")}
    if structure == "tikhonov":
        own["observed"] = draw(st.sampled_from([own["f"], (), own["f"][1:]]))
    if draw(flag):
        own["y0"] = some_of(batch)
    leaves = {n: leaf(size, d, d) if n in ("matrix", "vectors") else leaf(size, d) for n, size in own.items()}
    numbers = {}
    map_name = draw(st.sampled_from(maps))
    map_tensors = () if map_name is None else MAPS[map_name][1]
    for name in map_tensors if map_name != "soft_threshold" else ():
        if draw(flag):
            leaves[name] = leaf(some_of(batch), d) if draw(flag) else Leaf(())
        else:
            numbers[name] = -0.2 if name == "lower" else 0.2
    for name in (*METHODS[method], *(n for n in map_tensors if n == "threshold")):
        form = draw(st.sampled_from(["number", "scalar", "step", "sample", "both"]))
        if form == "number":
            numbers[name] = draw(st.sampled_from([0.25, 0.5, 0.75]))
        else:
            size = {"scalar": ((),), "step": ((), k), "sample": (batch, 1), "both": (some_of(batch), k)}[form]
            leaves[name] = leaf(*size) if form != "scalar" else Leaf(())
    if rnn:
        hidden = draw(st.lists(st.integers(1, 12), min_size=1, max_size=3))
        shapes = [(hidden[0], d), *zip(hidden, (d, *hidden[:-1]), strict=True), (d, hidden[-1])]
        leaves |= {f"W{i}": leaf((), *shape) for i, shape in enumerate(shapes)}
    trajectory = draw(flag)
    gradients = [{}, {}, {"backward_steps": draw(st.integers(1, 9))}]
    if not (rnn or trajectory):
        gradients.append({"backward": "implicit"})
    wanted = draw(st.integers(0, 2 ** len(leaves) - 1))
    return Problem(
        method=method,
        structure=structure,
        batch=batch,
        d=d,
        k=k,
        # in another dtype an entry of thousands lies on the other side of a kink
        dtype=draw(st.sampled_from(sorted(DTYPES) if map_name is None else ["f64"])),
        leaves={n: dataclasses.replace(x, grad=bool(wanted >> i & 1)) for i, (n, x) in enumerate(leaves.items())},
        numbers=numbers,
        prox=map_name,
        trajectory=trajectory,
        gradients=draw(st.sampled_from(gradients)),
        cotangent=draw(st.sampled_from(sorted(COTANGENTS))),
        narrow=draw(flag),
        seed=draw(st.integers(0, 2**20)),
    )


def compare(problem, *backends, eager=None):
    """Each of ``backends`` against the float64 reference, as close as eager in the same dtype, or as ``eager``."""
    values, dtype = problem.values(), DTYPES[problem.dtype]
    exact = problem.run("eager", torch.float64, values, full=True)
    if eager is None:
        eager = problem.run("eager", torch.float32 if problem.dtype == "f64" else dtype, values)
    sizes = problem.terms_of_cells(values) if problem.method == "rnn" else problem.terms_of_steps(values)
    for backend in backends:
        actual = problem.run(backend, dtype, values)
        assert actual.keys() == {"y"} | {n for n, leaf in problem.leaves.items() if leaf.grad}
        for name, result in actual.items():
            terms = exact[name]
            # gradients are sums, over the steps and over what is broadcast, whose terms may cancel
            scale = terms.abs().sum_to_size(result.shape).max().item() if terms.numel() else 0.0
            if name in sizes and result.numel():
                # what is stored in half is summed in float32 and rounded once
                once = 32 * torch.finfo(torch.float32).eps / torch.finfo(result.dtype).eps
                scale = max(scale, sizes[name].sum_to_size(result.shape).max().item() * min(1, once))
            if name in SCHEDULE:
                scale = max(10 * scale, problem.terms_of_schedule(values, exact["b"]))
            what = f"{backend}: {name if name == 'y' else f'gradient of {name}'}"
            assert_as_close_as_eager(result, terms.sum_to_size(result.shape), eager[name], what, scale)


@backends
@examples(400)
@given(problem=problems(("gd", "nesterov", "momentum"), maps=tuple(MAPS)))
def test_prox(backend, problem):
    compare(problem, "manual", backend)


@backends
@examples(1200)
@given(problem=problems(("gd", "nesterov", "momentum")))
def test_momentum(backend, problem):
    # the backward by hand is the control: where it fails too, the kernels are not to blame
    compare(problem, "manual", backend)


@backends
@examples(100)
@given(problem=problems(("gd", "nesterov", "momentum")), tolerance=st.sampled_from([1e-2, 1e-1, 0.5]))
@example(problem=CANCELS_IN_ITS_LAST_STEP, tolerance=0.01)
def test_tolerance(backend, problem, tolerance):
    """In float64, where nothing is so close to a tolerance that rounding decides."""
    assume("backward_steps" not in problem.gradients)
    problem = dataclasses.replace(problem, dtype="f64", gradients=problem.gradients | {"tolerance": tolerance})
    measured, measure = [], stopping.measure
    with mock.patch.object(stopping, "measure", lambda *x, **o: measured.append(measure(*x, **o)) or measured[-1]):
        problem.run("eager", torch.float64, problem.values())
    # the error of float32 in the steps of float64, which it may not count as its own
    with mock.patch.object(stopping, "measure", return_value=measured[0]):
        eager = problem.run("eager", torch.float32, problem.values())
    compare(problem, "manual", backend, eager=eager)


@backends
@examples(400)
@given(problem=problems(("rnn",)))
def test_rnn(backend, problem):
    # closer to the kink of a relu than rounding, either gradient is right
    inputs, relu = [], torch.relu
    with mock.patch.object(torch, "relu", lambda x: inputs.append(x.detach()) or relu(x)):
        problem.run("eager", torch.float64, problem.values())
    sizes = torch.cat([x.abs().flatten() for x in inputs]) if inputs else torch.ones(1)
    sizes = sizes[sizes > 0]
    assume(sizes.numel() == 0 or sizes.min() > 1e-5 * sizes.max())
    compare(problem, "manual", backend)


def rows(problem, results):
    """Those results that have a row of their own for every sample, ``[B, …]``."""
    front = lambda x: x.reshape(math.prod(problem.batch), -1)
    own = {n: front(x) for n, x in results.items() if n != "y" and problem.has_rows(n)}
    return own | {"y": front(results["y"].movedim(0, -1) if problem.trajectory else results["y"])}


@backends
@examples(300)
@given(
    problem=problems(("gd", "momentum", "rnn"), least=1),
    bad=st.sampled_from([math.nan, math.inf, -math.inf]),
    data=st.data(),
)
def test_nan_and_inf_stay_in_their_row(backend, problem, bad, data):
    """Where the reference has NaN or Inf there is one or the other, and no other sample changes by a bit."""
    size = math.prod(problem.batch)
    own = [
        name
        for name, leaf in problem.leaves.items()
        if problem.has_rows(name)
        and leaf.layout != "expanded"
        # a cold start leaves the product of Q with 0 out, and the first step those of m = 0
        and name not in ("beta", "gamma")
        and (name in ("b", "y0", "phi") or "y0" in problem.leaves)
    ]
    assume(own)
    name, row = data.draw(st.sampled_from(own), "leaf"), data.draw(st.integers(0, size - 1), "row")
    values, dtype = problem.values(), DTYPES[problem.dtype]
    clean = problem.run(backend, dtype, values)
    entries = values[name].clone().reshape(size, -1)
    entries[row, data.draw(st.integers(0, entries.shape[1] - 1), "entry")] = bad
    values[name] = entries.reshape(values[name].shape)
    spoiled = problem.run(backend, dtype, values)
    exact = problem.run("eager", torch.float64, values)
    assert torch.equal(spoiled["y"].isfinite(), exact["y"].isfinite())
    others = [i for i in range(size) if i != row]
    clean, spoiled = rows(problem, clean), rows(problem, spoiled)
    for result, x in spoiled.items():
        assert torch.equal(x[others], clean[result][others]), f"another sample's {result} changed"


@st.composite
def extreme_problems(draw):
    problem = draw(problems(("gd", "momentum")))
    names = [n for n in problem.leaves if n not in ("beta", "gamma")]
    edited = draw(st.lists(st.sampled_from(names), min_size=1, max_size=2, unique=True))
    edits = {n: draw(st.sampled_from(sorted(EXTREMES))) for n in edited}
    numbers = problem.numbers
    if "phi" in numbers:
        numbers = numbers | {"phi": draw(st.sampled_from([30.0, -1.0, 0.0]))}
    return dataclasses.replace(problem, edits=edits, numbers=numbers, narrow=False)


@backends
@examples(300)
@given(problem=extreme_problems())
@example(problem=START_OVERFLOWS)
@example(problem=F_IS_TOO_SMALL)
@example(problem=EIGENBASIS_OVERFLOWS)
def test_extreme_values(backend, problem):
    """Right where nothing can overflow, whatever Q and the step sizes are, and not finite where y is too large.

    With -|φ| for φ and absolute values for everything else, the recurrence is one of sums of positive terms: what it
    gives, and its gradients, are at least the terms of the true ones. They are the size that errors are measured by.
    """
    values, dtype = problem.values(), DTYPES[problem.dtype]
    exact = problem.run("eager", torch.float64, values, full=True)
    negated = lambda name, x: -abs(x) if name in ("phi", "observed") else abs(x)
    largest = dataclasses.replace(problem, numbers={n: negated(n, x) for n, x in problem.numbers.items()})

    start = {} if "y0" in problem.leaves else {"y0": torch.zeros(problem.d, dtype=torch.float64)}
    from_start = dataclasses.replace(
        largest, gradients={}, leaves=largest.leaves | {n: Leaf(x.shape) for n, x in start.items()}
    )

    def run_largest(problem, cotangent):
        of = {n: negated(n, x) for n, x in (values | start).items() if n in problem.leaves}
        return problem.run("eager", torch.float64, of, full=True, cotangent=cotangent)

    cotangent = problem.cotangent_values().abs()
    bounds = run_largest(largest, cotangent)
    compute = torch.promote_types(dtype, torch.float32)
    # the derivative by a y_0 too, where there is none: 1 - φ Q of a step, which meets zeros
    formed = [*bounds.values(), run_largest(from_start, torch.ones_like(cotangent))["y0"]]
    if problem.structure == "tikhonov":
        # and the derivative by it, which f multiplies afterwards
        q, b = 1 + values["f"].square(), abs(values["b"]) + abs(values["observed"])
        leaves = {n: x for n, x in largest.leaves.items() if n not in ("f", "observed")}
        leaves |= {"q": Leaf(q.shape), "b": Leaf(b.shape)}
        of = {n: negated(n, x) for n, x in (values | {"q": q, "b": b}).items() if n in leaves}
        diagonal = dataclasses.replace(largest, structure="diagonal", leaves=leaves)
        formed += [q, diagonal.run("eager", torch.float64, of, full=True, cotangent=cotangent)["q"]]
    if problem.structure == "spectral":
        # what goes into the eigenbasis, whatever multiplies it there
        into = [abs(x).unsqueeze(-1) for x in (values["b"], values.get("y0"), cotangent) if x is not None]
        formed += [abs(values["vectors"]).mT @ x for x in into]
    overflows = any(not (x.abs() < torch.finfo(compute).max / 64).all() for x in formed)
    for name, result in problem.run(backend, dtype, values).items():
        limits = torch.finfo(result.dtype)
        true, bound = exact[name].sum_to_size(result.shape), bounds[name].abs().sum_to_size(result.shape)
        if name == "y":
            assert not result[(true.abs() > 4 * limits.max) & true.isfinite()].isfinite().any(), "y: too large, finite"
        if overflows:
            continue
        sure = bound < limits.max / 4
        if not sure.any():
            continue
        eager = true[sure].to(torch.float32 if result.dtype == torch.float64 else result.dtype)
        # what is broadcast gets a sum of n terms, stored before they are added: n roundings and one of the sum, each by
        # half an eps of the term or, of a denormal one, by half of eps · tiny
        terms = exact[name].numel() // result.numel()
        scale = bound[sure].max().item() + (terms + 1) / 2 * limits.tiny
        if name in ("beta", "gamma") and "y0" in values:
            # the reference, and the last steps taken alone, form m_t as a difference of states, y_0 and what was
            # added to it; the kernels, which do not, may know it better
            states = run_largest(from_start, cotangent)
            scale = max(scale, (states["y0"] * values["y0"]).abs().sum().item())
        assert_as_close_as_eager(result[sure], true[sure], eager, name, scale)
