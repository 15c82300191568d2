"""Dense Q in Triton beyond the registers of a program: Q streams by in tiles ``[R, C]`` every step, from L2 if it fits.

A program takes S samples: one that owns its Q, or 16 that share one, whose products are then matrix products in plain
float32 or float64. The states live in global memory, ``[slots, S, d]`` a program, and are read back through L1: a
barrier between two steps is what makes them one program's memory. Backward takes three passes, replay, adjoint and
Q̄ = -Σ_t φ_t ȳ_{t+1} z_tᵀ, of which the last writes each tile of Q̄ once. Where a proximal map ends the steps, replay
keeps what it was given, and the adjoint passes through the map before the product.
"""

import torch
import triton
import triton.language as tl

from unrolled_kernels.ops.triton.launch import (
    NO_STOPPING,
    BoundGradients,
    Bounds,
    Matrices,
    Schedule,
    ScheduleGradient,
    Vectors,
    is_proximal,
    launch,
    resident_programs,
)
from unrolled_kernels.ops.triton.tile import (
    UNSPECIALIZED,
    accumulate_schedule,
    adjoint_step,
    largest_of,
    load_bounds,
    load_gamma,
    load_phi,
    load_schedule,
    load_threshold,
    load_vector,
    proximal_adjoint,
    proximal_map,
    stop_samples,
    store_schedule_of_program,
    store_schedule_of_samples,
)

_WARPS = 8
_SHARED_SAMPLES = 16


@triton.jit
def load_state(slot, entry, S: tl.constexpr, d):
    """Entries ``[R, S]`` of a state ``[S, d]`` of this program."""
    sample = tl.arange(0, S)[None, :]
    return tl.load(slot + sample * d + entry, mask=(entry < d) & (sample < S), other=0.0)


@triton.jit
def store_state(slot, entry, value, S: tl.constexpr, d):
    """Inverse of ``load_state``."""
    sample = tl.arange(0, S)[None, :]
    tl.store(slot + sample * d + entry, value, mask=(entry < d) & (sample < S))


@triton.jit
def add_to_bound(pointer, target, value, inside):
    """What a step has of the gradient of a bound, where that is needed."""
    if pointer is not None:
        tl.store(pointer + target, tl.load(pointer + target, mask=inside, other=0.0) + value, mask=inside)


@triton.jit
def streamed_product(
    Q, first, current, previous, gamma_t, d,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TRANSPOSED: tl.constexpr, EXTRAPOLATE: tl.constexpr,
):  # fmt: skip
    """Entries first … first + R of Q z or Qᵀ z as ``[R, S]``; z = current + γ_t (current - previous), or current."""
    dtype: tl.constexpr = current.dtype.element_ty
    i = (first + tl.arange(0, R))[:, None]
    total = tl.zeros([R, C if S == 1 else S], dtype)
    for start in range(0, d, C):
        j = start + tl.arange(0, C)
        row, column = (j[None, :], i) if TRANSPOSED else (i, j[None, :])
        tile = tl.load(Q + row.to(tl.int64) * d + column, mask=(row < d) & (column < d), other=0.0).to(dtype)
        z = load_state(current, j[:, None], S, d)
        if EXTRAPOLATE:
            z += gamma_t * (z - load_state(previous, j[:, None], S, d))
        if S == 1:
            total += tile * tl.trans(z)
        else:
            total += tl.dot(tile, z, input_precision="ieee", out_dtype=dtype)
    return tl.sum(total, 1)[:, None] if S == 1 else total


