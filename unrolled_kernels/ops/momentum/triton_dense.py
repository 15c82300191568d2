"""Dense Q in Triton while Q, and in backward Q̄ beside it, fit the registers of a program; beyond, triton_streamed.

A program takes BB samples at a time and reads each Q once, whatever the number of steps. Where the batch shares Q, it
is read once per program, which then walks through the batch. Backward replays the iterates into a trace in global
memory, ``[programs, num_steps, D, BB]``, a few megabytes however large the batch is and so in L2; where a proximal map
ends the steps, what it was given too.
"""

import triton
import triton.language as tl

from unrolled_kernels.ops.momentum import triton_streamed
from unrolled_kernels.ops.triton.launch import (
    DENSE_BACKWARD,
    DENSE_BACKWARD_SHARED,
    DENSE_FORWARD,
    NO_STOPPING,
    BoundGradients,
    Bounds,
    Matrices,
    Schedule,
    ScheduleGradient,
    Tile,
    Vectors,
    is_proximal,
    launch,
    resident_programs,
    zero_gradients,
)
from unrolled_kernels.ops.triton.tile import (
    UNSPECIALIZED,
    accumulate_schedule,
    adjoint_step,
    load_bounds,
    load_gamma,
    load_schedule,
    load_threshold,
    load_tile,
    load_vector,
    outer,
    product,
    proximal_adjoint,
    proximal_map,
    stop_rows,
    store_bounds,
    store_schedule_of_program,
    store_schedule_of_samples,
    store_tile,
    to_columns,
    to_rows,
    transposed_product,
)


