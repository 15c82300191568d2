// The step of `momentum` and its adjoint, elementwise behind the product with Q. m_t = y_t - y_{t-1} is carried along
// with y_t:
//
//     m_{t+1} = beta_t m_t - phi_t (Q z_t + b)     y_{t+1} = y_t + m_{t+1}     z_{t+1} = y_{t+1} + gamma_{t+1} m_{t+1}
//
// and backward, with s_t the adjoint of m_t by every way through it (a_t of the contract) and ybar_t that of y_t alone:
//
//     w = Q's_{t+1}     ybar_t = ybar_{t+1} - phi_t w (+ grad y_t)     s_t = ybar_t + beta_t s_{t+1} - phi_t gamma_t w
#pragma once

#include "cpu/momentum_schedule.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// Rows of one step of a tile. z is y without momentum; m is then not read.
template <typename C>
struct ForwardRows {
  const C *b, *y, *m;
  C *y_next, *m_next, *z_next;
};

// y_{t+1} at `i`, from (Q z_t) at i
template <bool momentum, typename C>
UNROLLED_KERNELS_INLINE void forward_step(const ForwardRows<C>& rows, const StepCoefficients<C>& c,
                                          Vector<C> gamma_next, int64_t i, Vector<C> Qz) {
  const Vector<C> step = c.phi * (Qz + load(rows.b + i));
  if constexpr (momentum) {
    const Vector<C> moved = c.beta * load(rows.m + i) - step, to = load(rows.y + i) + moved;
    store(rows.m_next + i, moved);
    store(rows.y_next + i, to);
    store(rows.z_next + i, to + gamma_next * moved);
  } else {
    store(rows.y_next + i, load(rows.y + i) - step);
  }
}

template <typename C>
struct AdjointRows {
  const C *b, *m, *z, *s;  // s_{t+1}
  C *s_t, *ybar;           // s_t comes with grad y_t if there is a trajectory
};

// Terms of -dphi_t, dbeta_t and -dgamma_t.
template <typename C>
struct StepSums {
  Vector<C> phi{}, beta{}, gamma{};
};

// s_t at `i`, from w = (Q's_{t+1}) at i. `sums_phi`: whether dphi is summed here.
template <bool momentum, bool sums_phi, typename C>
UNROLLED_KERNELS_INLINE void adjoint_step(const AdjointRows<C>& rows, const StepCoefficients<C>& c, bool trajectory,
                                          int64_t i, Vector<C> w, StepSums<C>& sums) {
  const Vector<C> s = load(rows.s + i), v = c.phi * w;
  Vector<C> to = (momentum ? load(rows.ybar + i) : s) - v;
  if (trajectory) to += load(rows.s_t + i);
  if constexpr (momentum) {
    const Vector<C> m = load(rows.m + i);
    sums.beta += s * m;
    sums.gamma += v * m;
    store(rows.ybar + i, to);
    to += c.beta * s - c.gamma * v;
  }
  store(rows.s_t + i, to);
  if constexpr (sums_phi) sums.phi += w * load(rows.z + i) + s * load(rows.b + i);
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
