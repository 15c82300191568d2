// One matrix for the batch: a tile of samples is rows, and their products with the matrix, which is packed once for all
// of them, are products of matrices (packed.h). The matrix' gradient is one product too: backward leaves the rows of
// both factors. Where several gradients fit the caches, tiles that follow each other add theirs to one of them at once;
// a larger one is the product of the rows of a slab of tiles, cut into rows of the gradient.
//
//     dense      a row for each step: a_t = -phi_t s_{t+1} and z_t           dQ = sum a_t z_t'
//     spectral   [b; y_0; ybar_t] and [dbh; dyh_0; yh_t] (momentum_spectral.cpp); without y_0 it has no row
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/momentum_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/momentum_elementwise.h"
#include "cpu/momentum_step.h"
#include "cpu/momentum_stopping.h"
#include "cpu/simd/packed.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

template <typename Storage>
class DenseRows {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;

 public:
  DenseRows(void* scratch, const MomentumInputs<Storage>& p, const SharedMomentumPlan& plan,
            const MomentumBackward<Storage>* backward)
      : p_(p), arena_(scratch), panels_(plan.panels), steps_(plan.schedule_steps), size_(plan.tile_rows * plan.row) {
    const bool momentum = p.beta.data;
    b_ = arena_.take<C>(size_);
    z_ = backward ? nullptr : arena_.take<C>(2 * size_);
    y_ = momentum ? arena_.take<C>(size_ * (p.stopping ? 2 : 1)) : nullptr;
    m_ = momentum ? arena_.take<C>(size_ * (backward ? p.k + 1 : 1)) : nullptr;
    s_ = backward ? arena_.take<C>(2 * size_) : nullptr;
    ybar_ = backward ? arena_.take<C>(size_) : nullptr;
    db_ = backward ? arena_.take<C>(size_) : nullptr;
    sums_ = backward ? arena_.take<C>(4 * plan.tile_rows * W) : nullptr;
    stopped_ = p.stopping ? arena_.take<C>(size_) : nullptr;
    moving_ = p.stopping ? arena_.take<MovingSamples<W, C>>(plan.tile_rows) : nullptr;
    if (p.prox == Prox::none) return;
    const auto take = [&](bool present) { return present ? arena_.take<C>(size_) : nullptr; };
    map_ = {take(p.lower.data), take(p.upper.data), take(p.weight.data)};
    if (!backward) return;
    v_size_ = backward->minimizer ? 0 : size_;
    v_ = arena_.take<C>(backward->minimizer ? size_ : size_ * p.k);
    map_sums_ = {take(backward->d_lower), take(backward->d_upper), take(backward->d_weight)};
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void forward(const MomentumForward<Storage>& p, const SharedMomentumTile<C>& tile) {
    Poll poll;
    begin(tile);
    start(rows(z_));
    for (int64_t r = 0; p.stopping && r < count_; ++r) moving_[r].begin(first_ + r, 1);
    for (int64_t t = 0;; ++t) {
      const Panels<C> z = rows(z_ + t % 2 * size_);
      if (p.y_begun && t == p.begun) {
        store_rows(p.beta.data ? rows(y_) : z, p.y_begun);
        if (p.m_begun) store_rows(rows(m_), p.m_begun);
      }
      if (p.trajectory || t == p.k) store_rows(p.beta.data ? rows(y_) : z, p.y + (p.trajectory ? t * p.B * p.d : 0));
      if (t == p.k) return;
      const Panels<C> z_next = rows(z_ + (t + 1) % 2 * size_);
      step(t, tile.packed, z, z_next, rows(m_), rows(m_), nullptr);
      poll.after(work());
      if (!p.stopping) continue;
      const bool momentum = p.beta.data;
      if (!stop_after(t, momentum ? y(t) : z, momentum ? y(t + 1) : z_next)) return store_rows(rows(stopped_), p.y);
    }
  }

  void backward(const MomentumBackward<Storage>& p, const SharedMomentumTile<C>& tile) {
    Poll poll;
    begin(tile);
    const int64_t k = p.k;
    // of step t: rows t count ... (t + 1) count - 1 of both factors of dQ
    const Panels<C> a{tile.a, (p.minimizer ? 1 : max(k, 1)) * count_ * W}, z{tile.z, a.plane};
    start(z);
    if (p.m0) start_moving(p, z);
    const int64_t replayed = needs_iterates(p) ? k : 0;
    // y_{t+1} does not tell whether v_t was on a bound or beyond
    if (p.iterates && p.prox != Prox::box && std::is_same_v<Storage, C>) {
      for (int64_t t = 1; t < replayed; ++t) load_iterate(p, t, z.from(t * count_));
      for (int64_t t = 0; v_ && t < replayed; ++t) load_side(p.iterates + (t + 1) * p.B * p.d, v(t));
    } else {
      // the last step is taken for v_(k-1) alone
      for (int64_t t = 0; t + 1 < replayed || (t < replayed && v_); ++t) {
        const Panels<C> z_next = t + 1 < k ? z.from((t + 1) * count_) : rows(ybar_);
        step(t, tile.packed, z.from(t * count_), z_next, m(t), m(t + 1), v(t));
        poll.after(work());
      }
    }
    if (v_ && p.minimizer) load_side(p.minimizer, v_);
    load_rows(p.grad_y + (p.trajectory ? k * p.B * p.d : 0), p.d, s(k));
    copy_vectors(s(k).data, count_ * panels_ * W, ybar_);
    fill_zero(db_, count_ * panels_ * W);
    C* const bounds[] = {map_sums_.lower, map_sums_.upper, map_sums_.weight};
    for (C* sums : bounds) {
      if (sums) fill_zero(sums, count_ * panels_ * W);
    }
    for (int64_t t = k - 1; t >= 0; --t) {
      // Q's_1 is in dy_0 alone if z_0 = 0
      const C* packed = t == 0 && !p.y0 && !p.dy0 ? nullptr : tile.packed_transposed;
      if (p.trajectory) load_rows(p.grad_y + t * p.B * p.d, p.d, s(t));
      fill_zero(sums_, 4 * count_ * W);
      if (v_) end_of_step(t);
      const Panels<C> a_t = p.d_matrix && !p.minimizer ? a.from(t * count_) : rows(nullptr);
      if (p.beta.data) {
        p.dphi ? adjoint<true, true>(t, packed, z, a_t) : adjoint<true, false>(t, packed, z, a_t);
      } else {
        p.dphi ? adjoint<false, true>(t, packed, z, a_t) : adjoint<false, false>(t, packed, z, a_t);
      }
      if (p.dphi) add_sums(p, t, tile.schedule);
      poll.after(work());
    }
    if (p.d_matrix && p.minimizer) {
      load_rows(p.minimizer, p.d, z);
      for (int64_t i = 0; i < panels_; ++i) copy_vectors(rows(db_).at(0, i), count_ * W, a.at(0, i));
    }
    if (p.db) store_rows(rows(db_), p.db);
    if (p.dy0) store_rows(s(0), p.dy0);
    C* const outputs[] = {p.d_lower, p.d_upper, p.d_weight};
    for (int i = 0; i < 3; ++i) {
      if (outputs[i]) store_rows(rows(bounds[i]), outputs[i]);
    }
  }

 private:
  // of a product
  int64_t work() const { return count_ * panels_ * p_.d; }
  // rows of the tile
  Panels<C> rows(C* data) const { return {data, count_ * W}; }
  // with momentum: overwritten as it is read, unless what it moves by is to be known
  Panels<C> y(int64_t t) const { return rows(p_.stopping ? y_ + t % 2 * size_ : y_); }
  Panels<C> s(int64_t t) const { return rows(s_ + t % 2 * size_); }
  Panels<C> m(int64_t t) const { return rows(m_ ? m_ + t * size_ : nullptr); }
  C* v(int64_t t) const { return v_ ? v_ + t * v_size_ : nullptr; }

  void begin(const SharedMomentumTile<C>& tile) {
    first_ = tile.begin, count_ = tile.end - tile.begin;
    load_rows(p_.b, p_.b_stride, rows(b_));
    load_bound(p_.lower, map_.lower);
    load_bound(p_.upper, map_.upper);
    load_bound(p_.weight, map_.weight);
  }
  void load_bound(const Rows<C>& x, C* out) const {
    if (!out) return;
    if (!x.single) return load_rows(x.data, x.batch_stride, rows(out));
    for (int64_t i = 0; i < panels_; ++i) {
      const Vector<C> number = keep_lanes<C>(broadcast(*x.data), min(p_.d - i * W, W));
      for (int64_t r = 0; r < count_; ++r) store(rows(out).at(r, i), number);
    }
  }

  UNROLLED_KERNELS_INLINE Vector<C> coefficient(const Coefficient<C>& c, int64_t r, int64_t t) const {
    return broadcast(c.data[(first_ + r) * c.batch_stride + t * c.step_stride]);
  }
  template <bool momentum>
  UNROLLED_KERNELS_INLINE StepCoefficients<C> coefficients(int64_t r, int64_t t) const {
    const auto at = [&](const Coefficient<C>& c) { return coefficient(c, r, t); };
    if constexpr (!momentum) return {at(p_.phi), Vector<C>{}, Vector<C>{}};
    return {at(p_.phi), at(p_.beta), at(p_.gamma)};
  }

  template <typename T>
  void load_rows(const T* x, int64_t stride, Panels<C> out) const {
    const T* end = x + (p_.B - 1) * stride + p_.d;
    for (int64_t r = 0; r < count_; ++r) load_panels(x + (first_ + r) * stride, p_.d, end, out, r);
  }
  template <typename T>
  void store_rows(Panels<C> in, T* x) const {
    for (int64_t r = 0; r < count_; ++r) store_panels(in, r, p_.d, x + (first_ + r) * p_.d);
  }

  // y_0, z_0 and m_0
  void start(Panels<C> z) const {
    if (p_.y0) {
      load_rows(p_.y0, p_.y0_stride, z);
    } else {
      for (int64_t i = 0; i < panels_; ++i) fill_zero(z.at(0, i), count_ * W);
    }
    if (!p_.beta.data) return;
    for (int64_t i = 0; i < panels_; ++i) copy_vectors(z.at(0, i), count_ * W, rows(y_).at(0, i));
    fill_zero(m_, count_ * panels_ * W);
  }

  // m_0 that is not zero, and z_0 with it
  UNROLLED_KERNELS_NOINLINE void start_moving(const MomentumBackward<Storage>& p, Panels<C> z) const {
    load_rows(p.m0, p.d, m(0));
    for (int64_t r = 0; r < count_; ++r) {
      const Vector<C> gamma = coefficients<true>(r, 0).gamma;
      for (int64_t i = 0; i < panels_; ++i) store(z.at(r, i), load(z.at(r, i)) + gamma * load(m(0).at(r, i)));
    }
  }

  // z_t and m_t of iterates that were kept
  UNROLLED_KERNELS_NOINLINE void load_iterate(const MomentumBackward<Storage>& p, int64_t t, Panels<C> z) const {
    const int64_t size = p.B * p.d;
    load_rows(p.iterates + t * size, p.d, z);
    if (!p.beta.data) return;
    load_rows(p.iterates + (t - 1) * size, p.d, m(t));
    for (int64_t r = 0; r < count_; ++r) {
      const Vector<C> gamma = coefficients<true>(r, t).gamma;
      for (int64_t i = 0; i < panels_; ++i) {
        const Vector<C> y = load(z.at(r, i)), m_t = y - load(m(t).at(r, i));
        store(m(t).at(r, i), m_t);
        store(z.at(r, i), y + gamma * m_t);
      }
    }
  }

  // what y says of v
  UNROLLED_KERNELS_NOINLINE void load_side(const Storage* y, C* v) const {
    const ProxRows<C> map{map_.lower, map_.upper, map_.weight};
    load_rows(y, p_.d, rows(v));
    for (int64_t n = 0; n < count_ * panels_ * W; n += W) store(v + n, side_of<C>(p_.prox, map, n, load(v + n)));
  }

  void step(int64_t t, const C* packed, Panels<C> z, Panels<C> z_next, Panels<C> m, Panels<C> m_next, C* v) const {
    if (p_.prox == Prox::none) {
      p_.beta.data ? step<true, false>(t, packed, z, z_next, m, m_next, v)
                   : step<false, false>(t, packed, z, z_next, m, m_next, v);
    } else {
      p_.beta.data ? step<true, true>(t, packed, z, z_next, m, m_next, v)
                   : step<false, true>(t, packed, z, z_next, m, m_next, v);
    }
  }

  // of step t, at vector i of row r
  UNROLLED_KERNELS_INLINE StepMap<C> step_map(int64_t t, int64_t r, int64_t i, Vector<C> phi, C* v) const {
    const auto at = [&](C* data) { return data ? rows(data).at(r, i) : nullptr; };
    const Vector<C> threshold = p_.threshold.data ? coefficient(p_.threshold, r, t) : Vector<C>{};
    return {p_.prox, {at(map_.lower), at(map_.upper), at(map_.weight)}, phi, threshold, at(v)};
  }

  // end(row, panel, vector) of the product of x with what is packed, or of zeros
  template <typename End>
  UNROLLED_KERNELS_INLINE void for_products(const C* packed, Panels<C> x, const End& end) const {
    if (packed) return multiply_rows<C>(x, count_, packed, p_.d, end);
    for (int64_t r = 0; r < count_; ++r) {
      for (int64_t i = 0; i < panels_; ++i) end(r, i, Vector<C>{});
    }
  }

  template <bool momentum, bool proximal>
  UNROLLED_KERNELS_NOINLINE void step(int64_t t, const C* packed, Panels<C> z, Panels<C> z_next, Panels<C> m,
                                      Panels<C> m_next, C* v) const {
    const Panels<C> b = rows(b_), y = momentum ? this->y(t) : z, y_next = momentum ? this->y(t + 1) : z_next;
    const auto end = [&](int64_t r, int64_t i, Vector<C> Qz) {
      const auto c = coefficients<momentum>(r, t);
      const Vector<C> gamma_next = coefficients<momentum>(r, min(t + 1, p_.k - 1)).gamma;
      const ForwardRows<C> at{b.at(r, i), y.at(r, i), m.at(r, i), y_next.at(r, i), m_next.at(r, i), z_next.at(r, i)};
      if constexpr (proximal) {
        forward_step<momentum>(at, c, gamma_next, 0, Qz, step_map(t, r, i, c.phi, v));
      } else {
        forward_step<momentum>(at, c, gamma_next, 0, Qz, NoMap());
      }
    };
    for_products(t > 0 || p_.y0 ? packed : nullptr, z, end);
  }

  // Keeps y_{t+1} of the samples that stop after step t, and says how many go on.
  int64_t stop_after(int64_t t, Panels<C> from, Panels<C> to) const {
    int64_t moving = 0;
    for (int64_t r = 0; r < count_; ++r) {
      if (moving_[r].count() == 0) continue;
      C* stopped = rows(stopped_).at(r, 0);
      moving_[r].after(*p_.stopping, t, p_.k, from.at(r, 0), to.at(r, 0), panels_, to.plane, stopped);
      moving += moving_[r].count();
    }
    return moving;
  }

  // s_{t+1} becomes the adjoint of v_t
  UNROLLED_KERNELS_NOINLINE void end_of_step(int64_t t) const {
    for (int64_t r = 0; r < count_; ++r) {
      const Vector<C> phi = coefficients<false>(r, t).phi;
      ProxTerms<C> terms;
      for (int64_t i = 0; i < panels_; ++i) {
        const auto at = [&](C* data) { return data ? rows(data).at(r, i) : nullptr; };
        const ProxSums<C> sums{at(map_sums_.lower), at(map_sums_.upper), at(map_sums_.weight)};
        C* const ybar = p_.beta.data ? at(ybar_) : nullptr;
        with_prox(p_.prox, [&](auto prox) {
          adjoint_map<decltype(prox)::value>(step_map(t, r, i, phi, v(t)), sums, 0, s(t + 1).at(r, i), ybar, terms);
        });
      }
      store(sums_ + r * W, -terms.phi);
      store(sums_ + (3 * count_ + r) * W, -terms.threshold);
    }
  }

  // s_t and a_t from s_{t+1}, and the sums of step t: [4, count] vectors. `packed` is nullptr where nobody asks for
  // Q's_{t+1}, `a` where nobody asks for dQ.
  template <bool momentum, bool sums_phi>
  UNROLLED_KERNELS_NOINLINE void adjoint(int64_t t, const C* packed, Panels<C> z_all, Panels<C> a) const {
    const Panels<C> b = rows(b_), db = rows(db_), ybar = rows(ybar_), m_t = m(t), z = z_all.from(t * count_),
                    from = s(t + 1), to = s(t);
    for_products(packed, from, [&](int64_t r, int64_t i, Vector<C> w) {
      auto c = coefficients<momentum>(r, t);
      if (t == 0) c.beta = c.gamma = Vector<C>{};  // there is no m_0: s_0 is ybar_0
      const AdjointRows<C> at{b.at(r, i), m_t.at(r, i), z.at(r, i), from.at(r, i), to.at(r, i), ybar.at(r, i)};
      StepSums<C> sums;
      adjoint_step<momentum, sums_phi>(at, c, p_.trajectory, 0, w, sums);
      const auto add = [&](int64_t n, Vector<C> v) {
        C* sum = sums_ + (n * count_ + r) * W;
        store(sum, load(sum) + v);
      };
      if constexpr (sums_phi) add(0, -sums.phi);
      if constexpr (momentum && sums_phi) add(1, sums.beta), add(2, -sums.gamma);
      const Vector<C> a_t = -(c.phi * load(at.s));
      store(db.at(r, i), load(db.at(r, i)) + a_t);
      if (a.data) store(a.at(r, i), a_t);
    });
  }

  // What belongs to samples is added to the outputs, what they share to `schedule`.
  UNROLLED_KERNELS_NOINLINE void add_sums(const MomentumBackward<Storage>& p, int64_t t, double* schedule) const {
    C* const outputs[] = {p.dphi, p.dbeta, p.dgamma, p.d_threshold};
    const Coefficient<C>* const of[] = {&p.phi, &p.beta, &p.gamma, &p.threshold};
    for (int n = 0; n < 4; ++n) {
      if (!outputs[n]) continue;
      const bool per_step = of[n]->step_stride != 0;
      for (int64_t r = 0; r < count_; ++r) {
        const C sum = sum_lanes<C>(load(sums_ + (n * count_ + r) * W));
        if (of[n]->batch_stride == 0) {
          schedule[n * steps_ + (steps_ == 1 ? 0 : t)] += sum;
          continue;
        }
        C* out = outputs[n] + (first_ + r) * (per_step ? p.k : 1) + (per_step ? t : 0);
        *out = per_step || t == p.k - 1 ? sum : *out + sum;
      }
    }
  }

  const MomentumInputs<Storage>& p_;
  Arena arena_;
  int64_t panels_, steps_, size_, first_ = 0, count_ = 0;
  C *b_, *z_, *y_, *m_, *s_, *ybar_, *db_, *sums_;
  // of samples that stop: where they did
  C* stopped_;
  MovingSamples<W, C>* moving_;
  // of a proximal map; v_ of every step, backward, or of a fixed point
  C* v_ = nullptr;
  int64_t v_size_ = 0;
  ProxSums<C> map_, map_sums_;
};

template <typename Storage>
class SpectralRows {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;

