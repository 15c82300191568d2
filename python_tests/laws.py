"""Laws that every op keeps, asserted of a problem of any family: what has ``leaves``, ``call`` and ``run``."""

import math

import torch

from unrolled_kernels.testing import poisoned_memory


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


def assert_reruns_are_bit_equal(problem, backend):
    """Outputs and gradients, run to run and for any number of threads."""
    results = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        results.append(problem.run(backend, torch.float32))
    torch.set_num_threads(2)
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


def assert_bad_values_stay_in_their_row(problem, backend, names):
    """NaN and infinity in row 4 of b show in row 4 of y, and in no other row of the tensors ``names``."""
    clean = problem.run(backend, torch.float32)
    for bad in (math.nan, math.inf):
        problem.leaves["b"][4, 2] = bad
        spoiled = problem.run(backend, torch.float32)
        assert not spoiled["y"][4].isfinite().all()
        others = [i for i in range(len(problem.leaves["b"])) if i != 4]
        for name in names:
            assert torch.equal(spoiled[name][others], clean[name][others]), name
