"""Q = R diag(λ) Rᵀ in Triton: R is read once into registers, rotates in and out, and the steps between are elementwise.

The states are columns of R's tile all along: Rᵀb comes out as columns and Rŷ takes them in, so the steps need no
exchange between lanes. Backward leaves the iterates in a trace as in triton_dense. Beyond the registers of a program
the rotations are matrix products of torch (under its setting for TF32) around the diagonal kernels.
"""

import torch
import triton
import triton.language as tl

from unrolled_kernels.ops.common import matvec
from unrolled_kernels.ops.momentum import triton_diagonal
from unrolled_kernels.ops.triton.launch import (
    NO_STOPPING,
    SPECTRAL_BACKWARD,
    SPECTRAL_FORWARD,
    Matrices,
    Schedule,
    ScheduleGradient,
    Tile,
    Vectors,
    launch,
    resident_programs,
    zero_gradients,
)
from unrolled_kernels.ops.triton.tile import (
    UNSPECIALIZED,
    accumulate_schedule,
    adjoint_step,
    diagonal_step,
    load_schedule,
    load_tile,
    load_vector,
    outer,
    product,
    stop_rows,
    store_schedule_of_program,
    store_schedule_of_samples,
    store_tile,
    transposed_product,
)

_NO_BOUNDS = (None, None, None)


