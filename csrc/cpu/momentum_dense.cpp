// Dense Q. Small or shared matrices run with samples in lanes, larger ones with rows in lanes (lanes.h). Backward takes
// three passes, each of them a product that keeps its accumulators in registers:
//
//     replay    z_t for every t                          k - 1 products with Q
//     adjoint   s_t for every t, schedule gradients      k products with Q'
//     outer     dQ = -sum_t phi_t s_{t+1} z_t'           one product over t
//
// With one phi for all steps, dphi = -(<sum_t s z', Q> + (sum_t s)'b) falls out of the last pass, unless a proximal map
// ends the steps: it takes one product more in the replay, which keeps v_t too.
//
// Second order runs the same passes on twice the state: y and behind it its tangent, the derivative along a direction X of
// Q, x of b and so on; backward, in the same places, the adjoints of both. Q becomes [Q 0; X Q], and of its gradient the
// two blocks with Q are one sum over twice the terms.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/momentum_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/momentum_step.h"
#include "cpu/momentum_stopping.h"
#include "cpu/simd/tile_matrix.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

// samples in lanes with a matrix each: up to here d is known to the compiler
constexpr int64_t max_static_d = 8;

// Q of one tile: multiply(Q, x, backwards, end) and multiply_transposed hand every vector of Q x, Q'x to end(n, vector).

template <int E>
constexpr int least_dynamic = E == 1 ? max_static_d + 1 : 1;
template <int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply(const TileView<E, M, C>& Q, const C* x, bool backwards, const End& end) {
  row_products<1, least_dynamic<E>>(Q, x, 0, backwards, [&](int, int64_t n, Vector<C> v) { end(n, v); });
}
template <int E, typename M, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply_transposed(const TileView<E, M, C>& Q, const C* x, bool backwards,
                                                 const End& end) {
  column_products<1, least_dynamic<E>>(Q, x, 0, backwards, [&](int, int64_t n, Vector<C> v) { end(n, v); });
}

// samples in lanes, d known to the compiler: the product stays in registers
template <int d, typename C>
struct StaticMatrix {
  const C* data;  // [d, d] vectors

  static constexpr int64_t size() { return d; }
  template <typename End>
  UNROLLED_KERNELS_INLINE void multiply(const C* x, int64_t row, int64_t column, const End& end) const {
    Vector<C> sum[d], xj = load(x);
#pragma GCC unroll 8
    for (int i = 0; i < d; ++i) sum[i] = load(data + i * row) * xj;
#pragma GCC unroll 8
    for (int j = 1; j < d; ++j) {
      xj = load(x + j * lanes<C>);
#pragma GCC unroll 8
      for (int i = 0; i < d; ++i) sum[i] += load(data + i * row + j * column) * xj;
    }
#pragma GCC unroll 8
    for (int i = 0; i < d; ++i) end(i, sum[i]);
  }
};

template <int d, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply(const StaticMatrix<d, C>& Q, const C* x, bool, const End& end) {
  Q.multiply(x, d * lanes<C>, lanes<C>, end);
}
template <int d, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply_transposed(const StaticMatrix<d, C>& Q, const C* x, bool, const End& end) {
  Q.multiply(x, lanes<C>, d * lanes<C>, end);
}

// [Q 0; X Q] for states with their tangents behind them
template <typename Matrix, typename C>
struct DualMatrix {
  Matrix Q, X;  // X.data is nullptr: zero
  C* products;  // a state with its tangent, where a product is left

  UNROLLED_KERNELS_INLINE int64_t size() const { return 2 * Q.size(); }
};
// out = Q x and Q xdot + X x, or Q'x + X'xdot and Q'xdot; not part of what calls them, which would be compiled for longer
template <typename Matrix, typename C>
UNROLLED_KERNELS_NOINLINE void dual_product(const DualMatrix<Matrix, C>& m, const C* x, bool backwards) {
  constexpr int64_t W = lanes<C>;
  const int64_t half = m.Q.size() * W;
  C *out = m.products, *second = out + half;
  row_products<2>(m.Q, x, half, backwards, [&](int v, int64_t n, Vector<C> w) { store(out + v * half + n * W, w); });
  if (!m.X.data) return;
  row_products(m.X, x, backwards, [&](int64_t n, Vector<C> w) { store(second + n * W, load(second + n * W) + w); });
}
template <typename Matrix, typename C>
UNROLLED_KERNELS_NOINLINE void dual_product_transposed(const DualMatrix<Matrix, C>& m, const C* x, bool backwards) {
  constexpr int64_t W = lanes<C>;
  const int64_t half = m.Q.size() * W;
  C* out = m.products;
  column_products<2>(m.Q, x, half, backwards, [&](int v, int64_t n, Vector<C> w) { store(out + v * half + n * W, w); });
  if (!m.X.data) return;
  column_products(m.X, x + half, backwards, [&](int64_t n, Vector<C> w) { store(out + n * W, load(out + n * W) + w); });
}
template <typename Matrix, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply(const DualMatrix<Matrix, C>& m, const C* x, bool backwards, const End& end) {
  dual_product(m, x, backwards);
  for (int64_t n = 0; n < m.size(); ++n) end(n, load(m.products + n * lanes<C>));
}
template <typename Matrix, typename C, typename End>
UNROLLED_KERNELS_INLINE void multiply_transposed(const DualMatrix<Matrix, C>& m, const C* x, bool backwards,
                                                 const End& end) {
  dual_product_transposed(m, x, backwards);
  for (int64_t n = 0; n < m.size(); ++n) end(n, load(m.products + n * lanes<C>));
}
template <typename Matrix>
constexpr bool is_static = false;
template <int d, typename C>
constexpr bool is_static<StaticMatrix<d, C>> = true;
template <typename Matrix>
constexpr bool is_dual = false;
template <typename Matrix, typename C>
constexpr bool is_dual<DualMatrix<Matrix, C>> = true;

