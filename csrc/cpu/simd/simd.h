// Vectors of the native width of one instruction set, their loads, conversions and transposes.
//
// A file that includes this is compiled once per level, UNROLLED_KERNELS_ISA = 0 | 1 | 2. The target pragma below holds
// from here on, so this header comes after every standard one, and whatever follows stays in
// UNROLLED_KERNELS_NAMESPACE: an inline function of the standard library that were compiled for AVX could be the copy
// that the linker keeps for all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/types.h"
#include "cpu/poll.h"
#include "cpu/simd/isa.h"

#ifndef UNROLLED_KERNELS_ISA
#define UNROLLED_KERNELS_ISA 0
#endif

#define UNROLLED_KERNELS_PRAGMA(x) _Pragma(#x)
#if defined(__clang__)
#define UNROLLED_KERNELS_TARGET(features) \
  UNROLLED_KERNELS_PRAGMA(clang attribute push(__attribute__((target(features))), apply_to = function))
#else
#define UNROLLED_KERNELS_TARGET(features) UNROLLED_KERNELS_PRAGMA(GCC target(features))
#endif

#if UNROLLED_KERNELS_ISA == 2
#define UNROLLED_KERNELS_NAMESPACE isa_avx512
UNROLLED_KERNELS_TARGET("avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")
#elif UNROLLED_KERNELS_ISA == 1
#define UNROLLED_KERNELS_NAMESPACE isa_avx2
UNROLLED_KERNELS_TARGET("avx2,fma")
#else
#define UNROLLED_KERNELS_NAMESPACE isa_baseline
#endif

#define UNROLLED_KERNELS_INLINE inline __attribute__((always_inline))
// one copy of a large function, whoever calls it
#define UNROLLED_KERNELS_NOINLINE __attribute__((noinline))

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// of the level; a test compiles those of AVX-512 for AVX2, which many more machines can run
#ifndef UNROLLED_KERNELS_VECTOR_BYTES
#define UNROLLED_KERNELS_VECTOR_BYTES (16 << UNROLLED_KERNELS_ISA)
#endif
constexpr int vector_bytes = UNROLLED_KERNELS_VECTOR_BYTES;

// The level that x86-64 has for processors without AVX2: it is to be right, and a third of what is compiled. Other
// processors have this level alone.
constexpr bool is_fallback = UNROLLED_KERNELS_ISA_LEVELS && UNROLLED_KERNELS_ISA == 0;

template <typename T, int lanes>
struct VectorOf {
  typedef T type __attribute__((vector_size(sizeof(T) * lanes)));
};

// lanes<C>, or W: how many values of the compute type C a vector holds
template <typename C>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(C));
template <typename C>
using Vector = typename VectorOf<C, lanes<C>>::type;

constexpr int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename T>
UNROLLED_KERNELS_INLINE T bits_at(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> broadcast(C x) {
  return x - Vector<C>{};  // x - 0 is x bit for bit, where 0 + x would lose the sign of -0
}

// Storage types to and from the vectors they compute in. No alignment is assumed anywhere.

UNROLLED_KERNELS_INLINE Vector<float> load(const float* p) { return bits_at<Vector<float>>(p); }
UNROLLED_KERNELS_INLINE Vector<double> load(const double* p) { return bits_at<Vector<double>>(p); }
UNROLLED_KERNELS_INLINE void store(float* p, Vector<float> v) { __builtin_memcpy(p, &v, sizeof v); }
UNROLLED_KERNELS_INLINE void store(double* p, Vector<double> v) { __builtin_memcpy(p, &v, sizeof v); }

constexpr int W32 = lanes<float>;
using Words = typename VectorOf<uint32_t, W32>::type;
using Halfwords = typename VectorOf<uint16_t, W32>::type;

UNROLLED_KERNELS_INLINE Words select(Words condition, Words yes, Words no) {
  return (condition & yes) | (~condition & no);
}
UNROLLED_KERNELS_INLINE Words less(Words a, Words b) { return reinterpret_cast<Words>(a < b); }

UNROLLED_KERNELS_INLINE Vector<float> load(const bfloat16* p) {
  return reinterpret_cast<Vector<float>>(__builtin_convertvector(bits_at<Halfwords>(p), Words) << 16);
}

// round to nearest even; every NaN becomes the quiet one
UNROLLED_KERNELS_INLINE void store(bfloat16* p, Vector<float> v) {
  const Words u = reinterpret_cast<Words>(v), sign = u & 0x80000000u;
  const Words rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const Words nan = less(Words{} + 0x7f800000u, u ^ sign);
  const Halfwords h = __builtin_convertvector(select(nan, Words{} + 0x7fc0u, rounded), Halfwords);
  __builtin_memcpy(p, &h, sizeof h);
}

// exact; subnormals by a subtraction that does not pass through a float32 subnormal
UNROLLED_KERNELS_INLINE Vector<float> load(const half* p) {
  const Words h = __builtin_convertvector(bits_at<Halfwords>(p), Words);
  const Words magnitude = (h & 0x7fffu) << 13, exponent = h & 0x7c00u, bias = Words{} + (112u << 23);
  const Words tiny = magnitude + (113u << 23);
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Vector<float>>(tiny) - 0x1p-14f);
  Words u = magnitude + bias;
  u = select(less(Words{} + 0x7bffu, exponent), u + bias, u);
  u = select(less(exponent, Words{} + 1u), subnormal, u);
  return reinterpret_cast<Vector<float>>(u | ((h & 0x8000u) << 16));
}

