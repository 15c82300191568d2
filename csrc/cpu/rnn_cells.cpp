// CPU kernels of `rnn`: samples in lanes, S groups of W a tile; see rnn.h for the equations.
//
// A cell is a chain of products with panels: [W1 W2] applied to [y; g], then W^2 ... W^L, then V. A weight is loaded
// once for S W samples, S = 2: 2 R multiply-adds of R rows take R + 2 loads, so that arithmetic is the limit.
//
// Backward replays the cells and keeps what the weights were applied to, [y; g], h^1 ... h^L, for all k steps, in the
// chunk's scratch. Adjoints are kept for a segment of steps that fits the second-level cache; then each weight gradient
// takes the whole segment in one go, and its accumulators, one vector a weight, are loaded and stored once for it. Where
// so many vectors leave that cache, the accumulators are rows of scalars, and activations are transposed to rows first.
//
// float32, (B, d, k) = (1000, 5, 20), widths 10-20-20, one core of an EPYC with AVX2: 60 to 64 % of the FMA peak, both
// passes together. What is lost is at the ends of blocks: their sums are 5 to 20 products long.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/rnn_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/simd/arena.h"
#include "cpu/simd/lanes.h"
#include "cpu/simd/panels.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

// [W1 W2], W^2 ... W^L or V
template <typename C>
struct Layer {
  int64_t in, out;
  int64_t x, h;     // where what it is applied to and what it gives stand in an activation row
  int64_t adjoint;  // where the adjoint of what it gives stands in an adjoint row
  const C* rows;    // the matrix
  C* columns;       // its transpose
  C* gradient;      // [out, in] vectors, or scalars in rows of whole vectors
};

// [W1; W2], each [h, d], to and from [W1 W2]
template <typename C>
void interleave(const C* stacked, int64_t h, int64_t d, C* rows) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < h; ++i) copy_elements(rows + (2 * i + half) * d, stacked + (half * h + i) * d, d);
  }
}
template <typename C>
void stack(const C* rows, int64_t h, int64_t d, C* stacked) {
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < h; ++i) copy_elements(stacked + (half * h + i) * d, rows + (2 * i + half) * d, d);
  }
}

// in strips of rows, so that the lines that are read and written stay in the cache
template <typename C>
UNROLLED_KERNELS_NOINLINE void transpose_scalars(const C* from, int64_t rows, int64_t columns, C* to) {
  constexpr int64_t strip = 64 / sizeof(C);
  for (int64_t i0 = 0; i0 < rows; i0 += strip) {
    const int64_t end = min(i0 + strip, rows);
    for (int64_t j = 0; j < columns; ++j) {
      for (int64_t i = i0; i < end; ++i) to[j * rows + i] = from[i * columns + j];
    }
  }
}

template <typename Storage, int S>
class Tile {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;
  using P = Panel<C>;

 public:
  // `backward` may be nullptr; of what it points to, only which outputs are wanted is read here
  UNROLLED_KERNELS_NOINLINE Tile(void* scratch, const RnnInputs<Storage>& p, const RnnBackward<Storage>* backward,
                                 int64_t segment)
      : p_(p), shared_(shares_matrix(p)), segment_(segment), arena_(scratch) {
    const int L = p.num_layers;
    gradients_in_rows_ = rnn_weights_size(p) * W * static_cast<int64_t>(sizeof(C)) > accumulators_bytes;
    activations_ = 2 * p.d;
    adjoints_ = 0;
    int64_t weights = 0;
    for (int l = 0; l <= L; ++l) {
      Layer<C>& layer = layers_[l];
      layer.in = l == 0 ? 2 * p.d : p.hidden_dims[l - 1];
      layer.out = l == L ? p.d : p.hidden_dims[l];
      layer.x = l == 0 ? 0 : layers_[l - 1].h;
      layer.h = activations_;
      layer.adjoint = adjoints_;
      adjoints_ += layer.out;
      if (l < L) activations_ += layer.out;
      layer.rows = p.weights + weights;
      layer.columns = arena_.take<C>(layer.in * layer.out);
      layer.gradient = backward && backward->d_weights ? arena_.take<C>(gradient_elements(layer)) : nullptr;
      weights += layer.in * layer.out;
    }
    work_ = S * (weights + p.d * (p.matrix ? p.d : 1));
    first_rows_ = arena_.take<C>(layers_[0].in * layers_[0].out);
    layers_[0].rows = first_rows_;
    input_adjoint_ = adjoints_;  // of [y; g]
    adjoints_ += 2 * p.d;
    b_ = panel(p.d);
    y_ = panel(p.d);
    if (p.diagonal) {
      diagonal_ = panel(p.d);
    } else if (shared_) {
      matrix_ = arena_.take<C>(p.d * p.d);
      transposed_ = arena_.take<C>(p.d * p.d);
    } else {
      matrix_ = take(S, p.d * p.d);
    }
    activation_rows_ = take(S * (backward ? max(p.k, 1) : 1), activations_);
    sums_ = arena_.take<C>(padded(max(p.d * p.d, largest_layer())));
    if (!backward) return;
    adjoint_rows_ = take(S * segment, adjoints_);
    // a product may read up to a vector behind the last row
    if (gradients_in_rows_) inputs_ = arena_.take<C>((S * segment * W + 1) * padded(activations_));
    if (backward->db) db_ = panel(p.d);
    grad_ = panel(p.d);
    if (backward->d_diagonal) d_diagonal_ = panel(p.d);
    if (backward->d_matrix) d_matrix_ = take(shared_ ? 1 : S, padded(p.d * p.d));
  }