// The states of one step after another: every one kept, two in turns, or one that is overwritten.
template <typename C>
struct States {
  C* data = nullptr;
  int64_t row = 0, mask = 0;  // elements of a state; state t is row t & mask

  UNROLLED_KERNELS_INLINE C* at(int64_t t) const { return data + (t & mask) * row; }
};
constexpr int64_t keep_all = -1, keep_two = 1, keep_one = 0;

// The proximal map of one tile.
template <typename C>
struct TileMap {
  Prox prox;
  ProxRows<C> rows;
  ProxSums<C> sums;
  States<C> v;  // backward
};

// The states of one tile, momentum_step.h; a row is `size` vectors.
template <typename C>
struct Trace {
  const C* b;
  States<C> y, m, z;  // z is y without momentum, m is unused
  C* s;               // rows 0 ... k: grad y_t, then s_t; phi_t s_{t+1} once step t is done, if per_step
  C* ybar;            // one row
  bool y0_is_zero, trajectory;
  ScheduleView<C> schedule;
  ScheduleSums<C> sums;
  const TileMap<C>* map;  // nullptr: none
  // second order: the tangents of the coefficients, if they have any, and DualMatrix::products
  const ScheduleView<C>* tangents;
  const C* products;

  // that of step t
  UNROLLED_KERNELS_INLINE StepMap<C> step_map(int64_t t, Vector<C> phi) const {
    const Vector<C> threshold = map->prox == Prox::soft_threshold ? schedule.threshold_at(t) : Vector<C>{};
    return {map->prox, map->rows, phi, threshold, map->v.data ? map->v.at(t) : nullptr};
  }
};

// How many tiles take turns is known to the compiler, and their traces are copied to where nothing else can write: what
// they point to is worked out once and not in every step.

// What the tangents of the coefficients add to those of y_{t+1}, m_{t+1} and z_{t+1}, which lie `half` behind.
template <bool momentum, typename C>
UNROLLED_KERNELS_NOINLINE void add_tangents(const Trace<C>& trace, int64_t t, Vector<C> gamma_next, int64_t half,
                                            int64_t k) {
  const auto d = trace.tangents->template at<momentum>(t);
  const Vector<C> d_gamma_next =
      momentum ? trace.tangents->template at<momentum>(min(t + 1, k - 1)).gamma : Vector<C>{};
  const auto add = [](C* p, Vector<C> v) { store(p, load(p) + v); };
  for (int64_t n = 0; n < half; n += lanes<C>) {
    Vector<C> moved = -d.phi * (load(trace.products + n) + load(trace.b + n));
    if constexpr (momentum) {
      moved += d.beta * load(trace.m.at(t) + n);
      add(trace.m.at(t + 1) + half + n, moved);
      add(trace.z.at(t + 1) + half + n, moved + gamma_next * moved + d_gamma_next * load(trace.m.at(t + 1) + n));
    }
    add(trace.y.at(t + 1) + half + n, moved);
  }
}

// The proximal map of step t, which has left v_t in the place of y_{t+1}.
template <bool momentum, typename C>
UNROLLED_KERNELS_NOINLINE void forward_map(const Trace<C>& trace, int64_t t, Vector<C> phi, Vector<C> gamma_next,
                                           int64_t row) {
  const StepMap<C> map = trace.step_map(t, phi);
  const C* y = trace.y.at(t);
  C *y_next = trace.y.at(t + 1), *m_next = trace.m.at(t + 1), *z_next = trace.z.at(t + 1);
  with_prox(map.prox, [&](auto prox) {
    for (int64_t n = 0; n < row; n += lanes<C>) {
      const Vector<C> v = load(y_next + n);
      if (map.v) store(map.v + n, v);
      const Vector<C> to = proximal_map<decltype(prox)::value>(map.rows, map.phi, map.threshold, n, v);
      store(y_next + n, to);
      if constexpr (momentum) {
        const Vector<C> moved = to - load(y + n);
        store(m_next + n, moved);
        store(z_next + n, to + gamma_next * moved);
      }
    }
  });
}

