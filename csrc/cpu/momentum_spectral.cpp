// Spectral Q = R diag(lambda) R': the diagonal recurrence in the eigenbasis, between products with R' and R.
//
//     bh = R'b    yh_0 = R'y_0    yh_t by the recurrence of lambda and bh    y_t = R yh_t,  t > 0
//
// Backward, with dyh_t = R'ybar_t (t > 0) as the cotangents in the eigenbasis:
//
//     db = R dbh    dy_0 = ybar_0 + R dyh_0    dR = b dbh' + y_0 dyh_0' + sum_{t > 0} ybar_t yh_t'
//
// Where the steps before t = f are constant, dR = b dbh' + y_f dyh_f' + m_f dmh_f' + sum_{t > f} ybar_t yh_t'. Implicit
// gradients have what the steps make of R'ybar_k for dbh, dlambda = dbh yh_k, and no term of y_0.
//
// y_0 itself is never rotated: with k = 0 or t = 0 of a trajectory nothing of R is in it.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/momentum_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/momentum_elementwise.h"
#include "cpu/momentum_stopping.h"
#include "cpu/simd/products.h"
#include "cpu/simd/tile_matrix.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

template <typename Storage_, template <typename> class Layout, template <typename> class Operand>
class SpectralTiles {
 public:
  using Storage = Storage_;
  using C = compute_type<Storage>;
  static constexpr int64_t samples = Layout<C>::samples;
  // beyond, transposing R to lanes costs more than the two products with it
  static constexpr int64_t max_d = samples == 1 ? INT64_MAX : Layout<C>::E == 1 ? 16 : 45;
  static constexpr int64_t max_copied_d = 0;

  SpectralTiles(void* scratch, const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward,
                int64_t steps)
      : p_(p),
        arena_(scratch),
        tile_{p.B, p.d, 0, 0},
        row_(tile_.size() * W),
        states_(p.stopping     ? steps_between_stops + 1
                : p.trajectory ? p.k + 1
                               : 1),
        terms_(2 + states_ + (backward && backward->first > 0 && p.beta.data)),
        schedule_(arena_, p, steps),
        gradient_(arena_, backward ? *backward : MomentumBackward<Storage>{}, backward ? steps : 0, false),
        R_(arena_, p, tile_.size()) {
    for (C** x : {&lambda_, &bh_, &y0h_, &state_}) *x = arena_.template take<C>(row_);
    yh_ = arena_.template take<C>(states_ * row_);
    const bool begins = p.stopping || (backward && backward->first > 0);
    for (C** x : {&z_, &m_, &next_}) *x = begins ? arena_.template take<C>(row_) : nullptr;
    stopped_ = p.stopping ? arena_.template take<C>(row_) : nullptr;
    if (!backward) return;
    for (C** x : {&dlambda_, &dbh_, &dy0h_}) *x = arena_.template take<C>(row_);
    // the rows of both factors of dR lie in one order: [b; y_0; ybar_t] and [dbh; dyh_0; yh_t], and last those of m_first
    left_ = arena_.template take<C>(terms_ * row_);
    right_ = arena_.template take<C>(terms_ * row_);
    grad_h_ = arena_.template take<C>(states_ * row_);
    trace_ = arena_.template take<C>(2 * p.k * vectors_at_once * W);
    d_matrix_ = arena_.template take<C>(R_.image_size());
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void forward(const MomentumForward<Storage>& p, const MomentumChunk<C>& chunk) {
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      load_tile(i, i == chunk.begin);
      load_rotated(p.b, p.b_stride, state_, bh_);
      if (p.y0) load_rotated(p.y0, p.y0_stride, state_, y0h_);
      if (p.stopping) {
        run_until_stopped(p);
        continue;
      }
      forward_eigenbasis(yh_);
      const int64_t first = p.trajectory || p.k == 0 ? 1 : 0;  // row 0 is y_0 then
      if (first == 1) {
        load_start();
        tile_.store_state(state_, p.y);
      }
      for (int64_t t = first; t < states_; ++t) {
        tile_.store_state(R_.apply(yh_ + t * row_), p.y + t * p.B * p.d);
        poll_.after(tile_.size() * p.d);
      }
    }
  }