 public:
  SpectralRows(void* scratch, const MomentumInputs<Storage>& p, const SharedMomentumPlan& plan,
               const MomentumBackward<Storage>* backward)
      : p_(p),
        arena_(scratch),
        panels_(plan.panels),
        states_(outputs(p)),
        given_(given(p, backward)),
        schedule_(arena_, p, plan.schedule_steps),
        gradient_(arena_, backward ? *backward : MomentumBackward<Storage>{}, backward ? plan.schedule_steps : 0,
                  false) {
    // of each sample: what is given and the outputs or their cotangents, and the same rotated
    const int64_t size = plan.tile_rows * plan.terms * plan.row;
    rows_ = arena_.take<C>(size);
    rotated_ = arena_.take<C>(size);
    // of one sample, as rows [row]
    lambda_ = arena_.take<C>(plan.row);
    hat_ = arena_.take<C>(plan.terms * plan.row);
    out_ = arena_.take<C>(plan.terms * plan.row);
    dlambda_ = backward ? arena_.take<C>(plan.row) : nullptr;
    for (C** x : {&y_, &z_, &m_}) *x = backward && backward->first > 0 ? arena_.take<C>(plan.row) : nullptr;
    trace_ = backward ? arena_.take<C>(2 * p.k * vectors_at_once * W) : nullptr;
    moving_ = p.stopping ? arena_.take<Moving>(plan.tile_rows) : nullptr;
    moving_rows_ = p.stopping ? arena_.take<C>(plan.tile_rows * rows_of_moving * plan.row) : nullptr;
  }