// The steps `begin` ... `end` - 1 of the k. k - 1 give every z_t. A map within the step, `proximal`, is compiled for every
// form of it. Where products are long it comes after them instead, which takes as long; with d <= 8 it would take a tenth
// longer.
template <bool momentum, bool proximal, int groups, typename Matrix, typename C>
UNROLLED_KERNELS_NOINLINE void replay_steps(const Trace<C> (&all)[groups], const Matrix (&matrices)[groups], int64_t k,
                                            int64_t begin, int64_t end) {
  constexpr int64_t W = lanes<C>;
  Trace<C> traces[groups];
#pragma GCC unroll 2
  for (int g = 0; g < groups; ++g) traces[g] = all[g];
  for (int64_t t = begin; t < end; ++t) {
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      const Trace<C>& s = traces[g];
      const auto c = s.schedule.template at<momentum>(t);
      const Vector<C> gamma_next = momentum ? s.schedule.template at<momentum>(min(t + 1, k - 1)).gamma : Vector<C>{};
      const ForwardRows<C> rows{s.b, s.y.at(t), s.m.at(t), s.y.at(t + 1), s.m.at(t + 1), s.z.at(t + 1)};
      const auto map = [&] {
        if constexpr (proximal) {
          return s.step_map(t, c.phi);
        } else {
          return NoMap();
        }
      }();
      const auto step = [=](int64_t n, Vector<C> Qz) { forward_step<momentum>(rows, c, gamma_next, n * W, Qz, map); };
      if (t == 0 && s.y0_is_zero) {
        for (int64_t n = 0; n < matrices[g].size(); ++n) step(n, Vector<C>{});
      } else {
        multiply(matrices[g], static_cast<const C*>(s.z.at(t)), t % 2 != 0, step);
      }
      if constexpr (is_dual<Matrix>) {
        if (s.tangents) add_tangents<momentum>(all[g], t, gamma_next, matrices[g].Q.size() * W, k);
      } else if constexpr (!is_static<Matrix>) {
        if (s.map) forward_map<momentum>(all[g], t, c.phi, gamma_next, matrices[g].size() * W);
      }
    }
  }
}

template <bool momentum, int groups, typename Matrix, typename C>
void replay(const Trace<C> (&traces)[groups], const Matrix (&matrices)[groups], int64_t k, int64_t begin, int64_t end) {
  if constexpr (is_static<Matrix>) {
    if (traces[0].map) return replay_steps<momentum, true>(traces, matrices, k, begin, end);
  }
  replay_steps<momentum, false>(traces, matrices, k, begin, end);
}

// from `first` to `last` - 1
template <int groups, typename Matrix, typename C>
void replay_blocks(const Trace<C> (&traces)[groups], const Matrix (&matrices)[groups], bool momentum, int64_t d,
                   int64_t k, int64_t first, int64_t last) {
  for_blocks(last - first, groups * matrices[0].size() * d, [&](int64_t begin, int64_t end) {
    begin += first, end += first;
    momentum ? replay<true>(traces, matrices, k, begin, end) : replay<false>(traces, matrices, k, begin, end);
  });
}
template <typename Inputs, int groups, typename Matrix, typename C>
void replay(const Inputs& p, const Trace<C> (&traces)[groups], const Matrix (&matrices)[groups], int64_t first,
            int64_t last) {
  replay_blocks(traces, matrices, p.beta.data != nullptr, p.d, p.k, first, last);
}

template <typename C>
UNROLLED_KERNELS_NOINLINE void adjoint_map(const Trace<C>& trace, int64_t t, Vector<C> phi, int64_t row, C* ybar) {
  ProxTerms<C> terms;
  const StepMap<C> map = trace.step_map(t, phi);
  with_prox(map.prox, [&](auto prox) {
    for (int64_t n = 0; n < row; n += lanes<C>) {
      adjoint_map<decltype(prox)::value>(map, trace.map->sums, n, trace.s + (t + 1) * row, ybar, terms);
    }
  });
  if (trace.sums.phi) {
    trace.sums.add_phi(t, -terms.phi);
    trace.sums.add_threshold(t, -terms.threshold);
  }
}

// What the tangents of the coefficients add to s_t and ybar_t of y, which lie `half` before those of its tangent; then
// weights s_{t+1} for the sums over t.
template <bool momentum, typename C>
UNROLLED_KERNELS_NOINLINE void add_adjoint_tangents(const Trace<C>& trace, int64_t t, const StepCoefficients<C>& c,
                                                    int64_t half, StepSums<C>& sums) {
  auto d = trace.tangents->template at<momentum>(t);
  if (t == 0) d.beta = d.gamma = Vector<C>{};
  const auto add = [](C* p, Vector<C> v) { store(p, load(p) + v); };
  C *const s_t = trace.s + t * 2 * half, *const s = s_t + 2 * half;
  for (int64_t n = 0; n < half; n += lanes<C>) {
    const Vector<C> w = load(trace.products + half + n), a = load(s + half + n), v = d.phi * w;
    if constexpr (momentum) {
      sums.gamma += v * load(trace.m.at(t) + n);
      add(trace.ybar + n, -v);
      add(s_t + n, d.beta * a - v - c.gamma * v - d.gamma * (c.phi * w));
    } else {
      add(s_t + n, -v);
    }
    store(s + n, c.phi * load(s + n) + d.phi * a);
    store(s + half + n, c.phi * a);
  }
}

