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
UNSPECIALIZED = ("column_stride", "B", "num_steps")
LANES_TAKE_FIRST_DIMENSION = tl.constexpr(triton.__version__.startswith("3.6."))


@triton.jit
def load_coefficient(pointer, sample_stride, step_stride, sample, t, inside):
    """φ_t, β_t or γ_t of each sample; where the samples share it, of those beyond the batch too."""
    if step_stride is not None:
        pointer += t * step_stride
    if sample_stride is not None:
        value = tl.load(pointer + sample.to(tl.int64) * sample_stride, mask=inside, other=0.0)
    else:
        value = tl.full(sample.shape, tl.load(pointer), pointer.dtype.element_ty)
    return value


@triton.jit
def load_phi(schedule, sample, t, inside):
    return load_coefficient(schedule.phi, schedule.phi_sample, schedule.phi_step, sample, t, inside)


@triton.jit
def load_gamma(schedule, sample, t, inside):
    return load_coefficient(schedule.gamma, schedule.gamma_sample, schedule.gamma_step, sample, t, inside)


@triton.jit
def load_schedule(schedule, sample, t, inside):
    """φ_t, β_t, γ_t of each sample; without momentum the last two are not to be looked at."""
    phi_t = load_phi(schedule, sample, t, inside)
    beta_t = phi_t
    gamma_t = phi_t
    if schedule.beta is not None:
        beta_t = load_coefficient(schedule.beta, schedule.beta_sample, schedule.beta_step, sample, t, inside)
        gamma_t = load_gamma(schedule, sample, t, inside)
    return phi_t, beta_t, gamma_t


@triton.jit
def load_threshold(schedule, sample, t, inside):
    """threshold_t of each sample; without one φ_t, which is not to be looked at."""
    if schedule.threshold is not None:
        value = load_coefficient(
            schedule.threshold, schedule.threshold_sample, schedule.threshold_step, sample, t, inside
        )
    else:
        value = load_phi(schedule, sample, t, inside)
    return value


@triton.jit
def load_vector(vectors, sample, entry, inside, compute: tl.constexpr, t=0):
    """Entries of ``Vectors``, of step t of a cotangent, in the compute dtype; zero where not ``inside``."""
    if vectors.pointer is None:
        value = tl.zeros(inside.shape, compute)
    else:
        offsets = tl.cast(t, tl.int64) * vectors.step + sample.to(tl.int64) * vectors.sample + entry * vectors.entry
        value = tl.load(vectors.pointer + offsets, mask=inside, other=0.0).to(compute)
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
def load_bounds(bounds, sample, entry, inside, compute: tl.constexpr):
    """The lower bound, or the weight, and the upper bound of a proximal map; what is absent is not to be looked at."""
    lower = inside
    upper = inside
    if bounds.weight.pointer is not None:
        lower = load_vector(bounds.weight, sample, entry, inside, compute)
    elif bounds.lower.pointer is not None:
        lower = load_vector(bounds.lower, sample, entry, inside, compute)
    if bounds.upper.pointer is not None:
        upper = load_vector(bounds.upper, sample, entry, inside, compute)
    return lower, upper


@triton.jit
def soft_threshold(bounds, weight, phi_t, threshold_t):
    """τ_t = φ_t weight or threshold_t, zero where that is below it."""
    tau = threshold_t
    if bounds.weight.pointer is not None:
        tau = phi_t * tl.where(weight < 0, 0.0, weight)
    return tl.where(tau < 0, 0.0, tau)


@triton.jit
def proximal_map(schedule, bounds, lower, upper, phi_t, threshold_t, v):
    """y_{t+1} = p_t(v_t), elementwise; a NaN stays one."""
    y = v
    if bounds.lower.pointer is not None:
        y = tl.where(y < lower, lower, y)
    if bounds.upper.pointer is not None:
        y = tl.where(y > upper, upper, y)
    if (bounds.weight.pointer is not None) or (schedule.threshold is not None):
        tau = soft_threshold(bounds, lower, phi_t, threshold_t)
        y = tl.where(tl.abs(v) <= tau, 0.0, tl.where(v < 0, v + tau, v - tau))
    return y