  size_t scratch_bytes() const { return arena_.used(); }

  // states that are outputs, or that are looked at together
  static int64_t outputs(const MomentumInputs<Storage>& p) {
    return p.stopping ? steps_between_stops + 1 : p.trajectory ? p.k + 1 : 1;
  }
  // b, and y_0 or y_first where there is one
  static int64_t given(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
    return 1 + (p.y0 || (backward && backward->first > 0));
  }
  // terms of dR: those of what is given, of the outputs, and of m_first
  static int64_t terms(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
    return given(p, backward) + outputs(p) + (backward && backward->first > 0 && p.beta.data);
  }

  void forward(const MomentumForward<Storage>& p, const SharedMomentumTile<C>& tile) {
    const int64_t count = tile.end - tile.begin;
    const Panels<C> inputs{rows_, given_ * count * W}, rotated{rotated_, inputs.plane};
    const Panels<C> outputs{rows_, states_ * count * W}, y{rotated_, outputs.plane};
    for (int64_t r = 0; r < count; ++r) load_inputs(tile.begin + r, inputs, given_ * r);
    multiply(inputs, given_ * count, tile.packed_transposed, rotated);
    if (p.stopping) return run_until_stopped(p, tile, inputs, rotated);
    for (int64_t r = 0; r < count; ++r) {
      stage(tile.begin + r, r == 0);
      for (int64_t i = 0; i < given_; ++i) to_row(rotated, given_ * r + i, hat_ + i * row());
      forward_eigenbasis(out_);
      for (int64_t t = 0; t < states_; ++t) from_row(out_ + t * row(), outputs, r * states_ + t);
    }
    multiply(outputs, count * states_, tile.packed, y);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t sample = tile.begin + r;
      if (returns_start()) load_start(sample, y, r * states_);
      for (int64_t t = 0; t < states_; ++t) {
        store_panels(y, r * states_ + t, p.d, p.y + t * p.B * p.d + sample * p.d);
      }
    }
  }

