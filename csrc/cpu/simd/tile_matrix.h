// The matrix of one tile, staged for products with it and its transpose, and its gradient.
//
//     samples in lanes, own matrix      [d, d] vectors: both products read it, with rows and columns exchanged
//     samples in lanes, shared matrix   [d, d] scalars, broadcast as they are read
//     rows in lanes                     Q and Q', rows padded to whole vectors; each product adds up columns of one
#pragma once

#include "cpu/momentum_schedule.h"
#include "cpu/simd/products.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

template <typename M_, typename X_, typename C>
struct BlockedMatrix {
  using M = M_;  // operand of the matrix
  using X = X_;  // operand of the vector it is applied to
  MatrixView<C> forward, adjoint;
  int64_t vectors, d;
  C* image;  // [vectors] vectors

  UNROLLED_KERNELS_INLINE int64_t size() const { return vectors; }
};

template <typename Storage, template <typename> class Layout, template <typename> class Operand>
class TileMatrix {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;
  static constexpr bool rows_in_lanes = std::is_same_v<Layout<C>, RowLanes<C>>;
  static constexpr bool scalars = std::is_same_v<Operand<C>, ScalarOperand<C>>;
  using M = Operand<C>;
  using X = std::conditional_t<rows_in_lanes, ScalarOperand<C>, VectorOperand<C>>;

 public:
  using Blocked = BlockedMatrix<M, X, C>;

  // `transposed`: whether so many products are to come that a transpose pays
  TileMatrix(Arena& arena, const MomentumInputs<Storage>& p, int64_t vectors, bool transposed)
      : p_(p),
        row_(vectors * W),
        matrix_(arena.take<C>(scalars ? ceil_div(p.d * p.d, W) * W : p.d * row_)),
        transposed_(rows_in_lanes && transposed ? arena.take<C>(p.d * row_) : nullptr),
        image_(arena.take<C>(row_)) {}

  UNROLLED_KERNELS_NOINLINE void stage(const Layout<C>& tile, bool first_of_chunk) {
    if (p_.matrix_stride == 0 && !first_of_chunk) return;
    const Storage* matrix = p_.matrix + tile.first * p_.matrix_stride;
    const int64_t elements = p_.d * p_.d;
    data_ = matrix_;
    if constexpr (rows_in_lanes) {
      if (transposed_) transpose_matrix(matrix, p_.d, transposed_);
      if (in_place()) {
        data_ = reinterpret_cast<const C*>(matrix);
      } else {
        pad_matrix(matrix, p_.d, matrix_);
      }
    } else if constexpr (scalars) {
      load_row(matrix, elements, matrix + elements, matrix_);
    } else {
      load_lanes(matrix, p_.matrix_stride, elements, tile.count, p_.matrix + (p_.B - 1) * p_.matrix_stride + elements,
                 matrix_);
    }
  }

  Blocked blocked() const {
    if constexpr (rows_in_lanes) {
      return {{transposed_, W, row_}, {data_, W, row_}, row_ / W, p_.d, image_};
    } else {
      constexpr int64_t e = M::width;
      return {{data_, p_.d * e, e}, {data_, e, p_.d * e}, p_.d, p_.d, image_};
    }
  }
  const C* data() const { return data_; }

  const C* apply(const C* x) const {
    if constexpr (rows_in_lanes) {
      row_products(data_, row_, p_.d, x, image_);
    } else {
      product<M, X>(blocked().forward, row_ / W, x, p_.d, false, image_);
    }
    return image_;
  }
  void apply_transposed(const C* x, C* out) const { product<M, X>(blocked().adjoint, row_ / W, x, p_.d, false, out); }

  // Writes scale sum_t a_t z_t' of the tile to p.d_matrix, or adds it to `sum` [d, row] where the matrix is shared.
  // a and z are rows of states. Returns, lane by lane, <sum_t a_t z_t', Q> if that is wanted.
  Vector<C> outer(const MomentumBackward<Storage>& p, const Layout<C>& tile, const C* a, const C* z, int64_t steps,
                  Vector<C> scale, bool inner_wanted, C* sum) const {
    const int64_t elements = p.d * p.d;
    const bool summed = shares_matrix(p), direct = !summed && in_place();
    Storage* out = p.d_matrix + (summed ? 0 : tile.first * elements);
    OuterOperands<C> o;
    o.a = a;
    o.z = z;
    o.step = row_;
    o.steps = steps;
    o.columns = row_ / W;
    o.scale = scale;
    o.accumulate = summed;
    o.out = direct ? reinterpret_cast<C*>(out) : sum;
    o.m = inner_wanted ? data_ : nullptr;
    const Vector<C> inner = outer_products<X, M>(o, p.d);
    if (summed || direct) return inner;
    if constexpr (rows_in_lanes) {
      unpad_matrix(sum, p.d, out);
    } else {
      store_lanes(sum, elements, tile.count, out, elements, out + tile.count * elements);
    }
    return inner;
  }

  // out [d, d] += the sum over tiles that `outer` left
  UNROLLED_KERNELS_NOINLINE void add_sum(const C* sum, C* out) const {
    for (int64_t i = 0; i < p_.d; ++i) {
      for (int64_t j = 0; j < p_.d; ++j) {
        out[i * p_.d + j] += rows_in_lanes ? sum[i * row_ + j] : sum_lanes<C>(load(sum + (i * p_.d + j) * W));
      }
    }
  }

 private:
  // rows that need no padding and no conversion are read and written where they are
  bool in_place() const { return rows_in_lanes && std::is_same_v<Storage, C> && p_.d == row_; }

  const MomentumInputs<Storage>& p_;
  int64_t row_;
  C *matrix_, *transposed_, *image_;
  const C* data_ = nullptr;
};

// Calls f(Type<Tiles<Storage, layout, operand of the matrix>>()): samples in lanes up to the d that Tiles
// names, and at any d where the matrix is shared and only broadcast; rows in lanes for the rest and where the samples
// are too few to fill the lanes.
template <template <typename, template <typename> class, template <typename> class> class Tiles, typename Storage,
          typename F>
void with_layout(const MomentumInputs<Storage>& p, F f) {
  constexpr int64_t W = lanes<compute_type<Storage>>;
  if (shares_matrix(p) && (p.d <= W || 2 * p.B >= W)) {
    f(Type<Tiles<Storage, SampleLanes, ScalarOperand>>());
  } else if (!shares_matrix(p) && p.d <= Tiles<Storage, SampleLanes, VectorOperand>::max_d && p.B * W >= 2 * p.d) {
    f(Type<Tiles<Storage, SampleLanes, VectorOperand>>());
  } else {
    f(Type<Tiles<Storage, RowLanes, VectorOperand>>());
  }
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
    plan.variant = !T::samples_in_lanes ? "rows in lanes"
                   : shares_matrix(p)   ? "samples in lanes, shared matrix"
                                        : "samples in lanes";
    plan.tiles = T::samples_in_lanes ? ceil_div(p.B, plan.lanes) : p.B;
    plan.scratch_bytes = T(nullptr, p, backward, plan.schedule_steps).scratch_bytes();
  });
  plan.chunks = chunks_for(plan.tiles, flops, shares_matrix(p) && backward ? 32 : 256);
  return plan;
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
