// The matrix of one tile, staged for products with it and its transpose, and its gradient. One image serves both
// (products.h); rows in lanes that need no padding are read and written where they are.
#pragma once

#include "cpu/momentum_schedule.h"
#include "cpu/simd/products.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

template <typename Storage, template <typename> class Layout, template <typename> class Operand>
class TileMatrix {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;
  static constexpr int E = Layout<C>::E;
  using M = Operand<C>;
  static constexpr bool scalars = M::width == 1;

 public:
  using View = TileView<E, M, C>;

  TileMatrix(Arena& arena, const MomentumInputs<Storage>& p, int64_t groups)
      : p_(p),
        groups_(groups),
        row_(groups * M::width),
        matrix_(arena.take<C>(scalars ? ceil_div(p.d * p.d, W) * W : image_size())),
        result_(arena.take<C>(groups * W)) {}

  // elements of an image, or of a gradient
  int64_t image_size() const { return groups_ * E * groups_ * W; }

  UNROLLED_KERNELS_NOINLINE void stage(const Layout<C>& tile, bool first_of_chunk) {
    if (p_.matrix_stride == 0 && !first_of_chunk) return;
    const int64_t d = p_.d, elements = d * d, stride = p_.matrix_stride;
    const Storage* matrix = p_.matrix + tile.first * stride;
    if (in_place() && !p_.transposed) {
      data_ = reinterpret_cast<const C*>(matrix);
      return;
    }
    data_ = matrix_;
    if (p_.transposed) return stage_transposed(tile, first_of_chunk);
    if constexpr (scalars) {
      load_row(matrix, elements, matrix + elements, matrix_);
    } else if constexpr (E == 1) {
      load_lanes(matrix, stride, elements, tile.count, p_.matrix + (p_.B - 1) * stride + elements, matrix_);
    } else {
      if (first_of_chunk) fill_zero(matrix_ + d * row_, image_size() - d * row_);
      for_rows([&](int64_t i, int64_t n) {
        if constexpr (E == W) {
          load_row(matrix + i * d, n, matrix + elements, matrix_ + i * row_);
        } else {
          load_groups<E>(matrix + i * d, stride, n, tile.count, matrix_ + i * row_);
        }
      });
    }
  }

  View view() const { return {data_, row_, groups_}; }

  const C* apply(const C* x) const {
    row_products(view(), x, false, [&](int64_t g, Vector<C> v) { store(result_ + g * W, v); });
    return result_;
  }
  void apply_transposed(const C* x, C* out) const {
    column_products(view(), x, false, [&](int64_t g, Vector<C> v) { store(out + g * W, v); });
  }

  // Writes scale sum_t a_t z_t' of the tile to p.d_matrix, or adds it to `sum` [image_size()] where the matrix is
  // shared. a and z are rows of states. Returns, lane by lane, <sum_t a_t z_t', Q> if that is wanted.
  Vector<C> outer(const MomentumBackward<Storage>& p, const Layout<C>& tile, const C* a, const C* z, int64_t steps,
                  Vector<C> scale, bool inner_wanted, C* sum) const {
    const int64_t d = p.d, elements = d * d;
    const bool summed = shares_matrix(p), direct = !summed && in_place();
    Storage* out = p.d_matrix + (summed ? 0 : tile.first * elements);
    OuterProducts<E, M, C> o{a, z, groups_ * W, steps, scale, summed, sum, view()};
    if (direct) o.out = reinterpret_cast<C*>(out);
    if (!inner_wanted) o.m.data = nullptr;
    const Vector<C> inner = outer_products(o);
    if (summed || direct) return inner;
    if constexpr (E == 1) {
      store_lanes(sum, elements, tile.count, out, elements, out + tile.count * elements);
    } else {
      for_rows([&](int64_t i, int64_t n) {
        if constexpr (E == W) {
          store_row(sum + i * row_, n, out + i * d, out + elements);
        } else {
          store_groups<E>(sum + i * row_, n, tile.count, out + i * d, elements);
        }
      });
    }
    return inner;
  }

  // out [d, d] += the sum over tiles that `outer` left
  UNROLLED_KERNELS_NOINLINE void add_sum(const C* sum, C* out) const {
    for (int64_t i = 0; i < p_.d; ++i) {
      for (int64_t j = 0; j < p_.d; ++j) {
        const C* p = sum + (i * groups_ + j / E) * W;
        out[i * p_.d + j] += E == 1 ? sum_lanes<C>(load(p)) : p[j % E];
      }
    }
  }

