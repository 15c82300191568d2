// Products of a matrix of each sample with its states, blocked so that every accumulator stays in a register. Lanes
// come in groups of E (lanes.h): a state is n vectors, vector g its elements gE ... gE+E-1, each lane group one sample;
// a matrix is n E rows of n vectors. Elements and rows behind d are zero.
//
//     row_products      (M x)_g, E dot products a group      one load of M for a multiply-add, and a sum over lanes
//     column_products   (M'x)_g, rows of M scaled by x_i     one load of M for a multiply-add
//     outer_products    out[i, j] (+)= scale sum_t a_t[i] z_t[j],  returns sum_ij M[i, j] sum_t a_t[i] z_t[j]
//
// The first two hand each vector of the result to end(g, vector) as soon as it is there. With V states at once, `step`
// elements apart, they load M once for all of them, and call end(v, g, vector).
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// How an entry of the matrix becomes a vector: loaded, or one number for all samples, broadcast.
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

// Element first + e of a state in every lane of its group, e < 4; first is a multiple of E where E < W.
template <int E, typename C>
UNROLLED_KERNELS_INLINE Vector<C> element(const C* x, int64_t first, int e) {
  if constexpr (E == 1) return load(x + (first + e) * lanes<C>);
  if constexpr (E == lanes<C>) return broadcast(x[first + e]);
  return broadcast_in_groups<E, C>(load(x + first / E * lanes<C>), e);
}
// how many elements are taken at a time
template <int E>
constexpr int elements_at_once = E == 1 || E > 4 ? 4 : E;
// Vectors of a state, at least: quads hold states that a single vector would not (with_layout of tile_matrix.h).
template <int E, typename C>
constexpr int least_groups = 1 < E && E < lanes<C> ? lanes<C> / E + 1 : 1;

// A matrix of a tile: entry (i, j) is the operand at data + i row + j M::width.
template <int E_, typename M_, typename C>
struct TileView {
  static constexpr int E = E_;
  using M = M_;
  const C* data;
  int64_t row, groups;

  UNROLLED_KERNELS_INLINE int64_t size() const { return groups; }
};

template <int G, int V, int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void row_block(const TileView<E, M, C>& m, int64_t group, const C* x, int64_t step,
                                       const End& end) {
  // rows whose sums stay in registers
  constexpr int R = G * E, at_once = min(R, 16 / V);
  Vector<C> sum[V][R] = {};
#pragma GCC unroll 2
  for (int first = 0; first < R; first += at_once) {
    const C* rows = m.data + (group * E + first) * m.row;
    for (int64_t j = 0; j < m.groups; ++j) {
      Vector<C> xj[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) xj[v] = load(x + v * step + j * lanes<C>);
#pragma GCC unroll 16
      for (int r = 0; r < at_once; ++r) {
        const Vector<C> entry = M::at(rows + r * m.row + j * M::width);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) sum[v][first + r] += entry * xj[v];
      }
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 16
    for (int g = 0; g < G; ++g) end(v, group + g, sum_groups<E, C>(sum[v] + g * E));
  }
}

// `backwards`: from the last row to the first. A matrix larger than the first-level cache that is read in turns finds
// what was read last still there. `least`: groups that the caller never has fewer of.
template <int V, int least = 1, int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void row_products(const TileView<E, M, C>& m, const C* x, int64_t step, bool backwards,
                                          const End& end) {
  constexpr int G = E >= 8 ? 1 : 8 / E;
  if constexpr (G == 1) {
    for (int64_t g = 0; g < m.groups; ++g) row_block<1, V>(m, backwards ? m.groups - 1 - g : g, x, step, end);
  } else {
    for_constant_blocks<G, max(least, least_groups<E, C>)>(
        m.groups, [&](int64_t group, auto size) { row_block<decltype(size)::value, V>(m, group, x, step, end); });
  }
}
template <int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void row_products(const TileView<E, M, C>& m, const C* x, bool backwards, const End& end) {
  row_products<1>(m, x, 0, backwards, [&](int, int64_t g, Vector<C> v) { end(g, v); });
}

// sum [V, J] += row i + u of the columns, scaled by that element of each state
template <int V, int J, int E, typename M, typename C>
UNROLLED_KERNELS_INLINE void add_row(const TileView<E, M, C>& m, const C* column, const C* x, int64_t step, int64_t i,
                                     int u, Vector<C> (&sum)[V][J]) {
  Vector<C> xi[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) xi[v] = element<E>(x + v * step, i, u);
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) {
    const Vector<C> entry = M::at(column + (i + u) * m.row + j * M::width);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sum[v][j] += entry * xi[v];
  }
}

