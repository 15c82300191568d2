"""What the tests, the benchmarks and a user's own checks share: problems to try and one rule for closeness."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from unrolled_kernels.annotations import Quadratic
from unrolled_kernels.quadratics import Diagonal, Spectral, Tikhonov

# from the tensors of a structure to Q
STRUCTURES: dict[str, Callable[..., Quadratic]] = {
    "dense": lambda Q: Q,
    "diagonal": Diagonal,
    "spectral": Spectral,
    "tikhonov": Tikhonov,
}


def random_quadratic(
    structure: str,
    batch: Sequence[int],
    d: int,
    *,
    mu: float = 0.1,
    L: float = 1.0,
    symmetric: bool = True,
    shared: bool = False,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
) -> tuple[tuple[torch.Tensor, ...], Callable[..., Quadratic], torch.Tensor]:
    """A batch of quadratic energies with spectrum in [mu, L], the extremes included where d ≥ 2.

    Args:
        structure: one of ``STRUCTURES``; tikhonov's spectrum is 1 + f² instead, in [1, 1 + L].
        batch: tuple of batch dimensions.
        d: size of the state.
        symmetric: False adds a skew part to a dense Q.
        shared: one Q (for spectral: one R) for the whole batch.
        dtype, device, seed: of the tensors made.
    Returns:
        ``(tensors, make_Q, b)``: the leaf tensors of Q, a function from them to Q, and b ``[*batch, d]``.
    Raises:
        ValueError: an unknown structure.
    """
    dtype = dtype or torch.get_default_dtype()
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    eigenvalues = mu + (L - mu) * torch.rand(*batch, d, generator=generator, dtype=torch.float64)
    if d >= 2:
        eigenvalues[..., 0], eigenvalues[..., -1] = L, mu
    matrix_batch = () if shared else batch
    b = normal(*batch, d)
    rotation = lambda: torch.linalg.qr(normal(*matrix_batch, d, d))[0].contiguous()
    tensors: tuple[torch.Tensor, ...]
    if structure == "diagonal":
        tensors = (eigenvalues,)
    elif structure == "tikhonov":
        tensors = (eigenvalues.sqrt(), normal(*batch, d))
    elif structure == "spectral":
        tensors = (eigenvalues, rotation())
    elif structure == "dense":
        values = eigenvalues[(0,) * len(batch)] if shared and eigenvalues.numel() else eigenvalues
        if shared and not eigenvalues.numel():
            values = torch.full((d,), mu, dtype=torch.float64)
        eigenvectors = rotation()
        Q = (eigenvectors * values.unsqueeze(-2)) @ eigenvectors.mT
        if not symmetric:
            skew = normal(*matrix_batch, d, d) * (0.2 * mu / d)
            Q = Q + skew - skew.mT
        tensors = (Q,)
    else:
        raise ValueError(f"structure: expected one of {tuple(STRUCTURES)}, got {structure!r}")
    to = lambda x: x.to(dtype=dtype, device=device)
    return tuple(to(x) for x in tensors), STRUCTURES[structure], to(b)


def assert_as_close_as_eager(
    actual: torch.Tensor, exact: torch.Tensor, eager: torch.Tensor, what: str = "", scale: float = 0.0
) -> None:
    """The one tolerance of the project: error ≤ 2 × (error of eager in the same dtype) + n eps · max|exact|.

    n = 1 for float16 and bfloat16, which are only stored, and 32 for float32 and float64, which are also accumulated
    in: sums of hundreds of terms that partly cancel, where a single run of eager may be lucky.

    Args:
        actual: result under test.
        exact: the float64 reference.
        eager: the plain loop's result in the dtype of ``actual``. For float64, whose own error no wider dtype of torch
            can measure, the float32 result instead: its error is scaled by the ratio of the two epsilons.
        what: named in the message.
        scale: size of the terms that are summed where the sum may cancel; takes the place of max|exact| if larger.
    Raises:
        AssertionError: shapes or dtypes differ, or the error is larger; the message has both errors.
    """
    assert actual.shape == exact.shape, f"{what}: shape {list(actual.shape)}, expected {list(exact.shape)}"
    eps, eager_eps = (torch.finfo(x.dtype).eps for x in (actual, eager))
    expected_dtype = torch.float32 if actual.dtype == torch.float64 else actual.dtype
    assert eager.dtype == expected_dtype, f"{what}: dtype {actual.dtype} against eager's {eager.dtype}"
    if exact.numel() == 0:
        return
    error = (actual.double() - exact).abs().max().item()
    eager_error = (eager.double() - exact).abs().max().item() * (eps / eager_eps)
    slack = 32 if actual.dtype in (torch.float32, torch.float64) else 1
    bound = 2 * eager_error + slack * eps * max(exact.abs().max().item(), scale)
    assert error <= bound, f"{what}: error {error:.3e}, allowed {bound:.3e} (eager's own error {eager_error:.3e})"


def bytes_kept_for_backward(call: Callable[[], Any]) -> int:
    """Bytes of the storages that autograd holds between the passes of ``call()``, each counted once."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = call()  # alive until counted, so that no address is given twice
    del result
    return sum(kept.values())


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fill freshly allocated tensors with NaN, so that reading what was never written shows."""
    deterministic: Any = torch.utils.deterministic
    fill, mode = deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(mode)
