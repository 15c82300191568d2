// Elementary functions of vectors: exp, and sqrt where the instruction set has it.
//
// A file that includes this includes <immintrin.h> on x86-64 and <cmath> before "cpu/simd/simd.h".
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

#if !defined(__x86_64__) || UNROLLED_KERNELS_VECTOR_BYTES != 16 << UNROLLED_KERNELS_ISA
template <typename V>
UNROLLED_KERNELS_INLINE V sqrt(V x) {
  for (size_t i = 0; i < sizeof(V) / sizeof(x[0]); ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#elif UNROLLED_KERNELS_ISA == 2
// with a mask of ones: GCC 12 takes the plain ones for uses of an uninitialised vector
UNROLLED_KERNELS_INLINE Vector<float> sqrt(Vector<float> x) { return _mm512_maskz_sqrt_ps(0xffff, x); }
UNROLLED_KERNELS_INLINE Vector<double> sqrt(Vector<double> x) { return _mm512_maskz_sqrt_pd(0xff, x); }
#elif UNROLLED_KERNELS_ISA == 1
UNROLLED_KERNELS_INLINE Vector<float> sqrt(Vector<float> x) { return _mm256_sqrt_ps(x); }
UNROLLED_KERNELS_INLINE Vector<double> sqrt(Vector<double> x) { return _mm256_sqrt_pd(x); }
#else
UNROLLED_KERNELS_INLINE Vector<float> sqrt(Vector<float> x) { return _mm_sqrt_ps(x); }
UNROLLED_KERNELS_INLINE Vector<double> sqrt(Vector<double> x) { return _mm_sqrt_pd(x); }
#endif

template <typename C>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int terms = 7, mantissa = 23, bias = 127;
  // below the smallest exponent: the result is 2^-126 instead of less
  static constexpr float least = -87.3f, round = 0x1.8p23f, ln2_high = 0x1.62e4p-1f, ln2_low = 0x1.7f7d1cp-20f;
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int terms = 13, mantissa = 52, bias = 1023;
  static constexpr double least = -708.3, round = 0x1.8p52;
  static constexpr double ln2_high = 0x1.62e42fefa38p-1, ln2_low = 0x1.ef35793c7673p-45;
};

// e^x for x <= 0, or NaN: 2^n e^r with x = n ln 2 + r and |r| <= ln(2) / 2, e^r by its Taylor series.
template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> exp_negative(Vector<C> x) {
  using K = ExpConstants<C>;
  using Ints = typename VectorOf<typename K::Int, lanes<C>>::type;
  x = x < K::least ? broadcast<C>(K::least) : x;
  // adding 1.5 2^mantissa leaves n in the last bits
  const Vector<C> shifted = x * static_cast<C>(0x1.71547652b82fep0) + K::round, n = shifted - K::round;
  const Vector<C> r = (x - n * K::ln2_high) - n * K::ln2_low;
  Vector<C> sum = broadcast<C>(1);
#pragma GCC unroll 16
  for (int i = K::terms; i > 0; --i) sum = sum * r * static_cast<C>(1.0 / i) + static_cast<C>(1);
  const Ints exponent = reinterpret_cast<Ints>(shifted) + K::bias;
  return sum * reinterpret_cast<Vector<C>>(exponent << K::mantissa);
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