// round to nearest even, overflow to infinity
UNROLLED_KERNELS_INLINE void store(half* p, Vector<float> v) {
  const Words bits = reinterpret_cast<Words>(v), sign = bits & 0x80000000u, u = bits ^ sign;
  const Words normal = (u + 0xc8000fffu + ((u >> 13) & 1u)) >> 13;
  // adding 1/2 aligns the mantissa with the subnormals' unit, 2^-24, and rounds
  const Words subnormal = reinterpret_cast<Words>(reinterpret_cast<Vector<float>>(u) + 0.5f) - 0x3f000000u;
  const Words special = select(less(Words{} + 0x7f800000u, u), Words{} + 0x7e00u, Words{} + 0x7c00u);
  Words h = select(less(u, Words{} + 0x38800000u), subnormal, normal);
  h = select(less(Words{} + 0x477fffffu, u), special, h);
  const Halfwords out = __builtin_convertvector(h | (sign >> 16), Halfwords);
  __builtin_memcpy(p, &out, sizeof out);
}

template <typename Storage>
UNROLLED_KERNELS_INLINE void copy_elements(Storage* to, const Storage* from, int64_t n) {
  __builtin_memcpy(to, from, n * sizeof(Storage));
}

// the first n <= W lanes; zeros behind them
template <typename C>
UNROLLED_KERNELS_INLINE Vector<C> keep_lanes(Vector<C> v, int64_t n) {
  using Int = std::conditional_t<sizeof(C) == 4, int32_t, int64_t>;
  using Mask = typename VectorOf<Int, lanes<C>>::type;
  Mask index;
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) index[i] = i;
  return reinterpret_cast<Vector<C>>(reinterpret_cast<Mask>(v) & (index < static_cast<Int>(n)));
}

// The first n elements, zeros behind them. Memory may be read up to `end`.
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_INLINE Vector<C> load_first(const Storage* p, int64_t n, const Storage* end) {
  if (n >= lanes<C>) return load(p);
  if (p + lanes<C> <= end) return keep_lanes<C>(load(p), n);
  Storage buffer[lanes<C>] = {};
  copy_elements(buffer, p, n);
  return load(buffer);
}

// Stores the first n lanes, and what lies behind them only up to `end`.
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_INLINE void store_first(Storage* p, Vector<C> v, int64_t n, const Storage* end) {
  if (p + lanes<C> <= end) return store(p, v);
  Storage buffer[lanes<C>];
  store(buffer, v);
  copy_elements(p, buffer, n);
}

// sum of the lanes, as a balanced tree
template <typename C>
UNROLLED_KERNELS_NOINLINE C sum_lanes(Vector<C> v) {
  C x[lanes<C>];
  store(x, v);
  for (int half_width = lanes<C> / 2; half_width > 0; half_width /= 2) {
    for (int i = 0; i < half_width; ++i) x[i] += x[i + half_width];
  }
  return x[0];
}

// Lane i of the result is lane Map::at(i) of a, or lane Map::at(i) - W of b.
template <typename Map, typename C, size_t... I>
UNROLLED_KERNELS_INLINE Vector<C> shuffle(Vector<C> a, Vector<C> b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Map::at(static_cast<int>(I))...);
#else
  using Index = typename VectorOf<std::conditional_t<sizeof(C) == 4, int32_t, int64_t>, lanes<C>>::type;
  return __builtin_shuffle(a, b, Index{Map::at(static_cast<int>(I))...});
#endif
}
template <typename Map, typename C>
UNROLLED_KERNELS_INLINE Vector<C> shuffle(Vector<C> a, Vector<C> b) {
  return shuffle<Map, C>(a, b, std::make_index_sequence<lanes<C>>());
}

// Halves to a whole of n lanes, and n / 2 lanes of it from `first` on.
template <typename C, typename Half, size_t... I>
UNROLLED_KERNELS_INLINE auto concatenate(Half a, Half b, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, static_cast<int>(I)...);
#else
  const Half halves[2] = {a, b};
  return bits_at<typename VectorOf<C, sizeof...(I)>::type>(halves);
#endif
}
template <typename C, int n, int first, size_t... I>
UNROLLED_KERNELS_INLINE auto part(typename VectorOf<C, n>::type v, std::index_sequence<I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(v, v, static_cast<int>(first + I)...);
#else
  return bits_at<typename VectorOf<C, n / 2>::type>(reinterpret_cast<const C*>(&v) + first);
#endif
}

