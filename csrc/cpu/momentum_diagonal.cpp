// Diagonal Q = diag(q), or diag(1 + f^2): elementwise, so a sample is cut into strips that need no common lanes. Short rows with a
// schedule of their own run with samples in lanes (lanes.h).
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "cpu/momentum_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/momentum_elementwise.h"
#include "cpu/momentum_stopping.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

constexpr int64_t strip_elements = 2048;

// elements `column` ... `column + width - 1` of one sample
template <typename C>
struct StripLanes {
  static constexpr int E = lanes<C>;
  int64_t B, d, sample, column, width;

  int64_t size() const { return ceil_div(width, lanes<C>); }

  template <typename Storage>
  void load_state(const Storage* x, int64_t stride, C* out) const {
    load_row(x + sample * stride + column, width, x + (B - 1) * stride + d, out);
  }
  template <typename Storage>
  void store_state(const C* in, Storage* x) const {
    store_row(in, width, x + sample * d + column, x + sample * d + column + width);
  }
  Vector<C> coefficient(const C* x, int64_t stride) const { return broadcast(x[sample * stride]); }
  void store_sums(Vector<C> sums, C* x, int64_t stride) const { x[sample * stride] = sum_lanes<C>(sums); }
};

template <typename Storage>
bool schedule_per_sample(const MomentumInputs<Storage>& p) {
  return p.phi.batch_stride != 0 || p.beta.batch_stride != 0 || p.gamma.batch_stride != 0 ||
         p.threshold.batch_stride != 0;
}

// samples that stop have schedules of their own from there on
template <typename Storage>
bool samples_in_lanes(const MomentumInputs<Storage>& p) {
  return (schedule_per_sample(p) || p.stopping) && p.B > 1 && p.d < 2 * lanes<compute_type<Storage>>;
}

// a sample that stops does so as a whole
template <typename Storage>
int64_t strip_width(const MomentumInputs<Storage>& p) {
  return p.stopping ? p.d : strip_elements;
}

template <typename Storage>
class DiagonalTiles {
  using C = compute_type<Storage>;
  static constexpr int64_t W = lanes<C>;

 public:
  DiagonalTiles(void* scratch, const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward,
                const MomentumPlan& plan)
      : p_(p),
        plan_(plan),
        arena_(scratch),
        schedule_(arena_, p, plan.schedule_steps),
        gradient_(arena_, backward ? *backward : MomentumBackward<Storage>{}, backward ? plan.schedule_steps : 0,
                  plan.tiles_per_sample > 1),
        tangents_(backward ? backward->tangents : nullptr),
        tangent_schedule_(arena_, tangents_ ? *tangents_ : MomentumTangents<Storage>{},
                          tangents_ ? plan.schedule_steps : 0),
        row_(samples_in_lanes(p) ? p.d * W : ceil_div(min(strip_width(p), p.d), W) * W) {
    const int64_t rows = p.stopping ? steps_between_stops + 1 : p.trajectory ? p.k + 1 : 1;
    x_ = p.observed ? arena_.take<C>(row_) : nullptr;
    q_ = arena_.take<C>(row_);
    b_ = arena_.take<C>(row_);
    y0_ = arena_.take<C>(row_);
    y_ = arena_.take<C>(rows * row_);
    dq_ = arena_.take<C>(row_);
    db_ = arena_.take<C>(row_);
    dy0_ = arena_.take<C>(row_);
    const int64_t slots = tangents_ ? 4 : p.prox == Prox::none ? 2 : 3;
    trace_ = backward ? arena_.take<C>(slots * p.k * vectors_at_once * W) : nullptr;
    for (C*& tangent : staged_tangents_) tangent = tangents_ ? arena_.take<C>(row_) : nullptr;
    y_tangent_ = tangents_ ? arena_.take<C>(rows * row_) : nullptr;
    for (C** state : {&z_, &m_, &stopped_}) *state = p.stopping ? arena_.take<C>(row_) : nullptr;
    for (C*& bound : bounds_) bound = p.prox != Prox::none ? arena_.take<C>(row_) : nullptr;
    for (C*& sum : bound_sums_) sum = backward && p.prox != Prox::none ? arena_.take<C>(row_) : nullptr;
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void forward(const MomentumForward<Storage>& p, const MomentumChunk<C>& chunk) {
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      for_parts(i, [&](const auto& part, bool first_of_tile) {
        if (first_of_tile) schedule_.stage(part, i == chunk.begin);
        forward_part(p, part);
      });
      poll_.after(p.k * row_ / W);
    }
  }

