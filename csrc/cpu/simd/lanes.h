// How states [B, d] are laid out in vectors, and the staging between them and memory. The W lanes of a vector are groups
// of E lanes, one for each of W / E consecutive samples: vector g holds elements gE ... gE+E-1 of each.
//
//     SampleLanes   E = 1           d vectors a tile of W samples
//     QuadLanes     E = 4 (2)       ceil(d / E) vectors a tile of W / E samples, 128 bits each
//     RowLanes      E = W           ceil(d / W) vectors a sample
//
// Staging converts between the storage type and the compute type; lanes without a sample or an element are zero.
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// out[e] = element e of `count` <= W rows that lie `stride` apart, e < n. Vectors may be read up to `end`, past the row
// they belong to: what they catch of the next one is dropped.
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_lanes(const Storage* rows, int64_t stride, int64_t n, int64_t count,
                                          const Storage* end, C* out) {
  constexpr int W = lanes<C>;
  for (int64_t e = 0; e < n; e += W) {
    if (e + W > n && n >= W) e = n - W;  // the last block overlaps the one before
    const int64_t valid = min(n - e, W);
    Vector<C> r[W];
    if (count == W && rows + (W - 1) * stride + e + W <= end) {
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) r[l] = load(rows + l * stride + e);
    } else {
#pragma GCC unroll 1
      for (int l = 0; l < W; ++l) {
        r[l] = l < count ? load_first(rows + l * stride + e, valid, end) : Vector<C>{};
      }
    }
    transpose<C>(r);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      if (j < valid) store(out + (e + j) * W, r[j]);
    }
  }
}

// out[e step] = element e of `rows`, which lie anywhere; zero for nullptr
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_lanes(const Storage* const* rows, int64_t n, const Storage* end, C* out,
                                          int64_t step) {
  constexpr int W = lanes<C>;
  for (int64_t e = 0; e < n; e += W) {
    const int64_t valid = min(n - e, W);
    Vector<C> r[W];
#pragma GCC unroll 1
    for (int l = 0; l < W; ++l) r[l] = rows[l] ? load_first(rows[l] + e, valid, end) : Vector<C>{};
    transpose<C>(r);
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) {
      if (j < valid) store(out + (e + j) * step, r[j]);
    }
  }
}

// The inverse. A vector may reach into the rows behind its own, which are stored later, but never past `end`.
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void store_lanes(const C* in, int64_t n, int64_t count, Storage* rows, int64_t stride,
                                           const Storage* end) {
  constexpr int W = lanes<C>;
  for (int64_t e = 0; e < n; e += W) {
    if (e + W > n && n >= W) e = n - W;
    const int64_t valid = min(n - e, W);
    Vector<C> r[W];
#pragma GCC unroll 16
    for (int j = 0; j < W; ++j) r[j] = load(in + (e + min(j, valid - 1)) * W);
    transpose<C>(r);
    if (count == W && rows + (W - 1) * stride + e + W <= end) {
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) store(rows + l * stride + e, r[l]);
    } else {
#pragma GCC unroll 1
      for (int l = 0; l < count; ++l) store_first(rows + l * stride + e, r[l], valid, end);
    }
  }
}

// Vectors of n elements made of the pieces [E] of n / E rows, and taken apart again.
template <int n, int E, typename C>
UNROLLED_KERNELS_INLINE auto load_pieces(const C* rows, int64_t stride) {
  using Piece = typename VectorOf<C, n>::type;
  if constexpr (n == E) {
    return bits_at<Piece>(rows);
  } else {
    return concatenate<C>(load_pieces<n / 2, E>(rows, stride), load_pieces<n / 2, E>(rows + n / 2 / E * stride, stride),
                          std::make_index_sequence<n>());
  }
}
template <int n, int E, typename C>
UNROLLED_KERNELS_INLINE void store_pieces(typename VectorOf<C, n>::type v, C* rows, int64_t stride) {
  if constexpr (n == E) {
    __builtin_memcpy(rows, &v, sizeof v);
  } else {
    constexpr auto half = std::make_index_sequence<n / 2>();
    store_pieces<n / 2, E, C>(part<C, n, 0>(v, half), rows, stride);
    store_pieces<n / 2, E, C>(part<C, n, n / 2>(v, half), rows + n / 2 / E * stride, stride);
  }
}

