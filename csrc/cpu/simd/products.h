// The two products that the matrix structures are made of, blocked so that every accumulator stays in a register:
//
//     product          out[r] = sum_j M[r, j] x[j]              M [rows, count]
//     outer_products   out[i, j] (+)= scale sum_t A[t, i] Z[t, j],  returns sum_ij M[i, j] sum_t A[t, i] Z[t, j]
//
// An operand is a Vector, loaded as it is, or a Scalar, broadcast to all lanes:
//
//     SampleLanes, own matrix     M Vector   x Vector    A Vector   Z Vector
//     SampleLanes, shared matrix  M Scalar   x Vector    A Vector   Z Vector
//     RowLanes                    M Vector   x Scalar    A Scalar   Z Vector
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

template <typename C>
struct VectorOperand {
  static constexpr int64_t width = lanes<C>;
  static UNROLLED_KERNELS_INLINE Vector<C> at(const C* p) { return load(p); }
};
template <typename C>
struct ScalarOperand {
  static constexpr int64_t width = 1;
  static UNROLLED_KERNELS_INLINE Vector<C> at(const C* p) { return broadcast(*p); }
};

// cuts n into blocks of at most `limit` whose sizes differ by one at most, and calls f(begin, size)
template <typename F>
UNROLLED_KERNELS_INLINE void for_balanced_blocks(int64_t n, int64_t limit, F f) {
  const int64_t blocks = ceil_div(n, limit);
  for (int64_t b = 0, begin = 0; b < blocks; ++b) {
    const int64_t size = (n - begin) / (blocks - b);
    f(begin, size);
    begin += size;
  }
}

// R rows, `chains` partial sums each: with few rows several columns have to be in flight to cover the latency of an
// FMA.
template <typename M, typename X, int R, int chains, typename C>
UNROLLED_KERNELS_INLINE void product_block(const C* m, int64_t row, int64_t column, const C* x, int64_t x_step,
                                           int64_t count, Vector<C> (&sum)[R]) {
  Vector<C> partial[chains][R] = {};
  int64_t j = 0;
  for (; j + chains <= count; j += chains) {
#pragma GCC unroll 8
    for (int c = 0; c < chains; ++c) {
      const Vector<C> xj = X::at(x + (j + c) * x_step);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) partial[c][r] += M::at(m + r * row + (j + c) * column) * xj;
    }
  }
  for (; j < count; ++j) {
    const Vector<C> xj = X::at(x + j * x_step);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) partial[0][r] += M::at(m + r * row + j * column) * xj;
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    sum[r] = partial[0][r];
#pragma GCC unroll 8
    for (int c = 1; c < chains; ++c) sum[r] += partial[c][r];
  }
}

// A matrix seen from one side: element (r, j) at data + r row + j column.
template <typename C>
struct MatrixView {
  const C* data;
  int64_t row, column;
};

template <typename M, typename X, int R, typename C>
inline void product_rows(const MatrixView<C>& m, int64_t begin, const C* x, int64_t x_step, int64_t count, C* out) {
  constexpr int chains = R >= 5 ? 1 : R >= 3 ? 2 : 4;
  Vector<C> sum[R];
  product_block<M, X, R, chains, C>(m.data + begin * m.row, m.row, m.column, x, x_step, count, sum);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store(out + (begin + r) * lanes<C>, sum[r]);
}

// `backwards`: from the last column to the first. A matrix larger than the first-level cache that is read in turns
// finds the half that was read last still there.
template <typename M, typename X, typename C>
UNROLLED_KERNELS_NOINLINE void product(MatrixView<C> m, int64_t rows, const C* x, int64_t count, bool backwards,
                                       C* out) {
  int64_t x_step = X::width;
  if (backwards) {
    m.data += (count - 1) * m.column;
    m.column = -m.column;
    x += (count - 1) * x_step;
    x_step = -x_step;
  }
  for_balanced_blocks(rows, 8, [&](int64_t begin, int64_t size) {
    switch (size) {
      case 1: return product_rows<M, X, 1>(m, begin, x, x_step, count, out);
      case 2: return product_rows<M, X, 2>(m, begin, x, x_step, count, out);
      case 3: return product_rows<M, X, 3>(m, begin, x, x_step, count, out);
      case 4: return product_rows<M, X, 4>(m, begin, x, x_step, count, out);
      case 5: return product_rows<M, X, 5>(m, begin, x, x_step, count, out);
      case 6: return product_rows<M, X, 6>(m, begin, x, x_step, count, out);
      case 7: return product_rows<M, X, 7>(m, begin, x, x_step, count, out);
      default: return product_rows<M, X, 8>(m, begin, x, x_step, count, out);
    }
  });
}

