"""Diagonal Q, or diag(1 + f²), in Triton: one scalar recurrence an element, all steps in registers.

Backward keeps the iterates of a segment of at most 12 steps (8 with momentum) in registers. Longer schedules run
forward once and leave y_t and y_{t-1} at the start of each segment in global memory; the segments are then replayed and
differentiated from the last to the first. What a proximal map was given is recomputed from the iterates.
"""

import torch
import triton
import triton.language as tl

from unrolled_kernels.ops.triton.launch import (
    NO_STOPPING,
    BoundGradients,
    Bounds,
    Schedule,
    ScheduleGradient,
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
    diagonal_step,
    load_bounds,
    load_schedule,
    load_threshold,
    load_vector,
    proximal_adjoint,
    proximal_map,
    stop_rows,
    store_bounds,
    store_schedule_of_program,
    store_schedule_of_samples,
)

_WARPS = 4
# compiling the unrolled steps takes seconds: fewer of them where each is longer
_SEGMENT = {False: 12, True: 8}


@triton.jit
def load_problem(diagonal, observed, b, s, entry, inside, compute: tl.constexpr):
    """The diagonal of Q and what stands for b; with ``observed`` x, Q = diag(1 + f²) of f = ``diagonal``, and b - x."""
    q = load_vector(diagonal, s, entry, inside, compute)
    rhs = load_vector(b, s, entry, inside, compute)
    if observed.pointer is not None:
        q = 1 + q * q
        rhs -= load_vector(observed, s, entry, inside, compute)
    return q, rhs


