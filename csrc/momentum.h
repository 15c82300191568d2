// The contract of the op family `momentum`: k steps of one first-order recurrence on a batch of quadratic energies
// E(y) = 1/2 y'Qy + b'y, forward and backward, for three structures of Q. The kernels behind it know no framework.
//
//     m_t     = y_t - y_{t-1}                                   (y_{-1} = y_0)
//     z_t     = y_t + gamma_t m_t
//     y_{t+1} = y_t + beta_t m_t - phi_t (Q z_t + b)             t = 0 ... k-1
//
//     dense     Q                         diagonal  Q = diag(q)  spectral  Q = R diag(lambda) R'
//     tikhonov  Q = diag(1 + f^2), and g - x for b: the energy 1/2 |y - x|^2 + 1/2 |f y|^2 + g'y
//
// A proximal map may end the step, y_{t+1} = p_t(v_t) where y_{t+1} is v_t above (dense and diagonal only):
//
//     box               lower <= y <= upper: a clamp
//     soft threshold    p_t(v) = sign(v) max(|v| - tau_t, 0), tau_t = phi_t weight (l1) or a coefficient of its own
//
// Backward, a is then the adjoint of v_t; NaN apart, the derivatives are those of torch's clamp and softshrink.
//
// spectral runs diagonally in the eigenbasis: bh = R'b, yh_0 = R'y_0, y_t = R yh_t for t >= 1 (y_0 itself is returned as
// it came, so k = 0 does not touch R). R need not be orthogonal for the gradients to be those of these formulas:
//     dR = b dbh' + y_0 dyh_0' + sum over t >= 1 of ybar_t^out yh_t'
//
// Backward, with a = the total adjoint of y_{t+1}, t = k-1 ... 0 (derived in unrolled_kernels/ops/momentum/manual.py):
//
//     w         = Q'a
//     ybar_t   += (1 + beta_t) a - phi_t (1 + gamma_t) w         ybar_{t-1} += -beta_t a + phi_t gamma_t w
//     db       -= phi_t a                                        dQ         -= phi_t a z_t'
//     dphi_t    = -(w'z_t + a'b)    dbeta_t = a'm_t              dgamma_t    = -phi_t w'm_t
//
// Dimensions: B samples, d state, k steps. Every matrix is row-major.
#pragma once
#include <cstdint>

#include "common/types.h"

