// The step of `momentum` and its adjoint, elementwise behind the product with Q. m_t = y_t - y_{t-1} is carried along
// with y_t:
//
//     m_{t+1} = beta_t m_t - phi_t (Q z_t + b)     y_{t+1} = y_t + m_{t+1}     z_{t+1} = y_{t+1} + gamma_{t+1} m_{t+1}
//
// and backward, with s_t the adjoint of m_t by every way through it (a_t of the contract) and ybar_t that of y_t alone:
//
//     w = Q's_{t+1}     ybar_t = ybar_{t+1} - phi_t w (+ grad y_t)     s_t = ybar_t + beta_t s_{t+1} - phi_t gamma_t w
//
// With a proximal map y_{t+1} = p_t(v_t), v_t what y_{t+1} is above, and m_{t+1} = y_{t+1} - y_t. Backward, the adjoint e of
// v_t takes the place of s_{t+1} first; what the map stops does not reach y_t by m_{t+1} either: ybar_{t+1} += e - s_{t+1}.
#pragma once

#include "cpu/momentum_prox.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// Rows of one step of a tile. z is y without momentum; m is then not read.
template <typename C>
struct ForwardRows {
  const C *b, *y, *m;
  C *y_next, *m_next, *z_next;
};

// The map of one step.
template <typename C>
struct StepMap {
  Prox prox;
  ProxRows<C> rows;
  Vector<C> phi, threshold;
  C* v;  // where backward keeps v_t, else nullptr

  UNROLLED_KERNELS_INLINE Vector<C> operator()(int64_t i, Vector<C> from) const {
    if (v) store(v + i, from);
    return proximal_map(prox, rows, phi, threshold, i, from);
  }
};
struct NoMap {};

// y_{t+1} at `i`, from (Q z_t) at i
template <bool momentum, typename C, typename Map>
UNROLLED_KERNELS_INLINE void forward_step(const ForwardRows<C>& rows, const StepCoefficients<C>& c,
                                          Vector<C> gamma_next, int64_t i, Vector<C> Qz, const Map& map) {
  constexpr bool proximal = !std::is_same_v<Map, NoMap>;
  const Vector<C> step = c.phi * (Qz + load(rows.b + i)), y = load(rows.y + i);
  if constexpr (momentum) {
    Vector<C> moved = c.beta * load(rows.m + i) - step, to = y + moved;
    if constexpr (proximal) to = map(i, to), moved = to - y;
    store(rows.m_next + i, moved);
    store(rows.y_next + i, to);
    store(rows.z_next + i, to + gamma_next * moved);
  } else {
    Vector<C> to = y - step;
    if constexpr (proximal) to = map(i, to);
    store(rows.y_next + i, to);
  }
}

// Turns s_{t+1} at `i` into e, and ybar_{t+1} with it if there is momentum (else nullptr).
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE void adjoint_map(const StepMap<C>& map, const ProxSums<C>& sums, int64_t i, C* s, C* ybar,
                                         ProxTerms<C>& terms) {
  const Vector<C> before = load(s + i);
  const Vector<C> e = proximal_adjoint<prox>(map.rows, sums, map.phi, map.threshold, i, load(map.v + i), before, terms);
  store(s + i, e);
  if (ybar) store(ybar + i, load(ybar + i) + (e - before));
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
