// The proximal map that may end a step, y_{t+1} = p_t(v_t), and its adjoint, on vectors.
#pragma once

#include "cpu/momentum_schedule.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// What the map of a tile reads: rows of vectors as b has them, and thresholds as phi has them.
template <typename C>
struct ProxView {
  const C *lower = nullptr, *upper = nullptr, *weight = nullptr;  // nullptr: absent
  const C* threshold = nullptr;                                   // [steps] vectors, `step` elements apart
  int64_t step = 0;
};

// What its adjoint adds to; nullptr where a gradient is not wanted.
template <typename C>
struct ProxSums {
  C *lower = nullptr, *upper = nullptr, *weight = nullptr;
};

// the lanes of v where the comparison holds; zeros elsewhere
template <typename C, typename Mask>
UNROLLED_KERNELS_INLINE Vector<C> where(Mask condition, Vector<C> v) {
  return reinterpret_cast<Vector<C>>(condition & reinterpret_cast<Mask>(v));
}

template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> above_zero(Vector<C> v) {
  return where<C>(v > Vector<C>{}, v);
}

// tau_t of vector n
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> prox_threshold(const ProxView<C>& p, int64_t t, Vector<C> phi, int64_t n) {
  if constexpr (prox == Prox::l1) return above_zero<C>(phi * above_zero<C>(load(p.weight + n)));
  return above_zero<C>(load(p.threshold + t * p.step));
}

// p_t(v); a NaN stays one
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> proximal_map(const ProxView<C>& p, int64_t t, Vector<C> phi, int64_t n, Vector<C> v) {
  if constexpr (prox == Prox::box) {
    if (p.lower) {
      const Vector<C> lower = load(p.lower + n);
      v = v < lower ? lower : v;
    }
    if (p.upper) {
      const Vector<C> upper = load(p.upper + n);
      v = v > upper ? upper : v;
    }
  } else if constexpr (prox != Prox::none) {
    const Vector<C> tau = prox_threshold<prox>(p, t, phi, n);
    v = v > tau ? v - tau : v < -tau ? v + tau : where<C>(v != v, v);
  }
  return v;
}

// Turns s, the adjoint of y_{t+1}, into that of v = v_t, and adds what the bounds and the weight get. `phi_sum` and
// `threshold_sum` add up -dphi_t and -dthreshold_t.
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> prox_adjoint(const ProxView<C>& p, const ProxSums<C>& sums, int64_t t, Vector<C> phi,
                                               int64_t n, Vector<C> v, Vector<C> s, Vector<C>& phi_sum,
                                               Vector<C>& threshold_sum) {
  const auto add = [&](C* out, Vector<C> x) { store(out + n, load(out + n) + x); };
  if constexpr (prox == Prox::box) {
    Vector<C> a = s;
    const Vector<C> lower = p.lower ? load(p.lower + n) : v, upper = p.upper ? load(p.upper + n) : v;
    a = where<C>((v >= lower) & (v <= upper), a);
    if (sums.lower) add(sums.lower, where<C>((v < lower) & (p.upper ? lower < upper : v < lower), s));
    if (sums.upper) add(sums.upper, where<C>((v > upper) | (p.lower ? upper < lower : v > upper), s));
    return a;
  } else if constexpr (prox != Prox::none) {
    const Vector<C> zero{}, tau = prox_threshold<prox>(p, t, phi, n);
    s = where<C>((v > tau) | (v < -tau), s);
    const Vector<C> signed_s = v > zero ? s : -s;
    if constexpr (prox == Prox::l1) {
      const Vector<C> weight = load(p.weight + n), counted = where<C>(phi >= zero, signed_s);
      phi_sum += above_zero<C>(weight) * counted;
      if (sums.weight) add(sums.weight, -phi * where<C>(weight >= zero, counted));
    } else {
      threshold_sum += where<C>(load(p.threshold + t * p.step) >= zero, signed_s);
    }
  }
  return s;
}

// Calls f(integral_constant<Prox, prox>).
template <typename F>
UNROLLED_KERNELS_INLINE void with_prox(Prox prox, F f) {
  switch (prox) {
    case Prox::none: return f(std::integral_constant<Prox, Prox::none>());
    case Prox::box: return f(std::integral_constant<Prox, Prox::box>());
    case Prox::l1: return f(std::integral_constant<Prox, Prox::l1>());
    case Prox::soft_threshold: return f(std::integral_constant<Prox, Prox::soft_threshold>());
  }
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