  void backward(const MomentumBackward<Storage>& p, const MomentumChunk<C>& chunk) {
    for (int64_t i = chunk.begin; i < chunk.end; ++i) {
      for_parts(i, [&](const auto& part, bool first_of_tile) {
        if (first_of_tile) {
          schedule_.stage(part, i == chunk.begin);
          if (tangents_) tangent_schedule_.stage(part, i == chunk.begin);
          if (gradient_.wanted()) gradient_.begin_tile(i == chunk.begin);
        }
        if (tangents_) {
          second_order_part(p, part);
        } else if (p.minimizer) {
          implicit_part(p, part);
        } else {
          ElementwiseBackward<C> e(p, schedule_.view());
          backward_part(p, part, e);
        }
      });
      poll_.after(3 * p.k * row_ / W);
      if (!gradient_.wanted()) continue;
      for_parts(i, [&](const auto& part, bool first_of_tile) {
        if (first_of_tile) gradient_.end_tile(part);
      });
    }
    if (gradient_.wanted()) gradient_.end_chunk(chunk.schedule);
  }

 private:
  // A tile in parts: whole vectors, which need no staging where the storage type is the compute type, and the rest.
  template <typename F>
  void for_parts(int64_t tile, F f) const {
    if (samples_in_lanes(p_)) {
      const int64_t first = tile * W;
      return f(SampleLanes<C>{p_.B, p_.d, first, min(W, p_.B - first)}, true);
    }
    const int64_t strip = strip_width(p_), column = tile % plan_.tiles_per_sample * strip;
    const int64_t width = min(strip, p_.d - column), whole = width / W * W;
    StripLanes<C> part{p_.B, p_.d, tile / plan_.tiles_per_sample, column, width};
    if (std::is_same_v<Storage, C> && whole > 0 && !p_.stopping) part.width = whole;
    f(part, true);
    if (part.width == width) return;
    part.column += part.width;
    part.width = width - part.width;
    f(part, false);
  }

  // f(first vector, vectors), as a sample that does not stop is cut: how many vectors are taken at once decides how the
  // compiler rounds
  template <typename F>
  static void for_pieces(const StripLanes<C>& part, F f) {
    for (int64_t column = 0; column < part.width; column += strip_elements) {
      const int64_t width = min(strip_elements, part.width - column), vectors = ceil_div(width, W);
      const int64_t whole = std::is_same_v<Storage, C> ? width / W : 0;
      if (whole > 0) f(column / W, whole);
      if (whole < vectors) f(column / W + whole, vectors - whole);
    }
  }
  template <typename F>
  static void for_pieces(const SampleLanes<C>& part, F f) {
    f(0, part.size());
  }

  // Where the vectors of x lie, read or written in place if they can be.
  static bool in_place(const StripLanes<C>& part) { return std::is_same_v<Storage, C> && part.width % W == 0; }
  static bool in_place(const SampleLanes<C>&) { return false; }
  static int64_t offset(const StripLanes<C>& part, int64_t stride) { return part.sample * stride + part.column; }
  static int64_t offset(const SampleLanes<C>&, int64_t) { return 0; }

  template <typename Part>
  const C* input(const Part& part, const Storage* x, int64_t stride, C* staged) const {
    if (!x) return nullptr;
    if (in_place(part)) return reinterpret_cast<const C*>(x + offset(part, stride));
    part.load_state(x, stride, staged);
    return staged;
  }
  template <typename Part>
  C* output(const Part& part, Storage* x, C* staged) const {
    if (!x) return nullptr;
    return in_place(part) ? reinterpret_cast<C*>(x + offset(part, p_.d)) : staged;
  }
  template <typename Part>
  void finish(const Part& part, const C* staged, Storage* x) const {
    if (x && !in_place(part)) part.store_state(staged, x);
  }
  template <typename Part>
  int64_t row(const Part& part) const {
    return !p_.trajectory ? 0 : in_place(part) ? p_.B * p_.d : row_;
  }

  template <typename Part, typename Elementwise>
  void set_lambda(const Part& part, Elementwise& e) const {
    e.lambda = input(part, p_.diagonal, p_.diagonal_stride, q_);
    e.squared = p_.observed;
  }
  template <typename Part, typename Elementwise>
  void set_energy(const Part& part, Elementwise& e) const {
    set_lambda(part, e);
    e.b = input(part, p_.b, p_.b_stride, b_);
    e.observed = input(part, p_.observed, p_.observed_stride, x_);
  }

  // The bounds or the weight of a proximal map; one number for all is staged like a row.
  template <typename Part>
  const C* bound(const Part& part, const Rows<C>& x, C* staged) const {
    if (!x.data) return nullptr;
    if (x.single) {
      for (int64_t i = 0; i < part.size() * W; i += W) store(staged + i, broadcast(*x.data));
      // lanes without an element stay at zero
      if constexpr (Part::E > 1) fill_zero(staged + part.width, part.size() * W - part.width);
    } else {
      part.load_state(x.data, x.batch_stride, staged);
    }
    return staged;
  }
  template <typename Part, typename Elementwise>
  void set_prox(const Part& part, Elementwise& e) const {
    e.map.lower = bound(part, p_.lower, bounds_[0]);
    e.map.upper = bound(part, p_.upper, bounds_[1]);
    e.map.weight = bound(part, p_.weight, bounds_[2]);
  }

