"""The hand-written backward of the momentum recurrence, in eager torch: the derivation that every kernel implements.

Let ȳ_t be the total adjoint of the iterate y_t, and take the step

    m_t = y_t - y_{t-1},   z_t = y_t + γ_t m_t,   y_{t+1} = y_t + β_t m_t - φ_t (Q z_t + b).

With a := ȳ_{t+1} and w := Qᵀa, the chain rule through z_t and m_t gives, for any Q, symmetric or not,

    ȳ_t     += (1 + β_t) a - φ_t (1 + γ_t) w          b̄   -= φ_t a
    ȳ_{t-1} += -β_t a + φ_t γ_t w                     Q̄   -= φ_t a z_tᵀ
    φ̄_t = -aᵀ(Q z_t + b) = -(wᵀz_t + aᵀb)             β̄_t  = aᵀm_t               γ̄_t = -φ_t wᵀm_t

run for t = k-1 … 0; what reaches y_{-1} belongs to y_0. Only y_k has a cotangent of its own unless the trajectory is
returned. The iterates are recomputed from the inputs, so nothing that grows with k is kept between the passes.

Nesterov's method for μ has β = γ = (1-r)/(1+r), r = √(μφ): dβ/dφ = -(1 - β²)/(4φ), dβ/dμ = -(1 - β²)/(4μ).

Q = diag(q): w = q a, and q̄ -= φ_t a z_t elementwise.

Q = diag(1 + f²) and g - x for b (tikhonov): the same, then f̄ = 2 f q̄, ḡ = b̄ and x̄ = -b̄.

Q = R diag(λ) Rᵀ: the diagonal case in the eigenbasis, b̂ = Rᵀb, ŷ_0 = Rᵀy_0, y_t = R ŷ_t for t ≥ 1. Through the
rotations, b̄ = R b̂̄, ȳ_0 += R ŷ̄_0, and R̄ = b b̂̄ᵀ + y_0 ŷ̄_0ᵀ + Σ_{t≥1} ȳ_t^out ŷ_tᵀ.

The functions below use no in-place operation, so they can be differentiated in turn: that is how second-order
gradients of every backend are computed.
"""

import torch

from unrolled_kernels.ops.common import matvec
from unrolled_kernels.ops.momentum import reference
from unrolled_kernels.ops.momentum.reference import columns, iterates, nesterov_momentum

forward = reference.forward


def with_nesterov(backward):
    """A backward that takes μ too and returns its gradient last, beside one that takes β and γ only."""

    def run(grad_y, matrix, eigenvalues, observed, b, y0, phi, beta, gamma, mu, num_steps, trajectory, needs):
        tensors, constants = (grad_y, matrix, eigenvalues, observed, b, y0, phi), (num_steps, trajectory)
        nothing = phi.new_empty(0)
        if mu is None:
            return (*backward(*tensors, beta, gamma, *constants, needs), nothing)
        beta = nesterov_momentum(phi, mu)
        wanted = 0b111 << 5 if needs >> 5 else 0
        *grads, d_phi, d_beta, d_gamma = backward(*tensors, beta, beta, *constants, needs & 0b11111 | wanted)
        d_mu = nothing
        if wanted:
            quarter = (d_beta + d_gamma) * (1 - beta * beta) / -4
            d_phi, d_mu = (d_phi + (quarter / phi).sum_to_size(phi.shape), (quarter / mu).sum_to_size(mu.shape))
        return (*grads, d_phi if needs & 1 << 5 else nothing, nothing, nothing, d_mu if needs & 1 << 8 else nothing)

    return run


