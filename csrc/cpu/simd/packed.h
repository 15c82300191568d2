// Products of rows with one matrix, and sums of outer products of rows, for a matrix that a batch shares. Rows and
// matrices are kept in panels of W columns, so that whatever a block of a product reads lies together:
//
//     multiply_rows   out[r, c] = sum_j x[r, j] M[j, c]       M packed once, for every row and every step
//     outer_sums      out[i, j] (+)= sum_n a[n, i] z[n, j]
//
// Columns behind the last are zero. A block of R rows and J vectors of columns takes R + J loads for R J multiply-adds.
#pragma once

#include "cpu/simd/lanes.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// Rows [n, d]: columns pW ... pW+W-1 of row r are the vector at(r, p).
template <typename T>
struct Panels {
  T* data;
  int64_t plane;  // from panel to panel: W for each row

  UNROLLED_KERNELS_INLINE T* at(int64_t r, int64_t p) const {
    return data + p * plane + r * lanes<std::remove_const_t<T>>;
  }
  UNROLLED_KERNELS_INLINE Panels from(int64_t r) const { return {at(r, 0), plane}; }
  operator Panels<const T>() const { return {data, plane}; }
};

// one row to panels and back
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void load_panels(const Storage* row, int64_t d, const Storage* end, Panels<C> out,
                                           int64_t r) {
  for (int64_t p = 0, i = 0; i < d; ++p, i += lanes<C>) store(out.at(r, p), load_first(row + i, d - i, end));
}
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void store_panels(Panels<C> in, int64_t r, int64_t d, Storage* row) {
  for (int64_t p = 0, i = 0; i < d; ++p, i += lanes<C>) store_first(row + i, load(in.at(r, p)), d - i, row + d);
}

// Panel `panel` of M = Q' or M = Q, Q [d, d]: [d, W]
template <typename Storage, typename C = compute_type<Storage>>
UNROLLED_KERNELS_NOINLINE void pack_panel(const Storage* Q, int64_t d, bool transposed, int64_t panel, C* out) {
  constexpr int64_t W = lanes<C>;
  const int64_t first = panel * W, count = min(W, d - first);
  const Storage* end = Q + d * d;
  if (transposed) return load_lanes(Q + first * d, d, d, count, end, out);
  for (int64_t i = 0; i < d; ++i) store(out + i * W, load_first(Q + i * d + first, count, end));
}

// with two vectors of columns, the rows of a block fill 32 registers, or 16
constexpr int block_of_rows = vector_bytes == 64 ? 12 : vector_bytes == 32 ? 6 : 4;

// rows of x [R, d], J panels of M; out [R, J] vectors
template <int R, int J, typename C>
UNROLLED_KERNELS_NOINLINE void multiply_block(Panels<const C> x, const C* M, int64_t d, C* out) {
  constexpr int W = lanes<C>;
  Vector<C> sum[R][J] = {};
  const C* second = M + d * W;
  for (int64_t j = 0; j < d; j += W, x.data += x.plane) {
    const int64_t count = min(W, d - j);
    for (int64_t l = 0; l < count; ++l) {
      const Vector<C> m0 = load(M + (j + l) * W), m1 = J == 2 ? load(second + (j + l) * W) : Vector<C>{};
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vector<C> xr = broadcast(x.data[r * W + l]);
        sum[r][0] += xr * m0;
        if constexpr (J == 2) sum[r][1] += xr * m1;
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < J; ++j) store(out + (r * J + j) * W, sum[r][j]);
  }
}

// end(row, panel, vector) for every vector of x M, x [rows, d]. Two panels of M, which comes from far away, meet all
// rows before the next two.
template <typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply_rows(Panels<const C> x, int64_t rows, const C* M, int64_t d, const End& end) {
  constexpr int64_t W = lanes<C>;
  const int64_t panels = ceil_div(d, W);
  C buffer[block_of_rows * 2 * W];
  for_blocks(ceil_div(panels, 2), 2 * rows * d, [&](int64_t begin, int64_t last) {
    for (int64_t p = 2 * begin; p < min(2 * last, panels); p += 2) {
      const int64_t J = min(2, panels - p);
      for_constant_blocks<block_of_rows>(rows, [&](int64_t first, auto size) {
        constexpr int R = decltype(size)::value;
        J == 2 ? multiply_block<R, 2, C>(x.from(first), M + p * d * W, d, buffer)
               : multiply_block<R, 1, C>(x.from(first), M + p * d * W, d, buffer);
        for (int64_t r = 0; r < R; ++r) {
          for (int64_t j = 0; j < J; ++j) end(first + r, p + j, load(buffer + (r * J + j) * W));
        }
      });
    }
  });
}

template <int I, int J, typename C>
UNROLLED_KERNELS_NOINLINE void outer_sums_block(const C* a, Panels<const C> z, int64_t terms, bool accumulate, C* out,
                                                int64_t row) {
  constexpr int W = lanes<C>;
  Vector<C> sum[I][J] = {};
  for (int64_t n = 0; n < terms; ++n) {
    Vector<C> zn[J];
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) zn[j] = load(z.at(n, j));
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vector<C> ai = broadcast(a[n * W + i]);
#pragma GCC unroll 3
      for (int j = 0; j < J; ++j) sum[i][j] += ai * zn[j];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < I; ++i) {
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) {
      C* p = out + i * row + j * W;
      store(p, accumulate ? load(p) + sum[i][j] : sum[i][j]);
    }
  }
}

// Rows of out [d, row] that belong to panels `begin` ... `end - 1` of a, (+)= sum_n a_n z_n' over `terms` rows, in
// blocks that the second-level cache holds.
template <typename C>
UNROLLED_KERNELS_NOINLINE void outer_sums(Panels<const C> a, Panels<const C> z, int64_t terms, int64_t d, int64_t begin,
                                          int64_t end, bool accumulate, C* out, int64_t row) {
  constexpr int64_t W = lanes<C>, block = 256;
  constexpr int I = min(W, vector_bytes == 64 ? 8 : 4);
  Poll poll;
  for (int64_t n = 0; n == 0 || n < terms; n += block) {
    const int64_t count = min(block, terms - n);
    for_constant_blocks<3>(ceil_div(d, W), [&](int64_t column, auto J) {
      const Panels<const C> columns{z.at(n, column), z.plane};
      for (int64_t p = begin; p < end; ++p) {
        for (int64_t i = 0; i < W && p * W + i < d; i += I) {
          with_constant<I, 1>(d - p * W - i, [&](auto size) {
            outer_sums_block<decltype(size)::value, decltype(J)::value, C>(
                a.at(n, p) + i, columns, count, accumulate || n > 0, out + (p * W + i) * row + column * W, row);
          });
        }
      }
    });
    poll.after(count * (end - begin) * d);
  }
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