@triton.jit
def proximal_adjoint(schedule, bounds, lower, upper, phi_t, threshold_t, v, a):
    """The adjoint of v = v_t from a = ȳ_{t+1}, and what lower (or the weight), upper, φ_t and threshold_t get of it."""
    to_v = a
    to_lower = a
    to_upper = a
    to_phi = tl.zeros_like(a)
    to_threshold = to_phi
    if (bounds.weight.pointer is not None) or (schedule.threshold is not None):
        tau = soft_threshold(bounds, lower, phi_t, threshold_t)
        to_v = tl.where(tl.abs(v) > tau, a, 0.0)
        to_threshold = tl.where(v < 0, to_v, -to_v)
        if bounds.weight.pointer is not None:
            counted = tl.where(phi_t >= 0, to_threshold, 0.0)
            to_phi = tl.where(lower < 0, 0.0, lower) * counted
            to_lower = tl.where(lower >= 0, phi_t * counted, 0.0)
        else:
            to_threshold = tl.where(threshold_t >= 0, to_threshold, 0.0)
    if bounds.lower.pointer is not None:
        to_v = tl.where(v >= lower, to_v, 0.0)
        to_lower = tl.where(v < lower, a, 0.0)
    if bounds.upper.pointer is not None:
        to_v = tl.where(v <= upper, to_v, 0.0)
        to_upper = tl.where(v > upper, a, 0.0)
        if bounds.lower.pointer is not None:
            to_lower = tl.where(lower < upper, to_lower, 0.0)
            to_upper = tl.where(upper < lower, a, to_upper)
    return to_v, to_lower, to_upper, to_phi, to_threshold


@triton.jit
def store_bounds(d_bounds, target, to_lower, to_upper, inside):
    """The gradients of the bounds, or of the weight, of ``inside``."""
    if d_bounds.lower is not None:
        tl.store(d_bounds.lower + target, to_lower, mask=inside)
    if d_bounds.upper is not None:
        tl.store(d_bounds.upper + target, to_upper, mask=inside)
    if d_bounds.weight is not None:
        tl.store(d_bounds.weight + target, to_lower, mask=inside)


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
def largest_of(x, AXIS: tl.constexpr):
    """max |x| of each sample, over all dimensions but its own, and whether any x is a NaN, which counts as zero."""
    unordered = x != x
    return tl.max(tl.where(unordered, 0.0, tl.abs(x)), AXIS), tl.max(unordered.to(tl.int32), AXIS)


@triton.jit
def stop_samples(stopping, moves, change, has_nan, large, sample, t, num_steps):
    """Which of the samples that move stop after step t, as integers: they leave in ``Stopping`` what it is to say."""
    limit = tl.load(stopping.tolerance) * tl.maximum(large, 1.0)
    steps = tl.full(sample.shape, t + 1, tl.int64)
    stops = (moves > 0) & (((change <= limit) & (has_nan == 0)) | (steps == num_steps))
    tl.store(stopping.taken + sample, steps, mask=stops)
    tl.store(stopping.residual + sample, tl.where(has_nan > 0, float("nan"), change), mask=stops)
    return stops.to(tl.int32)


@triton.jit
def stop_rows(stopping, moves, x, previous, sample, t, num_steps, AXIS: tl.constexpr):
    """The same of y_{t+1} = x and y_t = previous, with the entries of a sample along ``AXIS``."""
    change, has_nan = largest_of(x - previous, AXIS)
    large, _ = largest_of(x, AXIS)
    return stop_samples(stopping, moves, change, has_nan, large, sample, t, num_steps)