// Transpose of W vectors of W lanes: swap the off-diagonal blocks of size step = 1, 2, 4 ... W/2.

template <int W, int step>
struct UpperBlocks {
  static constexpr int at(int i) { return i & step ? W + i - step : i; }
};
template <int W, int step>
struct LowerBlocks {
  static constexpr int at(int i) { return i & step ? W + i : i + step; }
};

template <typename C, int step = 1>
UNROLLED_KERNELS_INLINE void transpose(Vector<C> (&rows)[lanes<C>]) {
#pragma GCC unroll 16
  for (int i = 0; i < lanes<C>; ++i) {
    if (i & step) continue;
    const Vector<C> upper = shuffle<UpperBlocks<lanes<C>, step>, C>(rows[i], rows[i + step]);
    rows[i + step] = shuffle<LowerBlocks<lanes<C>, step>, C>(rows[i], rows[i + step]);
    rows[i] = upper;
  }
  if constexpr (2 * step < lanes<C>) transpose<C, 2 * step>(rows);
}

// Groups of E consecutive lanes.

template <int E, int e>
struct SameInGroup {
  static constexpr int at(int i) { return i / E * E + e; }
};
// lane e < 4 of each group in all lanes of the group
template <int E, typename C>
UNROLLED_KERNELS_INLINE Vector<C> broadcast_in_groups(Vector<C> v, int e) {
  constexpr int last = E - 1;
  switch (e) {
    case 0: return shuffle<SameInGroup<E, 0>, C>(v, v);
    case 1: return shuffle<SameInGroup<E, min(1, last)>, C>(v, v);
    case 2: return shuffle<SameInGroup<E, min(2, last)>, C>(v, v);
    default: return shuffle<SameInGroup<E, min(3, last)>, C>(v, v);
  }
}

// of every `span` lanes the even (or odd) blocks of a, then those of b
template <int W, int span, int block, int odd>
struct EverySecondBlock {
  static constexpr int at(int i) {
    const int lane = i % span, half = span / 2;
    return i / span * span + (lane % half / block * 2 + odd) * block + lane % block + (lane < half ? 0 : W);
  }
};
template <int span, int block, int n, typename C>
UNROLLED_KERNELS_INLINE void add_blocks(Vector<C>* v) {
#pragma GCC unroll 8
  for (int i = 0; i < n / 2; ++i) {
    v[i] = shuffle<EverySecondBlock<lanes<C>, span, block, 0>, C>(v[2 * i], v[2 * i + 1]) +
           shuffle<EverySecondBlock<lanes<C>, span, block, 1>, C>(v[2 * i], v[2 * i + 1]);
  }
}
// Lane e of a group becomes the sum of the group of v[e], e < E; within 128 bits first, where shuffles are cheap.
template <int E, typename C>
UNROLLED_KERNELS_INLINE Vector<C> sum_groups(Vector<C>* v) {
  constexpr int L = min(E, 16 / static_cast<int>(sizeof(C)));
  if constexpr (L >= 2) add_blocks<L, 1, E, C>(v);
  if constexpr (L >= 4) add_blocks<L, 1, E / 2, C>(v);
  if constexpr (E / L >= 2) add_blocks<E, L, E / L, C>(v);
  if constexpr (E / L >= 4) add_blocks<E, L, E / L / 2, C>(v);
  return v[0];
}

// Calls f(begin, size) for blocks of at most `limit` whose sizes differ by one at most, `size` a constant. Sizes that
// `least` or more of them never come to are not compiled: several blocks are each half the limit or larger.
template <int n, int smallest, typename F>
UNROLLED_KERNELS_INLINE void with_constant(int64_t size, const F& f) {
  if constexpr (n > smallest) {
    if (size < n) return with_constant<n - 1, smallest>(size, f);
  }
  f(std::integral_constant<int, n>());
}
template <int limit, int least = 1, typename F>
UNROLLED_KERNELS_INLINE void for_constant_blocks(int64_t n, const F& f) {
  const int64_t blocks = ceil_div(n, limit);
  for (int64_t b = 0, begin = 0; b < blocks; ++b) {
    const int64_t size = (n - begin) / (blocks - b);
    with_constant<limit, min(least, (limit + 1) / 2)>(size, [&](auto constant) { f(begin, constant); });
    begin += size;
  }
}

// f(begin, end) for blocks of 0 ... n - 1 between which there is time to look up; `work`: as in Poll, of one of the n
template <typename F>
UNROLLED_KERNELS_INLINE void for_blocks(int64_t n, int64_t work, const F& f) {
  const int64_t block = max(1, Poll::work_between >> (63 - __builtin_clzll(work | 1)));
  for (int64_t begin = 0;; begin += block) {
    f(begin, min(begin + block, n));
    if (begin + block >= n) return;
    Poll::look();
  }
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