// s_t for t = last - 1 ... first
template <bool momentum, bool per_step, int groups, typename Matrix, typename C>
UNROLLED_KERNELS_NOINLINE void adjoint(const Trace<C> (&all)[groups], const Matrix (&matrices)[groups], int64_t first,
                                       int64_t last) {
  constexpr int64_t W = lanes<C>;
  Trace<C> traces[groups];
#pragma GCC unroll 2
  for (int g = 0; g < groups; ++g) traces[g] = all[g];
  const int64_t row = matrices[0].size() * W;
  for (int64_t t = last - 1; t >= first; --t) {
#pragma GCC unroll 2
    for (int g = 0; g < groups; ++g) {
      const Trace<C>& trace = traces[g];
      auto c = trace.schedule.template at<momentum>(t);
      if (per_step && trace.map) adjoint_map(all[g], t, c.phi, row, momentum ? trace.ybar : nullptr);
      if (t == 0) c.beta = c.gamma = Vector<C>{};  // there is no m_0: s_0 is ybar_0
      C* const s = trace.s + (t + 1) * row;
      const AdjointRows<C> rows{trace.b, trace.m.at(t), trace.z.at(t), s, trace.s + t * row, trace.ybar};
      const bool trajectory = trace.trajectory;
      StepSums<C> sums;
      const auto step = [&](int64_t n, Vector<C> w) {
        adjoint_step<momentum, per_step>(rows, c, trajectory, n * W, w, sums);
      };
      if (!is_dual<Matrix> && t == 0 && trace.y0_is_zero) {
        // Q's_1 is in dy_0 alone, and in z_0's share of dphi_0
        for (int64_t n = 0; n < matrices[g].size(); ++n) step(n, Vector<C>{});
      } else {
        multiply_transposed(matrices[g], static_cast<const C*>(s), t % 2 != 0, step);
      }
      bool weighted = false;
      if constexpr (is_dual<Matrix>) {
        weighted = trace.tangents != nullptr;
        if (weighted) add_adjoint_tangents<momentum>(all[g], t, c, row / 2, sums);
      }
      if (per_step && !weighted) {
        for (int64_t n = 0; n < row; n += W) store(s + n, c.phi * load(s + n));
      }
      if (trace.sums.phi) {
        if constexpr (per_step) trace.sums.add_phi(t, -sums.phi);
        trace.sums.template add_momentum<momentum>(t, sums.beta, -sums.gamma);
      }
    }
  }
}

template <int groups, typename Matrix, typename C>
void adjoint_blocks(const Trace<C> (&traces)[groups], const Matrix (&matrices)[groups], bool momentum, bool per_step,
                    int64_t d, int64_t k, int64_t first) {
  for_blocks(k - first, groups * matrices[0].size() * d, [&](int64_t begin, int64_t end) {
    const int64_t to = k - end, from = k - begin;
    if (is_dual<Matrix> || per_step) {
      momentum ? adjoint<true, true>(traces, matrices, to, from) : adjoint<false, true>(traces, matrices, to, from);
    } else if constexpr (!is_dual<Matrix>) {
      momentum ? adjoint<true, false>(traces, matrices, to, from) : adjoint<false, false>(traces, matrices, to, from);
    }
  });
}
template <typename Inputs, int groups, typename Matrix, typename C>
void adjoint(const Inputs& p, const Trace<C> (&traces)[groups], const Matrix (&matrices)[groups], bool per_step,
             int64_t first) {
  adjoint_blocks(traces, matrices, p.beta.data != nullptr, per_step, p.d, p.k, first);
}

// What second order takes beside the tile: X, the tangents of the coefficients, and DualMatrix::products.
template <typename Storage, template <typename> class Layout, template <typename> class Operand>
class TileTangents {
  using C = compute_type<Storage>;

 public:
  TileTangents(Arena& arena, const MomentumInputs<Storage>& p, const MomentumTangents<Storage>& tangents, int64_t size,
               int64_t steps)
      : p_(tangents),
        inputs_(with_matrix(p, tangents)),
        X_(arena, inputs_, size),
        schedule_(arena, tangents, steps),
        row_(size * lanes<C>),
        products_(arena.take<C>(2 * row_)) {}

  void stage(const Layout<C>& tile, bool first_of_chunk) {
    if (p_.matrix) X_.stage(tile, first_of_chunk);
    if (p_.phi.data) schedule_.stage(tile, first_of_chunk);
    view_ = schedule_.view();
    fill_zero(products_, 2 * row_);
  }

  // x, or zeros
  void load_state(const Layout<C>& tile, const Storage* x, C* out) const {
    x ? tile.load_state(x, tile.d, out) : fill_zero(out, row_);
  }

  template <typename Matrix>
  DualMatrix<Matrix, C> dual(const Matrix& Q) const {
    return {Q, p_.matrix ? X_.view() : Matrix{}, products_};
  }
  const MomentumTangents<Storage>& directions() const { return p_; }
  const ScheduleView<C>* schedule() const { return p_.phi.data ? &view_ : nullptr; }
  const C* products() const { return products_; }

 private:
  static MomentumInputs<Storage> with_matrix(MomentumInputs<Storage> p, const MomentumTangents<Storage>& tangents) {
    p.matrix = tangents.matrix, p.matrix_stride = tangents.matrix_stride, p.transposed = false;
    return p;
  }