  void backward(const MomentumBackward<Storage>& p, const SharedMomentumTile<C>& tile) {
    const int64_t count = tile.end - tile.begin, terms = this->terms(p, &p);
    // of each sample: dbh, then dyh_0 or, where the first steps are constant, yh and mh after them
    const int64_t images = terms - states_;
    const Panels<C> left{tile.a, count * terms * W}, right{tile.z, left.plane}, rotated{rotated_, left.plane};
    const Panels<C> hat{rows_, images * count * W}, from_hat{rotated_, hat.plane};
    for (int64_t r = 0; r < count; ++r) {
      load_inputs(tile.begin + r, left, r * terms);
      for (int64_t t = 0; t < states_; ++t) {
        load_sample(p.grad_y + t * p.B * p.d, p.d, tile.begin + r, left, r * terms + given_ + t);
      }
      if (images > given_) set_zero(left, (r + 1) * terms - 1);
    }
    multiply(left, count * terms, tile.packed_transposed, rotated);
    for (int64_t r = 0; r < count; ++r) {
      stage(tile.begin + r, r == 0);
      if (gradient_.wanted()) gradient_.begin_tile(r == 0);
      for (int64_t i = 0; i < terms; ++i) to_row(rotated, r * terms + i, hat_ + i * row());
      C* const yh = out_ + given_ * row();
      fill_zero(hat_ + given_ * row(), constant_outputs(p) * row());
      forward_eigenbasis(yh);
      p.minimizer ? backward_of_minimizer(yh) : backward_of_steps(p, terms - 1);
      fill_zero(yh, constant_outputs(p) * row());
      if (p.d_diagonal) layout(tile.begin + r).store_state(dlambda_, p.d_diagonal);
      if (gradient_.wanted()) gradient_.end_tile(layout(tile.begin + r));
      if (p.minimizer && given_ > 1) fill_zero(out_ + row(), row());
      for (int64_t i = 0; i < terms; ++i) from_row(out_ + i * row(), right, r * terms + i);
      for (int64_t i = 0; i < given_; ++i) {
        from_row(i == 1 && p.first > 0 ? y_ : out_ + i * row(), hat, r * images + i);
      }
      if (images > given_) from_row(m_, hat, r * images + given_);
    }
    if (gradient_.wanted()) gradient_.end_chunk(tile.schedule);
    if (p.db || p.dy0 || (p.first > 0 && p.d_matrix)) multiply(hat, images * count, tile.packed, from_hat);
    for (int64_t r = 0; r < count; ++r) {
      if (p.db) store_panels(from_hat, r * images, p.d, p.db + (tile.begin + r) * p.d);
      if (p.dy0) {
        for (int64_t i = 0; constant_outputs(p) > 0 && i < panels_; ++i) {
          C* dy0 = from_hat.at(r * images + 1, i);
          store(dy0, load(dy0) + load(left.at(r * terms + given_, i)));
        }
        store_panels(from_hat, r * images + 1, p.d, p.dy0 + (tile.begin + r) * p.d);
      }
      for (int64_t t = 0; t < constant_outputs(p); ++t) set_zero(left, r * terms + given_ + t);
      if (p.first == 0) continue;
      copy_row(from_hat, r * images + 1, left, r * terms + 1);
      if (images > given_) copy_row(from_hat, r * images + given_, left, (r + 1) * terms - 1);
    }
  }