  void backward(const MomentumBackward<Storage>& p, const MomentumChunk<C>& chunk) {
    if (shares_matrix(p) && p.d_matrix) fill_zero(d_matrix_, R_.image_size());
    C *b = left_, *y0 = left_ + row_, *grad = left_ + 2 * row_, *yh = right_ + 2 * row_;
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      load_tile(i, i == chunk.begin);
      if (gradient_.wanted()) gradient_.begin_tile(i == chunk.begin);
      load_rotated(p.b, p.b_stride, b, bh_);
      if (p.y0) {
        load_rotated(p.y0, p.y0_stride, y0, y0h_);
      } else {
        fill_zero(y0, row_);
      }
      for (int64_t t = 0; t < states_; ++t) {
        load_rotated(p.grad_y + t * p.B * p.d, p.d, grad + t * row_, grad_h_ + t * row_);
        poll_.after(tile_.size() * p.d);
      }
      // the first outputs are constant, or y_0 itself
      const int64_t constant = p.trajectory ? p.first + 1 : p.k == 0;
      fill_zero(grad_h_, constant * row_);
      p.minimizer ? backward_of_minimizer(yh) : backward_of_steps(p);

      if (p.d_diagonal) tile_.store_state(dlambda_, p.d_diagonal);
      if (p.db) tile_.store_state(R_.apply(dbh_), p.db);
      if (p.dy0) {
        const C* image = R_.apply(dy0h_);
        for (int64_t n = 0; n < row_; n += W) {
          store(state_ + n, constant == 1 ? load(image + n) + load(grad + n) : load(image + n));
        }
        tile_.store_state(state_, p.dy0);
      }
      if (p.d_matrix) {
        fill_zero(grad, constant * row_);
        copy_vectors(dbh_, row_, right_);
        if (!p.minimizer) forward_eigenbasis(yh);
        fill_zero(yh, constant * row_);
        if (p.first > 0) {
          const int64_t last = (terms_ - 1) * row_;
          copy_vectors(R_.apply(next_), row_, y0);
          copy_vectors(dy0h_, row_, right_ + row_);
          if (p.beta.data) copy_vectors(R_.apply(m_), row_, left_ + last);
        } else if (p.y0 && !p.minimizer) {
          copy_vectors(dy0h_, row_, right_ + row_);
        } else {
          // which may not be finite, and counts for nothing
          fill_zero(right_ + row_, row_);
        }
        R_.outer(p, tile_, left_, right_, terms_, broadcast(C(1)), false, d_matrix_);
      }
      if (gradient_.wanted()) gradient_.end_tile(tile_);
    }
    if (gradient_.wanted()) gradient_.end_chunk(chunk.schedule);
    if (chunk.d_matrix) R_.add_sum(d_matrix_, chunk.d_matrix);
  }

 private:
  static constexpr int64_t W = lanes<C>;

  void load_tile(int64_t index, bool first_of_chunk) {
    tile_.first = index * tile_.samples;
    tile_.count = min(tile_.samples, p_.B - tile_.first);
    schedule_.stage(tile_, first_of_chunk);
    R_.stage(tile_, first_of_chunk);
    tile_.load_state(p_.diagonal, p_.diagonal_stride, lambda_);
  }

  // y_0 itself
  void load_start() { p_.y0 ? tile_.load_state(p_.y0, p_.y0_stride, state_) : fill_zero(state_, row_); }

  void load_rotated(const Storage* x, int64_t stride, C* state, C* rotated) {
    tile_.load_state(x, stride, state);
    R_.apply_transposed(state, rotated);
  }

  void backward_of_steps(const MomentumBackward<Storage>& p) {
    ElementwiseBackward<C> e(p, schedule_.view());
    e.lambda = lambda_;
    e.b = bh_;
    e.y0 = p.y0 ? y0h_ : nullptr;
    e.grad_y = grad_h_;
    e.row = p.trajectory ? row_ : 0;
    e.dlambda = dlambda_;
    e.db = dbh_;
    e.dy0 = dy0h_;
    e.sums = gradient_.sums();
    e.trace = trace_;
    if (p.first > 0) {
      e.begin_after(in_eigenbasis(next_), p.first, z_, m_, right_ + (terms_ - 1) * row_, tile_.size());
    }
    run_elementwise(e, tile_.size());
  }

  // and yh_k
  void backward_of_minimizer(C* yh) {
    forward_eigenbasis(yh);
    ElementwiseForward<C> e = in_eigenbasis(dbh_);
    e.b = grad_h_;
    e.y0 = nullptr;
    run_elementwise(e, tile_.size());
    for (int64_t n = 0; n < row_; n += W) store(dlambda_ + n, load(dbh_ + n) * load(yh + n));
  }

  ElementwiseForward<C> in_eigenbasis(C* y) const {
    ElementwiseForward<C> e(p_, schedule_.view());
    e.lambda = lambda_;
    e.b = bh_;
    e.y0 = p_.y0 ? y0h_ : nullptr;
    e.y = y;
    e.row = p_.trajectory ? row_ : 0;
    return e;
  }
  void forward_eigenbasis(C* y) const { run_elementwise(in_eigenbasis(y), tile_.size()); }

  // Whether a sample stops is said of y, not of yh.
  void run_until_stopped(const MomentumForward<Storage>& p) {
    ElementwiseForward<C> e = in_eigenbasis(yh_);
    e.row = row_, e.trajectory = true;
    if (e.momentum) e.z = z_, e.m = m_;
    load_start();
    MovingSamples<Layout<C>::E, C> moving;
    moving.begin(tile_.first, tile_.count);
    for (e.last = min(steps_between_stops, p.k); moving.count() > 0; e.go_on(steps_between_stops)) {
      run_elementwise(e, tile_.size());
      for (int64_t t = e.first; t < e.last && moving.count() > 0; ++t) {
        copy_vectors(R_.apply(yh_ + (t + 1 - e.first) * row_), row_, next_);
        moving.after(*p.stopping, t, p.k, state_, next_, tile_.size(), W, stopped_);
        std::swap(state_, next_);
        poll_.after(tile_.size() * p.d);
      }
    }
    tile_.store_state(stopped_, p.y);
  }

  const MomentumInputs<Storage>& p_;
  Arena arena_;
  Poll poll_;
  Layout<C> tile_;
  int64_t row_, states_, terms_;  // elements of a state, states that are outputs, rows of the factors of dR
  Schedule<C> schedule_;
  ScheduleGradient<C> gradient_;
  TileMatrix<Storage, Layout, Operand> R_;
  C *lambda_, *bh_, *y0h_, *state_, *yh_;
  C *z_, *m_, *next_, *stopped_;  // of samples that stop; zh, mh and yh at `first`
  C *dlambda_, *dbh_, *dy0h_, *left_, *right_, *grad_h_, *trace_, *d_matrix_;
};