  template <typename Part>
  void forward_part(const MomentumForward<Storage>& p, const Part& part) {
    ElementwiseForward<C> e(p, schedule_.view());
    set_energy(part, e);
    set_prox(part, e);
    e.y0 = input(part, p.y0, p.y0_stride, y0_);
    if (p.stopping) return run_until_stopped(p, part, e);
    e.y = output(part, p.y, y_);
    e.row = row(part);
    run_elementwise<true>(e, part.size());
    for (int64_t t = 0; t <= (p.trajectory ? p.k : 0); ++t) finish(part, y_ + t * row_, p.y + t * p.B * p.d);
  }

  template <typename Part>
  void run_until_stopped(const MomentumForward<Storage>& p, const Part& part, ElementwiseForward<C>& e) {
    e.y = y_, e.row = row_, e.trajectory = true;
    if (e.momentum) e.z = z_, e.m = m_;
    MovingSamples<Part::E, C> moving;
    if constexpr (Part::E == 1) {
      moving.begin(part.first, part.count);
    } else {
      moving.begin(part.sample, 1);
    }
    for (e.last = min(steps_between_stops, p.k); moving.count() > 0; e.go_on(steps_between_stops)) {
      for_pieces(part, [&](int64_t first, int64_t vectors) { run_elementwise<true>(e, vectors, first); });
      const C* y = y_;
      for (int64_t t = e.first; t < e.last && moving.count() > 0; ++t, y += row_) {
        moving.after(*p.stopping, t, p.k, y, y + row_, part.size(), W, stopped_);
      }
      poll_.after(steps_between_stops * row_ / W);
    }
    part.store_state(stopped_, p.y);
  }

  template <typename Part>
  void second_order_part(const MomentumBackward<Storage>& p, const Part& part) {
    ElementwiseSecondOrder<C> e(p, schedule_.view());
    e.varied = tangents_->phi.data;
    e.tangents = tangent_schedule_.view();
    e.lambda_tangent = input(part, tangents_->diagonal, p.d, staged_tangents_[0]);
    e.b_tangent = input(part, tangents_->b, p.d, staged_tangents_[1]);
    e.y0_tangent = input(part, tangents_->y0, p.d, staged_tangents_[2]);
    e.y_tangent = output(part, tangents_->y, y_tangent_);
    backward_part(p, part, e);
    if (!tangents_->y) return;
    for (int64_t t = 0; t <= (p.trajectory ? p.k : 0); ++t) {
      finish(part, y_tangent_ + t * row_, tangents_->y + t * p.B * p.d);
    }
  }

  // The map of e becomes a box that holds at zero what its own holds of the fixed point y.
  template <typename Part>
  void hold(const Part& part, const C* y, ElementwiseForward<C>& e) const {
    set_prox(part, e);
    const Vector<C> zero{}, infinity = broadcast(std::numeric_limits<C>::infinity());
    for (int64_t i = 0; i < part.size() * W; i += W) {
      const Vector<C> side = side_of<C>(e.prox, e.map, i, load(y + i));
      const auto held = e.prox == Prox::box ? (side == infinity) | (side == -infinity) : side == zero;
      store(bounds_[0] + i, held ? zero : -infinity);
      store(bounds_[1] + i, held ? zero : infinity);
    }
    e.prox = Prox::box;
    e.map = {bounds_[0], bounds_[1], nullptr};
  }

  // db is what the same steps make of grad y for b
  template <typename Part>
  void implicit_part(const MomentumBackward<Storage>& p, const Part& part) {
    ElementwiseForward<C> e(p, schedule_.view());
    set_lambda(part, e);
    e.b = input(part, p.grad_y, p.d, y_);
    C* const db = e.y = p.db ? output(part, p.db, db_) : db_;
    const C* const y = input(part, p.minimizer, p.d, y0_);
    if (p.prox != Prox::none) hold(part, y, e);
    run_elementwise<true>(e, part.size());
    finish(part, db_, p.db);
    if (p.d_weight) {
      for (int64_t i = 0; i < part.size() * W; i += W) {
        const Vector<C> zero{}, y_i = load(y + i), db_i = load(db + i), signed_db = y_i < zero ? -db_i : db_i;
        store(bound_sums_[2] + i, (load(bounds_[2] + i) >= zero) & (y_i != zero) ? signed_db : zero);
      }
      part.store_state(bound_sums_[2], p.d_weight);
    }
    C* const dq = output(part, p.d_diagonal, dq_);
    if (!dq) return;
    for (int64_t i = 0; i < part.size() * W; i += W) {
      const Vector<C> dq_i = load(db + i) * load(y + i);
      store(dq + i, e.squared ? broadcast(C(2)) * load(e.lambda + i) * dq_i : dq_i);
    }
    finish(part, dq_, p.d_diagonal);
  }