@with_nesterov
def backward(
    grad_y, matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory, needs
):
    """Gradients of the canonical arguments for the cotangent ``grad_y`` (shape of the forward's output).

    Args:
        needs: bit i for the gradient of tensor i, in the order of forward's arguments.
    Returns:
        ``(d_matrix like matrix, d_eigenvalues, d_observed, db, dy0 [B, d], d_step_sizes, d_momentum,
        d_extrapolation)``, the last three shaped like their inputs; what is not needed, or absent, is a tensor of
        shape ``[0]``. With ``observed`` the second is f̄.
    """
    storage, compute = b.dtype, step_sizes.dtype
    schedule = (step_sizes, momentum, extrapolation)
    tensors = (matrix, eigenvalues, observed, b, y0, *schedule)
    needed = [x is not None and bool(needs >> i & 1) for i, x in enumerate(tensors)]
    grad_y, matrix, eigenvalues, observed, b, y0 = (
        x if x is None else x.to(compute) for x in (grad_y, matrix, eigenvalues, observed, b, y0)
    )
    f = eigenvalues
    if observed is not None:
        eigenvalues, b = 1 + f * f, b - observed
    y0 = torch.zeros_like(b) if y0 is None else y0
    zero = torch.zeros_like(b)
    cotangents = list(grad_y.unbind(0)) if trajectory else [zero] * num_steps + [grad_y]

    if eigenvalues is None:
        d_y0, a, z, d_schedule = _adjoint_sweep(
            lambda x: matvec(matrix, x), lambda x: matvec(matrix.mT, x), b, y0, schedule, num_steps, cotangents
        )
        db = a.sum(0)
        d_eigenvalues = None
        equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
        d_matrix = torch.einsum(equation, a, z).reshape(matrix.shape) if needed[0] else None
    elif matrix is None:
        apply_Q = lambda x: eigenvalues * x
        d_y0, a, z, d_schedule = _adjoint_sweep(apply_Q, apply_Q, b, y0, schedule, num_steps, cotangents)
        db = a.sum(0)
        d_eigenvalues = (a * z).sum(0)
        if observed is not None:
            d_eigenvalues = 2 * f * d_eigenvalues
        d_matrix = None
    else:
        apply_Q = lambda x: eigenvalues * x
        b_hat, y0_hat = matvec(matrix.mT, b), matvec(matrix.mT, y0)
        hat = [zero] + [matvec(matrix.mT, c) for c in cotangents[1:]]
        d_y0_hat, a, z, d_schedule = _adjoint_sweep(apply_Q, apply_Q, b_hat, y0_hat, schedule, num_steps, hat)
        db_hat = a.sum(0)
        db = matvec(matrix, db_hat)
        d_y0 = cotangents[0] + matvec(matrix, d_y0_hat)
        d_eigenvalues = (a * z).sum(0)
        d_matrix = None
        if needed[0]:
            y_hat = iterates(apply_Q, b_hat, y0_hat, *schedule, num_steps)
            left = torch.stack([b, y0, *cotangents[1:]])
            right = torch.stack([db_hat, d_y0_hat, *y_hat[1:]])
            equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
            d_matrix = torch.einsum(equation, left, right).reshape(matrix.shape)

    d_observed = None if observed is None else -db
    d_schedule = [x if c is None else x.sum_to_size(c.shape) for x, c in zip(d_schedule, schedule, strict=True)]
    grads = (d_matrix, d_eigenvalues, d_observed, db, d_y0, *d_schedule)
    dtypes = [storage] * 5 + [compute] * 3
    return tuple(
        (g if wanted else b.new_empty(0)).to(dtype) for g, wanted, dtype in zip(grads, needed, dtypes, strict=True)
    )


def _adjoint_sweep(apply_Q, apply_Qt, b, y0, schedule, num_steps, cotangents):
    """Replay the iterates, then run the adjoint down.

    Returns ȳ_0, the stacks A_t = -φ_t ȳ_{t+1} and Z_t = z_t (``[k, B, d]``), and φ̄, β̄, γ̄ (``[B, k]``).
    """
    ys = iterates(apply_Q, b, y0, *schedule, num_steps)
    gradient_descent = schedule[1] is None
    zero = torch.zeros((1, 1), dtype=b.dtype, device=b.device)
    phi, beta, gamma = ([zero] * num_steps if c is None else columns(c, num_steps) for c in schedule)
    a_stack, z_stack, d_phi, d_beta, d_gamma = [], [], [], [], []
    a, carry = cotangents[num_steps], torch.zeros_like(b)
    for t in reversed(range(num_steps)):
        m = ys[t] - ys[max(t - 1, 0)]
        z = ys[t] if gradient_descent else ys[t] + gamma[t] * m
        w = apply_Qt(a)
        a_stack.append(-phi[t] * a)
        z_stack.append(z)
        d_phi.append(-(w * z + a * b).sum(-1))
        d_beta.append((a * m).sum(-1))
        d_gamma.append(-phi[t].reshape(-1) * (w * m).sum(-1))
        y_bar = cotangents[t] + carry + (1 + beta[t]) * a - phi[t] * (1 + gamma[t]) * w
        carry = -beta[t] * a + phi[t] * gamma[t] * w
        a = y_bar
    empty = b.new_zeros((0, *b.shape))
    a_stack, z_stack = (torch.stack(x) if num_steps else empty for x in (a_stack, z_stack))
    d_schedule = tuple(torch.stack(x[::-1], 1) if num_steps else empty.sum(-1).mT for x in (d_phi, d_beta, d_gamma))
    return a + carry, a_stack, z_stack, d_schedule
