"""The structures of Q, handled as tensors are."""

import io

import pytest
import torch

import unrolled_kernels.functional as F
from unrolled_kernels import Diagonal, Spectral, Tikhonov, UnrolledGD, prox, theory
from unrolled_kernels.testing import STRUCTURES, random_quadratic

structured = pytest.mark.parametrize("structure", [s for s in STRUCTURES if s != "dense"])


def _make(structure, batch=(4, 3), d=5, **options):
    leaves, make_Q, b = random_quadratic(structure, batch, d, **options)
    return make_Q(*leaves), b


@structured
@pytest.mark.parametrize("batch", [(), (4,), (4, 3)], ids=str)
def test_shape(structure, batch):
    Q, b = _make(structure, batch)
    assert Q.state_shape == b.shape
    assert Q.shape == Q.to_dense().shape == Q.size() == (*batch, 5, 5)
    assert Q.dim() == Q.ndim == Q.to_dense().ndim == len(batch) + 2
    assert [Q.size(i) for i in range(-Q.ndim, Q.ndim)] == [*Q.shape, *Q.shape]
    with pytest.raises(IndexError):
        Q.size(Q.ndim)
    assert (Q.dtype, Q.device) == (torch.float32, torch.device("cpu"))


@structured
def test_len_and_iteration(structure):
    """Over the first dimension of the batch, as those of the matrices; the batch may be empty, not absent."""
    for batch in ((4, 3), (1,), (0, 3)):
        Q, _ = _make(structure, batch)
        assert len(Q) == len(Q.to_dense()) == len(list(Q)) == batch[0]
        for sample, matrices in zip(Q, Q.to_dense(), strict=True):
            assert type(sample) is type(Q)
            torch.testing.assert_close(sample.to_dense(), matrices)
        assert [i.shape for i in reversed(Q)] == [x.shape for x in Q.to_dense()]
        assert Q
    Q, _ = _make(structure, ())
    assert Q
    for of_samples in (len, list):
        with pytest.raises(TypeError, match=r"Q: a structure without a batch has no len and no samples: .*\[5\]"):
            of_samples(Q)


@structured
def test_save_and_load(structure):
    """By torch.save and torch.load, which takes weights alone unless it is told to trust the file."""
    Q, b = _make(structure, shared=True)
    saved = io.BytesIO()
    torch.save({"Q": Q.requires_grad_(), "prox": [prox.Box(0.0, b), prox.NonNegative(), prox.L1(0.1)]}, saved)
    for options in ({}, {"weights_only": True}, {"mmap": False, "map_location": "meta"}):
        saved.seek(0)
        loaded = torch.load(saved, **options)
        assert type(loaded["Q"]) is type(Q)
        assert loaded["Q"].requires_grad
        assert loaded["Q"].shape == Q.shape
    saved.seek(0)
    loaded = torch.load(saved)
    for x, y in zip(loaded["Q"].tensors.values(), Q.tensors.values(), strict=True):
        assert torch.equal(x, y)
    y = F.gradient_descent(Q, b, 0.2, 3, prox=prox.Box(0.0, b))
    assert torch.equal(F.gradient_descent(loaded["Q"], b, 0.2, 3, prox=loaded["prox"][0]), y)
    assert [type(x) for x in loaded["prox"]] == [prox.Box, prox.NonNegative, prox.L1]


@structured
def test_conversions(structure):
    Q, b = _make(structure)
    for dtype, name in ((torch.float64, "double"), (torch.bfloat16, "bfloat16"), (torch.float16, "half")):
        for converted in (Q.to(dtype), getattr(Q, name)()):
            assert type(converted) is type(Q)
            assert all(x.dtype == dtype for x in converted.tensors.values())
    assert all(x.dtype == torch.float32 for x in Q.double().float().tensors.values())
    assert all(x.device.type == "meta" for x in Q.to("meta").tensors.values())
    torch.testing.assert_close(
        F.gradient_descent(Q.double(), b.double(), 0.2, 3).float(), F.gradient_descent(Q, b, 0.2, 3)
    )


@structured
def test_detach_clone_and_gradients(structure):
    Q, b = _make(structure)
    assert not Q.requires_grad
    assert Q.requires_grad_() is Q
    assert Q.requires_grad
    assert all(x.requires_grad for x in Q.tensors.values())
    F.gradient_descent(Q, b, 0.2, 3).sum().backward()
    assert all(x.grad.any() for x in Q.tensors.values())
    for x, detached, cloned in zip(*(Q.tensors.values() for Q in (Q, Q.detach(), Q.clone())), strict=True):
        assert not detached.requires_grad
        assert detached.data_ptr() == x.data_ptr() != cloned.data_ptr()
        assert cloned.requires_grad


INDICES = {
    "sample": 2,
    "last": -1,
    "slice": slice(1, 3),
    "column": (slice(None), 1),
    "both": (1, 2),
    "none": (),
    "ellipsis": ...,
    "ellipsis then column": (..., 0),
    "new dimension": None,
    "list": [3, 0, 3],
    "tensor": torch.tensor([3, 0, 3]),
    "tensor and slice": (torch.tensor([1, 0]), slice(2)),
    "mask": torch.tensor([True, False, True, False]),
}


@structured
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("name", INDICES)
def test_indexing(structure, shared, name):
    """The samples that the same index picks from the matrices."""
    Q, _ = _make(structure, shared=shared)
    index = INDICES[name] if isinstance(INDICES[name], tuple) else (INDICES[name],)
    picked = Q[INDICES[name]]
    assert type(picked) is type(Q)
    rest = (slice(None), slice(None)) if ... in [i for i in index if not isinstance(i, torch.Tensor)] else (...,)
    expected = Q.to_dense()[(*index, *rest)]
    assert picked.shape == expected.shape
    torch.testing.assert_close(picked.to_dense(), expected)
    if structure == "spectral" and shared:
        assert picked.eigenvectors.shape == (5, 5)