@triton.jit
def advance(q, b_hat, x, previous, schedule, sample, t, real):
    """Step t in the eigenbasis, from ŷ_t = x and ŷ_{t-1} = previous; returns ŷ_{t+1} and ŷ_t."""
    phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
    phi_t, beta_t, gamma_t = phi_t[None, :, None], beta_t[None, :, None], gamma_t[None, :, None]
    return diagonal_step(q, b_hat, x, previous, phi_t, beta_t, gamma_t, schedule.beta is not None), x


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_spectral_kernel(
    eigenvalues, R, b, y0, schedule,
    y,              # [B, d], or [num_steps + 1, B, d]
    stopping,
    column_stride, B, num_steps,
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    j = (tl.arange(0, n)[:, None] * W + tl.arange(0, W)[None, :])[:, None, :]
    if SHARED:
        r = load_tile(R, tl.zeros([BB], tl.int32), column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        s_hat, inside_hat = sample[None, :, None], (j < d) & real[None, :, None]
        if not SHARED:
            r = load_tile(R, sample, column_stride, B, d, D, W).to(C)
        q = load_vector(eigenvalues, s_hat, j, inside_hat, C)
        b_hat = transposed_product(r, load_vector(b, s, i, inside, C))
        x = tl.zeros([n, BB, W], C)
        start = load_vector(y0, s, i, inside, C)
        if y0.pointer is not None:
            x = transposed_product(r, start)
        target = y + s.to(tl.int64) * d + i
        if TRAJECTORY:
            tl.store(target, start, mask=inside)
        previous = x
        if stopping.taken is None:
            for t in range(num_steps):
                x, previous = advance(q, b_hat, x, previous, schedule, sample, t, real)
                if TRAJECTORY:
                    target += tl.cast(B, tl.int64) * d
                    tl.store(target, product(r, x), mask=inside)
            if not TRAJECTORY:
                tl.store(target, product(r, x), mask=inside)
        else:
            rotated = start
            moves = real.to(tl.int32)
            t = block * 0
            while tl.max(moves, 0) > 0:
                x, previous = advance(q, b_hat, x, previous, schedule, sample, t, real)
                before = rotated
                rotated = product(r, x)
                stops = stop_rows(stopping, moves, rotated, before, sample, t, num_steps, 0)
                tl.store(target, rotated, mask=inside & (stops > 0)[None, :])
                moves -= stops
                t += 1


@triton.jit(do_not_specialize=UNSPECIALIZED)
def momentum_spectral_backward_kernel(
    grad_y, eigenvalues, R, b, y0, schedule,
    d_eigenvalues,  # [B, d]
    dR,             # like R; where the batch shares R one [d, d] a program, in the compute dtype
    db, dy0,        # [B, d]
    d_schedule,     # φ̄, β̄, γ̄, [B or programs, num_steps or 1] by ROWS and STEPS; any of these None where not needed
    trace,          # [programs, num_steps, D, BB]
    column_stride, B, num_steps,  # at least one step
    d: tl.constexpr, D: tl.constexpr, W: tl.constexpr, BB: tl.constexpr,
    SHARED: tl.constexpr, TRAJECTORY: tl.constexpr, ROWS: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = schedule.phi.dtype.element_ty
    MOMENTUM: tl.constexpr = schedule.beta is not None
    n: tl.constexpr = D // W
    i = tl.arange(0, D)[:, None]
    j = (tl.arange(0, n)[:, None] * W + tl.arange(0, W)[None, :])[:, None, :]
    trace += tl.program_id(0).to(tl.int64) * num_steps * (D * BB) + j * BB + tl.arange(0, BB)[None, :, None]
    dr = tl.zeros([n, D, BB, W], C)
    sums = (tl.zeros([n, BB, W], C), tl.zeros([n, BB, W], C), tl.zeros([n, BB, W], C), tl.zeros([n, BB, W], C))
    if SHARED:
        r = load_tile(R, tl.zeros([BB], tl.int32), column_stride, B, d, D, W).to(C)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        first = block == tl.program_id(0)
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[None, :], (i < d) & real[None, :]
        s_hat, inside_hat = sample[None, :, None], (j < d) & real[None, :, None]
        if not SHARED:
            r = load_tile(R, sample, column_stride, B, d, D, W).to(C)
            dr = tl.zeros([n, D, BB, W], C)
        q = load_vector(eigenvalues, s_hat, j, inside_hat, C)
        b_hat = transposed_product(r, load_vector(b, s, i, inside, C))
        x = tl.zeros([n, BB, W], C)
        if y0.pointer is not None:
            x = transposed_product(r, load_vector(y0, s, i, inside, C))

        # replay ŷ_0 … ŷ_k, all but the last into the trace; dR takes Σ_t ȳ_t^out ŷ_tᵀ on the way
        previous = x
        row = trace
        tl.debug_barrier()
        for t in range(num_steps):
            tl.store(row, x)
            row += D * BB
            x, previous = advance(q, b_hat, x, previous, schedule, sample, t, real)
            if TRAJECTORY and dR is not None:
                dr += outer(load_vector(grad_y, s, i, inside, C, t + 1), x)
        tl.debug_barrier()

        last = load_vector(grad_y, s, i, inside, C, num_steps)
        if dR is not None and not TRAJECTORY:
            dr += outer(last, x)
        a = transposed_product(r, last)
        carry = tl.zeros([n, BB, W], C)
        q_bar = tl.zeros([n, BB, W], C)
        b_hat_bar = tl.zeros([n, BB, W], C)
        row -= D * BB
        x = tl.load(row)
        for back in range(num_steps):
            t = num_steps - 1 - back
            if t > 0:
                row -= D * BB
            previous = tl.load(row)
            phi_t, beta_t, gamma_t = load_schedule(schedule, sample, t, real)
            phi_t, beta_t, gamma_t = phi_t[None, :, None], beta_t[None, :, None], gamma_t[None, :, None]
            m = x - previous
            z = x
            if MOMENTUM:
                z = x + gamma_t * m
            w = q * a
            a_scaled = phi_t * a
            q_bar -= a_scaled * z
            b_hat_bar -= a_scaled
            if d_schedule[0] is not None:
                parts = (-a * (q * z + b_hat), a * m, -phi_t * (q * (a * m)), m)
                sums = accumulate_schedule(d_schedule, sums, parts, sample, t, num_steps, real, first, 1, ROWS, STEPS)
            a, carry = adjoint_step(a, carry, w, phi_t, beta_t, gamma_t, MOMENTUM)
            # the cotangent of y_0 itself, which is never rotated, comes last
            if TRAJECTORY and t > 0:
                a += transposed_product(r, load_vector(grad_y, s, i, inside, C, t))
            x = previous

        a += carry
        target = s.to(tl.int64) * d + i
        if db is not None:
            tl.store(db + target, product(r, b_hat_bar), mask=inside)
        if dy0 is not None:
            start_bar = product(r, a)
            if TRAJECTORY:
                start_bar += load_vector(grad_y, s, i, inside, C)
            tl.store(dy0 + target, start_bar, mask=inside)
        if d_eigenvalues is not None:
            tl.store(d_eigenvalues + s_hat.to(tl.int64) * d + j, q_bar, mask=inside_hat)
        if dR is not None:
            dr += outer(load_vector(b, s, i, inside, C), b_hat_bar)
            if y0.pointer is not None:
                dr += outer(load_vector(y0, s, i, inside, C), a)
            if not SHARED:
                store_tile(dR, dr, sample, column_stride, B, d, D, W)
        if d_schedule[0] is not None:
            sums = store_schedule_of_samples(d_schedule, sums, sample, real, 1, ROWS, STEPS)

    if dR is not None and SHARED:
        own = tl.program_id(0) + tl.zeros([1], tl.int32)
        store_tile(dR, tl.sum(dr, 2)[:, :, None, :], own, column_stride, tl.num_programs(0), d, D, W)
    if d_schedule[0] is not None:
        store_schedule_of_program(d_schedule, sums, ROWS, STEPS)


def stops_by_itself(b, compute):
    """Whether ``forward`` takes ``stopping``."""
    return Tile.find(SPECTRAL_FORWARD, b.shape[1], b.dtype, compute) is not None


def forward(eigenvalues, matrix, b, y0, schedule, num_steps, trajectory, stopping=NO_STOPPING):
    """y of ``momentum_spectral_kernel``; of one step or more without a trajectory, what ``stopping`` has, too."""
    B, d = b.shape
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    tile = Tile.find(SPECTRAL_FORWARD, d, b.dtype, schedule[0].dtype)
    if tile is None:
        return _rotated_forward(eigenvalues, matrix, b, y0, schedule, num_steps, trajectory)
    shared = matrix.shape[0] < B
    blocks = triton.cdiv(B, tile.samples)
    programs = resident_programs(b.device, blocks, tile.num_warps) if shared else blocks
    launch(
        momentum_spectral_kernel, b.device, programs,
        Vectors.rows(eigenvalues), Matrices.of(matrix), Vectors.rows(b), Vectors.rows(y0), Schedule.of(schedule), y,
        stopping, 1, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, num_warps=tile.num_warps,
    )  # fmt: skip
    return y


def backward(
    grad_y, eigenvalues, matrix, b, y0, schedule, num_steps, trajectory,
    needs_eigenvalues, needs_matrix, needs_b, needs_y0, needs_schedule,
):  # fmt: skip
    """The gradients of ``momentum_spectral_backward_kernel``: of λ, R, b and y_0 None where not needed."""
    B, d = b.shape
    compute = schedule[0].dtype
    needs = (needs_eigenvalues, needs_matrix, needs_b, needs_y0, needs_schedule)
    if b.numel() == 0:
        return zero_gradients((eigenvalues, matrix), b, schedule, needs[:2], needs_schedule)
    tile = Tile.find(SPECTRAL_BACKWARD, d, b.dtype, compute)
    if tile is None:
        return _rotated_backward(grad_y, eigenvalues, matrix, b, y0, schedule, num_steps, trajectory, *needs)
    shared = matrix.shape[0] < B
    programs = resident_programs(b.device, triton.cdiv(B, tile.samples), tile.num_warps)
    trace = b.new_empty((programs, num_steps, tile.D, tile.samples), dtype=compute)
    d_eigenvalues = eigenvalues.new_empty((B, d)) if needs_eigenvalues else None
    d_matrix = None
    if needs_matrix:
        d_matrix = b.new_empty((programs, d, d), dtype=compute) if shared else matrix.new_empty(matrix.shape)
    db, dy0 = (b.new_empty((B, d)) if needed else None for needed in (needs_b, needs_y0))
    d_schedule = ScheduleGradient.allocate(schedule, B, num_steps, programs, needs_schedule)
    launch(
        momentum_spectral_backward_kernel, b.device, programs,
        Vectors.cotangent(grad_y, trajectory), Vectors.rows(eigenvalues), Matrices.of(matrix), Vectors.rows(b),
        Vectors.rows(y0), Schedule.of(schedule), d_eigenvalues, d_matrix, db, dy0, d_schedule.parts, trace,
        1, B, num_steps,
        **tile.constants(), SHARED=shared, TRAJECTORY=trajectory, ROWS=d_schedule.rows, STEPS=d_schedule.steps,
        num_warps=tile.num_warps,
    )  # fmt: skip
    if d_matrix is not None and shared:
        d_matrix = d_matrix.sum(0, keepdim=True).to(b.dtype)
    return d_eigenvalues, d_matrix, db, dy0, d_schedule.reduce(schedule)


def _rotated_forward(eigenvalues, matrix, b, y0, schedule, num_steps, trajectory):
    storage, compute = b.dtype, schedule[0].dtype
    R = matrix.to(compute)
    b_hat = matvec(R.mT, b.to(compute))
    y0_hat = None if y0 is None else matvec(R.mT, y0.to(compute))
    y_hat = triton_diagonal.forward(eigenvalues.to(compute), b_hat, y0_hat, schedule, _NO_BOUNDS, num_steps, trajectory)
    if not trajectory:
        return matvec(R, y_hat).to(storage)
    start = torch.zeros_like(b) if y0 is None else y0
    return torch.cat([start.unsqueeze(0), _matvecs(R, y_hat[1:]).to(storage)])


def _rotated_backward(
    grad_y, eigenvalues, matrix, b, y0, schedule, num_steps, trajectory,
    needs_eigenvalues, needs_matrix, needs_b, needs_y0, needs_schedule,
):  # fmt: skip
    storage, compute = b.dtype, schedule[0].dtype
    grad_y, eigenvalues, R, b, y0 = (x if x is None else x.to(compute) for x in (grad_y, eigenvalues, matrix, b, y0))
    b_hat = matvec(R.mT, b)
    y0_hat = None if y0 is None else matvec(R.mT, y0)
    if trajectory:
        grad_y_hat = torch.cat([torch.zeros_like(grad_y[:1]), _matvecs(R.mT, grad_y[1:])])
    else:
        grad_y_hat = matvec(R.mT, grad_y)
    d_eigenvalues, db_hat, dy0_hat, d_schedule, _ = triton_diagonal.backward(
        grad_y_hat, eigenvalues, b_hat, y0_hat, schedule, _NO_BOUNDS, num_steps, trajectory,
        needs_eigenvalues, needs_b or needs_matrix, needs_y0 or needs_matrix, needs_schedule, (False,) * 3,
    )  # fmt: skip
    db = matvec(R, db_hat) if needs_b else None
    dy0 = matvec(R, dy0_hat) if needs_y0 else None
    if needs_y0 and trajectory:
        dy0 = dy0 + grad_y[0]
    d_matrix = None
    if needs_matrix:
        y_hat = triton_diagonal.forward(eigenvalues, b_hat, y0_hat, schedule, _NO_BOUNDS, num_steps, trajectory)
        left, right = [b.unsqueeze(0)], [db_hat.unsqueeze(0)]
        if y0 is not None:
            left.append(y0.unsqueeze(0))
            right.append(dy0_hat.unsqueeze(0))
        left.append(grad_y[1:] if trajectory else grad_y.unsqueeze(0))
        right.append(y_hat[1:] if trajectory else y_hat.unsqueeze(0))
        equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
        d_matrix = torch.einsum(equation, torch.cat(left), torch.cat(right)).reshape(matrix.shape)
    return *(x if x is None else x.to(storage) for x in (d_eigenvalues, d_matrix, db, dy0)), d_schedule


def _matvecs(matrix, zs):
    """``matrix`` ``[B or 1, d, d]`` times each row of zs ``[steps, B, d]``."""
    if matrix.shape[0] == 1:
        return zs @ matrix[0].mT
    return (matrix @ zs.permute(1, 2, 0)).permute(2, 0, 1)
