"""The op family ``rnn``: k cells of a learned recurrent algorithm (paper, Eq. 20), for dense and diagonal Q.

Every module here takes the *canonical* arguments that ``functional`` prepares:

    matrix         dense: Q ``[B or 1, d, d]`` (1: shared by the batch); diagonal: None
    diagonal       diagonal: q ``[B, d]``; dense: None
    b, y0          ``[B, d]``; ``y0=None`` means zero
    weights        W₁ ``[h_1, d]``, W₂ ``[h_1, d]``, W² ``[h_2, h_1]`` … Wᴸ ``[h_L, h_{L-1}]``, V ``[d, h_L]``, in the
                   compute dtype (float32 for float16, bfloat16 and float32; float64 for float64)

and returns y_k, ``[B, d]``, or with ``trajectory`` all of y_0 … y_k, ``[num_steps + 1, B, d]``, in the dtype of b.
A backward returns the gradients in the order of the arguments, those of the weights as a list.
"""