 private:
  int64_t row() const { return panels_ * W; }
  // y_0 itself is among the outputs, and never rotated
  bool returns_start() const { return p_.trajectory || p_.k == 0; }
  // outputs that are y_0 or constant
  int64_t constant_outputs(const MomentumBackward<Storage>& p) const {
    return p.trajectory ? p.first + 1 : returns_start();
  }
  RowLanes<C> layout(int64_t sample) const { return {p_.B, p_.d, sample, 1}; }

  void to_row(Panels<C> from, int64_t r, C* out) const {
    for (int64_t i = 0; i < panels_; ++i) store(out + i * W, load(from.at(r, i)));
  }
  void from_row(const C* in, Panels<C> to, int64_t r) const {
    for (int64_t i = 0; i < panels_; ++i) store(to.at(r, i), load(in + i * W));
  }

  void set_zero(Panels<C> out, int64_t r) const {
    for (int64_t i = 0; i < panels_; ++i) store(out.at(r, i), Vector<C>{});
  }
  void copy_row(Panels<C> from, int64_t from_r, Panels<C> to, int64_t r) const {
    for (int64_t i = 0; i < panels_; ++i) store(to.at(r, i), load(from.at(from_r, i)));
  }

  void load_sample(const Storage* x, int64_t stride, int64_t sample, Panels<C> out, int64_t r) const {
    load_panels(x + sample * stride, p_.d, x + (p_.B - 1) * stride + p_.d, out, r);
  }
  void load_start(int64_t sample, Panels<C> out, int64_t r) const {
    p_.y0 ? load_sample(p_.y0, p_.y0_stride, sample, out, r) : set_zero(out, r);
  }
  void load_inputs(int64_t sample, Panels<C> out, int64_t r) const {
    load_sample(p_.b, p_.b_stride, sample, out, r);
    if (given_ > 1) load_start(sample, out, r + 1);
  }
  void stage(int64_t sample, bool first_of_tile) {
    schedule_.stage(layout(sample), first_of_tile);
    layout(sample).load_state(p_.diagonal, p_.diagonal_stride, lambda_);
  }

