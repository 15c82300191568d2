"""The hand-written backward of the RNN, in eager torch: the derivation that every kernel implements.

Let ȳ_t be the total adjoint of the state y_t and take the cell

    g = Q y_t + b,   h¹ = relu(W₁ y_t + W₂ g),   hˡ = relu(Wˡ hˡ⁻¹),   y_{t+1} = V hᴸ.

relu passes an adjoint where its result is positive. With a := ȳ_{t+1} and δˡ the adjoint of what the l-th relu gets,
the chain rule from V down to y_t gives, for any Q, symmetric or not,

    V̄  += a (hᴸ)ᵀ             δᴸ   = Vᵀa  where hᴸ > 0, else 0
    W̄ˡ += δˡ (hˡ⁻¹)ᵀ          δˡ⁻¹ = (Wˡ)ᵀδˡ  where hˡ⁻¹ > 0, else 0          l = L … 2
    W̄₁ += δ¹ y_tᵀ             W̄₂ += δ¹ gᵀ             e = W₂ᵀδ¹                (the adjoint of g)
    Q̄  += e y_tᵀ              b̄  += e                 ȳ_t += W₁ᵀδ¹ + Qᵀe

run for t = k-1 … 0. Only y_k has a cotangent of its own unless the trajectory is returned. States and hidden layers
are recomputed from the inputs, so nothing that grows with k is kept between the passes.

Q = diag(q): Qᵀe = q e, and q̄ += e y_t elementwise.

The functions below use no in-place operation, so they can be differentiated in turn: that is how second-order
gradients of every backend are computed.
"""

import torch

from unrolled_kernels.ops.common import zero_gradients
from unrolled_kernels.ops.rnn import reference
from unrolled_kernels.ops.rnn.reference import apply_Q

forward = reference.forward


def backward(grad_y, matrix, diagonal, b, y0, weights, num_steps, trajectory, needs):
    """Gradients of the canonical arguments for the cotangent ``grad_y`` (shape of the forward's output).

    Args:
        needs: bit i for the gradient of argument i, in the order of forward's; the weights are one of them.
    Returns:
        ``(d_matrix like matrix, d_diagonal, db, dy0 [B, d], [d_weights …])``; what is not needed, or absent, is a
        tensor of shape ``[0]``, and weights that are not needed have an empty list.
    """
    storage, compute = b.dtype, weights[0].dtype
    needed = [x is not None and bool(needs >> i & 1) for i, x in enumerate((matrix, diagonal, b, y0, weights))]
    if num_steps == 0:
        # y_0 came back and nothing else counts, whatever it is
        d_matrix, d_diagonal, db, dy0 = zero_gradients((matrix, diagonal, b, y0), needs, like=b)
        if needed[3]:
            dy0 = (grad_y[0] if trajectory else grad_y).clone()
        return d_matrix, d_diagonal, db, dy0, [torch.zeros_like(W) for W in weights if needed[4]]
    grad_y, matrix, diagonal, b, y0 = (x if x is None else x.to(compute) for x in (grad_y, matrix, diagonal, b, y0))
    transposed = None if matrix is None else matrix.mT
    cotangents = list(grad_y.unbind(0)) if trajectory else [torch.zeros_like(b)] * num_steps + [grad_y]
    cells = _replay(matrix, diagonal, b, torch.zeros_like(b) if y0 is None else y0, weights, num_steps)

    W1, W2, *rest = weights
    a, e_stack = cotangents[num_steps], []
    adjoints = [[] for _ in weights]  # what each weight's output gets, step by step
    for t in reversed(range(num_steps)):
        _, _, *hidden = cells[t]
        delta = a
        for i, (W, h) in enumerate(zip(reversed(rest), reversed(hidden), strict=True)):
            adjoints[-1 - i].append(delta)
            delta = torch.where(h > 0, delta @ W, 0)
        adjoints[0].append(delta)
        adjoints[1].append(delta)
        e_stack.append(delta @ W2)
        a = cotangents[t] + delta @ W1 + apply_Q(transposed, diagonal, e_stack[-1])

    # inputs of the weights in the same order: y_t, g_t, h¹ … hᴸ, the last step first
    inputs = [[cell[i] for cell in reversed(cells)] for i in range(len(weights))]
    e, y = torch.stack(e_stack), torch.stack(inputs[0])
    d_diagonal = (e * y).sum(0) if needed[1] else None
    d_matrix, d_weights = None, []
    if needed[0]:
        equation = "tbi,tbj->bij" if matrix.shape[0] == b.shape[0] else "tbi,tbj->ij"
        d_matrix = torch.einsum(equation, e, y).reshape(matrix.shape)
    if needed[4]:
        outer = lambda left, right: torch.einsum("tbi,tbj->ij", torch.stack(left), torch.stack(right))
        d_weights = map(outer, adjoints, inputs)
    grads = (d_matrix, d_diagonal, e.sum(0), a)
    d_inputs = [(g if wanted else b.new_empty(0)).to(storage) for g, wanted in zip(grads, needed, strict=False)]
    return (*d_inputs, list(d_weights))


def _replay(matrix, diagonal, b, y, weights, num_steps):
    """The inputs of every weight in each cell: a list of tuples ``(y_t, g_t, h¹ … hᴸ)``."""
    W1, W2, *inner, V = weights
    cells = []
    for _ in range(num_steps):
        g = apply_Q(matrix, diagonal, y) + b
        hidden = [torch.relu(y @ W1.mT + g @ W2.mT)]
        for W in inner:
            hidden.append(torch.relu(hidden[-1] @ W.mT))
        cells.append((y, g, *hidden))
        y = hidden[-1] @ V.mT
    return cells
