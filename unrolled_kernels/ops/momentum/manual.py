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

A proximal map, y_{t+1} = p_t(v_t) where y_{t+1} was v_t, leaves all of this as it is with the adjoint of v_t for a:

    a = D_t ȳ_{t+1},     D_t the derivative of p_t at v_t, diagonal, of zeros and ones

    box              D_t = 1[lower ≤ v_t ≤ upper]; what it stops belongs to the bound that was met,
                     lower̄ += 1[v_t < lower < upper] ȳ_{t+1},     upper̄ += 1[v_t > upper or upper < lower] ȳ_{t+1}
    soft threshold   p_t(v) = sign(v) max(|v| - τ_t, 0), D_t = 1[|v_t| > τ_t], and τ̄_t = -sign(v_t) a elementwise:
                     τ_t = φ_t weight:  weight̄ += φ_t τ̄_t,  φ̄_t += weightᵀ τ̄_t
                     τ_t = threshold_t: threshold̄_t is the sum of τ̄_t

Weights and thresholds below zero count as zero and have no gradient. D_t is constant where p_t is differentiable, so
second-order gradients go through the same formulas.

Truncated after n steps, the same is run for t = k-1 … k-n = f: y_f and y_{f-1} are constant, and y_0 gets zero. Of
Q = R diag(λ) Rᵀ what is constant are these and not Rᵀ times them, so that with ŷ̄_f the adjoint of ŷ_f but for m̂_f

    R̄ = b b̂̄ᵀ + y_f ŷ̄_fᵀ + m_f m̂̄_fᵀ + Σ_{t>f} ȳ_t^out ŷ_tᵀ

Implicitly, y_k is taken for the fixed point y of the steps, where Q y + b = 0 whatever the schedule. Differentiated,
Q dy + dQ y + db = 0, so with Qᵀa = ȳ

    ȳᵀdy = -aᵀ(dQ y + db)          b̄ = -a          Q̄ = b̄ yᵀ          the coefficients and y_0 get zero

and b̄ = -(Qᵀ)⁻¹ȳ is what k steps of the same method make of Qᵀ with ȳ for b. From y_0 = 0 they make P(Q) b of b, P a
polynomial, and P(Qᵀ) = P(Q)ᵀ: it is the b̄ of the steps themselves, whose adjoints do not ask where they were.

Q = diag(q): q̄ = b̄ y.
Q = R diag(λ) Rᵀ: the same in the eigenbasis. With a proximal map, let N be the entries that it holds at a bound or at
zero, F the others. Where (Q y + b + weight sign(y))_F = 0 and y_N is the bound or zero, dy_N is that of the bound and

    (Qᵀ)_FF a_F = ȳ_F,   a_N = 0,   b̄, Q̄ as above,   the bound that holds entry i gets (ȳ - Qᵀa)_i,   weight̄ = b̄ sign(y)

so the same method runs on Qᵀ with a box whose bounds are 0 in N and infinite in F. A threshold is a coefficient.

The functions below use no in-place operation, so they can be differentiated in turn: that is how gradients of second
order are computed where no kernel does it. The kernels that do take the gradients for what they are, those of ⟨ȳ, y_k⟩.
Weighted with cotangents X of Q̄, x of b̄, ẏ_0 of ȳ_0, φ̇_t of φ̄_t, … they sum to ⟨ȳ, ẏ_k⟩, ẏ_t the derivative of y_t along
(X, x, ẏ_0, φ̇, …), and the VJP of backward is the gradient of that:

    ż_t = ẏ_t + γ_t ṁ_t + γ̇_t m_t      ẏ_{t+1} = ẏ_t + β_t ṁ_t + β̇_t m_t - φ_t (Q ż_t + X z_t + x) - φ̇_t (Q z_t + b)