  template <typename Part, typename Elementwise>
  void backward_part(const MomentumBackward<Storage>& p, const Part& part, Elementwise& e) {
    set_energy(part, e);
    set_prox(part, e);
    C* const outputs[] = {p.d_lower, p.d_upper, p.d_weight};
    C** const sums[] = {&e.map_sums.lower, &e.map_sums.upper, &e.map_sums.weight};
    for (int i = 0; i < 3; ++i) {
      if (!outputs[i]) continue;
      fill_zero(bound_sums_[i], part.size() * W);
      *sums[i] = bound_sums_[i];
    }
    e.y0 = input(part, p.y0, p.y0_stride, y0_);
    e.grad_y = input(part, p.grad_y, p.d, y_);
    for (int64_t t = 1; t <= (p.trajectory ? p.k : 0); ++t) input(part, p.grad_y + t * p.B * p.d, p.d, y_ + t * row_);
    e.row = row(part);
    e.dlambda = output(part, p.d_diagonal, dq_);
    e.db = output(part, p.db, db_);
    e.dy0 = output(part, p.dy0, dy0_);
    e.first = p.first;
    e.traceless = e.traceless && p.first == 0;
    e.sums = gradient_.sums();
    e.trace = trace_;
    if constexpr (std::is_same_v<Elementwise, ElementwiseSecondOrder<C>>) {
      run_elementwise(e, part.size());
    } else {
      run_elementwise<true>(e, part.size());
    }
    finish(part, dq_, p.d_diagonal);
    finish(part, db_, p.db);
    finish(part, dy0_, p.dy0);
    for (int i = 0; i < 3; ++i) {
      if (outputs[i]) part.store_state(bound_sums_[i], outputs[i]);
    }
  }

  const MomentumInputs<Storage>& p_;
  const MomentumPlan& plan_;
  Arena arena_;
  Schedule<C> schedule_;
  ScheduleGradient<C> gradient_;
  const MomentumTangents<Storage>* tangents_;  // second order, else nullptr
  Schedule<C> tangent_schedule_;
  int64_t row_;  // elements of a staged row
  Poll poll_;
  C *x_, *q_, *b_, *y0_, *y_, *dq_, *db_, *dy0_, *trace_;
  C *z_, *m_, *stopped_;                // of samples that stop: between two looks, and where they did
  C *bounds_[3], *bound_sums_[3];       // lower, upper, weight
  C *staged_tangents_[3], *y_tangent_;  // of the diagonal, b and y_0
};

template <typename Storage>
MomentumPlan plan(const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward) {
  const bool samples = samples_in_lanes(p);
  MomentumPlan plan{};
  plan.variant = samples ? "samples in lanes" : is_traceless(p) ? "elementwise, no trace" : "elementwise";
  plan.lanes = lanes<compute_type<Storage>>;
  plan.tiles_per_sample = samples || p.stopping ? 1 : ceil_div(p.d, strip_elements);
  plan.tiles = samples ? ceil_div(p.B, plan.lanes) : p.B * plan.tiles_per_sample;
  plan.schedule_steps = constant_schedule(p) ? min(p.k, 1) : p.k;
  plan.scratch_bytes = DiagonalTiles<Storage>(nullptr, p, backward, plan).scratch_bytes();
  const double flops = (backward ? 10.0 : 4.0) * static_cast<double>(p.B) * p.d * (p.k + 2);
  const bool cut = backward && backward->dphi && schedule_per_sample(p) && plan.tiles_per_sample > 1;
  plan.chunks = cut ? plan.tiles : chunks_for(plan.tiles, flops, 1024);
  return plan;
}

template <typename Storage>
void forward(const MomentumForward<Storage>& p, const MomentumPlan& plan,
             const MomentumChunk<compute_type<Storage>>& chunk) {
  DiagonalTiles<Storage>(chunk.scratch, p, nullptr, plan).forward(p, chunk);
}

template <typename Storage>
void backward(const MomentumBackward<Storage>& p, const MomentumPlan& plan,
              const MomentumChunk<compute_type<Storage>>& chunk) {
  DiagonalTiles<Storage>(chunk.scratch, p, &p, plan).backward(p, chunk);
}

}  // namespace

template <typename Storage>
MomentumKernels<Storage> momentum_diagonal() {
  return {plan<Storage>, forward<Storage>, backward<Storage>};
}
template MomentumKernels<float> momentum_diagonal();
template MomentumKernels<double> momentum_diagonal();
template MomentumKernels<half> momentum_diagonal();
template MomentumKernels<bfloat16> momentum_diagonal();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
