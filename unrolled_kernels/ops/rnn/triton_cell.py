"""The RNN in Triton: k cells, and their adjoint, on 16 samples a program.

Vectors of a program's samples are tiles ``[BB, D]`` (states) and ``[BB, H]`` (hidden layers), D and H the powers of two
from 16 on that hold d and the widest layer; what is beyond a size is zero. A product with a weight, which the batch
shares, is a ``tl.dot`` in full precision. A product with a Q for each sample reads it R columns or rows at a time, from
L2 after the first step; so is its gradient made, from the messages e_t of all steps.

Backward keeps y_t and e_t in a trace in global memory, ``[programs, num_steps, BB, D]`` each, and replays the hidden
layers of each step into ``[programs, L, BB, H]``. The gradients of weights, and of a Q that the batch shares, are added
to a row of each program, which no other touches, and the rows are summed at the end: no atomics.
"""

import torch
import triton
import triton.language as tl

from unrolled_kernels.ops.rnn.native import hidden_dims_of
from unrolled_kernels.ops.triton import launch as devices
from unrolled_kernels.ops.triton.launch import Matrices, Vectors, launch, resident_programs
from unrolled_kernels.ops.triton.tile import load_vector

SAMPLES = 16  # the least that tl.dot takes
# warps by the larger of D and H; nothing spills up to 32, at 64 some of what a lane holds of the operands of tl.dot
NUM_WARPS = {16: 4, 32: 8, 64: 16}
# by D, H and compute capability where these spill
NUM_WARPS_ON = {(16, 16, 90): 2, (32, 32, 100): 16}
# scalars whose value is not worth a compilation of its own
UNSPECIALIZED = ("B", "num_steps", "num_weights")


