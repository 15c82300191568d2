// The contract of the ops `step_size_training` and `rnn_training`: algorithms that are learned where Q and b are given
// (paper, Sec. 7.1, Figure 6), trained as training.h says on the loss |y_k - ystar|. The kernels know no framework.
//
// Step sizes of GD and NAG, one parameter each, the logit of phi = largest sigmoid(logit), in the eigenbasis of Q:
//
//     z = p_t + beta (p_t - p_{t-1})                  y_k = -bh p_k,   p_0 = p_{-1} = 0
//     p_{t+1} = (1 - phi lambda) z + phi              beta = (1 - s) / (1 + s), s = sqrt(mu phi), or 0 of GD
//
// and beside it the tangent, by d/dphi:
//
//     z' = p'_t + beta (p'_t - p'_{t-1}) + beta' (p_t - p_{t-1}),   beta' = -mu / (s (1 + s)^2)
//     p'_{t+1} = (1 - phi lambda) z' - lambda z + 1
//
// An RNN learns its cells' weights, laid out as rnn.h says, whose kernels run it.
#pragma once
#include <cstdint>

#include "experiments/training.h"
#include "rnn.h"

namespace unrolled_kernels {

template <typename C>
struct StepSizeTraining : Training<C> {
  int64_t d;
  const C* samples;  // [S, 3, d, n]: lambda, bh, ystar in the eigenbasis
  const C* largest;  // [M]
  const C* mu;       // [M]; 0: GD
};

template <typename C>
struct RnnTraining : Training<C> {
  int64_t d;
  int num_layers;
  int64_t hidden_dims[max_rnn_layers];
  const C *matrices, *b, *y_star;  // [S, n, d, d], [S, n, d], [S, n, d]
};

}  // namespace unrolled_kernels