@triton.jit
def streamed_step(
    Q, b, schedule, bounds, sample, t, real, current, previous, following, given, d,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """Step t: write y_{t+1} to the slot ``following`` from y_t and y_{t-1}, and v_t to ``given`` unless it is None."""
    dtype: tl.constexpr = current.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
    threshold_t = load_threshold(schedule, sample, t, real)
    for first in range(0, d, R):
        i = (first + tl.arange(0, R))[:, None]
        Qz = streamed_product(Q, first, current, previous, gamma_t[None, :], d, S, R, C, False, MOMENTUM)
        x = load_state(current, i, S, d)
        rhs = load_vector(b, sample[None, :], i, (i < d) & real[None, :], dtype)
        v = x - phi_t[None, :] * (Qz + rhs)
        if MOMENTUM:
            v += beta_t[None, :] * (x - load_state(previous, i, S, d))
        if given is not None:
            store_state(given, i, v, S, d)
        lower, upper = load_bounds(bounds, sample[None, :], i, (i < d) & real[None, :], dtype)
        next_x = proximal_map(schedule, bounds, lower, upper, phi_t[None, :], threshold_t[None, :], v)
        store_state(following, i, next_x, S, d)
    tl.debug_barrier()


@triton.jit
def slots_of_step(states, t, slot):
    """Where y_t, y_{t-1} and y_{t+1} stand."""
    return states + (t % 3) * slot, states + (tl.maximum(t - 1, 0) % 3) * slot, states + ((t + 1) % 3) * slot


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_streamed_kernel(
    Q, b, y0, schedule, bounds,
    y,              # [B, d], or [num_steps + 1, B, d]
    states,         # [programs, 3, S, d]: y_t stands in slot t mod 3
    stopping,
    B, num_steps, d,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = schedule.phi.dtype.element_ty
    slot = tl.cast(d, tl.int64) * S
    states += tl.program_id(0) * 3 * slot
    for block in range(tl.program_id(0), tl.cdiv(B, S), tl.num_programs(0)):
        sample = block * S + tl.arange(0, S)
        real = sample < B
        s = sample[None, :]
        # with one sample a program Q is its own; otherwise the stride is 0
        Q_block = Q.pointer + tl.cast(block, tl.int64) * Q.stride
        for first in range(0, d, R):
            i = (first + tl.arange(0, R))[:, None]
            inside = (i < d) & real[None, :]
            x = load_vector(y0, s, i, inside, dtype)
            store_state(states, i, x, S, d)
            if TRAJECTORY:
                tl.store(y + s.to(tl.int64) * d + i, x, mask=inside)
        tl.debug_barrier()
        if stopping.taken is not None:
            moves = real.to(tl.int32)
            t = block * 0
            while tl.max(moves, 0) > 0:
                current, previous, following = slots_of_step(states, t, slot)
                streamed_step(
                    Q_block, b, schedule, bounds, sample, t, real, current, previous, following, None, d, S, R, C
                )
                change = tl.zeros([S], dtype)
                large = tl.zeros([S], dtype)
                has_nan = tl.zeros([S], tl.int32)
                for first in range(0, d, R):
                    i = (first + tl.arange(0, R))[:, None]
                    x = load_state(following, i, S, d)
                    moved, unordered = largest_of(x - load_state(current, i, S, d), 0)
                    magnitude, _ = largest_of(x, 0)
                    change = tl.maximum(change, moved)
                    large = tl.maximum(large, magnitude)
                    has_nan = tl.maximum(has_nan, unordered)
                stops = stop_samples(stopping, moves, change, has_nan, large, sample, t, num_steps)
                for first in range(0, d, R):
                    i = (first + tl.arange(0, R))[:, None]
                    x = load_state(following, i, S, d)
                    tl.store(y + s.to(tl.int64) * d + i, x, mask=(i < d) & (stops > 0)[None, :])
                moves -= stops
                t += 1
        target = y
        for t in range(num_steps if stopping.taken is None else 0):
            current, previous, following = slots_of_step(states, t, slot)
            streamed_step(Q_block, b, schedule, bounds, sample, t, real, current, previous, following, None, d, S, R, C)
            if TRAJECTORY:
                target += tl.cast(B, tl.int64) * d
                for first in range(0, d, R):
                    i = (first + tl.arange(0, R))[:, None]
                    x = load_state(following, i, S, d)
                    tl.store(target + s.to(tl.int64) * d + i, x, mask=(i < d) & real[None, :])
        if not TRAJECTORY and stopping.taken is None:
            for first in range(0, d, R):
                i = (first + tl.arange(0, R))[:, None]
                x = load_state(states + (num_steps % 3) * slot, i, S, d)
                tl.store(y + s.to(tl.int64) * d + i, x, mask=(i < d) & real[None, :])
        tl.debug_barrier()


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_dense_streamed_backward_kernel(
    grad_y, Q, b, y0, schedule, bounds,
    dQ,             # like Q; where the batch shares Q one [d, d] a program, in the compute dtype
    db, dy0,        # [B, d]
    d_schedule,     # φ̄, β̄, γ̄, threshold̄, [B or programs, num_steps or 1] by ROWS and STEPS
    d_bounds,       # [B, d], of zeros; any of these None where not needed
    states,         # [programs, slots, S, d]: y_0 … y_k, ȳ_0 … ȳ_k, two slots for what goes on to ȳ_{t-1}, then v_t
    B, num_steps, d,
    S: tl.constexpr, R: tl.constexpr, C: tl.constexpr,
    TRAJECTORY: tl.constexpr, PROXIMAL: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    dtype: tl.constexpr = schedule.phi.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    slot = tl.cast(d, tl.int64) * S
    states += tl.program_id(0) * ((3 if PROXIMAL else 2) * num_steps + 4) * slot
    adjoints = states + (num_steps + 1) * slot
    carries = adjoints + (num_steps + 1) * slot
    given = carries + 2 * slot
    sums = (tl.zeros([R, S], dtype), tl.zeros([R, S], dtype), tl.zeros([R, S], dtype), tl.zeros([R, S], dtype))
    for block in range(tl.program_id(0), tl.cdiv(B, S), tl.num_programs(0)):
        first_block = block == tl.program_id(0)
        sample = block * S + tl.arange(0, S)
        real = sample < B
        s = sample[None, :]
        Q_block = Q.pointer + tl.cast(block, tl.int64) * Q.stride
        for first in range(0, d, R):
            i = (first + tl.arange(0, R))[:, None]
            inside = (i < d) & real[None, :]
            store_state(states, i, load_vector(y0, s, i, inside, dtype), S, d)
            a = load_vector(grad_y, s, i, inside, dtype, num_steps)
            store_state(adjoints + num_steps * slot, i, a, S, d)
            store_state(carries + (num_steps % 2) * slot, i, tl.zeros([R, S], dtype), S, d)
        tl.debug_barrier()
        # of the last step only a map asks, for v_{k-1}
        for t in range(num_steps if PROXIMAL else num_steps - 1):
            current, previous = states + t * slot, states + tl.maximum(t - 1, 0) * slot
            streamed_step(
                Q_block, b, schedule, bounds, sample, t, real, current, previous, current + slot,
                given + t * slot if PROXIMAL else None, d, S, R, C,
            )  # fmt: skip

        for back in range(num_steps):
            t = num_steps - 1 - back
            phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
            phi_t, beta_t, gamma_t = phi_t[None, :], beta_t[None, :], gamma_t[None, :]
            phi_part = tl.zeros([R, S], dtype)
            beta_part = tl.zeros([R, S], dtype)
            gamma_part = tl.zeros([R, S], dtype)
            threshold_part = tl.zeros([R, S], dtype)
            following = adjoints + (t + 1) * slot
            if PROXIMAL:
                threshold_t = load_threshold(schedule, sample, t, real)[None, :]
                for first in range(0, d, R):
                    i = (first + tl.arange(0, R))[:, None]
                    inside = (i < d) & real[None, :]
                    lower, upper = load_bounds(bounds, s, i, inside, dtype)
                    v, a = load_state(given + t * slot, i, S, d), load_state(following, i, S, d)
                    a, to_lower, to_upper, to_phi, to_threshold = proximal_adjoint(
                        schedule, bounds, lower, upper, phi_t, threshold_t, v, a
                    )
                    store_state(following, i, a, S, d)
                    phi_part += to_phi
                    threshold_part += to_threshold
                    target = s.to(tl.int64) * d + i
                    add_to_bound(d_bounds.lower, target, to_lower, inside)
                    add_to_bound(d_bounds.upper, target, to_upper, inside)
                    add_to_bound(d_bounds.weight, target, to_lower, inside)
                tl.debug_barrier()
            for first in range(0, d, R):
                i = (first + tl.arange(0, R))[:, None]
                inside = (i < d) & real[None, :]
                w = streamed_product(Q_block, first, following, following, gamma_t, d, S, R, C, True, False)
                if y0.pointer is None:
                    # Qᵀa_1, which may overflow, is in ȳ_0 alone
                    w = tl.where(t > 0, w, 0.0)
                a = load_state(following, i, S, d)
                carry = load_state(carries + ((t + 1) % 2) * slot, i, S, d)
                if d_schedule[0] is not None:
                    x = load_state(states + t * slot, i, S, d)
                    z = x
                    if MOMENTUM:
                        m = x - load_state(states + tl.maximum(t - 1, 0) * slot, i, S, d)
                        z += gamma_t * m
                        beta_part += a * m
                        gamma_part -= phi_t * w * m
                    phi_part -= w * z + a * load_vector(b, s, i, inside, dtype)
                a, carry = adjoint_step(a, carry, w, phi_t, beta_t, gamma_t, MOMENTUM)
                if TRAJECTORY:
                    a += load_vector(grad_y, s, i, inside, dtype, t)
                store_state(adjoints + t * slot, i, a, S, d)
                store_state(carries + (t % 2) * slot, i, carry, S, d)
            if d_schedule[0] is not None:
                parts = (phi_part, beta_part, gamma_part, threshold_part)
                sums = accumulate_schedule(
                    d_schedule, sums, parts, sample, t, num_steps, real, first_block, 1, ROWS, STEPS
                )
            tl.debug_barrier()

        for first in range(0, d, R):
            i = (first + tl.arange(0, R))[:, None]
            inside = (i < d) & real[None, :]
            if db is not None:
                b_bar = tl.zeros([R, S], dtype)
                for t in range(num_steps):
                    phi_t = load_phi(schedule, sample, t, real)[None, :]
                    b_bar -= phi_t * load_state(adjoints + (t + 1) * slot, i, S, d)
                tl.store(db + s.to(tl.int64) * d + i, b_bar, mask=inside)
            if dy0 is not None:
                start = load_state(adjoints, i, S, d) + load_state(carries, i, S, d)
                tl.store(dy0 + s.to(tl.int64) * d + i, start, mask=inside)
            if dQ is not None:
                for start_column in range(0, d, C):
                    j = start_column + tl.arange(0, C)
                    tile = tl.zeros([R, C], dtype)
                    for t in range(num_steps):
                        a = load_phi(schedule, sample, t, real)[None, :] * load_state(
                            adjoints + (t + 1) * slot, i, S, d
                        )
                        z = load_state(states + t * slot, j[:, None], S, d)
                        if MOMENTUM:
                            gamma_t = load_gamma(schedule, sample, t, real)[None, :]
                            z += gamma_t * (z - load_state(states + tl.maximum(t - 1, 0) * slot, j[:, None], S, d))
                        if S == 1:
                            tile -= a * tl.trans(z)
                        else:
                            tile -= tl.dot(a, tl.trans(z), input_precision="ieee", out_dtype=dtype)
                    entries = i.to(tl.int64) * d + j[None, :]
                    whole = (i < d) & (j[None, :] < d)
                    if S == 1:
                        tl.store(dQ + tl.cast(block, tl.int64) * d * d + entries, tile, mask=whole)
                    else:
                        own = dQ + tl.program_id(0).to(tl.int64) * d * d + entries
                        if not first_block:
                            tile += tl.load(own, mask=whole, other=0.0)
                        tl.store(own, tile, mask=whole)
        if d_schedule[0] is not None:
            sums = store_schedule_of_samples(d_schedule, sums, sample, real, 1, ROWS, STEPS)
        # the states are overwritten for the next block
        tl.debug_barrier()

    if d_schedule[0] is not None:
        store_schedule_of_program(d_schedule, sums, ROWS, STEPS)


def _constants(matrix, B, compute):
    """Samples a program, the tile of Q, warps and registers."""
    shared = matrix.shape[0] < B
    tile = {"S": _SHARED_SAMPLES if shared else 1, "R": 64, "C": 16 if shared else 64}
    # two programs a multiprocessor; left alone, ptxas spills to fit a third
    return tile | {"num_warps": _WARPS, "maxnreg": 128 if compute == torch.float32 else None}


def forward(matrix, b, y0, schedule, bounds, num_steps, trajectory, stopping=NO_STOPPING):
    """y of ``momentum_dense_streamed_kernel``, for a batch that is not empty."""
    B, d = b.shape
    constants = _constants(matrix, B, schedule[0].dtype)
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    programs = resident_programs(b.device, triton.cdiv(B, constants["S"]), _WARPS)
    states = schedule[0].new_empty((programs, 3, constants["S"], d))
    launch(
        momentum_dense_streamed_kernel, b.device, programs,
        Matrices.of(matrix), Vectors.rows(b), Vectors.rows(y0), Schedule.of(schedule), Bounds.of(bounds),
        y, states, stopping, B, num_steps, d, **constants, TRAJECTORY=trajectory,
    )  # fmt: skip
    return y


def backward(
    grad_y, matrix, b, y0, schedule, bounds, num_steps, trajectory,
    needs_matrix, needs_b, needs_y0, needs_schedule, needs_bounds,
):  # fmt: skip
    """The same of ``momentum_dense_streamed_backward_kernel``, for a batch that is not empty."""
    B, d = b.shape
    shared = matrix.shape[0] < B
    constants = _constants(matrix, B, schedule[0].dtype)
    programs = resident_programs(b.device, triton.cdiv(B, constants["S"]), _WARPS)
    proximal = is_proximal(schedule, bounds)
    states = schedule[0].new_empty((programs, (3 if proximal else 2) * num_steps + 4, constants["S"], d))
    d_matrix = None
    if needs_matrix:
        d_matrix = schedule[0].new_empty((programs, d, d)) if shared else matrix.new_empty(matrix.shape)
    db, dy0 = (b.new_empty((B, d)) if needed else None for needed in (needs_b, needs_y0))
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule)
    d_bounds = BoundGradients.allocate(bounds, needs_bounds)
    for x in d_bounds:
        if x is not None:
            x.zero_()
    launch(
        momentum_dense_streamed_backward_kernel, b.device, programs,
        Vectors.cotangent(grad_y, trajectory), Matrices.of(matrix), Vectors.rows(b), Vectors.rows(y0),
        Schedule.of(schedule), Bounds.of(bounds), d_matrix, db, dy0, d_schedule.parts, d_bounds, states,
        B, num_steps, d,
        **constants, TRAJECTORY=trajectory, PROXIMAL=proximal, ROWS=d_schedule.rows, STEPS=d_schedule.steps,
    )  # fmt: skip
    if needs_matrix and shared:
        d_matrix = d_matrix.sum(0, keepdim=True).to(b.dtype)
    return d_matrix, db, dy0, d_schedule.reduce(schedule), d_bounds
