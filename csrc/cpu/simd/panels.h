// Products of small matrices with panels: many samples at once, so that a weight is loaded once for several of them.
//
// A panel holds n elements of S groups of W samples: element i of group s is the vector at data + s plane + i W.
//
//     panel_product     out[r] = sum_j M[r, j] x[j]             M scalars shared by all samples, or a matrix of each
//     outer_sums        sum[i, j] += sum_n a_n[i] z_n[j]        lane by lane: a vector for each [i, j]
//     row_outer_sums    the same over the samples too           j in lanes: z as rows, a row of vectors for each i
//
// A block of R rows and S groups takes R + S loads for R S multiply-adds, one of the outer sums I + J for I J.
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// as many accumulators as the registers hold beside the operands: 32 registers, or 16
constexpr int block_rows = vector_bytes == 64 ? 10 : 6;
constexpr int outer_block_rows = vector_bytes == 64 ? 5 : 4, outer_block_columns = vector_bytes == 64 ? 5 : 3;

template <typename T>
struct Panel {
  T* data;
  int64_t plane;

  Panel rows(int64_t first) const { return {data + first * lanes<std::remove_const_t<T>>, plane}; }
  operator Panel<const T>() const { return {data, plane}; }
};

// Element (r, j) at data + r + j step: the rows of a block are neighbours.
template <typename C>
struct SharedMatrix {
  const C* data;
  int64_t step;

  SharedMatrix from(int64_t row) const { return {data + row, step}; }
  UNROLLED_KERNELS_INLINE Vector<C> at(int r, int64_t j, int) const { return broadcast(data[r + j * step]); }
};

// A matrix of each sample: vector (r, j) at data + r row + j column, `plane` from group to group.
template <typename C>
struct OwnMatrix {
  const C* data;
  int64_t row, column, plane;

  OwnMatrix from(int64_t r) const { return {data + r * row, row, column, plane}; }
  UNROLLED_KERNELS_INLINE Vector<C> at(int r, int64_t j, int s) const {
    return load(data + r * row + j * column + s * plane);
  }
};

// What becomes of a row of the product: Vector operator()(i, s, sum), stored to `out`.
template <typename C>
struct Plain {
  UNROLLED_KERNELS_INLINE Vector<C> operator()(int64_t, int, Vector<C> sum) const { return sum; }
};
// NaN is not below 0 and stays
template <typename C>
struct Relu {
  UNROLLED_KERNELS_INLINE Vector<C> operator()(int64_t, int, Vector<C> sum) const {
    return sum < Vector<C>{} ? Vector<C>{} : sum;
  }
};
template <typename C>
struct WherePositive {
  Panel<const C> h;
  UNROLLED_KERNELS_INLINE Vector<C> operator()(int64_t i, int s, Vector<C> sum) const {
    return load(h.data + s * h.plane + i * lanes<C>) > Vector<C>{} ? sum : Vector<C>{};
  }
};
template <typename C>
struct Plus {
  Panel<const C> x;
  UNROLLED_KERNELS_INLINE Vector<C> operator()(int64_t i, int s, Vector<C> sum) const {
    return sum + load(x.data + s * x.plane + i * lanes<C>);
  }
};

template <int S, int R, typename M, typename C, typename End>
inline void product_block(M m, int64_t begin, Panel<const C> x, int64_t count, const End& end, Panel<C> out) {
  constexpr int W = lanes<C>;
  Vector<C> sum[R][S] = {};
  m = m.from(begin);
  for (int64_t j = 0; j < count; ++j) {
    Vector<C> xj[S];
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) xj[s] = load(x.data + s * x.plane + j * W);
#pragma GCC unroll 10
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int s = 0; s < S; ++s) sum[r][s] += m.at(r, j, s) * xj[s];
    }
  }
#pragma GCC unroll 10
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int s = 0; s < S; ++s) store(out.data + s * out.plane + (begin + r) * W, end(begin + r, s, sum[r][s]));
  }
}

// out [rows] = end(M x), x [count]; out may be what x or `end` reads only where it is another part of it
template <int S, typename M, typename C, typename End>
UNROLLED_KERNELS_NOINLINE void panel_product(M m, int64_t rows, Panel<const C> x, int64_t count, End end,
                                             Panel<C> out) {
  for_constant_blocks<block_rows>(
      rows, [&](int64_t begin, auto R) { product_block<S, decltype(R)::value, M, C>(m, begin, x, count, end, out); });
}

