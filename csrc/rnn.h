// The contract of the op family `rnn`: k cells of a learned recurrent algorithm (paper, Eq. 20) on a batch of quadratic
// energies E(y) = 1/2 y'Qy + b'y, forward and backward, dense Q or Q = diag(q). The kernels behind it know no framework.
//
//     g_t     = Q y_t + b
//     h^1     = relu(W1 y_t + W2 g_t)
//     h^l     = relu(W^l h^{l-1})                               l = 2 ... L
//     y_{t+1} = V h^L                                           t = 0 ... k-1
//
// Backward, with a = the total adjoint of y_{t+1}, t = k-1 ... 0 (derived in unrolled_kernels/ops/rnn/manual.py):
//
//     dV       += a h^L'          delta^L     = (V'a) where h^L > 0, else 0
//     dW^l     += delta^l h^{l-1}'  delta^{l-1} = (W^l' delta^l) where h^{l-1} > 0, else 0
//     dW1      += delta^1 y_t'    dW2        += delta^1 g_t'      e = W2' delta^1
//     dQ       += e y_t'          db         += e                 ybar_t += W1' delta^1 + Q'e
//
// Dimensions: B samples, d state, k steps, L layers of widths h_1 ... h_L. Every matrix is row-major.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace unrolled_kernels {

// What the fused kernels take; more runs in eager torch (unrolled_kernels/ops/rnn/native.py).
constexpr int max_rnn_layers = 6;
constexpr int64_t max_rnn_dim = 64, max_rnn_width = 128;

// What forward and backward read. Nothing is written through these pointers and none may alias an output.
template <typename Storage>
struct RnnInputs {
  using Compute = compute_type<Storage>;
  int64_t B, d, k;
  int num_layers;                       // L, 1 ... max_rnn_layers
  int64_t hidden_dims[max_rnn_layers];  // h_1 ... h_L
  // the weights of every layer, one after the other, shared by the batch:
  // W1 [h_1, d], W2 [h_1, d], W^2 [h_2, h_1] ... W^L [h_L, h_{L-1}], V [d, h_L]
  const Compute* weights;
  const Storage* matrix;    // Q, each sample [d, d] contiguous; nullptr where Q is diagonal
  int64_t matrix_stride;    // elements from sample to sample; 0: one Q shared by the batch
  const Storage* diagonal;  // q, each row [d] contiguous; nullptr where Q is dense
  int64_t diagonal_stride;  // 0: shared
  const Storage* b;         // rows [d], contiguous
  int64_t b_stride;         // 0: shared
  const Storage* y0;        // rows [d], contiguous; nullptr: y_0 = 0
  int64_t y0_stride;
  // CPU only. transposed: each sample is the transpose of its matrix; not where one serves the batch. separate: one
  // matrix serves the batch, and yet each sample has a gradient of its own.
  bool transposed, separate;
  bool trajectory;  // outputs (and their cotangents) are y_0 ... y_k, [k+1, B, d], not y_k, [B, d]
};

template <typename Storage>
struct RnnForward : RnnInputs<Storage> {
  Storage* y;  // [B, d] or [k+1, B, d], contiguous, written in full
};

// Every output is written in full, whatever was in it; a null pointer says that the gradient is not wanted.
template <typename Storage>
struct RnnBackward : RnnInputs<Storage> {
  using Compute = compute_type<Storage>;
  const Storage* grad_y;  // shape of y, contiguous
  Storage* d_matrix;      // [B, d, d]; [1, d, d], summed over the batch, of one shared matrix
  Storage* d_diagonal;    // [B, d], also where diagonal_stride is 0
  Storage* db;            // [B, d], also where b_stride is 0
  Storage* dy0;           // [B, d], also where y0 is nullptr
  Compute* d_weights;     // laid out as weights, summed over the batch in a fixed order
};

}  // namespace unrolled_kernels