@triton.jit
def load_columns(schedule, sample, t, inside, num_steps, TAIL: tl.constexpr):
    """φ_t, β_t, γ_t and a threshold as ``[RB, 1]``; where TAIL and t is past the last step, the first three are zero,
    which leaves everything as it is but for a map."""
    if TAIL:
        taken = tl.full(sample.shape, t, tl.int32) < num_steps
        phi_t, beta_t, gamma_t = load_schedule(schedule, sample, tl.minimum(t, num_steps - 1), inside)
        threshold_t = load_threshold(schedule, sample, tl.minimum(t, num_steps - 1), inside)
        phi_t = tl.where(taken, phi_t, 0.0)
        beta_t = tl.where(taken, beta_t, 0.0)
        gamma_t = tl.where(taken, gamma_t, 0.0)
    else:
        phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, inside)
        threshold_t = load_threshold(schedule, sample, t, inside)
    return phi_t[:, None], beta_t[:, None], gamma_t[:, None], threshold_t[:, None]


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_diagonal_kernel(
    diagonal, observed, b, y0, schedule, bounds,
    y,              # [B, d], or [num_steps + 1, B, d]
    stopping,       # then CB ≥ d
    B, num_steps, d,
    RB: tl.constexpr, CB: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    pieces = tl.cdiv(d, CB)
    sample = tl.program_id(0) // pieces * RB + tl.arange(0, RB)
    entry = ((tl.program_id(0) % pieces).to(tl.int64) * CB + tl.arange(0, CB))[None, :]
    real = sample < B
    s, inside = sample[:, None], (entry < d) & real[:, None]
    q, rhs = load_problem(diagonal, observed, b, s, entry, inside, C)
    lower, upper = load_bounds(bounds, s, entry, inside, C)
    x = load_vector(y0, s, entry, inside, C)
    previous = x
    target = y + s.to(tl.int64) * d + entry
    if TRAJECTORY:
        tl.store(target, x, mask=inside)
    if stopping.taken is None:
        for t in range(num_steps):
            phi_t, beta_t, gamma_t, threshold_t = load_columns(schedule, sample, t, real, num_steps, False)
            v = diagonal_step(q, rhs, x, previous, phi_t, beta_t, gamma_t, MOMENTUM)
            previous = x
            x = proximal_map(schedule, bounds, lower, upper, phi_t, threshold_t, v)
            if TRAJECTORY:
                target += tl.cast(B, tl.int64) * d
                tl.store(target, x, mask=inside)
        if not TRAJECTORY:
            tl.store(target, x, mask=inside)
    else:
        moves = real.to(tl.int32)
        t = tl.program_id(0) * 0
        while tl.max(moves, 0) > 0:
            phi_t, beta_t, gamma_t, threshold_t = load_columns(schedule, sample, t, real, num_steps, False)
            v = diagonal_step(q, rhs, x, previous, phi_t, beta_t, gamma_t, MOMENTUM)
            previous = x
            x = proximal_map(schedule, bounds, lower, upper, phi_t, threshold_t, v)
            stops = stop_rows(stopping, moves, x, previous, sample, t, num_steps, 1)
            tl.store(target, x, mask=inside & (stops > 0)[:, None])
            moves -= stops
            t += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_diagonal_backward_kernel(
    grad_y, diagonal, observed, b, y0, schedule, bounds,
    d_diagonal, db, dy0,  # [B, d]
    d_schedule,           # φ̄, β̄, γ̄, threshold̄, [pieces, B, num_steps or 1] for ROWS, else [programs, num_steps or 1]
    d_bounds,             # [B, d]; any of these None where not needed
    checkpoints,          # [programs, segments - 1, 2, RB, CB]
    B, num_steps, d,
    RB: tl.constexpr, CB: tl.constexpr, SEGMENT: tl.constexpr, TAIL: tl.constexpr,
    TRAJECTORY: tl.constexpr, PROXIMAL: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    pieces = tl.cdiv(d, CB)
    segments = tl.cdiv(num_steps, SEGMENT)
    checkpoints += tl.program_id(0).to(tl.int64) * tl.maximum(segments - 1, 0) * (2 * RB * CB)
    checkpoints += tl.arange(0, RB)[:, None] * CB + tl.arange(0, CB)[None, :]
    sums = (tl.zeros([RB, CB], C), tl.zeros([RB, CB], C), tl.zeros([RB, CB], C), tl.zeros([RB, CB], C))
    for block in range(tl.program_id(0), tl.cdiv(B, RB) * pieces, tl.num_programs(0)):
        first = block == tl.program_id(0)
        piece = block % pieces
        sample = block // pieces * RB + tl.arange(0, RB)
        entry = (tl.cast(piece, tl.int64) * CB + tl.arange(0, CB))[None, :]
        real = sample < B
        s, inside = sample[:, None], (entry < d) & real[:, None]
        # the row of this sample and piece in d_schedule
        part_row = tl.cast(piece, tl.int64) * B + sample
        q, rhs = load_problem(diagonal, observed, b, s, entry, inside, C)
        lower, upper = load_bounds(bounds, s, entry, inside, C)
        start = load_vector(y0, s, entry, inside, C)

        x = start
        previous = start
        for segment in range(segments - 1):
            for j in range(SEGMENT):
                t = segment * SEGMENT + j
                phi_t, beta_t, gamma_t, threshold_t = load_columns(schedule, sample, t, real, num_steps, False)
                v = diagonal_step(q, rhs, x, previous, phi_t, beta_t, gamma_t, MOMENTUM)
                previous = x
                x = proximal_map(schedule, bounds, lower, upper, phi_t, threshold_t, v)
            tl.store(checkpoints + segment * (2 * RB * CB), x)
            tl.store(checkpoints + segment * (2 * RB * CB) + RB * CB, previous)
        tl.debug_barrier()

        a = load_vector(grad_y, s, entry, inside, C, num_steps)
        carry = tl.zeros([RB, CB], C)
        q_bar = tl.zeros([RB, CB], C)
        b_bar = tl.zeros([RB, CB], C)
        lower_bar = tl.zeros([RB, CB], C)
        upper_bar = tl.zeros([RB, CB], C)
        for back in range(segments):
            segment = segments - 1 - back
            # y_{t-1}, y_t, … of the segment, whose last iterate is not needed
            ys = (previous, x)
            for j in tl.static_range(SEGMENT - 1):
                t = segment * SEGMENT + j
                phi_t, beta_t, gamma_t, threshold_t = load_columns(schedule, sample, t, real, num_steps, TAIL)
                v = diagonal_step(q, rhs, ys[j + 1], ys[j], phi_t, beta_t, gamma_t, MOMENTUM)
                following = proximal_map(schedule, bounds, lower, upper, phi_t, threshold_t, v)
                ys = ys + (following,)  # noqa: RUF005
            for j in tl.static_range(SEGMENT - 1, -1, -1):
                t = segment * SEGMENT + j
                phi_t, beta_t, gamma_t, threshold_t = load_columns(schedule, sample, t, real, num_steps, TAIL)
                to_phi = q
                to_threshold = q
                if PROXIMAL:
                    v = diagonal_step(q, rhs, ys[j + 1], ys[j], phi_t, beta_t, gamma_t, MOMENTUM)
                    arrived = a
                    if TAIL:
                        # a step that is not taken stops nothing, and nothing is owed for it
                        taken = tl.full([RB, CB], t, tl.int32) < num_steps
                        arrived = tl.where(taken, a, 0.0)
                    to_v, to_lower, to_upper, to_phi, to_threshold = proximal_adjoint(
                        schedule, bounds, lower, upper, phi_t, threshold_t, v, arrived
                    )
                    a = tl.where(taken, to_v, a) if TAIL else to_v
                    lower_bar += to_lower
                    upper_bar += to_upper
                m = ys[j + 1] - ys[j]
                z = ys[j + 1]
                if MOMENTUM:
                    z += gamma_t * m
                w = q * a
                a_scaled = phi_t * a
                q_bar -= a_scaled * z
                b_bar -= a_scaled
                if d_schedule[0] is not None:
                    # q a, which may overflow, is not multiplied by z_0 or m_0, which may be zero
                    phi_part = -a * (q * z + rhs)
                    if PROXIMAL:
                        phi_part += to_phi
                    parts = (phi_part, a * m, -a_scaled * (q * m), to_threshold)
                    if TAIL and not STEPS:
                        taken = tl.full([RB, CB], t, tl.int32) < num_steps
                        # γ̄'s has the factor φ_t = 0, and a threshold's is zero
                        parts = (tl.where(taken, parts[0], 0.0), tl.where(taken, parts[1], 0.0), parts[2], parts[3])
                    sums = accumulate_schedule(
                        d_schedule, sums, parts, part_row, t, num_steps, real, first, 0, ROWS, STEPS, TAIL
                    )
                a, carry = adjoint_step(a, carry, w, phi_t, beta_t, gamma_t, MOMENTUM)
                if TRAJECTORY:
                    taken = tl.full([RB, CB], t, tl.int32) < num_steps
                    a += load_vector(grad_y, s, entry, inside & taken, C, t)
            if segment > 1:
                x = tl.load(checkpoints + (segment - 2) * (2 * RB * CB))
                previous = tl.load(checkpoints + (segment - 2) * (2 * RB * CB) + RB * CB)
            else:
                x = start
                previous = start

        target = s.to(tl.int64) * d + entry
        if d_diagonal is not None:
            if observed.pointer is not None:
                # f is read again, which is cheaper than to keep it
                q_bar *= 2 * load_vector(diagonal, s, entry, inside, C)
            tl.store(d_diagonal + target, q_bar, mask=inside)
        if db is not None:
            tl.store(db + target, b_bar, mask=inside)
        if dy0 is not None:
            tl.store(dy0 + target, a + carry, mask=inside)
        store_bounds(d_bounds, target, lower_bar, upper_bar, inside)
        if d_schedule[0] is not None:
            sums = store_schedule_of_samples(d_schedule, sums, part_row, real, 0, ROWS, STEPS)
        # the checkpoints are overwritten for the next block
        tl.debug_barrier()

    if d_schedule[0] is not None:
        store_schedule_of_program(d_schedule, sums, ROWS, STEPS)


def _blocks(B, d, elements):
    """Samples and entries of a block of ``elements``, and how many blocks cover ``[B, d]``."""
    entries = min(elements, triton.next_power_of_2(d))
    samples = elements // entries
    return samples, entries, triton.cdiv(B, samples) * triton.cdiv(d, entries)


def _flat(schedule, *vectors):
    """Whether ``[B, d]`` may be walked through as one row: one schedule for all, and nothing strided or broadcast."""
    one_schedule = all(c is None or c.shape[0] == 1 for c in schedule)
    one_number = lambda v: v.sample == v.entry == 0
    return one_schedule and all(v.pointer is None or v.pointer.is_contiguous() or one_number(v) for v in vectors)


# entries of a sample in the registers of 16 warps
LONGEST_THAT_STOPS = 8192


def forward(diagonal, b, y0, schedule, bounds, num_steps, trajectory, observed=None, stopping=NO_STOPPING):
    """y of ``momentum_diagonal_kernel``; of one step or more without a trajectory, what ``stopping`` has, too."""
    B, d = b.shape
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    vectors, bounds = [Vectors.rows(x) for x in (diagonal, observed, b, y0)], Bounds.of(bounds)
    # one 16-byte vector of the storage dtype a lane
    elements, warps = 32 * _WARPS * (16 // b.dtype.itemsize), _WARPS
    if stopping.taken is not None:
        # a sample is in one program
        if d > elements:
            elements, warps = triton.next_power_of_2(d), 16
    elif _flat(schedule, *vectors, *bounds):
        B, d = 1, B * d
    RB, CB, blocks = _blocks(B, d, elements)
    launch(
        momentum_diagonal_kernel, b.device, blocks, *vectors, Schedule.of(schedule), bounds, y, stopping,
        B, num_steps, d, RB=RB, CB=CB, TRAJECTORY=trajectory, num_warps=warps,
    )  # fmt: skip
    return y


def backward(
    grad_y, diagonal, b, y0, schedule, bounds, num_steps, trajectory,
    needs_diagonal, needs_b, needs_y0, needs_schedule, needs_bounds, observed=None,
):  # fmt: skip
    """The gradients of ``momentum_diagonal_backward_kernel``: of Q, b, y_0 and the bounds None where not needed."""
    B, d = b.shape
    compute = schedule[0].dtype
    if b.numel() == 0:
        return *zero_gradients((diagonal,), b, schedule, (needs_diagonal,), needs_schedule), bounds
    d_diagonal = diagonal.new_empty((B, d)) if needs_diagonal else None
    db, dy0 = (b.new_empty((B, d)) if needed else None for needed in (needs_b, needs_y0))
    d_bounds, proximal = BoundGradients.allocate(bounds, needs_bounds), is_proximal(schedule, bounds)
    vectors, bounds = [Vectors.rows(x) for x in (diagonal, observed, b, y0)], Bounds.of(bounds)
    cotangent = Vectors.cotangent(grad_y, trajectory)
    if _flat(schedule, *vectors, *bounds) and cotangent.sample == d * cotangent.entry:
        B, d = 1, B * d
    # two registers a lane for each iterate of a segment
    RB, CB, blocks = _blocks(B, d, 32 * _WARPS * (8 // compute.itemsize))
    segments = max(1, triton.cdiv(num_steps, _SEGMENT[schedule[1] is not None]))
    segment = max(1, triton.cdiv(num_steps, segments))
    programs = blocks if segments == 1 else resident_programs(b.device, blocks, _WARPS)
    checkpoints = b.new_empty((programs, segments - 1, 2, RB, CB), dtype=compute)
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule, triton.cdiv(d, CB))
    launch(
        momentum_diagonal_backward_kernel, b.device, programs,
        cotangent, *vectors, Schedule.of(schedule), bounds,
        d_diagonal, db, dy0, d_schedule.parts, d_bounds, checkpoints, B, num_steps, d,
        RB=RB, CB=CB, SEGMENT=segment, TAIL=num_steps % segment != 0,
        TRAJECTORY=trajectory, PROXIMAL=proximal, ROWS=d_schedule.rows, STEPS=d_schedule.steps, num_warps=_WARPS,
        # three programs a multiprocessor; left alone, ptxas spills to fit a fourth or fifth
        maxnreg=168 if compute == torch.float32 else None,
    )  # fmt: skip
    return d_diagonal, db, dy0, d_schedule.reduce(schedule), d_bounds
