"""The specification of the momentum recurrence: a plain loop that autograd differentiates. Also the backend "eager".

m_t     = y_t - y_{t-1}                              (y_{-1} = y_0)
z_t     = y_t + γ_t m_t
y_{t+1} = y_t + β_t m_t - φ_t (Q z_t + b)            t = 0 … k-1
"""

import torch

from unrolled_kernels.ops.common import matvec


def with_nesterov(forward):
    """A forward that takes μ too, beside one that takes β and γ only."""

    def run(matrix, eigenvalues, observed, b, y0, phi, beta, gamma, mu, num_steps, trajectory):
        if mu is not None:
            beta = gamma = nesterov_momentum(phi, mu)
        return forward(matrix, eigenvalues, observed, b, y0, phi, beta, gamma, num_steps, trajectory)

    return run


@with_nesterov
def forward(matrix, eigenvalues, observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory):
    """Run the recurrence on canonical arguments (see the package's docstring)."""
    storage, compute = b.dtype, step_sizes.dtype
    matrix, eigenvalues, observed, b, y0 = (
        x if x is None else x.to(compute) for x in (matrix, eigenvalues, observed, b, y0)
    )
    if observed is not None:
        eigenvalues, b = 1 + eigenvalues * eigenvalues, b - observed
    y0 = torch.zeros_like(b) if y0 is None else y0
    if eigenvalues is None:
        ys = iterates(lambda z: matvec(matrix, z), b, y0, step_sizes, momentum, extrapolation, num_steps)
    elif matrix is None:
        ys = iterates(lambda z: eigenvalues * z, b, y0, step_sizes, momentum, extrapolation, num_steps)
    else:
        # Q = R diag(λ) Rᵀ: the same recurrence, diagonal in the eigenbasis; y_0 itself is never rotated
        b, y0_rotated = matvec(matrix.mT, b), matvec(matrix.mT, y0)
        ys = iterates(lambda z: eigenvalues * z, b, y0_rotated, step_sizes, momentum, extrapolation, num_steps)
        rotated = ys[1:] if trajectory else ys[-1:]
        ys = [y0] + [matvec(matrix, y) for y in rotated if num_steps > 0]
    y = torch.stack(ys) if trajectory else ys[-1]
    # without a step y_0 itself comes back, and an output never aliases an input
    return y.to(storage, copy=num_steps == 0)


def iterates(apply_Q, b, y0, step_sizes, momentum, extrapolation, num_steps):
    """The list y_0 … y_k of ``[B, d]`` tensors; ``apply_Q`` maps z ``[B, d]`` to Q z."""
    phi, beta, gamma = (columns(x, num_steps) for x in (step_sizes, momentum, extrapolation))
    ys = [y0]
    for t in range(num_steps):
        y = ys[t]
        if momentum is None:
            ys.append(y - phi[t] * (apply_Q(y) + b))
        else:
            m = y - ys[max(t - 1, 0)]
            ys.append(y + beta[t] * m - phi[t] * (apply_Q(y + gamma[t] * m) + b))
    return ys


def nesterov_momentum(step_size, mu):
    """β = (1-√(μφ))/(1+√(μφ)) for tensors φ, μ (paper, Eq. 9)."""
    # (1-r)/(1+r) = -tanh(log(r)/2): fewer operations, which is what a small call waits for
    return (-0.25 * (step_size * mu).log()).tanh()


def columns(coefficient, num_steps):
    """Split a schedule coefficient into one column ``[B or 1, 1]`` a step, or one number."""
    if coefficient is None:
        return None
    if coefficient.dim() == 0 or coefficient.shape[1] == 1:
        return [coefficient] * num_steps
    return coefficient.split(1, dim=1)