namespace unrolled_kernels {

enum class Structure { dense, diagonal, spectral };
enum class Prox { none, box, l1, soft_threshold };

// One of phi, beta, gamma: logical shape [B, k], a zero stride where it is shared by samples or by steps.
template <typename Compute>
struct Coefficient {
  const Compute* data;  // nullptr: the coefficient is 0 (beta and gamma only, both or neither: gradient descent)
  int64_t batch_stride;
  int64_t step_stride;
};

// A bound or a weight: logical shape [B, d], in the compute type.
template <typename Compute>
struct Rows {
  const Compute* data;   // rows contiguous; nullptr: absent
  int64_t batch_stride;  // 0: shared
  bool single;           // data is one number for all
};

// Samples that stop by themselves, after the first step with max |y_{t+1} - y_t| <= tolerance max(1, max |y_{t+1}|).
template <typename Compute>
struct Stopping {
  Compute tolerance;
  // outputs, [B]: how many steps a sample takes, and max |y_{t+1} - y_t| of the last of them
  int64_t* taken;
  Compute* residual;
};

// What forward and backward read. Nothing is written through these pointers and none may alias an output.
template <typename Storage>
struct MomentumInputs {
  using Compute = compute_type<Storage>;
  int64_t B, d, k;
  // dense: Q, each sample [d, d] contiguous. spectral: R, likewise. diagonal: nullptr.
  const Storage* matrix;
  int64_t matrix_stride;  // elements from sample to sample; 0: one matrix shared by the batch
  // diagonal: q. spectral: lambda. tikhonov: f. each row [d] contiguous. dense: nullptr.
  const Storage* diagonal;
  int64_t diagonal_stride;  // 0: shared
  const Storage* observed;  // tikhonov, which otherwise is diagonal: x, rows [d], contiguous. else nullptr
  int64_t observed_stride;  // 0: shared
  const Storage* b;         // rows [d], contiguous. tikhonov: g
  int64_t b_stride;         // 0: shared
  const Storage* y0;        // rows [d], contiguous; nullptr: y_0 = 0, and its product with Q is skipped
  int64_t y0_stride;
  Coefficient<Compute> phi, beta, gamma;
  Prox prox;
  Rows<Compute> lower, upper;      // box: one or both
  Rows<Compute> weight;            // l1; what is below zero counts as zero
  Coefficient<Compute> threshold;  // soft_threshold; what is below zero counts as zero
  // CPU only. transposed: each sample is the transpose of its matrix; not where one serves the batch. separate: one
  // matrix serves the batch, and yet each sample has a gradient of its own.
  bool transposed, separate;
  // forward without a trajectory: y is where each sample stops; nullptr: y_k
  const Stopping<Compute>* stopping;
  bool trajectory;  // outputs (and their cotangents) are y_0 ... y_k, [k+1, B, d], instead of y_k, [B, d]
};

template <typename Storage>
struct MomentumForward : MomentumInputs<Storage> {
  Storage* y;  // [B, d] or [k+1, B, d], contiguous, written in full
  // CPU only, of a dense Q: y_t and m_t at t = begun, [B, d], contiguous; m_begun only beside beta. nullptr: not wanted
  int64_t begun;
  Storage *y_begun, *m_begun;
};

// A direction in the space of inputs, and the derivative of y along it.
template <typename Storage>
struct MomentumTangents {
  using Compute = compute_type<Storage>;
  const Storage* matrix;  // like Q, contiguous; nullptr: zero
  int64_t matrix_stride;
  const Storage *diagonal, *b, *y0;  // [B, d], contiguous; nullptr: zero
  // like those of the problem, all that it has; nullptr: zero, all of them
  Coefficient<Compute> phi, beta, gamma, threshold;
  Storage* y;  // output, shape of y; nullptr: not wanted
};

// Every output is written in full, whatever was in it; a null pointer says that the gradient is not wanted.
template <typename Storage>
struct MomentumBackward : MomentumInputs<Storage> {
  using Compute = compute_type<Storage>;
  const Storage* grad_y;  // shape of y, contiguous
  // y_0 ... y_k, [k+1, B, d], contiguous, where they were kept; else nullptr, and they are replayed. Only the kernels of a
  // shared matrix read them, and only where Storage is Compute and no box ends the steps.
  const Storage* iterates;
  // CPU only, rows [d], contiguous:
  const Storage* m0;  // of a dense Q, beside y0 and beta: where the first step comes from; nullptr: m_0 = 0
  // y: dQ is db y' instead, no gradient of a bound; nullptr: that of the steps. A spectral Q has yh from its own steps.
  const Storage* minimizer;
  // CPU only, of a diagonal or spectral Q: y_t is a constant up to t = first, and so are dy0 and the coefficients'
  // gradients zero
  int64_t first;
  // The outputs are the gradients of <grad_y, derivative of y along these>: where these are cotangents of backward's
  // outputs, its VJP. No prox, not of momentum_shared, of a dense Q on a GPU where it has a tile, Storage is Compute.
  // nullptr: those of <grad_y, y>
  const MomentumTangents<Storage>* tangents;
  Storage* d_matrix;    // [B, d, d]; [1, d, d], summed over the batch, of one shared matrix
  Storage* d_diagonal;  // [B, d], also where diagonal_stride is 0. tikhonov: df
  Storage* db;          // [B, d], also where b_stride is 0. tikhonov: dg = -dx
  Storage* dy0;         // [B, d]; nullptr where y0 is
  // [B or 1, k or 1], summed over what is shared. dbeta, dgamma: nullptr where beta, gamma are 0.
  Compute *dphi, *dbeta, *dgamma, *d_threshold;
  Compute *d_lower, *d_upper, *d_weight;  // [B, d], also where they are shared or single
};

}  // namespace unrolled_kernels