@triton.jit
def load_tile(matrices, sample, column_stride, B, d: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """``Matrices`` of the samples as a tile ``[n, D, BB, W]``."""
    s, i, j = _tile_indices(sample, D, W)
    # with one column per vector, lanes are to run over samples: the compiler must not see that columns are adjacent
    offsets = s.to(tl.int64) * matrices.stride + i * d + (j * column_stride if W == 1 else j)
    return _from_memory(tl.load(matrices.pointer + offsets, mask=(s < B) & (i < d) & (j < d), other=0.0))


@triton.jit
def store_tile(pointer, tile, sample, column_stride, B, d: tl.constexpr, D: tl.constexpr, W: tl.constexpr):
    """Inverse of ``load_tile``, to matrices ``[B, d, d]`` one after the other."""
    s, i, j = _tile_indices(sample, D, W)
    offsets = s.to(tl.int64) * (d * d) + i * d + (j * column_stride if W == 1 else j)
    tl.store(pointer + offsets, _from_memory(tile), mask=(s < B) & (i < d) & (j < d))


@triton.jit
def _tile_indices(sample, D: tl.constexpr, W: tl.constexpr):
    """Sample, row and column of a tile in the order in which memory is read and written."""
    s = sample[None, None, :, None]
    i = tl.arange(0, D)[None, :, None, None]
    j = (tl.arange(0, D // W)[:, None] * W + tl.arange(0, W)[None, :])[:, None, None, :]
    return _from_memory(s), _from_memory(i), _from_memory(j)


@triton.jit
def _from_memory(tile):
    """Exchange the first and the third dimension, or not: its own inverse.

    Lanes run over a tile's vectors, then over samples, then over rows. Of dimensions that a load walks through in like
    strides, Triton 3.6 gives lanes to the first, later ones to the last.
    """
    return tl.permute(tile, [2, 1, 0, 3]) if LANES_TAKE_FIRST_DIMENSION else tile


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
def sum_of_sample(x, AXIS: tl.constexpr):
    """Sums over all dimensions of x but ``AXIS``, that of the samples."""
    return tl.sum(tl.sum(x, 2), 0) if len(x.shape) == 3 else tl.sum(x, 1 - AXIS)


@triton.jit
def accumulate_schedule(
    d_schedule, sums, parts, row, t, num_steps, inside, first,
    AXIS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr, TAIL: tl.constexpr = False,
):  # fmt: skip
    """Add what step t has of φ̄, β̄, γ̄, threshold̄, the tiles ``parts``, to ``sums``, or where steps differ to memory.

    Where the samples have coefficients of their own (ROWS) the parts of a step go to their rows of
    ``[rows, num_steps]``. Where they share them, the total is added to the row of this program in
    ``[programs, num_steps]``, which no other touches. TAIL: t may be past the last step, which has no place there.
    """
    if STEPS:
        for n in tl.static_range(4):
            if d_schedule[n] is not None:
                of_sample = sum_of_sample(parts[n], AXIS)
                if ROWS:
                    if TAIL:
                        inside = inside & (tl.full(row.shape, t, tl.int32) < num_steps)
                    tl.store(d_schedule[n] + row.to(tl.int64) * num_steps + t, of_sample, mask=inside)
                else:
                    own = d_schedule[n] + tl.program_id(0).to(tl.int64) * num_steps + t
                    taken = t < num_steps
                    before = tl.load(own, mask=taken & (first == 0), other=0.0)
                    tl.store(own, before + tl.sum(of_sample, 0), mask=taken)
    else:
        if d_schedule[1] is not None:
            sums = (sums[0], sums[1] + parts[1], sums[2] + parts[2], sums[3])
        if d_schedule[3] is not None:
            sums = (sums[0], sums[1], sums[2], sums[3] + parts[3])
        sums = (sums[0] + parts[0], sums[1], sums[2], sums[3])
    return sums


@triton.jit
def store_schedule_of_samples(
    d_schedule, sums, row, inside, AXIS: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr
):
    """Where each sample has coefficients of its own, but one for all steps: their gradients; then sums begin anew."""
    if ROWS and not STEPS:
        for n in tl.static_range(4):
            if d_schedule[n] is not None:
                tl.store(d_schedule[n] + row, sum_of_sample(sums[n], AXIS), mask=inside)
        zero = tl.zeros_like(sums[0])
        sums = (zero, zero, zero, zero)
    return sums


@triton.jit
def store_schedule_of_program(d_schedule, sums, ROWS: tl.constexpr, STEPS: tl.constexpr):
    """Where all samples and steps share the coefficients: the part that this program has of their gradients."""
    if not ROWS and not STEPS:
        for n in tl.static_range(4):
            if d_schedule[n] is not None:
                tl.store(d_schedule[n] + tl.program_id(0), tl.sum(sums[n]))