 private:
  // A vector of the image holds, from E rows of each transposed sample, the elements of one column.
  UNROLLED_KERNELS_NOINLINE void stage_transposed(const Layout<C>& tile, bool first_of_chunk) {
    const int64_t d = p_.d;
    const Storage* end = p_.matrix + (p_.B - 1) * p_.matrix_stride + d * d;
    if (E != 1 && first_of_chunk) fill_zero(matrix_ + d * row_, image_size() - d * row_);
    for (int64_t g = 0; g < groups_; ++g) {
      const Storage* rows[W] = {};
      for (int64_t l = 0; l < tile.count * E; ++l) {
        const int64_t j = g * E + l % E;
        if (j < d) rows[l] = p_.matrix + (tile.first + l / E) * p_.matrix_stride + j * d;
      }
      load_lanes(rows, d, end, matrix_ + g * W, row_);
    }
  }

  // rows that need no padding and no conversion are read and written where they are
  bool in_place() const { return E == W && std::is_same_v<Storage, C> && p_.d == groups_ * W; }
  // f(row, elements): the rows, all at once where none is padded
  template <typename F>
  void for_rows(F f) const {
    if (p_.d == groups_ * E) return f(0, p_.d * p_.d);
    for (int64_t i = 0; i < p_.d; ++i) f(i, p_.d);
  }

  const MomentumInputs<Storage>& p_;
  int64_t groups_, row_;
  C *matrix_, *result_;
  const C* data_ = nullptr;
};

// Calls f(Type<Tiles<Storage, layout, operand of the matrix>>()): samples in lanes up to the d that Tiles
// names, and at any d where the matrix is shared and only broadcast, or copied to every lane where that is as cheap; then
// quads of rows, and whole rows for the rest, where the samples are too few to fill the lanes and in the fallback.
template <template <typename, template <typename> class, template <typename> class> class Tiles, typename Storage,
          typename F>
void with_layout(const MomentumInputs<Storage>& p, F f) {
  using C = compute_type<Storage>;
  if constexpr (!is_fallback) {
    using Samples = Tiles<Storage, SampleLanes, VectorOperand>;
    constexpr int64_t W = lanes<C>;
    const bool shared = shares_matrix(p);
    if (shared ? p.d <= W || 2 * p.B >= W : p.d <= Samples::max_d && p.B * W >= 2 * p.d) {
      return shared && p.d > Samples::max_copied_d ? f(Type<Tiles<Storage, SampleLanes, ScalarOperand>>())
                                                   : f(Type<Samples>());
    }
    // vectors of 16 bytes hold one quad
    if constexpr (QuadLanes<C>::samples > 1) {
      using Quads = Tiles<Storage, QuadLanes, VectorOperand>;
      static_assert(Samples::max_d >= W, "least_groups: what fits a vector and is not one sample has samples in lanes");
      if (!shared && p.d <= Quads::max_d && p.B > 1) return f(Type<Quads>());
    }
  }
  f(Type<Tiles<Storage, RowLanes, VectorOperand>>());
}

// The plan of both structures; `flops` of the whole problem.
template <template <typename, template <typename> class, template <typename> class> class Tiles, typename Storage>
MomentumPlan matrix_plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward, bool constant,
                         double flops) {
  MomentumPlan plan{};
  plan.lanes = lanes<compute_type<Storage>>;
  plan.tiles_per_sample = 1;
  plan.schedule_steps = constant ? min(p.k, 1) : p.k;
  with_layout<Tiles>(p, [&](auto type) {
    using T = typename decltype(type)::type;
    plan.variant = T::samples == 1           ? "rows in lanes"
                   : T::samples < plan.lanes ? "quads of rows in lanes"
                   : shares_matrix(p)        ? "samples in lanes, shared matrix"
                                             : "samples in lanes";
    plan.tiles = ceil_div(p.B, T::samples);
    plan.scratch_bytes = T(nullptr, p, backward, plan.schedule_steps).scratch_bytes();
  });
  plan.chunks = chunks_for(plan.tiles, flops, shares_matrix(p) && backward ? 32 : 256);
  return plan;
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