@triton.jit
def weight_offsets(rows: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Where a matrix ``[rows, columns]`` has the entries of a tile ``[R, K]``, and whether it has them."""
    i = tl.arange(0, R)[:, None]
    j = tl.arange(0, K)[None, :]
    return i * columns + j, (i < rows) & (j < columns)


@triton.jit
def load_matrix(
    pointer, rows: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, K: tl.constexpr, compute: tl.constexpr
):
    """A matrix ``[rows, columns]`` as a tile ``[R, K]``."""
    offsets, inside = weight_offsets(rows, columns, R, K)
    return tl.load(pointer + offsets, mask=inside, other=0.0).to(compute)


@triton.jit
def dot(a, b):
    """a b in the precision of its operands: no TF32."""
    return tl.dot(a, b, input_precision="ieee", out_dtype=a.dtype)


@triton.jit
def add_outer_products(pointer, a, x, rows: tl.constexpr, columns: tl.constexpr, R: tl.constexpr, K: tl.constexpr):
    """Add the sum over the samples of a xᵀ to a matrix ``[rows, columns]`` of this program's own."""
    offsets, inside = weight_offsets(rows, columns, R, K)
    before = tl.load(pointer + offsets, mask=inside, other=0.0)
    tl.store(pointer + offsets, before + dot(tl.trans(a), x), mask=inside)


@triton.jit
def multiply_by_Q(
    Q, x, copy, sample, real,
    d: tl.constexpr, D: tl.constexpr, R: tl.constexpr, BB: tl.constexpr,
    DIAGONAL: tl.constexpr, SHARED: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """Q x, or Qᵀx, of x ``[BB, D]``, of which ``copy`` has a copy in memory where D > R."""
    C: tl.constexpr = x.dtype
    s = sample.to(tl.int64)
    columns = tl.arange(0, D)
    if DIAGONAL:
        inside = real[:, None] & (columns[None, :] < d)
        product = x * load_vector(Q, s[:, None], columns[None, :], inside, C)
    elif SHARED:
        q = load_matrix(Q.pointer, d, d, D, D, C)
        product = dot(x, q if TRANSPOSED else tl.trans(q))
    else:
        product = tl.zeros([BB, D], C)
        for first in range(0, D, R):
            part = first + tl.arange(0, R)
            piece = x
            if R < D:
                piece = tl.load(copy + tl.arange(0, BB)[:, None] * D + part[None, :])
            if TRANSPOSED:
                i, j = part[None, :, None], columns[None, None, :]
                piece = piece[:, :, None]
            else:
                i, j = columns[None, :, None], part[None, None, :]
                piece = piece[:, None, :]
            inside = real[:, None, None] & (i < d) & (j < d)
            q = tl.load(Q.pointer + s[:, None, None] * Q.stride + i * d + j, mask=inside, other=0.0).to(C)
            product += tl.sum(q * piece, 1 if TRANSPOSED else 2)
    return product


@triton.jit
def hidden_layers(
    y, g, weights, hidden,
    HIDDEN: tl.constexpr, d: tl.constexpr, D: tl.constexpr, H: tl.constexpr, BB: tl.constexpr,
):  # fmt: skip
    """h^L of y and g; all of h¹ … h^L to ``hidden`` ``[L, BB, H]`` unless it is None."""
    C: tl.constexpr = y.dtype
    layer = tl.arange(0, BB)[:, None] * H + tl.arange(0, H)[None, :]
    size: tl.constexpr = HIDDEN[0] * d
    h = dot(y, tl.trans(load_matrix(weights, HIDDEN[0], d, H, D, C)))
    h += dot(g, tl.trans(load_matrix(weights + size, HIDDEN[0], d, H, D, C)))
    # a NaN stays
    h = tl.where(h < 0, 0.0, h)
    weights += 2 * size
    for l in tl.static_range(1, len(HIDDEN)):
        if hidden is not None:
            tl.store(hidden + (l - 1) * BB * H + layer, h)
        h = dot(h, tl.trans(load_matrix(weights, HIDDEN[l], HIDDEN[l - 1], H, H, C)))
        h = tl.where(h < 0, 0.0, h)
        weights += HIDDEN[l] * HIDDEN[l - 1]
    return h


@triton.jit
def output_layer(h, weights, num_weights, HIDDEN: tl.constexpr, d: tl.constexpr, D: tl.constexpr, H: tl.constexpr):
    """V h^L."""
    width: tl.constexpr = HIDDEN[len(HIDDEN) - 1]
    return dot(h, tl.trans(load_matrix(weights + num_weights - d * width, d, width, D, H, h.dtype)))


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_kernel(
    Q, b, y0, weights,
    y,              # [B, d], or [num_steps + 1, B, d]
    scratch,        # [programs, BB, D], y_t
    B, num_steps, num_weights,
    HIDDEN: tl.constexpr, d: tl.constexpr, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BB: tl.constexpr,
    DIAGONAL: tl.constexpr, SHARED: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = weights.dtype.element_ty
    i = tl.arange(0, D)[None, :]
    copy = scratch + tl.program_id(0).to(tl.int64) * (BB * D)
    state = tl.arange(0, BB)[:, None] * D + i
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[:, None], (i < d) & real[:, None]
        b_ = load_vector(b, s, i, inside, C)
        x = load_vector(y0, s, i, inside, C)
        target = y + s.to(tl.int64) * d + i
        if TRAJECTORY:
            tl.store(target, x, mask=inside)
        for _ in range(num_steps):
            if R < D:
                tl.debug_barrier()
                tl.store(copy + state, x)
                tl.debug_barrier()
            g = b_ + multiply_by_Q(Q, x, copy, sample, real, d, D, R, BB, DIAGONAL, SHARED, False)
            h = hidden_layers(x, g, weights, None, HIDDEN, d, D, H, BB)
            x = output_layer(h, weights, num_weights, HIDDEN, d, D, H)
            if TRAJECTORY:
                target += tl.cast(B, tl.int64) * d
                tl.store(target, x, mask=inside)
        if not TRAJECTORY:
            tl.store(target, x, mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rnn_backward_kernel(
    grad_y, Q, b, y0, weights,
    dQ,             # like Q; [B, d] of a diagonal one, [programs, d, d] in the compute dtype where the batch shares Q
    db, dy0,        # [B, d]
    d_weights,      # [programs, num_weights], zero at first; None where not needed
    trace,          # [programs, 2, max(num_steps, 1), BB, D]: y_t, then e_t
    hidden,         # [programs, L, BB, H]
    B, num_steps, num_weights,
    HIDDEN: tl.constexpr, d: tl.constexpr, D: tl.constexpr, H: tl.constexpr, R: tl.constexpr, BB: tl.constexpr,
    DIAGONAL: tl.constexpr, SHARED: tl.constexpr, TRAJECTORY: tl.constexpr,
):  # fmt: skip
    C: tl.constexpr = weights.dtype.element_ty
    L: tl.constexpr = len(HIDDEN)
    size: tl.constexpr = HIDDEN[0] * d
    last: tl.constexpr = HIDDEN[L - 1]
    program = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, D)[None, :]
    state = tl.arange(0, BB)[:, None] * D + i
    layer = tl.arange(0, BB)[:, None] * H + tl.arange(0, H)[None, :]
    trace_size = tl.maximum(num_steps, 1).to(tl.int64) * (BB * D)
    states = trace + program * 2 * trace_size
    messages = states + trace_size
    hidden += program * (L * BB * H)
    if d_weights is not None:
        d_weights += program * num_weights
    if SHARED and dQ is not None:
        dQ += program * (d * d)
    for block in range(tl.program_id(0), tl.cdiv(B, BB), tl.num_programs(0)):
        sample = block * BB + tl.arange(0, BB)
        real = sample < B
        s, inside = sample[:, None], (i < d) & real[:, None]
        b_ = load_vector(b, s, i, inside, C)
        x = load_vector(y0, s, i, inside, C)

        # replay y_0 … y_{k-1} into the trace, which other threads still read for the block before
        tl.debug_barrier()
        row = states
        tl.store(row + state, x)
        tl.debug_barrier()
        for _ in range(num_steps - 1):
            g = b_ + multiply_by_Q(Q, x, row, sample, real, d, D, R, BB, DIAGONAL, SHARED, False)
            h = hidden_layers(x, g, weights, None, HIDDEN, d, D, H, BB)
            x = output_layer(h, weights, num_weights, HIDDEN, d, D, H)
            row += BB * D
            tl.store(row + state, x)
            tl.debug_barrier()

        # the adjoint recurrence of manual.py
        a = load_vector(grad_y, s, i, inside, C, num_steps)
        b_bar = tl.zeros([BB, D], C)
        q_bar = tl.zeros([BB, D], C)
        message = messages + trace_size
        for back in range(num_steps):
            x = tl.load(row + state)
            message -= BB * D
            g = b_ + multiply_by_Q(Q, x, row, sample, real, d, D, R, BB, DIAGONAL, SHARED, False)
            h = hidden_layers(x, g, weights, hidden, HIDDEN, d, D, H, BB)
            tl.debug_barrier()
            offset = num_weights - d * last
            if d_weights is not None:
                add_outer_products(d_weights + offset, a, h, d, last, D, H)
            delta = tl.where(h > 0, dot(a, load_matrix(weights + offset, d, last, D, H, C)), 0.0)
            for n in tl.static_range(1, L):
                below = tl.load(hidden + (L - 1 - n) * BB * H + layer)
                offset -= HIDDEN[L - n] * HIDDEN[L - n - 1]
                if d_weights is not None:
                    add_outer_products(d_weights + offset, delta, below, HIDDEN[L - n], HIDDEN[L - n - 1], H, H)
                W = load_matrix(weights + offset, HIDDEN[L - n], HIDDEN[L - n - 1], H, H, C)
                delta = tl.where(below > 0, dot(delta, W), 0.0)
            if d_weights is not None:
                add_outer_products(d_weights, delta, x, HIDDEN[0], d, H, D)
                add_outer_products(d_weights + size, delta, g, HIDDEN[0], d, H, D)
            e = dot(delta, load_matrix(weights + size, HIDDEN[0], d, H, D, C))
            tl.store(message + state, e)
            tl.debug_barrier()
            b_bar += e
            if dQ is not None:
                if DIAGONAL:
                    q_bar += e * x
                elif SHARED:
                    add_outer_products(dQ, e, x, d, d, D, D)
            a = dot(delta, load_matrix(weights, HIDDEN[0], d, H, D, C))
            a += multiply_by_Q(Q, e, message, sample, real, d, D, R, BB, DIAGONAL, SHARED, True)
            if TRAJECTORY:
                a += load_vector(grad_y, s, i, inside, C, num_steps - 1 - back)
            row -= BB * D

        target = s.to(tl.int64) * d + i
        if db is not None:
            tl.store(db + target, b_bar, mask=inside)
        if dy0 is not None:
            tl.store(dy0 + target, a, mask=inside)
        if dQ is not None:
            if DIAGONAL:
                tl.store(dQ + target, q_bar, mask=inside)
            elif not SHARED:
                # R rows of Q̄ at a time
                for first in range(0, D, R):
                    part = first + tl.arange(0, R)
                    rows = tl.zeros([BB, R, D], C)
                    e_row = messages + tl.arange(0, BB)[:, None] * D + part[None, :]
                    y_row = states + state
                    for _ in range(num_steps):
                        rows += tl.load(e_row)[:, :, None] * tl.load(y_row)[:, None, :]
                        e_row += BB * D
                        y_row += BB * D
                    r, j = part[None, :, None], tl.arange(0, D)[None, None, :]
                    entries = sample.to(tl.int64)[:, None, None] * (d * d) + r * d + j
                    tl.store(dQ + entries, rows, mask=real[:, None, None] & (r < d) & (j < d))


def _power_of_two(n):
    return max(SAMPLES, triton.next_power_of_2(n))


def _constants(matrix, b, hidden_dims, trajectory):
    """The sizes of the tiles, and what of the call the kernels are compiled for."""
    D, H = _power_of_two(b.shape[1]), _power_of_two(max(hidden_dims))
    diagonal = matrix.dim() == 2
    return {
        "HIDDEN": tuple(hidden_dims),
        "d": b.shape[1],
        "D": D,
        "H": H,
        # a tile [BB, D, R] of 4096 elements
        "R": max(1, 256 // D),
        "BB": SAMPLES,
        "DIAGONAL": diagonal,
        "SHARED": not diagonal and matrix.shape[0] < b.shape[0],
        "TRAJECTORY": trajectory,
        "num_warps": NUM_WARPS_ON.get((D, H, devices.capability(b.device)), NUM_WARPS[max(D, H)]),
    }


def _operands(matrix, b, y0):
    """Q, b and y_0 as the kernels take them."""
    Q = Vectors.rows(matrix) if matrix.dim() == 2 else Matrices.of(matrix)
    return Q, Vectors.rows(b), Vectors.rows(y0)


def _pack(weights):
    """The matrices one after the other, ``[P]``."""
    return torch.cat([W.reshape(-1) for W in weights])


def forward(matrix, b, y0, weights, num_steps, trajectory):
    """y of ``rnn_kernel``; ``matrix`` is Q, or q ``[B, d]`` of a diagonal one."""
    B, d = b.shape
    y = b.new_empty((num_steps + 1, B, d) if trajectory else (B, d))
    if y.numel() == 0:
        return y
    hidden_dims, weights = hidden_dims_of(weights), _pack(weights)
    constants = _constants(matrix, b, hidden_dims, trajectory)
    programs = resident_programs(b.device, triton.cdiv(B, SAMPLES), constants["num_warps"])
    scratch = weights.new_empty((programs, SAMPLES, constants["D"]))
    launch(
        rnn_kernel, b.device, programs,
        *_operands(matrix, b, y0), weights, y, scratch, B, num_steps, weights.numel(), **constants,
    )  # fmt: skip
    return y


def backward(grad_y, matrix, b, y0, weights, num_steps, trajectory, needs_matrix, needs_b, needs_y0, needs_weights):
    """The gradients of ``rnn_backward_kernel``: of Q, b and y_0 None where not needed."""
    B, d = b.shape
    db, dy0 = (b.new_empty((B, d)) if needed else None for needed in (needs_b, needs_y0))
    if b.numel() == 0:
        d_matrix = matrix.new_zeros(matrix.shape) if needs_matrix else None
        return d_matrix, db, dy0, [torch.zeros_like(W) for W in weights] if needs_weights else []
    shapes, hidden_dims, weights = [W.shape for W in weights], hidden_dims_of(weights), _pack(weights)
    constants = _constants(matrix, b, hidden_dims, trajectory)
    programs = resident_programs(b.device, triton.cdiv(B, SAMPLES), constants["num_warps"])
    trace = weights.new_empty((programs, 2, max(num_steps, 1), SAMPLES, constants["D"]))
    hidden = weights.new_empty((programs, len(hidden_dims), SAMPLES, constants["H"]))
    d_weights = weights.new_zeros((programs, weights.numel())) if needs_weights else None
    d_matrix = None
    if needs_matrix:
        d_matrix = weights.new_zeros((programs, d, d)) if constants["SHARED"] else matrix.new_empty(matrix.shape)
    launch(
        rnn_backward_kernel, b.device, programs,
        Vectors.cotangent(grad_y, trajectory), *_operands(matrix, b, y0), weights,
        d_matrix, db, dy0, d_weights, trace, hidden, B, num_steps, weights.numel(), **constants,
    )  # fmt: skip
    if needs_matrix and constants["SHARED"]:
        d_matrix = d_matrix.sum(0, keepdim=True).to(b.dtype)
    if d_weights is None:
        return d_matrix, db, dy0, []
    # outputs of an op may not be views of one tensor
    parts = d_weights.split([shape.numel() for shape in shapes], dim=1)
    return d_matrix, db, dy0, [part.sum(0).view(shape) for part, shape in zip(parts, shapes, strict=True)]
