// The proximal map that may end a step, y_{t+1} = p_t(v_t), and its adjoint, on vectors.
#pragma once

#include <limits>

#include "cpu/momentum_schedule.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// What the map of a tile reads: vectors as b has them. nullptr: absent.
template <typename C>
struct ProxRows {
  const C *lower = nullptr, *upper = nullptr, *weight = nullptr;
};

// What its adjoint adds to; nullptr where a gradient is not wanted.
template <typename C>
struct ProxSums {
  C *lower = nullptr, *upper = nullptr, *weight = nullptr;
};

// Terms of -dphi_t and -dthreshold_t.
template <typename C>
struct ProxTerms {
  Vector<C> phi{}, threshold{};
};

// the lanes of v where the comparison holds; zeros elsewhere
template <typename C, typename Mask>
UNROLLED_KERNELS_INLINE Vector<C> where(Mask condition, Vector<C> v) {
  return reinterpret_cast<Vector<C>>(condition & reinterpret_cast<Mask>(v));
}

// zero below zero; a NaN stays one
template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> above_zero(Vector<C> v) {
  return where<C>(~(v <= Vector<C>{}), v);
}

// tau_t of vector n
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> soft_threshold(const ProxRows<C>& p, Vector<C> phi, Vector<C> threshold, int64_t n) {
  if constexpr (prox == Prox::l1) return above_zero<C>(phi * above_zero<C>(load(p.weight + n)));
  return above_zero<C>(threshold);
}

// p_t(v) of vector n; a NaN, of v or of tau_t, stays one
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> proximal_map(const ProxRows<C>& p, Vector<C> phi, Vector<C> threshold, int64_t n,
                                               Vector<C> v) {
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
    const Vector<C> tau = soft_threshold<prox>(p, phi, threshold, n);
    v = where<C>(~((v <= tau) & (v >= -tau)), v > Vector<C>{} ? v - tau : v + tau);
  }
  return v;
}

// The adjoint of v = v_t from s, that of y_{t+1}; what the bounds and the weight get is added to `sums`.
template <Prox prox, typename C>
UNROLLED_KERNELS_INLINE Vector<C> proximal_adjoint(const ProxRows<C>& p, const ProxSums<C>& sums, Vector<C> phi,
                                                   Vector<C> threshold, int64_t n, Vector<C> v, Vector<C> s,
                                                   ProxTerms<C>& terms) {
  const auto add = [&](C* out, Vector<C> x) { store(out + n, load(out + n) + x); };
  if constexpr (prox == Prox::box) {
    const Vector<C> lower = p.lower ? load(p.lower + n) : v, upper = p.upper ? load(p.upper + n) : v;
    if (sums.lower) add(sums.lower, where<C>((v < lower) & (p.upper ? lower < upper : v < lower), s));
    if (sums.upper) add(sums.upper, where<C>((v > upper) | (p.lower ? upper < lower : v > upper), s));
    return where<C>((v >= lower) & (v <= upper), s);
  } else if constexpr (prox != Prox::none) {
    const Vector<C> zero{}, tau = soft_threshold<prox>(p, phi, threshold, n);
    s = where<C>((v > tau) | (v < -tau), s);
    const Vector<C> signed_s = v > zero ? s : -s;
    if constexpr (prox == Prox::l1) {
      const Vector<C> weight = load(p.weight + n), counted = where<C>(phi >= zero, signed_s);
      terms.phi += above_zero<C>(weight) * counted;
      if (sums.weight) add(sums.weight, -phi * where<C>(weight >= zero, counted));
    } else {
      terms.threshold += where<C>(threshold >= zero, signed_s);
    }
  }
  return s;
}

// What the adjoint of a map asks of v_t where y = p(v_t) is all that is known, the fixed point of the steps: an infinity on
// the side where a bound holds it, or where a soft threshold does not.
template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> side_of(Prox prox, const ProxRows<C>& p, int64_t n, Vector<C> y) {
  const Vector<C> zero{}, infinity = broadcast(std::numeric_limits<C>::infinity());
  if (prox != Prox::box) return y > zero ? infinity : y < zero ? -infinity : y;
  Vector<C> v = y;
  if (p.lower) v = y <= load(p.lower + n) ? -infinity : v;
  if (p.upper) v = y >= load(p.upper + n) ? infinity : v;
  return v;
}

// Calls f(integral_constant<Prox, prox>).
template <typename F>
UNROLLED_KERNELS_INLINE auto with_prox(Prox prox, F f) {
  switch (prox) {
    case Prox::box: return f(std::integral_constant<Prox, Prox::box>());
    case Prox::l1: return f(std::integral_constant<Prox, Prox::l1>());
    case Prox::soft_threshold: return f(std::integral_constant<Prox, Prox::soft_threshold>());
    default: return f(std::integral_constant<Prox, Prox::none>());
  }
}

// The first for a map that is known at run time, as beside a product with a matrix it may be.
template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> proximal_map(Prox prox, const ProxRows<C>& p, Vector<C> phi, Vector<C> threshold,
                                               int64_t n, Vector<C> v) {
  return with_prox(prox, [&](auto map) { return proximal_map<decltype(map)::value>(p, phi, threshold, n, v); });
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