  void multiply(Panels<C> x, int64_t rows, const C* packed, Panels<C> out) const {
    multiply_rows<C>(x, rows, packed, p_.d, [&](int64_t r, int64_t i, Vector<C> v) { store(out.at(r, i), v); });
  }

  ElementwiseForward<C> in_eigenbasis(const C* hat, C* y) const {
    ElementwiseForward<C> e(p_, schedule_.view());
    e.lambda = lambda_;
    e.b = hat;
    e.y0 = p_.y0 ? hat + row() : nullptr;
    e.y = y;
    e.row = p_.trajectory ? row() : 0;
    return e;
  }
  // yh_k, or yh_0 ... yh_k
  void forward_eigenbasis(C* y) const { run_elementwise(in_eigenbasis(hat_, y), panels_); }

  // rows of hat_ are bh, yh_0 and R'ybar_t; of out_ dbh, dyh_0 or dyh_first, yh_t and, at `last`, dmh_first
  void backward_of_steps(const MomentumBackward<Storage>& p, int64_t last) {
    ElementwiseBackward<C> e(p, schedule_.view());
    e.lambda = lambda_;
    e.b = hat_;
    e.y0 = p.y0 ? hat_ + row() : nullptr;
    e.grad_y = hat_ + given_ * row();
    e.row = p.trajectory ? row() : 0;
    e.dlambda = dlambda_;
    e.db = out_;
    e.dy0 = given_ > 1 ? out_ + row() : nullptr;
    e.sums = gradient_.sums();
    e.trace = trace_;
    if (p.first > 0) e.begin_after(in_eigenbasis(hat_, y_), p.first, z_, m_, out_ + last * row(), panels_);
    run_elementwise(e, panels_);
  }
  void backward_of_minimizer(const C* yh) {
    ElementwiseForward<C> e = in_eigenbasis(hat_ + given_ * row(), out_);
    e.y0 = nullptr;
    run_elementwise(e, panels_);
    for (int64_t i = 0; i < row(); i += W) store(dlambda_ + i, load(out_ + i) * load(yh + i));
  }

