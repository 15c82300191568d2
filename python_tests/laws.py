"""Laws that every op keeps, asserted of a problem of any family: what has ``leaves``, ``call`` and ``run``."""

import math

import torch

from unrolled_kernels.testing import poisoned_memory

# the same values in other strides
LAYOUTS = (
    lambda x: torch.cat([x, x + 1, x], -1)[..., x.shape[-1] * 2 :],
    lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    lambda x: x.repeat_interleave(2, 0)[::2],
)


def _normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


# from y to its cotangent: that of y.sum(), expanded in the last dimension, and transposed
COTANGENTS = (
    lambda y: torch.ones((), dtype=y.dtype, device=y.device).expand(y.shape),
    lambda y: _normal(*y.shape[:-1], 1).to(y).expand(y.shape),
    lambda y: _normal(*y.shape[::-1]).to(y).permute(*range(y.dim())[::-1]),
)


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


def bytes_kept_for_backward(call):
    """Of the storages that autograd holds after ``call()``."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # alive until counted, so that no address is given twice
    del result
    return sum(kept.values())
