"""Diagonal Q, or diag(1 + f²), in Triton: one scalar recurrence an element, all steps in registers.

Backward keeps the iterates of a segment of at most 12 steps (8 with momentum) in registers. Longer schedules run
forward once and leave y_t and y_{t-1} at the start of each segment in global memory; the segments are then replayed and
differentiated from the last to the first.
"""

import torch
import triton
import triton.language as tl

from unrolled_kernels.ops.momentum.triton_launch import (
    ScheduleGradient,
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
    diagonal_step,
    load_schedule,
    load_vector,
    store_step_gradient,
)

_WARPS = 4
# compiling the unrolled steps takes seconds: fewer of them where each is longer
_SEGMENT = {False: 12, True: 8}


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_diagonal_kernel(
    q, observed, b, y0, phi, beta, gamma,  # observed x: q is f, b is g
    y,              # [B, d], or [num_steps + 1, B, d]
    q_stride, observed_stride, b_stride, y0_stride,
    phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
    B, num_steps, d,
    RB: tl.constexpr, CB: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = phi.dtype.element_ty
    MOMENTUM: tl.constexpr = beta is not None
    pieces = tl.cdiv(d, CB)
    sample = tl.program_id(0) // pieces * RB + tl.arange(0, RB)
    entry = ((tl.program_id(0) % pieces).to(tl.int64) * CB + tl.arange(0, CB))[None, :]
    real = sample < B
    s, inside = sample[:, None], (entry < d) & real[:, None]
    q_ = load_vector(q, s, q_stride, entry, 1, inside, C)
    b_ = load_vector(b, s, b_stride, entry, 1, inside, C)
    if observed is not None:
        q_ = 1 + q_ * q_
        b_ -= load_vector(observed, s, observed_stride, entry, 1, inside, C)
    x = load_vector(y0, s, y0_stride, entry, 1, inside, C)
    previous = x
    target = y + s.to(tl.int64) * d + entry
    if TRAJECTORY:
        tl.store(target, x, mask=inside)
    for t in range(num_steps):
        phi_t, beta_t, gamma_t = load_schedule(
            phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
            sample, t, real,
        )  # fmt: skip
        following = diagonal_step(q_, b_, x, previous, phi_t[:, None], beta_t[:, None], gamma_t[:, None], MOMENTUM)
        previous = x
        x = following
        if TRAJECTORY:
            target += tl.cast(B, tl.int64) * d
            tl.store(target, x, mask=inside)
    if not TRAJECTORY:
        tl.store(target, x, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_diagonal_backward_kernel(
    grad_y, q, observed, b, y0, phi, beta, gamma,
    dq, db, dy0,             # [B, d]; dq None where not needed
    d_phi, d_beta, d_gamma,  # ROWS: [pieces, B, num_steps or 1], else [programs, num_steps or 1]; None where not needed
    checkpoints,             # [programs, segments - 1, 2, RB, CB]
    grad_step, grad_sample, grad_entry,
    q_stride, observed_stride, b_stride, y0_stride,
    phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
    B, num_steps, d,
    RB: tl.constexpr, CB: tl.constexpr, SEGMENT: tl.constexpr, TAIL: tl.constexpr,
    TRAJECTORY: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = phi.dtype.element_ty
    MOMENTUM: tl.constexpr = beta is not None
    pieces = tl.cdiv(d, CB)
    segments = tl.cdiv(num_steps, SEGMENT)
    checkpoints += tl.program_id(0).to(tl.int64) * tl.maximum(segments - 1, 0) * (2 * RB * CB)
    checkpoints += tl.arange(0, RB)[:, None] * CB + tl.arange(0, CB)[None, :]
    phi_sum = tl.zeros([RB, CB], C)
    beta_sum = tl.zeros([RB, CB], C)
    gamma_sum = tl.zeros([RB, CB], C)
    for block in range(tl.program_id(0), tl.cdiv(B, RB) * pieces, tl.num_programs(0)):
        first_block = block == tl.program_id(0)
        piece = block % pieces
        sample = block // pieces * RB + tl.arange(0, RB)
        entry = (tl.cast(piece, tl.int64) * CB + tl.arange(0, CB))[None, :]
        real = sample < B
        s, inside = sample[:, None], (entry < d) & real[:, None]
        # the row of this sample and piece in d_phi
        part_row = tl.cast(piece, tl.int64) * B + sample
        q_ = load_vector(q, s, q_stride, entry, 1, inside, C)
        b_ = load_vector(b, s, b_stride, entry, 1, inside, C)
        if observed is not None:
            q_ = 1 + q_ * q_
            b_ -= load_vector(observed, s, observed_stride, entry, 1, inside, C)
        start = load_vector(y0, s, y0_stride, entry, 1, inside, C)

        x = start
        previous = start
        for segment in range(segments - 1):
            for j in range(SEGMENT):
                phi_t, beta_t, gamma_t = load_schedule(
                    phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                    sample, segment * SEGMENT + j, real,
                )  # fmt: skip
                following = diagonal_step(
                    q_, b_, x, previous, phi_t[:, None], beta_t[:, None], gamma_t[:, None], MOMENTUM
                )
                previous = x
                x = following
            tl.store(checkpoints + segment * (2 * RB * CB), x)
            tl.store(checkpoints + segment * (2 * RB * CB) + RB * CB, previous)
        tl.debug_barrier()

        cotangent = grad_y
        if TRAJECTORY:
            cotangent += tl.cast(num_steps, tl.int64) * grad_step
        a = load_vector(cotangent, s, grad_sample, entry, grad_entry, inside, C)
        carry = tl.zeros([RB, CB], C)
        q_bar = tl.zeros([RB, CB], C)
        b_bar = tl.zeros([RB, CB], C)
        for back in range(segments):
            segment = segments - 1 - back
            # y_{t-1}, y_t, … of the segment, whose last iterate is not needed
            ys = (previous, x)
            for j in tl.static_range(SEGMENT - 1):
                t = segment * SEGMENT + j
                phi_t, beta_t, gamma_t = load_schedule(
                    phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                    sample, t, real & (tl.full([RB], t, tl.int32) < num_steps),
                )  # fmt: skip
                following = diagonal_step(
                    q_, b_, ys[j + 1], ys[j], phi_t[:, None], beta_t[:, None], gamma_t[:, None], MOMENTUM
                )
                ys = ys + (following,)  # noqa: RUF005
            for j in tl.static_range(SEGMENT - 1, -1, -1):
                t = segment * SEGMENT + j
                # past the last step the coefficients load as 0, which leaves a as it is
                taken = tl.full([RB], t, tl.int32) < num_steps
                phi_t, beta_t, gamma_t = load_schedule(
                    phi, beta, gamma, phi_sample, phi_step, beta_sample, beta_step, gamma_sample, gamma_step,
                    sample, t, real & taken,
                )  # fmt: skip
                m = ys[j + 1] - ys[j]
                z = ys[j + 1]
                if MOMENTUM:
                    z += gamma_t[:, None] * m
                w = q_ * a
                a_scaled = phi_t[:, None] * a
                q_bar -= a_scaled * z
                b_bar -= a_scaled
                if d_phi is not None:
                    phi_part = -(w * z + a * b_)
                    beta_part = a * m
                    gamma_part = -(phi_t[:, None] * w * m)
                    if STEPS:
                        own = real & taken
                        some = t < num_steps
                        store_step_gradient(
                            d_phi, tl.sum(phi_part, 1), part_row, t, num_steps, own, some, first_block, ROWS
                        )
                        if MOMENTUM:
                            store_step_gradient(
                                d_beta, tl.sum(beta_part, 1), part_row, t, num_steps, own, some, first_block, ROWS
                            )
                            store_step_gradient(
                                d_gamma, tl.sum(gamma_part, 1), part_row, t, num_steps, own, some, first_block, ROWS
                            )
                    else:
                        phi_sum += tl.where(taken[:, None], phi_part, 0.0) if TAIL else phi_part
                        if MOMENTUM:
                            beta_sum += tl.where(taken[:, None], beta_part, 0.0) if TAIL else beta_part
                            gamma_sum += tl.where(taken[:, None], gamma_part, 0.0) if TAIL else gamma_part
                a, carry = adjoint_step(a, carry, w, phi_t[:, None], beta_t[:, None], gamma_t[:, None], MOMENTUM)
                if TRAJECTORY:
                    before = grad_y + tl.cast(t, tl.int64) * grad_step
                    a += load_vector(before, s, grad_sample, entry, grad_entry, inside & taken[:, None], C)
            if segment > 1:
                x = tl.load(checkpoints + (segment - 2) * (2 * RB * CB))
                previous = tl.load(checkpoints + (segment - 2) * (2 * RB * CB) + RB * CB)
            else:
                x = start
                previous = start

        target = s.to(tl.int64) * d + entry
        if dq is not None:
            if observed is not None:
                # f is read again, which is cheaper than to keep it
                q_bar *= 2 * load_vector(q, s, q_stride, entry, 1, inside, C)
            tl.store(dq + target, q_bar, mask=inside)
        tl.store(db + target, b_bar, mask=inside)
        tl.store(dy0 + target, a + carry, mask=inside)
        if d_phi is not None and ROWS and not STEPS:
            tl.store(d_phi + part_row, tl.sum(phi_sum, 1), mask=real)
            phi_sum = tl.zeros([RB, CB], C)
            if MOMENTUM:
                tl.store(d_beta + part_row, tl.sum(beta_sum, 1), mask=real)
                tl.store(d_gamma + part_row, tl.sum(gamma_sum, 1), mask=real)
                beta_sum = tl.zeros([RB, CB], C)
                gamma_sum = tl.zeros([RB, CB], C)
        # the checkpoints are overwritten for the next block
        tl.debug_barrier()

    if d_phi is not None and not ROWS and not STEPS:
        tl.store(d_phi + tl.program_id(0), tl.sum(phi_sum))
        if MOMENTUM:
            tl.store(d_beta + tl.program_id(0), tl.sum(beta_sum))
            tl.store(d_gamma + tl.program_id(0), tl.sum(gamma_sum))


def _blocks(B, d, elements):
    """Samples and entries of a block of ``elements``, and how many blocks cover ``[B, d]``."""
    entries = min(elements, triton.next_power_of_2(d))
    samples = elements // entries
    return samples, entries, triton.cdiv(B, samples) * triton.cdiv(d, entries)


def _flat(schedule, *tensors):
    """Whether ``[B, d]`` may be walked through as one row: one schedule for all, and nothing strided or broadcast."""
    one_schedule = all(c is None or c.shape[0] == 1 for c in schedule)
    return one_schedule and all(x is None or x.is_contiguous() for x in tensors)


def forward(eigenvalues, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory, observed=None):
    """Contract of the op ``momentum_diagonal``; with ``observed``, of ``momentum_tikhonov``."""
    B, d = b.shape
    schedule = (step_sizes, momentum, extrapolation)
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    rows = [as_rows(x) for x in (eigenvalues, observed, b, y0)]
    (q, observed, b, y0), row_strides = zip(*rows, strict=True)
    if _flat(schedule, q, observed, b, y0):
        B, d = 1, B * d
    # one 16-byte vector of the storage dtype a lane
    RB, CB, blocks = _blocks(B, d, 32 * _WARPS * (16 // b.dtype.itemsize))
    phi, beta, gamma, *strides = schedule_arguments(*schedule)
    launch(
        momentum_diagonal_kernel, blocks,
        q, observed, b, y0, phi, beta, gamma, y, *row_strides, *strides, B, num_steps, d,
        RB=RB, CB=CB, TRAJECTORY=trajectory, num_warps=_WARPS,
    )  # fmt: skip
    return y


def backward(
    grad_y, eigenvalues, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory,
    needs_eigenvalues, needs_schedule, observed=None,
):  # fmt: skip
    """Contract of the op ``momentum_diagonal_backward``; with ``observed``, of ``momentum_tikhonov_backward``."""
    B, d = b.shape
    schedule = (step_sizes, momentum, extrapolation)
    if b.numel() == 0:
        return zero_gradients((eigenvalues,), b, schedule, (needs_eigenvalues,), needs_schedule)
    d_eigenvalues = eigenvalues.new_empty((B, d)) if needs_eigenvalues else None
    db, dy0 = b.new_empty((B, d)), b.new_empty((B, d))
    rows = [as_rows(x) for x in (eigenvalues, observed, b, y0)]
    (q, observed, b, y0), row_strides = zip(*rows, strict=True)
    grad_strides = cotangent_strides(grad_y, trajectory)
    if _flat(schedule, q, observed, b, y0) and grad_strides[1] == d * grad_strides[2]:
        B, d = 1, B * d
    # two registers a lane for each iterate of a segment
    RB, CB, blocks = _blocks(B, d, 32 * _WARPS * (8 // step_sizes.dtype.itemsize))
    segments = max(1, triton.cdiv(num_steps, _SEGMENT[momentum is not None]))
    segment = max(1, triton.cdiv(num_steps, segments))
    programs = blocks if segments == 1 else resident_programs(b.device, blocks, _WARPS)
    checkpoints = step_sizes.new_empty((programs, segments - 1, 2, RB, CB))
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule, triton.cdiv(d, CB))
    phi, beta, gamma, *strides = schedule_arguments(*schedule)
    launch(
        momentum_diagonal_backward_kernel, programs,
        grad_y, q, observed, b, y0, phi, beta, gamma, d_eigenvalues, db, dy0, *d_schedule.parts, checkpoints,
        *grad_strides, *row_strides, *strides, B, num_steps, d,
        RB=RB, CB=CB, SEGMENT=segment, TAIL=num_steps % segment != 0,
        TRAJECTORY=trajectory, ROWS=d_schedule.rows, STEPS=d_schedule.steps, num_warps=_WARPS,
        # three programs a multiprocessor; left alone, ptxas spills to fit a fourth or fifth
        maxnreg=168 if step_sizes.dtype == torch.float32 else None,
    )  # fmt: skip
    nothing = b.new_empty(0)
    return (nothing if d_eigenvalues is None else d_eigenvalues, db, dy0, *d_schedule.reduce(schedule))