  const MomentumTangents<Storage>& p_;
  MomentumInputs<Storage> inputs_;
  TileMatrix<Storage, Layout, Operand> X_;
  Schedule<C> schedule_;
  ScheduleView<C> view_{};
  int64_t row_;
  C* products_;
};
struct NoTangents {};

// One tile and its scratch. `dual`: its states have their tangents behind them.
template <typename Storage, template <typename> class Layout, template <typename> class Operand, bool dual>
class DenseTile {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;

 public:
  static constexpr bool may_take_turns = Layout<C>::E == 1 && std::is_same_v<Operand<C>, VectorOperand<C>> && !dual;

  // `backward` may be nullptr; of what it points to, the constructor reads which outputs are wanted
  UNROLLED_KERNELS_NOINLINE DenseTile(Arena& arena, const MomentumInputs<Storage>& p,
                                      const MomentumBackward<Storage>* backward, int64_t steps)
      : p_(p),
        tile_{p.B, p.d, 0, 0},
        row_(tile_.size() * W),
        width_(dual ? 2 * row_ : row_),
        schedule_(arena, p, steps),
        gradient_(arena, backward ? *backward : MomentumBackward<Storage>{}, backward ? steps : 0, false),
        Q_(arena, p, tile_.size()),
        tangents_(tangents(arena, p, backward, tile_.size(), steps)),
        b_(arena.take<C>(width_)),
        // a step reads all of z_t before the last of z_{t+1} is there; y_t and m_t are overwritten as they are read,
        // unless a proximal map takes y_t once more
        z_(states(arena, backward || (p.trajectory && !p.beta.data) ? keep_all : keep_two)),
        y_(!p.beta.data ? z_
                        : states(arena, p.trajectory && (dual || !backward)   ? keep_all
                                        : p.prox == Prox::none && !p.stopping ? keep_one
                                                                              : keep_two)),
        m_(!p.beta.data ? States<C>{} : states(arena, backward ? keep_all : keep_one)),
        s_(backward ? arena.take<C>((p.k + 1) * width_) : nullptr),
        ybar_(backward ? arena.take<C>(width_) : nullptr),
        db_(backward ? arena.take<C>(row_) : nullptr),
        dQ_(backward ? arena.take<C>(Q_.image_size()) : nullptr),
        stopped_(p.stopping ? arena.take<C>(row_) : nullptr) {
    map_.prox = p.prox;
    if (p.prox == Prox::none) return;
    const auto take = [&](bool present) { return present ? arena.take<C>(row_) : nullptr; };
    lower_ = take(p.lower.data), upper_ = take(p.upper.data), weight_ = take(p.weight.data);
    map_.rows = {lower_, upper_, weight_};
    if (!backward) return;
    map_.sums = {take(backward->d_lower), take(backward->d_upper), take(backward->d_weight)};
    map_.v = states(arena, backward->minimizer ? keep_one : keep_all);
  }

  UNROLLED_KERNELS_NOINLINE void stage(int64_t index, bool first_of_chunk) {
    tile_.first = index * tile_.samples;
    tile_.count = min(tile_.samples, p_.B - tile_.first);
    schedule_.stage(tile_, first_of_chunk);
    Q_.stage(tile_, first_of_chunk);
    tile_.load_state(p_.b, p_.b_stride, b_);
    if (p_.prox != Prox::none) {
      stage(p_.lower, lower_);
      stage(p_.upper, upper_);
      stage(p_.weight, weight_);
    }
    if (p_.y0) {
      tile_.load_state(p_.y0, p_.y0_stride, y_.data);
    } else {
      fill_zero(y_.data, row_);
    }
    if constexpr (dual) {
      tangents_.stage(tile_, first_of_chunk);
      tangents_.load_state(tile_, tangents_.directions().b, b_ + row_);
      tangents_.load_state(tile_, tangents_.directions().y0, y_.data + row_);
    }
    if (!p_.beta.data) return;
    copy_vectors(y_.data, width_, z_.data);
    fill_zero(m_.data, width_);
  }

  const TileMatrix<Storage, Layout, Operand>& Q() const { return Q_; }
  auto dual_matrix() const { return tangents_.dual(Q_.view()); }
  int64_t work(int64_t products) const { return products * tile_.size() * p_.d; }

  UNROLLED_KERNELS_NOINLINE Trace<C> trace() const {
    Trace<C> trace{b_,
                   y_,
                   m_,
                   z_,
                   s_,
                   ybar_,
                   !starts(),
                   p_.trajectory,
                   schedule_.view(),
                   gradient_.sums(),
                   map_.prox == Prox::none ? nullptr : &map_,
                   nullptr,
                   nullptr};
    if constexpr (dual) trace.tangents = tangents_.schedule(), trace.products = tangents_.products();
    return trace;
  }

  void begin_moving() { moving_.begin(tile_.first, tile_.count); }
  // how many samples go on after step t
  int64_t stop_after(int64_t t) {
    moving_.after(*p_.stopping, t, p_.k, y_.at(t), y_.at(t + 1), tile_.size(), W, stopped_);
    return moving_.count();
  }
  void store_stopped(Storage* y) const { tile_.store_state(stopped_, y); }

  void store_forward(Storage* y) const {
    for (int64_t t = p_.trajectory ? 0 : p_.k; t <= p_.k; ++t) {
      tile_.store_state(y_.at(t), p_.trajectory ? y + t * p_.B * p_.d : y);
    }
  }

