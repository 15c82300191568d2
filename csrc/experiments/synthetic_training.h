// The contract of the op `synthetic_training`: the models of the synthetic task (paper, Sec. 7.1) trained for some
// epochs (training.h). The kernel behind it knows no framework.
//
//     s         = softmax(W2 relu(W1 x + b1) + b2)    or softmax(W x + b) without hidden units
//     lambda    = mu + (L - mu) s                     the eigenvalues that are learned, in the eigenbasis of Q
//     y_{t+1}   = y_t + beta_t m_t - phi_t (lambda (y_t + gamma_t m_t) + bh),   m_t = y_t - y_{t-1},   y_0 = y_{-1} = 0
//     loss      = sqrt(fixed + |y_k - ystar|^2)       fixed: the part of the eigenvalues that are known
//
// y_k is linear in bh: y_k = -bh p(lambda), and the kernel runs the recurrence of p and of dp/dlambda side by side:
//
//     z = p_t + gamma (p_t - p_{t-1}),   p_{t+1} = p_t + beta (p_t - p_{t-1}) - phi (lambda z - 1)
//                                        p'_{t+1} = p'_t + beta (p'_t - p'_{t-1}) - phi (lambda z' + z)
//
// or takes their limit, p = 1 / lambda.
//
// With dl/dy = (y_k - ystar) / loss, u = -(L - mu) dl/dy bh p' and the gradient o = s (u - s'u) of the logits:
//
//     dW2 += o h'    db2 += o    e = W2'o where h > 0, else 0    dW1 += e x'    db1 += e
//
// Dimensions: those of training.h, and h hidden units; the parameters of a model are laid out as
// W1 [h, 10], b1 [h], W2 [3, h], b2 [3], or W [3, 10], b [3].
#pragma once
#include <cstdint>

#include "experiments/training.h"

namespace unrolled_kernels {

constexpr int64_t synthetic_inputs = 10, synthetic_outputs = 3;

constexpr int64_t synthetic_parameters(int64_t hidden) {
  return hidden ? hidden * (synthetic_inputs + 1 + synthetic_outputs) + synthetic_outputs
                : (synthetic_inputs + 1) * synthetic_outputs;
}

template <typename C>
struct SyntheticTraining : Training<C> {
  int64_t h, K;
  const C* samples;         // [S, 16, n]: x, bh, ystar
  const C* fixed;           // [M, n]
  const double* schedules;  // [M, K, 3]: phi_t, beta_t, gamma_t; num_steps <= K, or negative: the limit
  double mu, L;
};

}  // namespace unrolled_kernels