  size_t scratch_bytes() const { return arena_.used(); }
  int64_t row_elements() const { return (activations_ + adjoints_) * S * W; }

  // What the tiles of a chunk share.
  UNROLLED_KERNELS_NOINLINE void begin_chunk() {
    interleave(p_.weights, layers_[0].out, p_.d, first_rows_);
    for (int l = 0; l <= p_.num_layers; ++l) {
      const Layer<C>& layer = layers_[l];
      transpose_scalars(layer.rows, layer.out, layer.in, layer.columns);
      if (layer.gradient) fill_zero(layer.gradient, gradient_elements(layer));
    }
    if (shared_) {
      C* row = sums_;
      for (int64_t i = 0; i < p_.d; ++i) {
        load_row(p_.matrix + i * p_.d, p_.d, p_.matrix + p_.d * p_.d, row);
        copy_elements(matrix_ + i * p_.d, row, p_.d);
      }
      transpose_scalars(matrix_, p_.d, p_.d, transposed_);
      if (d_matrix_) fill_zero(d_matrix_, padded(p_.d * p_.d) * W);
    }
  }

  UNROLLED_KERNELS_NOINLINE void forward(const RnnForward<Storage>& p, int64_t tile) {
    begin_tile(tile);
    const P y = row(0);
    load_panel(p_.y0, p_.y0_stride, p_.d, y);
    for (int64_t t = 0; t < p_.k; ++t) {
      if (p_.trajectory) store_panel(y, p_.d, p.y + t * p_.B * p_.d);
      hidden(y);
      output(y, y);
      poll_.after(work_);
    }
    store_panel(y, p_.d, p.y + (p_.trajectory ? p_.k * p_.B * p_.d : 0));
  }

  UNROLLED_KERNELS_NOINLINE void backward(const RnnBackward<Storage>& p, int64_t tile) {
    begin_tile(tile);
    load_panel(p_.y0, p_.y0_stride, p_.d, row(0));
    for (int64_t t = 0; t < p_.k; ++t) {
      hidden(row(t));
      if (t + 1 < p_.k) output(row(t), row(t + 1));
      poll_.after(work_);
    }
    if (db_.data) zero(db_, p_.d);
    if (d_diagonal_.data) zero(d_diagonal_, p_.d);
    if (d_matrix_ && !shared_) fill_zero(d_matrix_, S * padded(p_.d * p_.d) * W);
    // y_ is the adjoint of y_{t+1}, then of y_t
    load_panel(p.grad_y + (p_.trajectory ? p_.k * p_.B * p_.d : 0), p_.d, p_.d, y_);
    for (int64_t t = p_.k; t > 0;) {
      const int64_t steps = min(segment_, t);
      for (int64_t n = steps; n > 0; --n) {
        --t;
        adjoint(row(t), adjoint_row(n - 1));
        if (p_.trajectory) add_cotangent(p.grad_y + t * p_.B * p_.d);
        poll_.after(2 * work_);
      }
      add_gradients(t, steps);
    }
    if (db_.data) store_panel(db_, p_.d, p.db);
    if (p.dy0) store_panel(y_, p_.d, p.dy0);
    if (d_diagonal_.data) store_panel(d_diagonal_, p_.d, p.d_diagonal);
    if (d_matrix_ && !shared_) {
      store_panel({d_matrix_, padded(p_.d * p_.d) * W}, p_.d * p_.d, p.d_matrix);
    }
  }