@structured
def test_an_index_of_too_many_dimensions(structure):
    Q, _ = _make(structure, (4,))
    for index in ((0, 0), (..., 0, 0), 4):
        with pytest.raises(IndexError):
            Q[index]
    with pytest.raises(IndexError):
        Q[0][0]


def test_what_does_not_broadcast_is_refused():
    b = torch.zeros(3, 5)
    for Q in (Spectral(torch.ones(2, 5), torch.ones(3, 5, 5)), Tikhonov(torch.ones(3, 5), torch.ones(2, 5))):
        with pytest.raises(ValueError, match=r"Q: the tensors do not broadcast against each other: .*\[2, 5\]"):
            F.gradient_descent(Q, b, 0.1, 2)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_one_f_for_many_images(backend):
    f, x, g = torch.rand(6), torch.randn(4, 3, 6), torch.randn(3, 6)
    results = []
    for weights in (f, f.expand(4, 3, 6)):
        leaf = weights.clone().requires_grad_()
        y = F.gradient_descent(Tikhonov(leaf, x), g, 0.3, 4, backend=backend)
        y.square().sum().backward()
        results.append((y, leaf.grad.sum_to_size(6), F.minimize(Tikhonov(leaf, x), g)))
    for one, many in zip(*results, strict=True):
        assert one.shape in ((4, 3, 6), (6,))
        torch.testing.assert_close(one, many)


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_dimension_at_all(structure, backend, shared):
    """d = 0 with two batch dimensions: everything is empty but gradients of the schedule, which are zero."""
    sizes = {"dense": [(0, 0)], "diagonal": [(0,)], "spectral": [(0,), (0, 0)], "tikhonov": [(0,), (0,)]}[structure]
    tensors = [torch.rand(*(() if shared else (2, 3)), *size, requires_grad=True) for size in sizes]
    Q, b = STRUCTURES[structure](*tensors), torch.rand(2, 3, 0, requires_grad=True)
    for step_size in (0.3, torch.rand(2, 1, 4, requires_grad=True), torch.rand(2, 3, 1, requires_grad=True)):
        for trajectory in (False, True):
            y = F.nesterov(Q, b, step_size, 0.1, 4, return_trajectory=trajectory, y0=torch.rand(3, 0), backend=backend)
            assert y.shape == ((5, 2, 3, 0) if trajectory else (2, 3, 0))
            y.sum().backward()
        if isinstance(step_size, torch.Tensor):
            assert torch.equal(step_size.grad, torch.zeros_like(step_size))
    for options in (
        {"prox": prox.L1(0.1)},
        {"prox": prox.Box(torch.zeros(0), 1.0), "backward": "implicit"},
        {"backward_steps": 2},
        {"tolerance": 0.1},
    ):
        y, info = F.momentum(Q, b, step_size, 0.1, 0.1, 4, return_info=True, backend=backend, **options)
        y.sum().backward()
        assert y.shape == (2, 3, 0)
        # the first step moves nothing
        assert (info.num_steps == (1 if "tolerance" in options else 4)).all()
        assert torch.equal(info.residual, torch.zeros(2, 3))
    with pytest.raises(ValueError, match="Q: expected matrices of size d ≥ 1, got d = 0"):
        theory.check(UnrolledGD(4), Q)
    assert F.minimize(Q, b).shape == F.nesterov(Q, b, 0.3, None, 4).shape == (2, 3, 0)
    weights = torch.rand(2, 0), torch.rand(2, 0), [], torch.rand(0, 2)
    assert F.rnn(Q, b, weights, 4, backend=backend).shape == (2, 3, 0)
    assert all(x.grad.shape == x.shape for x in (*tensors, b))


@structured
def test_default_collate(structure):
    """Samples become a batch, in a DataLoader and inside other collections too."""
    Q, _ = _make(structure, (4, 3))
    samples = [Q[i] for i in range(4)]
    batch, labels = torch.utils.data.default_collate([(x, i) for i, x in enumerate(samples)])
    assert type(batch) is type(Q)
    assert labels.tolist() == [0, 1, 2, 3]
    for x, y in zip(batch.tensors.values(), Q.tensors.values(), strict=True):
        assert torch.equal(x, y)
    (loaded,) = torch.utils.data.DataLoader(samples, batch_size=4)
    torch.testing.assert_close(loaded.to_dense(), Q.to_dense())


@pytest.mark.parametrize("structure", STRUCTURES)
def test_symbolic_trace_with_a_layer_as_a_leaf(structure):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = UnrolledGD(3, 0.2)

        def forward(self, b, tensors):
            return 2 * self.layer(STRUCTURES[structure](*(tensors[i] for i in range(count))), b + 1)

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, UnrolledGD) or super().is_leaf_module(module, name)

    tensors, _, b = random_quadratic(structure, (4, 3), 5)
    count, model = len(tensors), Model()
    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["layer"]
    torch.testing.assert_close(traced(b, tensors), model(b, tensors))


def test_data_loader():
    class Loaded(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, i):
            return Diagonal(torch.full((3,), float(i)))

    collate = lambda samples: Diagonal(torch.stack([Q.q for Q in samples]))
    (batch,) = torch.utils.data.DataLoader(Loaded(), batch_size=2, collate_fn=collate)
    assert batch.shape == (2, 3, 3)
    assert torch.equal(batch[1].q, torch.ones(3))
    assert not batch.is_pinned()
