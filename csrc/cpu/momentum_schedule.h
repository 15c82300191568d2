// The schedule phi, beta, gamma of one tile as vectors, with the threshold of a proximal map, and the sums that become
// its gradient.
#pragma once

#include "cpu/simd/arena.h"
#include "cpu/simd/lanes.h"
#include "cpu/momentum_kernels.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// phi, beta and gamma are the same at every step.
template <typename Inputs>
inline bool constant_schedule(const Inputs& p) {
  return p.phi.step_stride == 0 && p.beta.step_stride == 0 && p.gamma.step_stride == 0 && p.threshold.step_stride == 0;
}

template <typename C>
struct StepCoefficients {
  Vector<C> phi, beta, gamma;
};

// What the recurrences read. Copied to where its members stay in registers.
template <typename C>
struct ScheduleView {
  const C *phi, *beta, *gamma, *threshold;  // [steps] vectors
  int64_t step;                             // elements from step to step, 0 where nothing varies

  template <bool momentum>
  UNROLLED_KERNELS_INLINE StepCoefficients<C> at(int64_t t) const {
    if constexpr (!momentum) return {load(phi + t * step), Vector<C>{}, Vector<C>{}};
    return {load(phi + t * step), load(beta + t * step), load(gamma + t * step)};
  }
  UNROLLED_KERNELS_INLINE Vector<C> threshold_at(int64_t t) const { return load(threshold + t * step); }
};

// The sums that they add to.
template <typename C>
struct ScheduleSums {
  C *phi, *beta, *gamma, *threshold;  // [steps] vectors; nullptr where a gradient is not wanted, as that of phi is with
                                      // all others
  int64_t step;

  UNROLLED_KERNELS_INLINE void add_phi(int64_t t, Vector<C> v) const { add(phi + t * step, v); }
  UNROLLED_KERNELS_INLINE void add_threshold(int64_t t, Vector<C> v) const {
    if (threshold) add(threshold + t * step, v);
  }
  template <bool momentum>
  UNROLLED_KERNELS_INLINE void add_momentum(int64_t t, Vector<C> dbeta, Vector<C> dgamma) const {
    if constexpr (momentum) {
      add(beta + t * step, dbeta);
      add(gamma + t * step, dgamma);
    }
  }

 private:
  static UNROLLED_KERNELS_INLINE void add(C* p, Vector<C> v) { store(p, load(p) + v); }
};

template <typename C>
class Schedule {
 public:
  // `steps` columns: k, or 1 for a constant schedule
  template <typename Inputs>
  Schedule(Arena& arena, const Inputs& p, int64_t steps)
      : coefficients_{p.phi, p.beta, p.gamma, p.threshold}, steps_(steps), step_(steps == 1 ? 0 : lanes<C>) {
    for (C*& staged : staged_) staged = arena.take<C>(steps * lanes<C>);
  }

  // Stage what the tile needs; `fresh`: nothing is staged yet, else what samples share still is.
  template <typename Layout>
  UNROLLED_KERNELS_NOINLINE void stage(const Layout& tile, bool fresh) {
    for (int i = 0; i < 4; ++i) {
      const Coefficient<C>& c = coefficients_[i];
      if (!c.data || (c.batch_stride == 0 && !fresh)) continue;
      for (int64_t t = 0; t < steps_; ++t) {
        const C* x = c.data + t * c.step_stride;
        store(staged_[i] + t * lanes<C>, c.batch_stride == 0 ? broadcast(*x) : tile.coefficient(x, c.batch_stride));
      }
    }
  }

  ScheduleView<C> view() const { return {staged_[0], staged_[1], staged_[2], staged_[3], step_}; }

 private:
  Coefficient<C> coefficients_[4];
  int64_t steps_, step_;
  C* staged_[4];  // [steps] vectors
};

template <typename C>
class ScheduleGradient {
 public:
  // `cut`: a tile holds part of a sample only, so that every sum goes to the chunk's partial result
  template <typename Backward>
  ScheduleGradient(Arena& arena, const Backward& p, int64_t steps, bool cut)
      : outputs_{p.dphi, p.dbeta, p.dgamma, p.d_threshold},
        coefficients_{p.phi, p.beta, p.gamma, p.threshold},
        k_(p.k),
        steps_(steps),
        step_(steps == 1 ? 0 : lanes<C>),
        cut_(cut) {
    for (C*& sum : sums_) sum = arena.take<C>(steps * lanes<C>);
  }

  bool wanted() const { return outputs_[0] != nullptr; }

  UNROLLED_KERNELS_NOINLINE void begin_tile(bool first_of_chunk) {
    for (int i = 0; i < 4; ++i) {
      if (outputs_[i] && (first_of_chunk || own(i))) fill_zero(sums_[i], steps_ * lanes<C>);
    }
  }

  ScheduleSums<C> sums() const {
    return {wanted() ? sums_[0] : nullptr, sums_[1], sums_[2], outputs_[3] ? sums_[3] : nullptr, step_};
  }

  template <typename Layout>
  UNROLLED_KERNELS_NOINLINE void end_tile(const Layout& tile) {
    for (int i = 0; i < 4; ++i) {
      if (!outputs_[i] || !own(i)) continue;
      const bool per_step = coefficients_[i].step_stride != 0;
      Vector<C> total{};
      for (int64_t t = 0; t < steps_; ++t) {
        const Vector<C> v = load(sums_[i] + t * lanes<C>);
        if (per_step) tile.store_sums(v, outputs_[i] + t, k_);
        total += v;
      }
      if (!per_step) tile.store_sums(total, outputs_[i], 1);
    }
  }

  // adds to out [4, steps]
  UNROLLED_KERNELS_NOINLINE void end_chunk(double* out) const {
    for (int i = 0; i < 4; ++i) {
      if (!outputs_[i] || own(i)) continue;
      for (int64_t t = 0; t < steps_; ++t) {
        double sum = 0;
        for (int l = 0; l < lanes<C>; ++l) sum += sums_[i][t * lanes<C> + l];
        out[i * steps_ + t] += sum;
      }
    }
  }

 private:
  bool own(int i) const { return coefficients_[i].batch_stride != 0 && !cut_; }

  C* outputs_[4];
  Coefficient<C> coefficients_[4];
  int64_t k_, steps_, step_;
  bool cut_;
  C* sums_[4];  // [steps] vectors
};

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
