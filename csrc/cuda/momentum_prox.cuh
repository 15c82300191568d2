// The proximal map that may end a step, y_{t+1} = p_t(v_t), and its adjoint, on the n elements that a thread owns.
#pragma once

#include <limits>

#include "cuda/schedule.cuh"

namespace unrolled_kernels::cuda {

template <typename C>
__device__ __forceinline__ C above_zero(C x) {
  return x < 0 ? C(0) : x;
}

// Without `proximal` it is the identity, and costs nothing.
template <typename C, int n, bool proximal = true>
class ProximalMap {
 public:
  // its elements are [first, first + n) of a sample's row; those that are not there are held at zero
  template <typename Inputs>
  __device__ __forceinline__ ProximalMap(const Inputs& p, int64_t sample, int64_t first, bool exists) {
    if constexpr (proximal) {
      prox_ = p.prox;
      const bool box = prox_ == Prox::box;
      const Rows<C>& left = box ? p.lower : p.weight;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        const bool there = exists && first + i < p.d;
        left_[i] = there ? at(left, sample, first + i, box ? -infinity : C(0)) : C(0);
        upper_[i] = there && box ? at(p.upper, sample, first + i, infinity) : C(0);
      }
    }
  }

  // p_t(v) of element i; a NaN stays one
  __device__ __forceinline__ C operator()(const StepCoefficients<C>& s, int i, C v) const {
    if constexpr (proximal) {
      if (prox_ == Prox::box) {
        v = v < left_[i] ? left_[i] : v;
        return v > upper_[i] ? upper_[i] : v;
      }
      const C tau = threshold(s, i);
      return (v < 0 ? -v : v) <= tau ? C(0) : v < 0 ? v + tau : v - tau;
    }
    return v;
  }

  // The adjoint of v = v_t of element i from a, that of y_{t+1}; what the bounds and the weight get is summed here.
  __device__ __forceinline__ C adjoint(const StepCoefficients<C>& s, int i, C v, C a, C (&terms)[4]) {
    if constexpr (proximal) {
      const C lower = left_[i], upper = upper_[i];
      if (prox_ == Prox::box) {
        d_left_[i] += v < lower && lower < upper ? a : C(0);
        d_upper_[i] += v > upper || upper < lower ? a : C(0);
        return v >= lower && v <= upper ? a : C(0);
      }
      const C tau = threshold(s, i);
      a = (v < 0 ? -v : v) > tau ? a : C(0);
      const C d_tau = v < 0 ? a : -a;
      if (prox_ == Prox::l1) {
        const C counted = s.phi >= 0 ? d_tau : C(0);
        terms[0] += above_zero(left_[i]) * counted;
        d_left_[i] += left_[i] >= 0 ? s.phi * counted : C(0);
      } else {
        terms[3] += s.threshold >= 0 ? d_tau : C(0);
      }
    }
    return a;
  }

  // The sums to the gradients that are wanted, or added to them.
  template <typename Backward>
  __device__ __forceinline__ void store(const Backward& p, int64_t sample, int64_t first, bool exists,
                                        bool accumulate = false) const {
    if constexpr (proximal) {
      C *left = prox_ == Prox::box ? p.d_lower : p.d_weight, *upper = p.d_upper;
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (!exists || first + i >= p.d) continue;
        const int64_t e = sample * p.d + first + i;
        if (left) left[e] = accumulate ? left[e] + d_left_[i] : d_left_[i];
        if (upper) upper[e] = accumulate ? upper[e] + d_upper_[i] : d_upper_[i];
      }
    }
  }

 private:
  static constexpr C infinity = std::numeric_limits<C>::infinity();
  static __device__ __forceinline__ C at(const Rows<C>& x, int64_t sample, int64_t e, C absent) {
    return x.data ? __ldg(x.data + (x.single ? 0 : sample * x.batch_stride + e)) : absent;
  }
  __device__ __forceinline__ C threshold(const StepCoefficients<C>& s, int i) const {
    return above_zero(prox_ == Prox::l1 ? s.phi * above_zero(left_[i]) : s.threshold);
  }

  Prox prox_ = Prox::none;
  C left_[n], upper_[n];  // lower, or the weight, and upper
  C d_left_[n] = {}, d_upper_[n] = {};
};

}  // namespace unrolled_kernels::cuda