  void store_begun(const MomentumForward<Storage>& p) const {
    tile_.store_state(y_.at(p.begun), p.y_begun);
    if (p.m_begun) tile_.store_state(m_.at(p.begun), p.m_begun);
  }

  UNROLLED_KERNELS_NOINLINE void stage_cotangents(const MomentumBackward<Storage>& p, bool first_of_chunk) {
    if (p.m0) {
      tile_.load_state(p.m0, p.d, m_.data);
      const Vector<C> gamma = schedule_.view().template at<true>(0).gamma;
      for (int64_t n = 0; n < row_; n += W) store(z_.data + n, load(z_.data + n) + gamma * load(m_.data + n));
    }
    if (gradient_.wanted()) gradient_.begin_tile(first_of_chunk);
    if (first_of_chunk && shares_matrix(p) && p.d_matrix) fill_zero(dQ_, Q_.image_size());
    for (int64_t t = p.trajectory ? 0 : p.k; t <= p.k; ++t) {
      // that of the tangent, which is behind that of y
      if (dual) fill_zero(s_ + t * width_, row_);
      tile_.load_state(p.grad_y + (p.trajectory ? t * p.B * p.d : 0), p.d, s_ + (t + 1) * width_ - row_);
    }
    copy_vectors(s_ + p.k * width_, width_, ybar_);
    for (C* sums : {map_.sums.lower, map_.sums.upper, map_.sums.weight}) {
      if (sums) fill_zero(sums, row_);
    }
    if (!p.minimizer || p.prox == Prox::none) return;
    C* const v = map_.v.data;
    tile_.load_state(p.minimizer, p.d, v);
    for (int64_t n = 0; n < row_; n += W) store(v + n, side_of<C>(p.prox, map_.rows, n, load(v + n)));
  }

  UNROLLED_KERNELS_NOINLINE void store_backward(const MomentumBackward<Storage>& p, bool per_step) {
    const Vector<C> scale = per_step || p.k == 0 ? broadcast(C(-1)) : -schedule_.view().template at<false>(0).phi;
    Vector<C> phi_sum{};
    const bool sum_wanted = p.db || p.minimizer || (!per_step && gradient_.wanted());
    for (int64_t n = 0; sum_wanted && n < row_; n += W) {
      Vector<C> partial[4] = {};
      const C* a = s_ + width_ + n;
      int64_t t = 0;
      for (; t + 4 <= p.k; t += 4) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) partial[i] += load(a + (t + i) * width_);
      }
      for (; t < p.k; ++t) partial[0] += load(a + t * width_);
      const Vector<C> sum = (partial[0] + partial[1]) + (partial[2] + partial[3]);
      phi_sum += sum * load(b_ + n);
      store(db_ + n, scale * sum);
    }
    if (p.db) tile_.store_state(db_, p.db);
    if (p.d_matrix && p.minimizer) {
      tile_.load_state(p.minimizer, p.d, z_.data);
      Q_.outer(p, tile_, db_, z_.data, 1, broadcast(C(1)), false, dQ_);
    } else if (p.d_matrix) {
      const int64_t first = starts() || p.k == 0 ? 0 : 1;  // z_0 = y_0 may be zero
      phi_sum += Q_.outer(p, tile_, s_ + (first + 1) * width_, z_.at(first), (p.k - first) * (dual ? 2 : 1), scale,
                          !per_step && gradient_.wanted(), dQ_);
    }
    if (gradient_.wanted()) {
      if (!per_step && p.k > 0) gradient_.sums().add_phi(0, -phi_sum);
      gradient_.end_tile(tile_);
    }
    if (p.dy0) tile_.store_state(s_, p.dy0);
    if constexpr (dual) store_tangent(tangents_.directions().y);
    if (p.d_lower) tile_.store_state(map_.sums.lower, p.d_lower);
    if (p.d_upper) tile_.store_state(map_.sums.upper, p.d_upper);
    if (p.d_weight) tile_.store_state(map_.sums.weight, p.d_weight);
  }

  void end_chunk(const MomentumChunk<C>& chunk) const {
    if (gradient_.wanted()) gradient_.end_chunk(chunk.schedule);
    if (chunk.d_matrix) Q_.add_sum(dQ_, chunk.d_matrix);
  }

 private:
  States<C> states(Arena& arena, int64_t mask) const {
    const int64_t rows = mask == keep_all ? p_.k + 1 : mask + 1;
    return {arena.take<C>(rows * width_), width_, mask};
  }

  using Tangents = std::conditional_t<dual, TileTangents<Storage, Layout, Operand>, NoTangents>;
  static Tangents tangents(Arena& arena, const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward,
                           int64_t size, int64_t steps) {
    if constexpr (dual) {
      return Tangents(arena, p, *backward->tangents, size, steps);
    } else {
      return {};
    }
  }
  // whether there is a y_0 that is not zero, or a tangent of it
  bool starts() const {
    if constexpr (dual) {
      if (tangents_.directions().y0) return true;
    }
    return p_.y0 != nullptr;
  }
  void store_tangent(Storage* y) const {
    if (!y) return;
    for (int64_t t = p_.trajectory ? 0 : p_.k; t <= p_.k; ++t) {
      tile_.store_state(y_.at(t) + row_, p_.trajectory ? y + t * p_.B * p_.d : y);
    }
  }

  void stage(const Rows<C>& x, C* out) const {
    if (!out) return;
    if (!x.single) return tile_.load_state(x.data, x.batch_stride, out);
    const Vector<C> number = tile_.coefficient(x.data, 0);
    for (int64_t n = 0; n < row_; n += W) store(out + n, number);
    // lanes without an element stay at zero
    constexpr int E = Layout<C>::E;
    for (int64_t l = 0; l < W; ++l) {
      if ((tile_.size() - 1) * E + l % E >= p_.d) out[row_ - W + l] = 0;
    }
  }

  const MomentumInputs<Storage>& p_;
  Layout<C> tile_;
  int64_t row_, width_;  // elements of a state, without and with its tangent
  Schedule<C> schedule_;
  ScheduleGradient<C> gradient_;
  TileMatrix<Storage, Layout, Operand> Q_;
  Tangents tangents_;
  C* b_;
  States<C> z_, y_, m_;
  C *s_, *ybar_, *db_, *dQ_;
  // of samples that stop: where they did
  C* stopped_;
  MovingSamples<Layout<C>::E, C> moving_;
  // of a proximal map
  C *lower_ = nullptr, *upper_ = nullptr, *weight_ = nullptr;
  TileMap<C> map_;
};