  UNROLLED_KERNELS_NOINLINE void end_chunk(C* d_weights, C* d_matrix) {
    for (int l = 0; d_weights && l <= p_.num_layers; ++l) {
      const Layer<C>& layer = layers_[l];
      const int64_t elements = layer.in * layer.out;
      if (gradients_in_rows_) {
        for (int64_t i = 0; i < layer.out; ++i) {
          copy_elements(sums_ + i * layer.in, layer.gradient + i * padded(layer.in), layer.in);
        }
      } else {
        sum_lanes_of(layer.gradient, padded(elements), sums_);
      }
      if (l == 0) {
        stack(sums_, layer.out, p_.d, d_weights);
      } else {
        copy_elements(d_weights, sums_, elements);
      }
      d_weights += elements;
    }
    if (d_matrix) {
      sum_lanes_of(d_matrix_, padded(p_.d * p_.d), sums_);
      copy_elements(d_matrix, sums_, p_.d * p_.d);
    }
  }

 private:
  static int64_t padded(int64_t n) { return ceil_div(n, W) * W; }
  int64_t gradient_elements(const Layer<C>& layer) const {
    return gradients_in_rows_ ? layer.out * padded(layer.in) : padded(layer.in * layer.out) * W;
  }
  int64_t largest_layer() const {
    int64_t size = 0;
    for (int l = 0; l <= p_.num_layers; ++l) size = max(size, layers_[l].in * layers_[l].out);
    return size;
  }

  C* take(int64_t planes, int64_t vectors) { return arena_.template take<C>(planes * vectors * W); }
  P panel(int64_t n) { return {take(S, n), n * W}; }
  // what the weights of step t are applied to, and the adjoints of what they give in the n-th step of a segment
  P row(int64_t t) const { return {activation_rows_ + t * S * activations_ * W, activations_ * W}; }
  P adjoint_row(int64_t n) const { return {adjoint_rows_ + n * S * adjoints_ * W, adjoints_ * W}; }

  SampleLanes<C> samples(int s, int64_t n) const {
    const int64_t first = first_ + s * W;
    return {p_.B, n, first, max(0, min(W, p_.B - first))};
  }
  // [B, n] rows that lie `stride` apart; nullptr: zeros
  void load_panel(const Storage* x, int64_t stride, int64_t n, P to) const {
    if (!x) return zero(to, n);
    for (int s = 0; s < S; ++s) {
      const auto group = samples(s, n);
      if (group.count > 0) {
        group.load_state(x, stride, to.data + s * to.plane);
      } else {
        fill_zero(to.data + s * to.plane, n * W);
      }
    }
  }
  void store_panel(P from, int64_t n, Storage* x) const {
    for (int s = 0; s < S; ++s) {
      const auto group = samples(s, n);
      if (group.count > 0) group.store_state(from.data + s * from.plane, x);
    }
  }
  void zero(P x, int64_t n) const {
    for (int s = 0; s < S; ++s) fill_zero(x.data + s * x.plane, n * W);
  }

  void begin_tile(int64_t tile) {
    first_ = tile * S * W;
    load_panel(p_.b, p_.b_stride, p_.d, b_);
    if (p_.diagonal) {
      load_panel(p_.diagonal, p_.diagonal_stride, p_.d, diagonal_);
    } else if (!shared_) {
      load_panel(p_.matrix, p_.matrix_stride, p_.d * p_.d, {matrix_, p_.d * p_.d * W});
    }
  }

  // out = x + Q y, or x + Q'y
  UNROLLED_KERNELS_INLINE void add_product(bool transposed, P y, P x, P out) const {
    const int64_t d = p_.d;
    const Plus<C> end{x};
    if (p_.diagonal) {
      for (int s = 0; s < S; ++s) {
        const C *q = diagonal_.data + s * diagonal_.plane, *v = y.data + s * y.plane;
        for (int64_t i = 0; i < d; ++i) {
          store(out.data + s * out.plane + i * W, end(i, s, load(q + i * W) * load(v + i * W)));
        }
      }
    } else if (shared_) {
      // neighbours in a block of rows: columns of Q, rows of Q'
      panel_product<S>(SharedMatrix<C>{transposed ? matrix_ : transposed_, d}, d, Panel<const C>(y), d, end, out);
    } else {
      const bool by_columns = transposed != p_.transposed;
      const OwnMatrix<C> Q{matrix_, by_columns ? W : d * W, by_columns ? d * W : W, d * d * W};
      panel_product<S>(Q, d, Panel<const C>(y), d, end, out);
    }
  }

