"""The op family ``momentum``: k steps of a first-order recurrence with a schedule, for each structure of Q.

Every module here takes the *canonical* arguments that ``functional`` prepares:

    matrix         dense: Q, spectral: R, ``[B or 1, d, d]`` (1: shared by the batch); diagonal, tikhonov: None
    diagonal       diagonal: q, spectral: λ, tikhonov: f, ``[B, d]``; dense: None
    observed       None, or x ``[B, d]``: then Q = diag(1 + diagonal²), and b - x takes the place of b (tikhonov)
    b, y0          ``[B, d]``; ``y0=None`` means zero
    step_sizes, momentum, extrapolation
                   φ, β, γ, ``[B or 1, num_steps or 1]``, or ``[]`` for one number, in the compute dtype (float32 for
                   float16, bfloat16 and float32; float64 for float64);
                   ``momentum=extrapolation=None`` means gradient descent
    mu             None, or for Nesterov's method μ, shaped like a coefficient; the two before it are then None, and
                   both follow from φ and μ
    lower, upper   the bounds of a clamp that ends each step, or
    weight         that of a soft threshold φ_t weight, ``[B, d]`` in the compute dtype, or
    threshold      a soft threshold of its own, like φ; all four None: neither

and returns y_k, ``[B, d]``, or with ``trajectory`` all of y_0 … y_k, ``[num_steps + 1, B, d]``, in the dtype of b.
"""