  // A sample between two looks at y, which says whether it stops, and not yh: rows bh, yh, zh, mh, y and where it stopped.
  using Moving = MovingSamples<W, C>;
  static constexpr int64_t rows_of_moving = 6;
  C* moving_row(int64_t r, int64_t i) const { return moving_rows_ + (r * rows_of_moving + i) * row(); }

  void run_until_stopped(const MomentumForward<Storage>& p, const SharedMomentumTile<C>& tile, Panels<C> inputs,
                         Panels<C> rotated) {
    Poll poll;
    const int64_t count = tile.end - tile.begin, steps = steps_between_stops;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t i = 0; i < given_; ++i) to_row(rotated, given_ * r + i, moving_row(r, i));
      given_ > 1 ? to_row(inputs, given_ * r + 1, moving_row(r, 4)) : fill_zero(moving_row(r, 4), row());
      moving_[r].begin(tile.begin + r, 1);
    }
    const Panels<C> outputs{rows_, steps * count * W}, y{rotated_, outputs.plane};
    for (int64_t first = 0, moving = count; moving > 0; first += steps) {
      const int64_t last = min(first + steps, p.k);
      for (int64_t r = 0; r < count; ++r) {
        stage(tile.begin + r, first == 0 && r == 0);
        ElementwiseForward<C> e = in_eigenbasis(moving_row(r, 0), out_);
        if (first > 0) e.y0 = moving_row(r, 1);
        e.row = row(), e.trajectory = true, e.first = first, e.last = last;
        if (e.momentum) e.z = moving_row(r, 2), e.m = moving_row(r, 3);
        run_elementwise(e, panels_);
        copy_vectors(out_ + (last - first) * row(), row(), moving_row(r, 1));
        for (int64_t i = 0; i < steps; ++i) from_row(out_ + min(i + 1, last - first) * row(), outputs, r * steps + i);
      }
      multiply(outputs, count * steps, tile.packed, y);
      poll.after(steps * count * panels_ * p.d);
      moving = 0;
      for (int64_t r = 0; r < count; ++r) {
        for (int64_t t = first; t < last && moving_[r].count() > 0; ++t) {
          to_row(y, r * steps + t - first, hat_);
          moving_[r].after(*p.stopping, t, p.k, moving_row(r, 4), hat_, panels_, W, moving_row(r, 5));
          copy_vectors(hat_, row(), moving_row(r, 4));
        }
        moving += moving_[r].count();
      }
    }
    for (int64_t r = 0; r < count; ++r) layout(tile.begin + r).store_state(moving_row(r, 5), p.y);
  }

  const MomentumInputs<Storage>& p_;
  Arena arena_;
  int64_t panels_, states_, given_;  // states that are outputs, and rows that are given
  Schedule<C> schedule_;
  ScheduleGradient<C> gradient_;
  C *rows_, *rotated_, *lambda_, *hat_, *out_, *dlambda_, *trace_;
  C *y_, *z_, *m_;  // yh, zh and mh at `first`
  Moving* moving_;
  C* moving_rows_;
};