template <typename Storage>
MomentumPlan plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
  const double d = static_cast<double>(p.d), states = p.trajectory ? p.k + 1 : 1;
  const double flops = (backward ? 6 : 2) * (1 + states) * d * d + (backward ? 14 : 4) * d * p.k;
  return matrix_plan<SpectralTiles>(p, backward, constant_schedule(p), flops * static_cast<double>(p.B));
}

template <typename Storage>
void forward(const MomentumForward<Storage>& p, const MomentumPlan& plan,
             const MomentumChunk<compute_type<Storage>>& chunk) {
  with_layout<SpectralTiles>(p, [&](auto type) {
    typename decltype(type)::type(chunk.scratch, p, nullptr, plan.schedule_steps).forward(p, chunk);
  });
}

template <typename Storage>
void backward(const MomentumBackward<Storage>& p, const MomentumPlan& plan,
              const MomentumChunk<compute_type<Storage>>& chunk) {
  with_layout<SpectralTiles>(p, [&](auto type) {
    typename decltype(type)::type(chunk.scratch, p, &p, plan.schedule_steps).backward(p, chunk);
  });
}

}  // namespace

template <typename Storage>
MomentumKernels<Storage> momentum_spectral() {
  return {plan<Storage>, forward<Storage>, backward<Storage>};
}
template MomentumKernels<float> momentum_spectral();
template MomentumKernels<double> momentum_spectral();
template MomentumKernels<half> momentum_spectral();
template MomentumKernels<bfloat16> momentum_spectral();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
