"""Dense Q in Triton while Q, and in backward Q̄ beside it, fit the registers of a program; beyond, triton_streamed.

A program takes BB samples at a time and reads each Q once, whatever the number of steps. Where the batch shares Q, it
is read once per program, which then walks through the batch. Backward replays the iterates into a trace in global
memory, ``[programs, num_steps, D, BB]``, a few megabytes however large the batch is and so in L2.
"""

import triton
import triton.language as tl

from unrolled_kernels.ops.momentum import triton_streamed
from unrolled_kernels.ops.momentum.triton_launch import (
    DENSE_BACKWARD,
    DENSE_BACKWARD_SHARED,
    DENSE_FORWARD,
    ScheduleGradient,
    Tile,
    as_matrices,
    as_rows,
    cotangent_strides,
    launch,
    resident_programs,
    schedule_arguments,
    zero_gradients,
)
from unrolled_kernels.ops.momentum.triton_tile import (
    UNSPECIALIZED,
    adjoint_step,
    load_coefficient,
    load_schedule,
    load_tile,
    load_vector,
    outer,
    product,
    store_step_gradient,
    store_tile,
    to_columns,
    to_rows,
    transposed_product,
)


@triton.jit
def advance(
    q, b, x, previous, phi_t, beta_t, gamma_t,
    MOMENTUM: tl.constexpr, n: tl.constexpr, BB: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One step from y_t = x and y_{t-1} = previous; returns y_{t+1} and y_t."""
    if MOMENTUM:
        m = x - previous
        z = x + gamma_t * m
        following = x + beta_t * m - phi_t * (product(q, to_columns(z, n, BB, W)) + b)
    else:
        following = x - phi_t * (product(q, to_columns(x, n, BB, W)) + b)
    return following, x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_kernel(
    Q, b, y0, phi, beta, gamma,
    y,              # [B, d], or [num_steps + 1, B, d]
    Q_stride, b_stride, y0_stride, column_stride,
    phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
    B, num_steps,
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = phi.dtype.element_ty
    MOMENTUM: tl.constexpr = beta is not None
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    if SHARED:
        q = load_tile(Q, tl.zeros([BB], tl.int32), 0, column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        if not SHARED:
            q = load_tile(Q, sample, Q_stride, column_stride, B, d, D, W).to(C)
        b_ = load_vector(b, s, b_stride, i, 1, inside, C)
        x = load_vector(y0, s, y0_stride, i, 1, inside, C)
        previous = x
        target = y + s.to(tl.int64) * d + i
        if TRAJECTORY:
            tl.store(target, x, mask=inside)
        for t in range(num_steps):
            phi_t, beta_t, gamma_t = load_schedule(
                phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                sample, t, real,
            )  # fmt: skip
            x, previous = advance(
                q, b_, x, previous, phi_t[None, :], beta_t[None, :], gamma_t[None, :], MOMENTUM, n, BB, W
            )
            if TRAJECTORY:
                target += tl.cast(B, tl.int64) * d
                tl.store(target, x, mask=inside)
        if not TRAJECTORY:
            tl.store(target, x, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_backward_kernel(
    grad_y, Q, b, y0, phi, beta, gamma,
    dQ,             # like Q; where the batch shares Q one [d, d] a program, in the compute dtype
    db, dy0,        # [B, d]
    d_phi, d_beta, d_gamma,  # [B or programs, num_steps or 1] by ROWS and STEPS; None where not needed
    trace,          # [programs, 2, max(num_steps, 1), D, BB]: y_t, then φ_t ȳ_{t+1}
    grad_step, grad_sample, grad_entry,
    Q_stride, b_stride, y0_stride, column_stride,
    phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
    B, num_steps,
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = phi.dtype.element_ty
    MOMENTUM: tl.constexpr = beta is not None
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    j = (tl.arange(0, n)[:, None] * W + tl.arange(0, W)[None, :])[:, None, :]
    rows = i * BB + tl.arange(0, BB)[None, :]
    columns = j * BB + tl.arange(0, BB)[None, :, None]
    trace_size = tl.maximum(num_steps, 1).to(tl.int64) * (D * BB)
    trace += tl.program_id(0) * 2 * trace_size
    adjoints = trace + trace_size
    dq = tl.zeros([n, D, BB, W], C)
    phi_sum = tl.zeros([D, BB], C)
    beta_sum = tl.zeros([D, BB], C)
    gamma_sum = tl.zeros([D, BB], C)
    if SHARED:
        q = load_tile(Q, tl.zeros([BB], tl.int32), 0, column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        first_block = block == tl.program_id(0)
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        if not SHARED:
            q = load_tile(Q, sample, Q_stride, column_stride, B, d, D, W).to(C)
        b_ = load_vector(b, s, b_stride, i, 1, inside, C)
        x = load_vector(y0, s, y0_stride, i, 1, inside, C)

        # replay y_0 … y_{k-1} into the trace, which other threads still read for the block before
        previous = x
        row = trace + rows
        tl.debug_barrier()
        tl.store(row, x)
        for t in range(num_steps - 1):
            phi_t, beta_t, gamma_t = load_schedule(
                phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                sample, t, real,
            )  # fmt: skip
            x, previous = advance(
                q, b_, x, previous, phi_t[None, :], beta_t[None, :], gamma_t[None, :], MOMENTUM, n, BB, W
            )
            row += D * BB
            tl.store(row, x)
        tl.debug_barrier()

        # the adjoint recurrence of manual.py, with x = y_t and previous = y_{t-1}
        cotangent = grad_y
        if TRAJECTORY:
            cotangent += tl.cast(num_steps, tl.int64) * grad_step
        a = load_vector(cotangent, s, grad_sample, i, grad_entry, inside, C)
        carry = tl.zeros([D, BB], C)
        b_bar = tl.zeros([D, BB], C)
        adjoint_row = adjoints + trace_size + rows
        for back in range(num_steps):
            t = num_steps - 1 - back
            phi_t, beta_t, gamma_t = load_schedule(
                phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                sample, t, real,
            )  # fmt: skip
            if t > 0:
                row -= D * BB
            previous = tl.load(row)
            z = x
            if MOMENTUM:
                m = x - previous
                z = x + gamma_t[None, :] * m
            w = to_rows(transposed_product(q, a), D, BB)
            a_scaled = phi_t[None, :] * a
            if dQ is not None:
                adjoint_row -= D * BB
                tl.store(adjoint_row, a_scaled)
            b_bar -= a_scaled
            if d_phi is not None:
                phi_part = -(w * z + a * b_)
                if STEPS:
                    part = tl.sum(phi_part, 0)
                    store_step_gradient(d_phi, part, sample, t, num_steps, real, True, first_block, ROWS)
                else:
                    phi_sum += phi_part
                if MOMENTUM:
                    beta_part = a * m
                    gamma_part = -(phi_t[None, :] * w * m)
                    if STEPS:
                        part = tl.sum(beta_part, 0)
                        store_step_gradient(d_beta, part, sample, t, num_steps, real, True, first_block, ROWS)
                        part = tl.sum(gamma_part, 0)
                        store_step_gradient(d_gamma, part, sample, t, num_steps, real, True, first_block, ROWS)
                    else:
                        beta_sum += beta_part
                        gamma_sum += gamma_part
            a, carry = adjoint_step(a, carry, w, phi_t[None, :], beta_t[None, :], gamma_t[None, :], MOMENTUM)
            if TRAJECTORY:
                cotangent -= grad_step
                a += load_vector(cotangent, s, grad_sample, i, grad_entry, inside, C)
            x = previous

        target = s.to(tl.int64) * d + i
        tl.store(db + target, b_bar, mask=inside)
        tl.store(dy0 + target, a + carry, mask=inside)

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
                    gamma_t = load_coefficient(gamma, sample, gamma_sample, t, gamma_step, real)
                    z_hat += gamma_t[None, :, None] * (x_hat - previous_hat)
                dq -= outer(tl.load(adjoint_row), z_hat)
                previous_hat = x_hat
                row_hat += D * BB
                adjoint_row += D * BB
            if not SHARED:
                store_tile(dQ, dq, sample, d * d, column_stride, B, d, D, W)
        if d_phi is not None and ROWS and not STEPS:
            tl.store(d_phi + sample, tl.sum(phi_sum, 0), mask=real)
            phi_sum = tl.zeros([D, BB], C)
            if MOMENTUM:
                tl.store(d_beta + sample, tl.sum(beta_sum, 0), mask=real)
                tl.store(d_gamma + sample, tl.sum(gamma_sum, 0), mask=real)
                beta_sum = tl.zeros([D, BB], C)
                gamma_sum = tl.zeros([D, BB], C)

    if dQ is not None and SHARED:
        own = tl.program_id(0) + tl.zeros([1], tl.int32)
        store_tile(dQ, tl.sum(dq, 2)[:, :, None, :], own, d * d, column_stride, tl.num_programs(0), d, D, W)
    if d_phi is not None and not ROWS and not STEPS:
        tl.store(d_phi + tl.program_id(0), tl.sum(phi_sum))
        if MOMENTUM:
            tl.store(d_beta + tl.program_id(0), tl.sum(beta_sum))
            tl.store(d_gamma + tl.program_id(0), tl.sum(gamma_sum))


def forward(matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
    """Contract of the op ``momentum_dense``."""
    B, d = b.shape
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    tile = Tile.find(DENSE_FORWARD, d, b.dtype, step_sizes.dtype)
    if tile is None:
        return triton_streamed.forward(matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory)
    shared = matrix.shape[0] < B
    blocks = triton.cdiv(B, tile.samples)
    matrix, matrix_stride = as_matrices(matrix)
    (b, b_stride), (y0, y0_stride) = as_rows(b), as_rows(y0)
    phi, beta, gamma, *strides = schedule_arguments(step_sizes, momentum, extrapolation)
    launch(
        momentum_dense_kernel,
        resident_programs(b.device, blocks, tile.num_warps) if shared else blocks,
        matrix, b, y0, phi, beta, gamma, y, matrix_stride, b_stride, y0_stride, 1, *strides, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def backward(
    grad_y, matrix, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory, needs_matrix, needs_schedule
):
    """Contract of the op ``momentum_dense_backward``."""
    B, d = b.shape
    schedule = (step_sizes, momentum, extrapolation)
    if b.numel() == 0:
        return zero_gradients((matrix,), b, schedule, (needs_matrix,), needs_schedule)
    shared = matrix.shape[0] < B
    tile = Tile.find(DENSE_BACKWARD_SHARED if shared else DENSE_BACKWARD, d, b.dtype, step_sizes.dtype)
    if tile is None:
        return triton_streamed.backward(
            grad_y, matrix, b, y0, *schedule, num_steps, trajectory, needs_matrix, needs_schedule
        )
    programs = resident_programs(b.device, triton.cdiv(B, tile.samples), tile.num_warps)
    trace = step_sizes.new_empty((programs, 2, max(num_steps, 1), tile.D, tile.samples))
    d_matrix = None
    if needs_matrix:
        d_matrix = step_sizes.new_empty((programs, d, d)) if shared else matrix.new_empty(matrix.shape)
    db, dy0 = b.new_empty((B, d)), b.new_empty((B, d))
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule)
    matrix, matrix_stride = as_matrices(matrix)
    (b, b_stride), (y0, y0_stride) = as_rows(b), as_rows(y0)
    phi, beta, gamma, *strides = schedule_arguments(*schedule)
    launch(
        momentum_dense_backward_kernel,
        programs,
        grad_y, matrix, b, y0, phi, beta, gamma, d_matrix, db, dy0, *d_schedule.parts, trace,
        *cotangent_strides(grad_y, trajectory), matrix_stride, b_stride, y0_stride, 1, *strides, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, ROWS=d_schedule.rows, STEPS=d_schedule.steps,
        num_warps=tile.num_warps,
    )  # fmt: skip
    if d_matrix is None:
        d_matrix = b.new_empty(0)
    elif shared:
        d_matrix = d_matrix.sum(0, keepdim=True).to(b.dtype)
    return (d_matrix, db, dy0, *d_schedule.reduce(schedule))