template <typename Storage>
SharedMomentumPlan shared_plan(const MomentumInputs<Storage>& p, int64_t terms, bool gradient) {
  using C = compute_type<Storage>;
  SharedMomentumPlan plan{};
  plan.variant = "rows of a shared matrix";
  plan.lanes = lanes<C>;
  plan.tiles_per_sample = 1;
  plan.schedule_steps = constant_schedule(p) ? min(p.k, 1) : p.k;
  plan.panels = ceil_div(p.d, lanes<C>);
  plan.row = plan.panels * plan.lanes;
  plan.terms = terms;
  // larger tiles where the matrix comes from far away; few samples are worth two tiles
  const int64_t rows = p.d >= 512 && p.B >= 32 * block_of_rows ? 4 * block_of_rows
                       : p.B >= 2 * block_of_rows              ? block_of_rows
                                                               : max(ceil_div(p.B, 2), 4);
  plan.tiles = plan.chunks = p.B > rows ? 2 * ceil_div(p.B, 2 * rows) : 1;  // an even number, for two threads
  plan.tile_rows = ceil_div(p.B, max(plan.tiles, 1));
  const int64_t tile_bytes = 2 * plan.tile_rows * terms * plan.row * static_cast<int64_t>(sizeof(C));
  plan.slab_tiles = max(1, (int64_t(1) << 20) / max(tile_bytes, 1));
  // more of them than cores, and no more than fit a cache together
  const int64_t sums = (int64_t(1) << 22) / (p.d * plan.row * static_cast<int64_t>(sizeof(C)));
  plan.sums = gradient && sums >= 16 && plan.tiles > plan.slab_tiles ? min(plan.tiles, sums) : 0;
  return plan;
}

template <typename Storage>
SharedMomentumPlan dense_plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
  SharedMomentumPlan plan =
      shared_plan(p, backward && backward->minimizer ? min(p.k, 1) : p.k, backward && backward->d_matrix);
  plan.packs = backward ? 2 : 1;
  plan.scratch_bytes = DenseRows<Storage>(nullptr, p, plan, backward).scratch_bytes();
  return plan;
}

template <typename Storage>
SharedMomentumPlan spectral_plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
  SharedMomentumPlan plan = shared_plan(p, SpectralRows<Storage>::terms(p, backward), backward && backward->d_matrix);
  plan.packs = 2;
  plan.scratch_bytes = SpectralRows<Storage>(nullptr, p, plan, backward).scratch_bytes();
  return plan;
}

template <typename Storage>
void pack(const MomentumInputs<Storage>& p, bool transposed, int64_t panel, compute_type<Storage>* out) {
  pack_panel(p.matrix, p.d, transposed, panel, out);
}

template <template <typename> class Rows, typename Storage>
void forward(const MomentumForward<Storage>& p, const SharedMomentumPlan& plan,
             const SharedMomentumTile<compute_type<Storage>>& tile) {
  Rows<Storage>(tile.scratch, p, plan, nullptr).forward(p, tile);
}

template <template <typename> class Rows, typename Storage>
void backward(const MomentumBackward<Storage>& p, const SharedMomentumPlan& plan,
              const SharedMomentumTile<compute_type<Storage>>& tile) {
  Rows<Storage>(tile.scratch, p, plan, &p).backward(p, tile);
}

// The gradient is written where it belongs if its rows are whole vectors, else to `sum` first.
template <typename Storage>
void outer(const MomentumBackward<Storage>& p, const SharedMomentumPlan& plan,
           const SharedMomentumTile<compute_type<Storage>>* tiles, int64_t count, int64_t begin, int64_t end,
           bool accumulate, bool last, compute_type<Storage>* sum) {
  using C = compute_type<Storage>;
  constexpr int64_t W = lanes<C>;
  const bool in_place = std::is_same_v<Storage, C> && p.d == plan.row && plan.sums == 0;
  C* out = in_place ? reinterpret_cast<C*>(p.d_matrix) : sum;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t terms = (tiles[i].end - tiles[i].begin) * plan.terms;
    const Panels<const C> a{tiles[i].a, terms * W}, z{tiles[i].z, terms * W};
    outer_sums(a, z, terms, p.d, begin, end, accumulate || i > 0, out, plan.row);
  }
  if (in_place || !last) return;
  for (int64_t i = begin * W; i < min(end * W, p.d); ++i) {
    Storage* row = p.d_matrix + i * p.d;
    store_row(out + i * plan.row, p.d, row, row + p.d);
  }
}

}  // namespace

template <typename Storage>
SharedMomentumKernels<Storage> momentum_shared(Structure structure) {
  if (structure == Structure::dense) {
    return {dense_plan<Storage>, pack<Storage>, forward<DenseRows, Storage>, backward<DenseRows, Storage>,
            outer<Storage>};
  }
  return {spectral_plan<Storage>, pack<Storage>, forward<SpectralRows, Storage>, backward<SpectralRows, Storage>,
          outer<Storage>};
}
template SharedMomentumKernels<float> momentum_shared(Structure);
template SharedMomentumKernels<double> momentum_shared(Structure);
template SharedMomentumKernels<half> momentum_shared(Structure);
template SharedMomentumKernels<bfloat16> momentum_shared(Structure);

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