// Operands of outer_sums: element i of term n at a + n a_step + i W, likewise z.
template <typename C>
struct PanelOuterOperands {
  const C *a, *z;
  int64_t a_step, z_step, terms;
};

template <int I, int J, typename C>
inline void outer_block(const PanelOuterOperands<C>& o, int64_t i0, int64_t j0, int64_t columns, C* out) {
  constexpr int W = lanes<C>;
  Vector<C> sum[I][J];
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) sum[i][j] = load(out + (i * columns + j) * W);
  }
  const C *a = o.a + i0 * W, *z = o.z + j0 * W;
  for (int64_t n = 0; n < o.terms; ++n, a += o.a_step, z += o.z_step) {
    Vector<C> zj[J];
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) zj[j] = load(z + j * W);
#pragma GCC unroll 5
    for (int i = 0; i < I; ++i) {
      const Vector<C> ai = load(a + i * W);
#pragma GCC unroll 5
      for (int j = 0; j < J; ++j) sum[i][j] += ai * zj[j];
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) store(out + (i * columns + j) * W, sum[i][j]);
  }
}

// out [rows, columns] vectors += the sums
template <typename C>
UNROLLED_KERNELS_NOINLINE void outer_sums(const PanelOuterOperands<C>& o, int64_t rows, int64_t columns, C* out) {
  for_constant_blocks<outer_block_rows>(rows, [&](int64_t i0, auto I) {
    for_constant_blocks<outer_block_columns>(columns, [&](int64_t j0, auto J) {
      outer_block<decltype(I)::value, decltype(J)::value>(o, i0, j0, columns, out + (i0 * columns + j0) * lanes<C>);
    });
  });
}

// Operands of row_outer_sums: sample s of group g has element i of a at a + g a_step + i W + s, and its z, a row, at
// z + (g W + s) z_step.
template <typename C>
struct RowOuterOperands {
  const C *a, *z;
  int64_t a_step, z_step, groups;
};

template <int I, int J, typename C>
inline void row_outer_block(const RowOuterOperands<C>& o, int64_t i0, int64_t j0, int64_t row, C* out) {
  constexpr int W = lanes<C>;
  Vector<C> sum[I][J];
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) sum[i][j] = load(out + i * row + j * W);
  }
  const C *a = o.a + i0 * W, *z = o.z + j0 * W;
  for (int64_t g = 0; g < o.groups; ++g, a += o.a_step) {
    for (int s = 0; s < W; ++s, z += o.z_step) {
      Vector<C> zj[J];
#pragma GCC unroll 5
      for (int j = 0; j < J; ++j) zj[j] = load(z + j * W);
#pragma GCC unroll 5
      for (int i = 0; i < I; ++i) {
        const Vector<C> ai = broadcast(a[i * W + s]);
#pragma GCC unroll 5
        for (int j = 0; j < J; ++j) sum[i][j] += ai * zj[j];
      }
    }
  }
#pragma GCC unroll 5
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 5
    for (int j = 0; j < J; ++j) store(out + i * row + j * W, sum[i][j]);
  }
}

// out [rows, columns] += the sums; rows of `columns` vectors, of which the last may hold what belongs to no column
template <typename C>
UNROLLED_KERNELS_NOINLINE void row_outer_sums(const RowOuterOperands<C>& o, int64_t rows, int64_t columns, C* out) {
  const int64_t row = columns * lanes<C>;
  for_constant_blocks<outer_block_columns>(columns, [&](int64_t j0, auto J) {
    for_constant_blocks<outer_block_rows>(rows, [&](int64_t i0, auto I) {
      row_outer_block<decltype(I)::value, decltype(J)::value>(o, i0, j0, row, out + i0 * row + j0 * lanes<C>);
    });
  });
}

// out[i] = the sum of the lanes of vector i, both padded to whole groups of W
template <typename C>
UNROLLED_KERNELS_NOINLINE void sum_lanes_of(const C* vectors, int64_t n, C* out) {
  constexpr int W = lanes<C>;
  for (int64_t i = 0; i < n; i += W) {
    Vector<C> r[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) r[l] = load(vectors + (i + l) * W);
    store(out + i, sum_groups<W, C>(r));
  }
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