// Tiles that take turns in every step, where d is known to the compiler: with few rows one tile alone would wait for its
// own results.
constexpr int max_groups = 2;
constexpr int groups_for(int64_t d) { return d <= max_static_d ? max_groups : 1; }

template <typename C, typename F>
void with_static_d(int64_t d, F f) {
  using std::integral_constant;
  switch (d) {
    case 1: return f(integral_constant<int, 1>());
    case 2: return f(integral_constant<int, 2>());
    case 3: return f(integral_constant<int, 3>());
    case 4: return f(integral_constant<int, 4>());
    case 5: return f(integral_constant<int, 5>());
    case 6: return f(integral_constant<int, 6>());
    case 7: return f(integral_constant<int, 7>());
    case 8: return f(integral_constant<int, 8>());
  }
}

// Calls f(traces, matrices) of the tiles in turn, `second` only if there are two, with the type of matrix that suits.
template <typename C, typename Tile, typename F>
void with_matrices(const Tile& first, const Tile& second, int active, int64_t d, F f) {
  if constexpr (Tile::may_take_turns) {
    if (d <= max_static_d) {
      return with_static_d<C>(d, [&](auto size) {
        using Matrix = StaticMatrix<decltype(size)::value, C>;
        if (active == 2) {
          const Trace<C> traces[2] = {first.trace(), second.trace()};
          const Matrix matrices[2] = {{first.Q().view().data}, {second.Q().view().data}};
          return f(traces, matrices);
        }
        const Trace<C> traces[1] = {first.trace()};
        const Matrix matrices[1] = {{first.Q().view().data}};
        f(traces, matrices);
      });
    }
  }
  const Trace<C> traces[1] = {first.trace()};
  const decltype(first.Q().view()) matrices[1] = {first.Q().view()};
  f(traces, matrices);
}

// The tiles that take turns, their scratch, and the walk over a chunk.
template <typename Storage_, template <typename> class Layout, template <typename> class Operand, bool dual>
class TileGroups {
 public:
  using Storage = Storage_;
  using C = compute_type<Storage>;
  using Tile = DenseTile<Storage, Layout, Operand, dual>;
  static constexpr int64_t samples = Layout<C>::samples;
  // the matrices of a tile, [d, d] vectors of E lanes a sample, fit 16 KiB
  static constexpr int64_t max_d = samples == 1 ? INT64_MAX : Layout<C>::E == 1 ? 16 : 45;
  static constexpr int64_t max_copied_d = max_static_d;

  TileGroups(void* scratch, const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward, int64_t steps)
      : groups_(Tile::may_take_turns ? groups_for(p.d) : 1),
        arena_(scratch),
        none_(nullptr),
        first_(arena_, p, backward, steps),
        second_(groups_ > 1 ? arena_ : none_, p, backward, steps) {}

  size_t scratch_bytes() const { return arena_.used(); }

  void forward(const MomentumForward<Storage>& p, const MomentumChunk<C>& chunk) {
    Poll poll;
    for (int64_t i = chunk.begin; i < chunk.end; i += groups_) {
      const int active = static_cast<int>(min(groups_, chunk.end - i));
      for (int g = 0; g < active; ++g) tiles_[g]->stage(i + g, i == chunk.begin);
      if (p.stopping) {
        run_until_stopped(p, active);
        poll.after(active * first_.work(p.k));
        continue;
      }
      const auto run = [&](int64_t begin, int64_t end) {
        with_matrices<C>(first_, second_, active, p.d,
                         [&](const auto& traces, const auto& matrices) { replay(p, traces, matrices, begin, end); });
      };
      if (p.y_begun) {
        run(0, p.begun);
        for (int g = 0; g < active; ++g) tiles_[g]->store_begun(p);
      }
      run(p.begun, p.k);
      for (int g = 0; g < active; ++g) tiles_[g]->store_forward(p.y);
      poll.after(active * first_.work(p.k));
    }
  }