@triton.jit
def advance(
    q, b, x, previous, schedule, bounds, lower, upper, sample, t, real,
    n: tl.constexpr, BB: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Step t, from y_t = x and y_{t-1} = previous; returns y_{t+1}, y_t and v_t."""
    phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
    if schedule.beta is not None:
        m = x - previous
        z = x + gamma_t[None, :] * m
        v = x + beta_t[None, :] * m - phi_t[None, :] * (product(q, to_columns(z, n, BB, W)) + b)
    else:
        v = x - phi_t[None, :] * (product(q, to_columns(x, n, BB, W)) + b)
    threshold_t = load_threshold(schedule, sample, t, real)
    return proximal_map(schedule, bounds, lower, upper, phi_t[None, :], threshold_t[None, :], v), x, v


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_kernel(
    Q, b, y0, schedule, bounds,
    y,              # [B, d], or [num_steps + 1, B, d]
    stopping,
    column_stride, B, num_steps,
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    if SHARED:
        q = load_tile(Q, tl.zeros([BB], tl.int32), column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        if not SHARED:
            q = load_tile(Q, sample, column_stride, B, d, D, W).to(C)
        b_ = load_vector(b, s, i, inside, C)
        lower, upper = load_bounds(bounds, s, i, inside, C)
        x = load_vector(y0, s, i, inside, C)
        previous = x
        target = y + s.to(tl.int64) * d + i
        if TRAJECTORY:
            tl.store(target, x, mask=inside)
        if stopping.taken is None:
            for t in range(num_steps):
                x, previous, _ = advance(q, b_, x, previous, schedule, bounds, lower, upper, sample, t, real, n, BB, W)
                if TRAJECTORY:
                    target += tl.cast(B, tl.int64) * d
                    tl.store(target, x, mask=inside)
            if not TRAJECTORY:
                tl.store(target, x, mask=inside)
        else:
            moves = real.to(tl.int32)
            t = block * 0
            while tl.max(moves, 0) > 0:
                x, previous, _ = advance(q, b_, x, previous, schedule, bounds, lower, upper, sample, t, real, n, BB, W)
                stops = stop_rows(stopping, moves, x, previous, sample, t, num_steps, 0)
                tl.store(target, x, mask=inside & (stops > 0)[None, :])
                moves -= stops
                t += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_backward_kernel(
    grad_y, Q, b, y0, schedule, bounds,
    dQ,             # like Q; where the batch shares Q one [d, d] a program, in the compute dtype
    db, dy0,        # [B, d]
    d_schedule,     # φ̄, β̄, γ̄, threshold̄, [B or programs, num_steps or 1] by ROWS and STEPS
    d_bounds,       # [B, d]; any of these None where not needed
    trace,          # [programs, 2 or 3, max(num_steps, 1), D, BB]: y_t, φ_t times the adjoint of v_t, for PROXIMAL v_t
    column_stride, B, num_steps,
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr, PROXIMAL: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    j = (tl.arange(0, n)[:, None] * W + tl.arange(0, W)[None, :])[:, None, :]
    rows = i * BB + tl.arange(0, BB)[None, :]
    columns = j * BB + tl.arange(0, BB)[None, :, None]
    trace_size = tl.maximum(num_steps, 1).to(tl.int64) * (D * BB)
    trace += tl.program_id(0) * (3 if PROXIMAL else 2) * trace_size
    adjoints = trace + trace_size
    given = adjoints + trace_size + rows
    dq = tl.zeros([n, D, BB, W], C)
    sums = (tl.zeros([D, BB], C), tl.zeros([D, BB], C), tl.zeros([D, BB], C), tl.zeros([D, BB], C))
    if SHARED:
        q = load_tile(Q, tl.zeros([BB], tl.int32), column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        first = block == tl.program_id(0)
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        if not SHARED:
            q = load_tile(Q, sample, column_stride, B, d, D, W).to(C)
        b_ = load_vector(b, s, i, inside, C)
        lower, upper = load_bounds(bounds, s, i, inside, C)
        x = load_vector(y0, s, i, inside, C)

        # replay y_0 … y_{k-1} into the trace, which other threads still read for the block before
        previous = x
        row = trace + rows
        tl.debug_barrier()
        tl.store(row, x)
        for t in range(num_steps if PROXIMAL else num_steps - 1):
            x, previous, v = advance(q, b_, x, previous, schedule, bounds, lower, upper, sample, t, real, n, BB, W)
            row += D * BB
            # y_k, of a step that only v_{k-1} is wanted of, where an adjoint will be
            tl.store(row, x)
            if PROXIMAL:
                tl.store(given + t * (D * BB), v)
        if PROXIMAL:
            x = previous
            row = trace + rows + (num_steps - 1) * (D * BB)
        tl.debug_barrier()

        # the adjoint recurrence of manual.py, with x = y_t and previous = y_{t-1}
        a = load_vector(grad_y, s, i, inside, C, num_steps)
        carry = tl.zeros([D, BB], C)
        b_bar = tl.zeros([D, BB], C)
        lower_bar = tl.zeros([D, BB], C)
        upper_bar = tl.zeros([D, BB], C)
        adjoint_row = adjoints + trace_size + rows
        for back in range(num_steps):
            t = num_steps - 1 - back
            phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
            to_phi = b_bar
            to_threshold = b_bar
            if PROXIMAL:
                threshold_t = load_threshold(schedule, sample, t, real)
                v = tl.load(given + t * (D * BB))
                a, to_lower, to_upper, to_phi, to_threshold = proximal_adjoint(
                    schedule, bounds, lower, upper, phi_t[None, :], threshold_t[None, :], v, a
                )
                lower_bar += to_lower
                upper_bar += to_upper
            if t > 0:
                row -= D * BB
            previous = tl.load(row)
            m = x - previous
            z = x
            if MOMENTUM:
                z = x + gamma_t[None, :] * m
            w = to_rows(transposed_product(q, a), D, BB)
            a_scaled = phi_t[None, :] * a
            if dQ is not None:
                adjoint_row -= D * BB
                tl.store(adjoint_row, a_scaled)
            b_bar -= a_scaled
            if d_schedule[0] is not None:
                w_z = w * z
                w_m = w * m
                if y0.pointer is None:
                    # z_0 and m_0 are zero, and Qᵀa_1, which is in ȳ_0 alone, may overflow
                    w_z = tl.where(t > 0, w_z, 0.0)
                    w_m = tl.where(t > 0, w_m, 0.0)
                phi_part = -(w_z + a * b_)
                if PROXIMAL:
                    phi_part += to_phi
                parts = (phi_part, a * m, -(phi_t[None, :] * w_m), to_threshold)
                sums = accumulate_schedule(d_schedule, sums, parts, sample, t, num_steps, real, first, 1, ROWS, STEPS)
            a, carry = adjoint_step(a, carry, w, phi_t[None, :], beta_t[None, :], gamma_t[None, :], MOMENTUM)
            if TRAJECTORY:
                a += load_vector(grad_y, s, i, inside, C, t)
            x = previous

        target = s.to(tl.int64) * d + i
        if db is not None:
            tl.store(db + target, b_bar, mask=inside)
        if dy0 is not None:
            tl.store(dy0 + target, a + carry, mask=inside)
        store_bounds(d_bounds, target, lower_bar, upper_bar, inside)
        # Q̄ in a pass of its own, so that Q and Q̄ are not in registers together
        if dQ is not None:
            tl.debug_barrier()
            if not SHARED:
                dq = tl.zeros([n, D, BB, W], C)
            row_hat = trace + columns
            adjoint_row = adjoints + rows
            previous_hat = tl.load(row_hat)
            for t in range(num_steps):
                x_hat = tl.load(row_hat)
                z_hat = x_hat
                if MOMENTUM:
                    z_hat += load_gamma(schedule, sample, t, real)[None, :, None] * (x_hat - previous_hat)
                dq -= outer(tl.load(adjoint_row), z_hat)
                previous_hat = x_hat
                row_hat += D * BB
                adjoint_row += D * BB
            if not SHARED:
                store_tile(dQ, dq, sample, column_stride, B, d, D, W)
        if d_schedule[0] is not None:
            sums = store_schedule_of_samples(d_schedule, sums, sample, real, 1, ROWS, STEPS)

    if dQ is not None and SHARED:
        own = tl.program_id(0) + tl.zeros([1], tl.int32)
        store_tile(dQ, tl.sum(dq, 2)[:, :, None, :], own, column_stride, tl.num_programs(0), d, D, W)
    if d_schedule[0] is not None:
        store_schedule_of_program(d_schedule, sums, ROWS, STEPS)


def forward(matrix, b, y0, schedule, bounds, num_steps, trajectory, stopping=NO_STOPPING):
    """y of ``momentum_dense_kernel``; of one step or more without a trajectory, what ``stopping`` has, too."""
    B, d = b.shape
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    tile = Tile.find(DENSE_FORWARD, d, b.dtype, schedule[0].dtype)
    if tile is None:
        return triton_streamed.forward(matrix, b, y0, schedule, bounds, num_steps, trajectory, stopping)
    shared = matrix.shape[0] < B
    blocks = triton.cdiv(B, tile.samples)
    programs = resident_programs(b.device, blocks, tile.num_warps) if shared else blocks
    launch(
        momentum_dense_kernel, b.device, programs,
        Matrices.of(matrix), Vectors.rows(b), Vectors.rows(y0), Schedule.of(schedule), Bounds.of(bounds),
        y, stopping, 1, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def backward(
    grad_y, matrix, b, y0, schedule, bounds, num_steps, trajectory,
    needs_matrix, needs_b, needs_y0, needs_schedule, needs_bounds,
):  # fmt: skip
    """The gradients of ``momentum_dense_backward_kernel``: of Q, b, y_0 and the bounds None where not needed."""
    B, d = b.shape
    compute = schedule[0].dtype
    if b.numel() == 0:
        return *zero_gradients((matrix,), b, schedule, (needs_matrix,), needs_schedule), bounds
    shared = matrix.shape[0] < B
    tile = Tile.find(DENSE_BACKWARD_SHARED if shared else DENSE_BACKWARD, d, b.dtype, compute)
    if tile is None:
        return triton_streamed.backward(
            grad_y, matrix, b, y0, schedule, bounds, num_steps, trajectory,
            needs_matrix, needs_b, needs_y0, needs_schedule, needs_bounds,
        )  # fmt: skip
    programs = resident_programs(b.device, triton.cdiv(B, tile.samples), tile.num_warps)
    proximal = is_proximal(schedule, bounds)
    traces = 3 if proximal else 2
    trace = b.new_empty((programs, traces, max(num_steps, 1), tile.D, tile.samples), dtype=compute)
    d_matrix = None
    if needs_matrix:
        d_matrix = b.new_empty((programs, d, d), dtype=compute) if shared else matrix.new_empty(matrix.shape)
    db, dy0 = (b.new_empty((B, d)) if needed else None for needed in (needs_b, needs_y0))
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule)
    d_bounds = BoundGradients.allocate(bounds, needs_bounds)
    launch(
        momentum_dense_backward_kernel, b.device, programs,
        Vectors.cotangent(grad_y, trajectory), Matrices.of(matrix), Vectors.rows(b), Vectors.rows(y0),
        Schedule.of(schedule), Bounds.of(bounds), d_matrix, db, dy0, d_schedule.parts, d_bounds, trace, 1, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, PROXIMAL=proximal,
        ROWS=d_schedule.rows, STEPS=d_schedule.steps, num_warps=tile.num_warps,
    )  # fmt: skip
    if needs_matrix and shared:
        d_matrix = d_matrix.sum(0, keepdim=True).to(b.dtype)
    return d_matrix, db, dy0, d_schedule.reduce(schedule), d_bounds