  // g, h^1 ... h^L of the row whose y is there
  UNROLLED_KERNELS_INLINE void hidden(P x) const {
    add_product(false, x, b_, x.rows(p_.d));
    for (int l = 0; l < p_.num_layers; ++l) apply(layers_[l], x, Relu<C>(), x.rows(layers_[l].h));
  }
  void output(P x, P y) const { apply(layers_[p_.num_layers], x, Plain<C>(), y); }

  template <typename End>
  void apply(const Layer<C>& layer, P x, End end, P out) const {
    panel_product<S>(SharedMatrix<C>{layer.columns, layer.out}, layer.out, Panel<const C>(x.rows(layer.x)), layer.in,
                     end, out);
  }
  template <typename End>
  void apply_transposed(const Layer<C>& layer, P adjoints, End end, P out) const {
    panel_product<S>(SharedMatrix<C>{layer.rows, layer.in}, layer.in, Panel<const C>(adjoints.rows(layer.adjoint)),
                     layer.out, end, out);
  }

  // One cell: from the adjoint of y_{t+1} in y_ to that of y_t, every weight's share left in `a`.
  void adjoint(P x, P a) {
    const int L = p_.num_layers;
    const int64_t d = p_.d;
    for (int s = 0; s < S; ++s) {
      copy_vectors(y_.data + s * y_.plane, d * W, a.data + s * a.plane + layers_[L].adjoint * W);
    }
    for (int l = L; l > 0; --l) {
      const WherePositive<C> passes{x.rows(layers_[l].x)};
      apply_transposed(layers_[l], a, passes, a.rows(layers_[l - 1].adjoint));
    }
    const P into_y = a.rows(input_adjoint_), e = into_y.rows(d);
    apply_transposed(layers_[0], a, Plain<C>(), into_y);
    add_product(true, e, into_y, y_);
    for (int s = 0; s < S; ++s) {
      C *db = db_.data ? db_.data + s * db_.plane : nullptr,
        *dq = d_diagonal_.data ? d_diagonal_.data + s * d_diagonal_.plane : nullptr;
      const C *es = e.data + s * e.plane, *y = x.data + s * x.plane;
      for (int64_t i = 0; i < d * W; i += W) {
        const Vector<C> ei = load(es + i);
        if (db) store(db + i, load(db + i) + ei);
        if (dq) store(dq + i, load(dq + i) + ei * load(y + i));
      }
    }
  }

  void add_cotangent(const Storage* grad) {
    const P x = grad_;
    load_panel(grad, p_.d, p_.d, x);
    for (int s = 0; s < S; ++s) {
      C* y = y_.data + s * y_.plane;
      for (int64_t i = 0; i < p_.d * W; i += W) store(y + i, load(y + i) + load(x.data + s * x.plane + i));
    }
  }

  // Gradients of the weights and of Q from the segment of `steps` steps that begins with step `first`.
  void add_gradients(int64_t first, int64_t steps) {
    const P x = row(first), a = adjoint_row(0);
    if (layers_[0].gradient && gradients_in_rows_) add_gradients_in_rows(x, a, steps);
    PanelOuterOperands<C> o{nullptr, nullptr, a.plane, x.plane, S * steps};  // groups follow each other as steps do
    for (int l = 0; layers_[0].gradient && !gradients_in_rows_ && l <= p_.num_layers; ++l) {
      const Layer<C>& layer = layers_[l];
      o.a = a.rows(layer.adjoint).data;
      o.z = x.rows(layer.x).data;
      outer_sums(o, layer.out, layer.in, layer.gradient);
    }
    if (!d_matrix_) return;
    o.a = a.rows(input_adjoint_ + p_.d).data;
    o.z = x.data;
    if (shared_) return outer_sums(o, p_.d, p_.d, d_matrix_);
    o.a_step *= S;
    o.z_step *= S;
    o.terms = steps;
    for (int s = 0; s < S; ++s, o.a += a.plane, o.z += x.plane) {
      outer_sums(o, p_.d, p_.d, d_matrix_ + s * padded(p_.d * p_.d) * W);
    }
  }

  void add_gradients_in_rows(P x, P a, int64_t steps) {
    const int64_t row = padded(activations_), groups = S * steps;
    for (int64_t g = 0; g < groups; ++g) {
      C* rows = inputs_ + g * W * row;
      store_lanes(x.data + g * x.plane, activations_, W, rows, row, rows + W * row);
    }
    for (int l = 0; l <= p_.num_layers; ++l) {
      const Layer<C>& layer = layers_[l];
      const RowOuterOperands<C> o{a.rows(layer.adjoint).data, inputs_ + layer.x, a.plane, row, groups};
      row_outer_sums(o, layer.out, ceil_div(layer.in, W), layer.gradient);
    }
  }