// out [ceil(n / E)] vectors: elements of `count` <= W / E rows that lie `stride` apart
template <int E, typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_groups(const Storage* rows, int64_t stride, int64_t n, int64_t count, C* out) {
  constexpr int W = lanes<C>;
  int64_t e = 0;
  if constexpr (std::is_same_v<Storage, C>) {
    if (count == W / E) {
      for (; e + E <= n; e += E, out += W) store(out, load_pieces<W, E>(rows + e, stride));
    }
  }
  for (; e < n; e += E, out += W) {
    Storage buffer[W] = {};
    for (int64_t s = 0; s < count; ++s) copy_elements(buffer + s * E, rows + s * stride + e, min(n - e, E));
    store(out, load(buffer));
  }
}

template <int E, typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void store_groups(const C* in, int64_t n, int64_t count, Storage* rows, int64_t stride) {
  constexpr int W = lanes<C>;
  int64_t e = 0;
  if constexpr (std::is_same_v<Storage, C>) {
    if (count == W / E) {
      for (; e + E <= n; e += E, in += W) store_pieces<W, E, C>(load(in), rows + e, stride);
    }
  }
  for (; e < n; e += E, in += W) {
    Storage buffer[W];
    store(buffer, load(in));
    for (int64_t s = 0; s < count; ++s) copy_elements(rows + s * stride + e, buffer + s * E, min(n - e, E));
  }
}

// [n] -> ceil(n / W) vectors, padded with zeros
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_row(const Storage* row, int64_t n, const Storage* end, C* out) {
  for (int64_t i = 0; i < n; i += lanes<C>) store(out + i, load_first(row + i, n - i, end));
}

template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void store_row(const C* in, int64_t n, Storage* row, const Storage* end) {
  for (int64_t i = 0; i < n; i += lanes<C>) store_first(row + i, load(in + i), n - i, end);
}

// One tile of samples `first` ... `first + count - 1` of [B, d] tensors.
template <typename C, int E_>
struct Lanes {
  static constexpr int E = E_;
  static constexpr int64_t samples = lanes<C> / E;
  int64_t B, d, first, count;

  int64_t size() const { return ceil_div(d, E); }  // vectors of a state

  template <typename Storage>
  void load_state(const Storage* x, int64_t stride, C* out) const {
    const Storage *rows = x + first * stride, *end = x + (B - 1) * stride + d;
    if constexpr (E == 1) return load_lanes(rows, stride, d, count, end, out);
    if constexpr (E == lanes<C>) return load_row(rows, d, end, out);
    load_groups<E>(rows, stride, d, count, out);
  }
  template <typename Storage>
  void store_state(const C* in, Storage* x) const {
    Storage *rows = x + first * d, *end = rows + count * d;
    if constexpr (E == 1) return store_lanes(in, d, count, rows, d, end);
    if constexpr (E == lanes<C>) return store_row(in, d, rows, end);
    store_groups<E>(in, d, count, rows, d);
  }
  // the coefficient of a sample in the lanes of its group
  Vector<C> coefficient(const C* x, int64_t stride) const {
    C buffer[lanes<C>] = {};
    for (int64_t l = 0; l < count * E; ++l) buffer[l] = x[(first + l / E) * stride];
    return load(buffer);
  }
  // sums over the lanes of a group, as a balanced tree
  void store_sums(Vector<C> sums, C* x, int64_t stride) const {
    C buffer[lanes<C>];
    store(buffer, sums);
    for (int64_t s = 0; s < count; ++s) {
      C* group = buffer + s * E;
      for (int half_width = E / 2; half_width > 0; half_width /= 2) {
        for (int i = 0; i < half_width; ++i) group[i] += group[i + half_width];
      }
      x[(first + s) * stride] = group[0];
    }
  }
};

template <typename C>
using SampleLanes = Lanes<C, 1>;
template <typename C>
using QuadLanes = Lanes<C, min(4, 16 / sizeof(C))>;
template <typename C>
using RowLanes = Lanes<C, lanes<C>>;

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