  void backward(const MomentumBackward<Storage>& p, const MomentumChunk<C>& chunk, bool per_step) {
    Poll poll;
    for (int64_t i = chunk.begin; i < chunk.end; i += groups_) {
      const int active = static_cast<int>(min(groups_, chunk.end - i));
      for (int g = 0; g < active; ++g) {
        tiles_[g]->stage(i + g, i == chunk.begin);
        tiles_[g]->stage_cotangents(p, i == chunk.begin);
      }
      if constexpr (dual) {
        const Trace<C> traces[1] = {first_.trace()};
        const decltype(first_.dual_matrix()) matrices[1] = {first_.dual_matrix()};
        replay(p, traces, matrices, 0, p.k);
        adjoint(p, traces, matrices, true, 0);
        first_.store_backward(p, true);
      } else {
        with_matrices<C>(first_, second_, active, p.d, [&](const auto& traces, const auto& matrices) {
          if (needs_iterates(p)) replay(p, traces, matrices, 0, p.prox == Prox::none ? p.k - 1 : p.k);
          // s_0 is dy_0, and dphi_0 comes with it or of dQ; dbeta_0 and dgamma_0 are zero with m_0
          adjoint(p, traces, matrices, per_step, per_step || p.dy0 || p.m0 ? 0 : 1);
        });
        for (int g = 0; g < active; ++g) tiles_[g]->store_backward(p, per_step);
      }
      poll.after(3 * active * first_.work(p.k));
    }
    for (int g = 0; g < min(groups_, chunk.end - chunk.begin); ++g) tiles_[g]->end_chunk(chunk);
  }

 private:
  void run_until_stopped(const MomentumForward<Storage>& p, int active) {
    for (int g = 0; g < active; ++g) tiles_[g]->begin_moving();
    with_matrices<C>(first_, second_, active, p.d, [&](const auto& traces, const auto& matrices) {
      for (int64_t t = 0, moving = 1; moving > 0; ++t) {
        replay(p, traces, matrices, t, t + 1);
        moving = 0;
        for (int g = 0; g < active; ++g) moving += tiles_[g]->stop_after(t);
      }
    });
    for (int g = 0; g < active; ++g) tiles_[g]->store_stopped(p.y);
  }

  int64_t groups_;
  Arena arena_, none_;
  Tile first_, second_;
  Tile* const tiles_[max_groups] = {&first_, &second_};
};

template <typename Storage, template <typename> class Layout, template <typename> class Operand>
using DenseTiles = TileGroups<Storage, Layout, Operand, false>;
template <typename Storage, template <typename> class Layout, template <typename> class Operand>
using SecondOrderTiles = TileGroups<Storage, Layout, Operand, true>;

// one phi, beta and gamma for all steps, and dQ at hand for dphi, which then comes of nothing else
template <typename Storage>
bool constant_in_backward(const MomentumBackward<Storage>& p) {
  return constant_schedule(p) && (p.d_matrix || !p.dphi) && p.prox == Prox::none;
}

template <typename Storage>
MomentumPlan plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
  if constexpr (std::is_same_v<Storage, compute_type<Storage>>) {
    if (backward && backward->tangents) {
      const double flops = 16.0 * static_cast<double>(p.B) * p.d * p.d * p.k;
      return matrix_plan<SecondOrderTiles>(p, backward, constant_schedule(p), flops);
    }
  }
  const double flops = (backward ? 6.0 : 2.0) * static_cast<double>(p.B) * p.d * p.d * p.k;
  const bool constant = backward ? constant_in_backward(*backward) : constant_schedule(p);
  return matrix_plan<DenseTiles>(p, backward, constant, flops);
}

template <typename Storage>
void forward(const MomentumForward<Storage>& p, const MomentumPlan& plan,
             const MomentumChunk<compute_type<Storage>>& chunk) {
  with_layout<DenseTiles>(p, [&](auto type) {
    typename decltype(type)::type(chunk.scratch, p, nullptr, plan.schedule_steps).forward(p, chunk);
  });
}

template <typename Storage>
void backward(const MomentumBackward<Storage>& p, const MomentumPlan& plan,
              const MomentumChunk<compute_type<Storage>>& chunk) {
  if constexpr (std::is_same_v<Storage, compute_type<Storage>>) {
    if (p.tangents) {
      return with_layout<SecondOrderTiles>(p, [&](auto type) {
        typename decltype(type)::type(chunk.scratch, p, &p, plan.schedule_steps).backward(p, chunk, true);
      });
    }
  }
  with_layout<DenseTiles>(p, [&](auto type) {
    typename decltype(type)::type(chunk.scratch, p, &p, plan.schedule_steps)
        .backward(p, chunk, !constant_in_backward(p));
  });
}

}  // namespace

template <typename Storage>
MomentumKernels<Storage> momentum_dense() {
  return {plan<Storage>, forward<Storage>, backward<Storage>};
}
template MomentumKernels<float> momentum_dense();
template MomentumKernels<double> momentum_dense();
template MomentumKernels<half> momentum_dense();
template MomentumKernels<bfloat16> momentum_dense();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
