"""Device functions that the Triton kernels share: schedules, vectors, and a matrix held in registers.

The matrices of BB samples are one tile ``[n, D, BB, W]``: row i and column j = c W + l of sample s stand at
``[c, i, s, l]``, with D the next power of two above d and n = D / W. A state has one of two forms: *rows* ``[D, BB]``,
what a product Qz comes out as, and *columns* ``[n, BB, W]``, what it goes in as. Lanes run over l in 16-byte vectors,
then over s, then over i, so W says how a product is paid for: the sum over c is free, the one over l costs log₂ of the
lanes in W shuffles a row, and each lane needs n vectors of z.
"""

import triton
import triton.language as tl

# scalars whose value is not worth a compilation of its own
UNSPECIALIZED = (
    "column_stride",
    "phi_sample",
    "phi_step",
    "beta_sample",
    "beta_step",
    "gamma_sample",
    "gamma_step",
    "B",
    "num_steps",
)


@triton.jit
def load_coefficient(pointer, sample, sample_stride, t, step_stride, inside):
    """φ_t, β_t or γ_t of each sample."""
    return tl.load(pointer + sample.to(tl.int64) * sample_stride + t * step_stride, mask=inside, other=0.0)


@triton.jit
def load_schedule(
    phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step, sample, t, inside
):
    """φ_t, β_t, γ_t of each sample; without momentum the last two are not to be looked at."""
    phi_t = load_coefficient(phi, sample, phi_sample, t, phi_step, inside)
    beta_t = phi_t
    gamma_t = phi_t
    if beta is not None:
        beta_t = load_coefficient(beta, sample, beta_sample, t, beta_step, inside)
        gamma_t = load_coefficient(gamma, sample, gamma_sample, t, gamma_step, inside)
    return phi_t, beta_t, gamma_t


@triton.jit
def load_vector(pointer, sample, sample_stride, entry, entry_stride, inside, compute: tl.constexpr):
    """Entries of b, y_0, λ or a cotangent in the compute dtype; zero where ``pointer`` is None or not ``inside``."""
    if pointer is None:
        value = tl.zeros(inside.shape, compute)
    else:
        offsets = sample.to(tl.int64) * sample_stride + entry * entry_stride
        value = tl.load(pointer + offsets, mask=inside, other=0.0).to(compute)
    return value


@triton.jit
def diagonal_step(q, b, x, previous, phi_t, beta_t, gamma_t, MOMENTUM: tl.constexpr):
    """y_{t+1} from y_t = x and y_{t-1} = previous, elementwise."""
    if MOMENTUM:
        m = x - previous
        following = x + beta_t * m - phi_t * (q * (x + gamma_t * m) + b)
    else:
        following = x - phi_t * (q * x + b)
    return following


@triton.jit
def adjoint_step(a, carry, w, phi_t, beta_t, gamma_t, MOMENTUM: tl.constexpr):
    """ȳ_t but for its own cotangent, and what goes on to ȳ_{t-1}, of a = ȳ_{t+1} and w = Qᵀa (see manual.py)."""
    to_y = a - phi_t * w
    to_previous = carry
    if MOMENTUM:
        to_previous = phi_t * gamma_t * w - beta_t * a
        to_y += carry - to_previous
    return to_y, to_previous


@triton.jit
def load_tile(pointer, sample, stride, column_stride, B, d: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """The matrices of the samples as a tile ``[n, D, BB, W]``."""
    s, i, j = _tile_indices(sample, D, W)
    # with one column per vector, lanes are to run over samples: the compiler must not see that columns are adjacent
    offsets = s.to(tl.int64) * stride + i * d + (j * column_stride if W == 1 else j)
    return tl.load(pointer + offsets, mask=(s < B) & (i < d) & (j < d), other=0.0)


@triton.jit
def store_tile(pointer, tile, sample, stride, column_stride, B, d: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Inverse of ``load_tile``."""
    s, i, j = _tile_indices(sample, D, W)
    offsets = s.to(tl.int64) * stride + i * d + (j * column_stride if W == 1 else j)
    tl.store(pointer + offsets, tile, mask=(s < B) & (i < d) & (j < d))


@triton.jit
def _tile_indices(sample, D: tl.constexpr, W: tl.constexpr):
    i = tl.arange(0, D)[None, :, None, None]
    j = (tl.arange(0, D // W)[:, None] * W + tl.arange(0, W)[None, :])[:, None, None, :]
    return sample[None, None, :, None], i, j


@triton.jit
def to_columns(x, n: tl.constexpr, BB: tl.constexpr, W: tl.constexpr):
    """Rows ``[D, BB]`` to columns ``[n, BB, W]``."""
    return tl.permute(tl.reshape(x, [n, W, BB]), [0, 2, 1])


@triton.jit
def to_rows(x, D: tl.constexpr, BB: tl.constexpr):
    """Columns ``[n, BB, W]`` to rows ``[D, BB]``."""
    return tl.reshape(tl.permute(x, [0, 2, 1]), [D, BB])


@triton.jit
def product(tile, z):
    """Q z as rows, of z as columns."""
    return tl.sum(tl.sum(tile * z[:, None, :, :], 0), 2)


@triton.jit
def transposed_product(tile, a):
    """Qᵀ a as columns, of a as rows."""
    return tl.sum(tile * a[None, :, :, None], 1)


@triton.jit
def outer(a, z):
    """a zᵀ as a tile, of a as rows and z as columns."""
    return a[None, :, :, None] * z[:, None, :, :]


@triton.jit
def store_step_gradient(pointer, value, row, t, num_steps, inside, taken, first, ROWS: tl.constexpr):
    """The gradient of φ_t, β_t or γ_t, of which ``value`` has each sample's part; nothing where not ``taken``.

    Where the samples have coefficients of their own (ROWS) the parts go to their rows of ``[rows, num_steps]``. Where
    they share them, the sum is added to the row of this program in ``[programs, num_steps]``, which no other touches.
    """
    if ROWS:
        tl.store(pointer + row.to(tl.int64) * num_steps + t, value, mask=inside)
    else:
        own = pointer + tl.program_id(0).to(tl.int64) * num_steps + t
        before = tl.load(own, mask=taken & (first == 0), other=0.0)
        tl.store(own, before + tl.sum(value, 0), mask=taken)