ȳ gets ẏ_k. Backward, a is the adjoint of ẏ_{t+1}, as above; let p be that of y_{t+1}, w = Qᵀa, u = Qᵀp + Xᵀa, and of
ż_t and z_t let them be ẇ = -φ_t w and v = -φ_t u - φ̇_t w:

    ẏ_t gets a + β_t a + (1 + γ_t) ẇ                  y_t gets p + (β_t p + β̇_t a) + (1 + γ_t) v + γ̇_t ẇ
    (and ẏ_{t-1}, y_{t-1} lose what went through ṁ_t, m_t)
    b̄   -= φ_t p + φ̇_t a                             Q̄   -= (φ_t p + φ̇_t a) z_tᵀ + φ_t a ż_tᵀ
    φ̄_t = -(uᵀz_t + wᵀż_t + pᵀb + aᵀx)               β̄_t = pᵀm_t + aᵀṁ_t          γ̄_t = vᵀm_t + ẇᵀṁ_t

Where the coefficients have no cotangents this is first order for the state (y, ẏ), [Q 0; X Q] and the cotangent (0, ȳ).
Eight products for first order's three, of which the kernels load Q for two at once.
"""

import torch

from unrolled_kernels.ops.common import matvec, zero_gradients
from unrolled_kernels.ops.momentum import reference
from unrolled_kernels.ops.momentum.reference import NO_PROX, Prox, columns, iterates, nesterov_momentum, thresholds

forward = reference.forward


# bits of `needs`
_SCHEDULE, _MU = 0b111 << 5, 1 << 8


def with_nesterov(backward):
    """A backward that takes μ too and returns its gradient, beside one that takes β and γ only.

    That one has the same bits of ``needs`` without that of μ, and returns an empty tensor in the place of μ's gradient.
    """

    def run(grad_y, matrix, diagonal, observed, b, y0, phi, beta, gamma, mu, *rest):
        tensors, (*constants, needs) = (grad_y, matrix, diagonal, observed, b, y0, phi), rest
        nothing = phi.new_empty(0)
        if mu is None:
            return backward(*tensors, beta, gamma, *constants, needs & ~_MU)
        beta = nesterov_momentum(phi, mu)
        wanted = _SCHEDULE if needs & (_SCHEDULE | _MU) else 0
        grads = backward(*tensors, beta, beta, *constants, needs & ~(_SCHEDULE | _MU) | wanted)
        d_phi, d_beta, d_gamma = grads[5:8]
        d_mu = nothing
        if wanted:
            quarter = (d_beta + d_gamma) * (1 - beta * beta) / -4
            d_phi, d_mu = (d_phi + (quarter / phi).sum_to_size(phi.shape), (quarter / mu).sum_to_size(mu.shape))
        d_phi, d_mu = d_phi if needs & 1 << 5 else nothing, d_mu if needs & _MU else nothing
        return (*grads[:5], d_phi, nothing, nothing, d_mu, *grads[9:])

    return run


def with_no_steps(backward):
    """A backward that takes no steps too: y_0 came back and nothing else counts, whatever it is."""

    def run(grad_y, *arguments):
        *tensors, num_steps, trajectory, needs = arguments
        if num_steps > 0:
            return backward(grad_y, *arguments)
        storage, compute = tensors[:5], tensors[5:]
        grads = [
            *zero_gradients(storage, needs, like=tensors[3]),
            *zero_gradients(compute, needs >> 5, like=tensors[5]),
        ]
        if grads[4].dim() > 1:
            grads[4] = (grad_y[0] if trajectory else grad_y).clone()
        return tuple(grads)

    return run


@with_no_steps
@with_nesterov
def backward(
    grad_y,
    matrix,
    diagonal,
    observed,
    b,
    y0,
    step_sizes,
    momentum,
    extrapolation,
    lower,
    upper,
    weight,
    threshold,
    num_steps,
    trajectory,
    needs,
):
    """Gradients of the canonical arguments for the cotangent ``grad_y`` (shape of the forward's output).

    Args:
        needs: bit i for the gradient of tensor i, in the order of forward's arguments.
    Returns:
        ``(d_matrix like matrix, d_diagonal, d_observed, db, dy0 [B, d], d_step_sizes, d_momentum,
        d_extrapolation, d_mu, d_lower, d_upper, d_weight [B, d], d_threshold)``, those of the schedule and of the
        threshold shaped like their inputs; what is not needed, or absent, is a tensor of shape ``[0]``, and so is
        d_mu. With ``observed`` the second is f̄.
    """
    storage, compute = b.dtype, step_sizes.dtype
    schedule, prox = (step_sizes, momentum, extrapolation), Prox(lower, upper, weight, threshold)
    tensors = (matrix, diagonal, observed, b, y0, *schedule, None, *prox)
    needed = [x is not None and bool(needs >> i & 1) for i, x in enumerate(tensors)]
    grad_y, matrix, diagonal, observed, b, y0 = (
        x if x is None else x.to(compute) for x in (grad_y, matrix, diagonal, observed, b, y0)
    )
    f = diagonal
    if observed is not None:
        diagonal, b = 1 + f * f, b - observed
    cold = y0 is None
    y0 = torch.zeros_like(b) if cold else y0
    zero = torch.zeros_like(b)
    cotangents = list(grad_y.unbind(0)) if trajectory else [zero] * num_steps + [grad_y]

    if diagonal is None:
        apply_Q, apply_Qt = lambda x: matvec(matrix, x), lambda x: matvec(matrix.mT, x)
        d_y0, a, z, d_schedule, d_prox = _adjoint_sweep(
            apply_Q, apply_Qt, b, y0, schedule, num_steps, cotangents, cold, prox
        )
        db = a.sum(0)
        d_diagonal = None
        equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
        d_matrix = torch.einsum(equation, a, z).reshape(matrix.shape) if needed[0] else None
    elif matrix is None:
        apply_Q = lambda x: diagonal * x
        d_y0, a, z, d_schedule, d_prox = _adjoint_sweep(
            apply_Q, apply_Q, b, y0, schedule, num_steps, cotangents, cold, prox
        )
        db = a.sum(0)
        d_diagonal = (a * z).sum(0)
        if observed is not None:
            d_diagonal = 2 * f * d_diagonal
        d_matrix = None
    else:
        apply_Q = lambda x: diagonal * x
        b_hat, y0_hat = matvec(matrix.mT, b), matvec(matrix.mT, y0)
        hat = [zero] + [matvec(matrix.mT, c) for c in cotangents[1:]]
        d_y0_hat, a, z, d_schedule, d_prox = _adjoint_sweep(
            apply_Q, apply_Q, b_hat, y0_hat, schedule, num_steps, hat, cold
        )
        db_hat = a.sum(0)
        db = matvec(matrix, db_hat)
        d_y0 = cotangents[0] + matvec(matrix, d_y0_hat)
        d_diagonal = (a * z).sum(0)
        d_matrix = None
        if needed[0]:
            y_hat, _ = iterates(apply_Q, b_hat, y0_hat, schedule, num_steps)
            left = torch.stack([b, y0, *cotangents[1:]])
            right = torch.stack([db_hat, d_y0_hat, *y_hat[1:]])
            equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
            d_matrix = torch.einsum(equation, left, right).reshape(matrix.shape)

    d_observed = None if observed is None else -db
    shared = (*d_schedule, d_prox.threshold)
    shared = [x if c is None else x.sum_to_size(c.shape) for x, c in zip(shared, (*schedule, threshold), strict=True)]
    grads = (d_matrix, d_diagonal, d_observed, db, d_y0, *shared[:3], None, *d_prox[:3], shared[3])
    dtypes = [storage] * 5 + [compute] * 8
    return tuple(
        (g if wanted else b.new_empty(0)).to(dtype) for g, wanted, dtype in zip(grads, needed, dtypes, strict=True)
    )


def _adjoint_sweep(apply_Q, apply_Qt, b, y0, schedule, num_steps, cotangents, cold, prox=NO_PROX):
    """Replay the iterates, then run the adjoint down.

    Returns ȳ_0 (not if ``cold``: y_0 is zero), the stacks A_t = -φ_t a_t and Z_t = z_t (``[k, B, d]``),
    φ̄, β̄, γ̄ (``[B, k]``), and the gradients of ``prox``: of its bounds and weight ``[B, d]``, of its
    threshold ``[B, k]``, None for what it has not.
    """
    ys, vs = iterates(apply_Q, b, y0, schedule, num_steps, prox)
    gradient_descent = schedule[1] is None
    zero = torch.zeros((1, 1), dtype=b.dtype, device=b.device)
    phi, beta, gamma = ([zero] * num_steps if c is None else columns(c, num_steps) for c in schedule)
    taus = thresholds(prox, phi, num_steps)
    free = columns(prox.threshold, num_steps) or [None] * num_steps
    a_stack, z_stack, d_phi, d_beta, d_gamma, d_prox = [], [], [], [], [], []
    y_bar, carry = cotangents[num_steps], torch.zeros_like(b)
    for t in reversed(range(num_steps)):
        a, *d_prox_t = _through_prox(vs[t], y_bar, prox, taus[t], free[t], phi[t])
        m = ys[t] - ys[max(t - 1, 0)]
        z = ys[t] if gradient_descent else ys[t] + gamma[t] * m
        # Qᵀa_0 is in ȳ_0 alone where z_0 is zero; it need not be finite
        w = apply_Qt(a) if t > 0 or not cold else torch.zeros_like(b)
        a_stack.append(-phi[t] * a)
        z_stack.append(z)
        d_phi.append(-(w * z + a * b).sum(-1) + d_prox_t.pop())
        d_prox.append(d_prox_t)
        d_beta.append((a * m).sum(-1))
        d_gamma.append(-phi[t].reshape(-1) * (w * m).sum(-1))
        y_bar = cotangents[t] + carry + (1 + beta[t]) * a - phi[t] * (1 + gamma[t]) * w
        carry = -beta[t] * a + phi[t] * gamma[t] * w
    per_step = lambda rows: torch.stack(rows[::-1], 1)
    d_schedule = tuple(map(per_step, (d_phi, d_beta, d_gamma)))
    d_lower, d_upper, d_weight, d_threshold = zip(*d_prox, strict=True)
    total = lambda x, rows: None if x is None else sum(rows, torch.zeros_like(b))
    d_prox = Prox(
        total(prox.lower, d_lower),
        total(prox.upper, d_upper),
        total(prox.weight, d_weight),
        None if prox.threshold is None else per_step(list(d_threshold)),
    )
    return y_bar + carry, torch.stack(a_stack), torch.stack(z_stack), d_schedule, d_prox


def _through_prox(v, y_bar, prox, tau, threshold, phi):
    """The adjoint a of v = v_t, and what lower, upper, weight, threshold and φ of that step get from its map."""
    if tau is not None:
        a = y_bar * (v.abs() > tau)
        d_tau = -v.sign() * a
        if prox.weight is None:
            return a, None, None, None, (d_tau * (threshold >= 0)).sum(-1), 0
        d_tau = d_tau * (phi >= 0)
        return a, None, None, phi * d_tau * (prox.weight >= 0), None, (prox.weight.clamp(min=0) * d_tau).sum(-1)
    lower, upper = prox.lower, prox.upper
    if lower is None and upper is None:
        return y_bar, None, None, None, None, 0
    if upper is None:
        return y_bar * (v >= lower), y_bar * (v < lower), None, None, None, 0
    if lower is None:
        return y_bar * (v <= upper), None, y_bar * (v > upper), None, None, 0
    below, above = (v < lower) & (lower < upper), (v > upper) | (upper < lower)
    return y_bar * ((v >= lower) & (v <= upper)), y_bar * below, y_bar * above, None, None, 0