// out = M x for rows in lanes, M [d, d] in rows of `row` elements that are padded with zeros, as is x [row]: dot
// products, W at a time. Slower than `product` on the transpose, but without one.
template <typename C>
UNROLLED_KERNELS_NOINLINE void row_products(const C* m, int64_t row, int64_t d, const C* x, C* out) {
  constexpr int W = lanes<C>;
  for (int64_t i = 0; i < d; i += W) {
    Vector<C> sum[W] = {};
    if (i + W <= d) {
      for (int64_t j = 0; j < row; j += W) {
        const Vector<C> xj = load(x + j);
#pragma GCC unroll 16
        for (int r = 0; r < W; ++r) sum[r] += load(m + (i + r) * row + j) * xj;
      }
    } else {
#pragma GCC unroll 16
      for (int r = 0; r < W; ++r) {
        for (int64_t j = 0; i + r < d && j < row; j += W) sum[r] += load(m + (i + r) * row + j) * load(x + j);
      }
    }
    transpose<C>(sum);
#pragma GCC unroll 4
    for (int half_width = W / 2; half_width > 0; half_width /= 2) {
#pragma GCC unroll 8
      for (int r = 0; r < half_width; ++r) sum[r] += sum[r + half_width];
    }
    store(out + i, sum[0]);
  }
}

// Operands of outer_products: A[t, i] at a + t step + i A::width, Z[t, j] at z + t step + j W.
template <typename C>
struct OuterOperands {
  const C *a, *z;
  int64_t step, steps, columns;
  Vector<C> scale;
  bool accumulate;
  C* out;      // [rows, columns] vectors
  const C* m;  // [rows, columns] of the operand M; nullptr: the product with it is not wanted
};

template <typename A, typename M, int I, int J, typename C>
inline void outer_block(const OuterOperands<C>& o, int64_t i0, int64_t j0, Vector<C>& inner) {
  constexpr int W = lanes<C>;
  const int64_t steps = o.steps, step = o.step, columns = o.columns, first = i0 * columns + j0;
  const Vector<C> scale = o.scale;
  Vector<C> sum[I][J] = {};
  const C *a = o.a + i0 * A::width, *z = o.z + j0 * W;
  for (int64_t t = 0; t < steps; ++t, a += step, z += step) {
    Vector<C> zj[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) zj[j] = load(z + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vector<C> ai = A::at(a + i * A::width);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[i][j] += ai * zj[j];
    }
  }
  if (o.m) {
    const C* m = o.m + first * M::width;
    Vector<C> dot{};
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) dot += M::at(m + (i * columns + j) * M::width) * sum[i][j];
    }
    inner += dot;
  }
  C* out = o.out + first * W;
  const auto store_scaled = [&](auto accumulate) {
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) {
        C* p = out + (i * columns + j) * W;
        store(p, decltype(accumulate)::value ? load(p) + scale * sum[i][j] : scale * sum[i][j]);
      }
    }
  };
  o.accumulate ? store_scaled(std::true_type()) : store_scaled(std::false_type());
}

template <typename A, typename M, int J, typename C>
inline void outer_columns(const OuterOperands<C>& o, int64_t rows, int64_t j0, Vector<C>& inner) {
  for_balanced_blocks(rows,
                      J == 1   ? 8
                      : J == 2 ? 6
                               : 4,
                      [&](int64_t i0, int64_t size) {
                        switch (size) {
                          case 1: return outer_block<A, M, 1, J>(o, i0, j0, inner);
                          case 2: return outer_block<A, M, 2, J>(o, i0, j0, inner);
                          case 3: return outer_block<A, M, 3, J>(o, i0, j0, inner);
                          case 4: return outer_block<A, M, 4, J>(o, i0, j0, inner);
                          case 5:
                            if constexpr (J <= 2) return outer_block<A, M, 5, J>(o, i0, j0, inner);
                            break;
                          case 6:
                            if constexpr (J <= 2) return outer_block<A, M, 6, J>(o, i0, j0, inner);
                            break;
                          case 7:
                            if constexpr (J == 1) return outer_block<A, M, 7, J>(o, i0, j0, inner);
                            break;
                          default:
                            if constexpr (J == 1) return outer_block<A, M, 8, J>(o, i0, j0, inner);
                        }
                      });
}

template <typename A, typename M, typename C>
UNROLLED_KERNELS_NOINLINE Vector<C> outer_products(const OuterOperands<C>& o, int64_t rows) {
  Vector<C> inner{};
  for_balanced_blocks(o.columns, 3, [&](int64_t j0, int64_t size) {
    switch (size) {
      case 1: return outer_columns<A, M, 1>(o, rows, j0, inner);
      case 2: return outer_columns<A, M, 2>(o, rows, j0, inner);
      default: return outer_columns<A, M, 3>(o, rows, j0, inner);
    }
  });
  return inner;
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
