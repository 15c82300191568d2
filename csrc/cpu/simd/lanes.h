// The two ways of laying states [B, d] out in vectors, and the staging between them and memory.
//
//     SampleLanes   vector i holds element i of W consecutive samples        d vectors a tile of W samples
//     RowLanes      vector n holds elements nW ... nW+W-1 of one sample      ceil(d / W) vectors a sample
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

// [n] -> ceil(n / W) vectors, padded with zeros
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_row(const Storage* row, int64_t n, const Storage* end, C* out) {
  for (int64_t i = 0; i < n; i += lanes<C>) store(out + i, load_first(row + i, n - i, end));
}

template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void store_row(const C* in, int64_t n, Storage* row, const Storage* end) {
  for (int64_t i = 0; i < n; i += lanes<C>) store_first(row + i, load(in + i), n - i, end);
}

// out [d, N W] = the matrix [d, d], rows padded
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void pad_matrix(const Storage* matrix, int64_t d, C* out) {
  const int64_t padded = ceil_div(d, lanes<C>) * lanes<C>;
  for (int64_t i = 0; i < d; ++i) load_row(matrix + i * d, d, matrix + d * d, out + i * padded);
}

template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void unpad_matrix(const C* in, int64_t d, Storage* matrix) {
  const int64_t padded = ceil_div(d, lanes<C>) * lanes<C>;
  for (int64_t i = 0; i < d; ++i) store_row(in + i * padded, d, matrix + i * d, matrix + d * d);
}

// out [d, N W] = the transpose of the matrix [d, d], rows padded
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void transpose_matrix(const Storage* matrix, int64_t d, C* out) {
  constexpr int W = lanes<C>;
  const int64_t padded = ceil_div(d, W) * W;
  for (int64_t i = 0; i < d; i += W) {
    for (int64_t j = 0; j < d; j += W) {
      const Storage* block = matrix + i * d + j;
      Vector<C> r[W];
      if (i + W <= d && block + (W - 1) * d + W <= matrix + d * d) {
#pragma GCC unroll 16
        for (int l = 0; l < W; ++l) r[l] = load(block + l * d);
      } else {
#pragma GCC unroll 1
        for (int l = 0; l < W; ++l) {
          r[l] = i + l < d ? load_first(block + l * d, d - j, matrix + d * d) : Vector<C>{};
        }
      }
      transpose<C>(r);
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) {
        if (j + l < d) store(out + (j + l) * padded + i, r[l]);
      }
    }
  }
}

// One tile of samples `first` ... `first + count - 1` of [B, d] tensors.

template <typename C>
struct SampleLanes {
  static constexpr int64_t samples = lanes<C>;
  int64_t B, d, first, count;

  int64_t size() const { return d; }  // vectors of a state

  template <typename Storage>
  void load_state(const Storage* x, int64_t stride, C* out) const {
    load_lanes(x + first * stride, stride, d, count, x + (B - 1) * stride + d, out);
  }
  template <typename Storage>
  void store_state(const C* in, Storage* x) const {
    store_lanes(in, d, count, x + first * d, d, x + (first + count) * d);
  }
  // coefficient of sample `first + l` in lane l
  Vector<C> coefficient(const C* x, int64_t stride) const {
    C buffer[lanes<C>] = {};
    for (int64_t l = 0; l < count; ++l) buffer[l] = x[(first + l) * stride];
    return load(buffer);
  }
  void store_sums(Vector<C> sums, C* x, int64_t stride) const {
    C buffer[lanes<C>];
    store(buffer, sums);
    for (int64_t l = 0; l < count; ++l) x[(first + l) * stride] = buffer[l];
  }
};

template <typename C>
struct RowLanes {
  static constexpr int64_t samples = 1;
  int64_t B, d, first, count;

  int64_t size() const { return ceil_div(d, lanes<C>); }

  template <typename Storage>
  void load_state(const Storage* x, int64_t stride, C* out) const {
    load_row(x + first * stride, d, x + (B - 1) * stride + d, out);
  }
  template <typename Storage>
  void store_state(const C* in, Storage* x) const {
    store_row(in, d, x + first * d, x + (first + count) * d);
  }
  Vector<C> coefficient(const C* x, int64_t stride) const { return broadcast(x[first * stride]); }
  void store_sums(Vector<C> sums, C* x, int64_t stride) const { x[first * stride] = sum_lanes<C>(sums); }
};

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