  static constexpr int64_t accumulators_bytes = 192 * 1024;

  const RnnInputs<Storage>& p_;
  bool shared_, gradients_in_rows_;
  int64_t segment_, work_, first_ = 0;  // work of a cell
  Poll poll_;
  Arena arena_;
  Layer<C> layers_[max_rnn_layers + 1];
  int64_t activations_, adjoints_, input_adjoint_;  // vectors of a row of one group, and where [y; g]'s adjoint stands
  P b_, y_, diagonal_{}, db_{}, grad_{}, d_diagonal_{};
  C *matrix_ = nullptr, *transposed_ = nullptr, *activation_rows_, *adjoint_rows_ = nullptr, *d_matrix_ = nullptr;
  C *first_rows_, *inputs_ = nullptr, *sums_;
};

// Calls f(Type<Tile>(), groups) with the Tile that suits: two groups of samples, or one where they are too few for two,
// where every sample has a large Q of its own that would not stay in the second-level cache twice, and in the fallback.
template <typename Storage, typename F>
void with_tile(const RnnInputs<Storage>& p, F f) {
  if constexpr (!is_fallback) {
    const bool large = p.matrix && !shares_matrix(p) && p.d > 32;
    if (p.B > lanes<compute_type<Storage>> && !large) return f(Type<Tile<Storage, 2>>(), 2);
  }
  f(Type<Tile<Storage, 1>>(), 1);
}

template <typename Storage>
RnnPlan plan(const RnnInputs<Storage>& p, const RnnBackward<Storage>* backward) {
  using C = compute_type<Storage>;
  constexpr int64_t segment_bytes = 384 * 1024;
  RnnPlan plan{};
  plan.variant = "samples in lanes";
  plan.lanes = lanes<C>;
  with_tile(p, [&](auto type, int groups) {
    using T = typename decltype(type)::type;
    plan.groups = groups;
    plan.tiles = ceil_div(p.B, groups * plan.lanes);
    const int64_t row = T(nullptr, p, backward, 1).row_elements() * static_cast<int64_t>(sizeof(C));
    // whole segments of equal length, at least 8 steps to share a load and store of the accumulators
    const int64_t longest = max(8, segment_bytes / row), k = max(p.k, 1);
    plan.segment = ceil_div(k, ceil_div(k, longest));
    plan.scratch_bytes = T(nullptr, p, backward, plan.segment).scratch_bytes();
  });
  const double matrix = p.matrix ? static_cast<double>(p.d) * p.d : static_cast<double>(p.d);
  const double flops = 2.0 * (backward ? 3 : 1) * static_cast<double>(p.B) * p.k * (rnn_weights_size(p) + matrix);
  // two tiles or more, to share what a chunk does once with the weights and their gradient
  plan.chunks = chunks_for(plan.tiles > 1 ? plan.tiles / 2 : plan.tiles, flops, backward ? 32 : 256);
  return plan;
}

template <typename Storage>
void forward(const RnnForward<Storage>& p, const RnnPlan& plan, const RnnChunk<compute_type<Storage>>& chunk) {
  with_tile(p, [&](auto type, int) {
    typename decltype(type)::type tile(chunk.scratch, p, nullptr, plan.segment);
    tile.begin_chunk();
    for (int64_t i = chunk.begin; i < chunk.end; ++i) tile.forward(p, i);
  });
}

template <typename Storage>
void backward(const RnnBackward<Storage>& p, const RnnPlan& plan, const RnnChunk<compute_type<Storage>>& chunk) {
  with_tile(p, [&](auto type, int) {
    typename decltype(type)::type tile(chunk.scratch, p, &p, plan.segment);
    tile.begin_chunk();
    for (int64_t i = chunk.begin; i < chunk.end; ++i) tile.backward(p, i);
    tile.end_chunk(chunk.d_weights, chunk.d_matrix);
  });
}

}  // namespace

template <typename Storage>
RnnKernels<Storage> rnn_kernels() {
  return {plan<Storage>, forward<Storage>, backward<Storage>};
}
template RnnKernels<float> rnn_kernels();
template RnnKernels<double> rnn_kernels();
template RnnKernels<half> rnn_kernels();
template RnnKernels<bfloat16> rnn_kernels();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