// J columns, `chains` partial sums each: with few columns several rows have to be in flight to cover the latency of an
// FMA.
template <int J, int V, int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void column_block(const TileView<E, M, C>& m, int64_t group, const C* x, int64_t step,
                                          bool backwards, const End& end) {
  constexpr int U = elements_at_once<E>, chains = J >= 5 ? 1 : J >= 3 ? min(U, 2) : U;
  Vector<C> sum[chains][V][J] = {};
  const C* column = m.data + group * M::width;
  const int64_t count = m.groups * E, whole = count / U * U;
  for (int64_t n = 0; n < whole; n += U) {
    const int64_t i = backwards ? whole - U - n : n;
#pragma GCC unroll 4
    for (int u = 0; u < U; ++u) add_row(m, column, x, step, i, u, sum[u % chains]);
  }
  if constexpr (E == 1) {
    for (int64_t i = whole; i < count; ++i) add_row(m, column, x, step, i, 0, sum[0]);
  }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
#pragma GCC unroll 4
      for (int c = 1; c < chains; ++c) sum[0][v][j] += sum[c][v][j];
      end(v, group + j, sum[0][v][j]);
    }
  }
}

template <int V, int least = 1, int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void column_products(const TileView<E, M, C>& m, const C* x, int64_t step, bool backwards,
                                             const End& end) {
  constexpr int limit = V == 1 || vector_bytes == 64 ? 8 : 4;
  for_constant_blocks<limit, max(least, least_groups<E, C>)>(m.groups, [&](int64_t group, auto size) {
    column_block<decltype(size)::value, V>(m, group, x, step, backwards, end);
  });
}
template <int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void column_products(const TileView<E, M, C>& m, const C* x, bool backwards, const End& end) {
  column_products<1>(m, x, 0, backwards, [&](int, int64_t g, Vector<C> v) { end(g, v); });
}

// Operands of outer_products: a_t and z_t at a + t step and z + t step.
template <int E, typename M, typename C>
struct OuterProducts {
  const C *a, *z;
  int64_t step, steps;
  Vector<C> scale;
  bool accumulate;
  C* out;               // [groups E, groups] vectors
  TileView<E, M, C> m;  // data is nullptr: the product with it is not wanted
};

template <int I, int J, int E, typename M, typename C>
UNROLLED_KERNELS_INLINE void outer_block(const OuterProducts<E, M, C>& o, int64_t i0, int64_t j0, Vector<C>& inner) {
  constexpr int W = lanes<C>;
  const int64_t steps = o.steps, step = o.step, columns = o.m.groups;
  const Vector<C> scale = o.scale;
  Vector<C> sum[I][J] = {};
  const C *a = o.a, *z = o.z + j0 * W;
  for (int64_t t = 0; t < steps; ++t, a += step, z += step) {
    Vector<C> zj[J];
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) zj[j] = load(z + j * W);
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
      const Vector<C> ai = element<E>(a, i0, i);
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) sum[i][j] += ai * zj[j];
    }
  }
  if (o.m.data) {
    const C* m = o.m.data + i0 * o.m.row + j0 * M::width;
    Vector<C> dot{};
#pragma GCC unroll 8
    for (int i = 0; i < I; ++i) {
#pragma GCC unroll 8
      for (int j = 0; j < J; ++j) dot += M::at(m + i * o.m.row + j * M::width) * sum[i][j];
    }
    inner += dot;
  }
  C* out = o.out + (i0 * columns + j0) * W;
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

template <int E, typename M, typename C>
UNROLLED_KERNELS_NOINLINE Vector<C> outer_products(const OuterProducts<E, M, C>& o) {
  // as many accumulators as the registers hold beside the operands: 32 registers, or 16
  constexpr int rows = E == 1 && vector_bytes == 64 ? 5 : elements_at_once<E>, columns = vector_bytes == 64 ? 5 : 3;
  Vector<C> inner{};
  Poll poll;
  for_constant_blocks<columns, least_groups<E, C>>(o.m.groups, [&](int64_t j0, auto J) {
    constexpr int width = decltype(J)::value;
    Vector<C> of_columns{};  // one sum of d^2 terms would round too often
    const auto block = [&](int64_t i0, auto I) {
      outer_block<decltype(I)::value, width>(o, i0, j0, of_columns);
      poll.after(o.steps * (I * J));
    };
    if constexpr (E == 1 && width < (columns + 1) / 2) {
      block(0, J);  // narrower than every one of several: all there is
    } else if constexpr (E == 1) {
      for_constant_blocks<rows, width>(o.m.groups, block);
    } else {
      for (int64_t i0 = 0; i0 < o.m.groups * E; i0 += rows) block(i0, std::integral_constant<int, rows>());
    }
    inner += of_columns;
  });
  return inner;
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
