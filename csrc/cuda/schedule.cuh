// The schedule phi, beta, gamma as kernels read it, with the threshold of a proximal map, and the sums that become its
// gradient.
#pragma once

#include "cuda/platform.cuh"
#include "cuda/columns.cuh"
#include "momentum.h"

namespace unrolled_kernels::cuda {

template <typename C>
struct StepCoefficients {
  C phi, beta, gamma, threshold = 0;
};

// The recurrence of momentum.h on one element, for every kernel. `momentum` is a constant where it is to cost nothing.
template <typename C>
__device__ __forceinline__ C extrapolate(const StepCoefficients<C>& s, bool momentum, C y, C previous) {
  return momentum ? y + s.gamma * (y - previous) : y;
}
// y_{t+1}, or v_t where a proximal map follows; g: that element of Q z_t + b
template <typename C>
__device__ __forceinline__ C advance(const StepCoefficients<C>& s, bool momentum, C y, C previous, C g) {
  return (momentum ? y + s.beta * (y - previous) : y) - s.phi * g;
}

// Its adjoint on one element: a of y_{t+1} (of v_t), carry: what of it y_t is owed, db.
template <typename C>
struct StepAdjoint {
  C a, carry = 0, db = 0;

  // back through step t. w: of Q'a; terms: of dphi, dbeta, dgamma, d_threshold, the last three added to. That of dphi,
  // -a'(Q z + b), is the caller's.
  __device__ __forceinline__ void step(const StepCoefficients<C>& s, bool momentum, C w, C y, C previous,
                                       C (&terms)[4]) {
    const C m = momentum ? y - previous : C(0);
    const C phi_w = s.phi * w;
    db -= s.phi * a;
    if (momentum) {
      terms[1] += a * m;
      terms[2] -= phi_w * m;
      const C next = (1 + s.beta) * a + carry - (1 + s.gamma) * phi_w;
      carry = s.gamma * phi_w - s.beta * a;
      a = next;
    } else {
      a -= phi_w;
    }
  }
};

// The same of one element of a diagonal Q where all steps have the same coefficients, which weigh the sums at the end.
template <typename C>
struct ConstantStepAdjoint {
  C a, direct = a;                             // of y_{t+1}: by every way, and by y alone, not by m_{t+1}
  C sum = 0, sum_z = 0, sum_g = 0, sum_m = 0;  // of a, a z, a g and a m

  // back through a step. p: phi q; r: beta - gamma p; g: q z + b, small where q sum_z and b sum would cancel
  __device__ __forceinline__ void step(bool momentum, C p, C r, C z, C g, C m) {
    sum += a;
    sum_z += a * z;
    sum_g += a * g;
    direct -= p * a;
    if (momentum) sum_m += a * m;
    a = momentum ? direct + r * a : direct;
  }
  // p: phi q
  __device__ __forceinline__ void add_terms(C p, C (&terms)[4]) const {
    terms[0] -= sum_g;
    terms[1] += sum_m;
    terms[2] -= p * sum_m;
  }
};

// Their tangents, d being those of the coefficients.
template <typename C>
__device__ __forceinline__ C extrapolate_tangent(const StepCoefficients<C>& s, const StepCoefficients<C>& d,
                                                 bool momentum, C y, C previous, C dy, C d_previous) {
  const C z = extrapolate(s, momentum, dy, d_previous);
  return momentum ? z + d.gamma * (y - previous) : z;
}
template <typename C>
__device__ __forceinline__ C advance_tangent(const StepCoefficients<C>& s, const StepCoefficients<C>& d, bool momentum,
                                             C y, C previous, C g, C dy, C d_previous, C dg) {
  const C next = advance(s, momentum, dy, d_previous, dg) - d.phi * g;
  return momentum ? next + d.beta * (y - previous) : next;
}

// The adjoint of a step and its tangent on one element (derived in manual.py).
template <typename C>
struct SecondOrderAdjoint {
  StepAdjoint<C> p, a;  // of y_{t+1}, and of its tangent

  // back through step t. u: of Q'p + X'a, w: of Q'a; terms: as in StepAdjoint
  __device__ __forceinline__ void step(const StepCoefficients<C>& s, const StepCoefficients<C>& d, bool momentum, C u,
                                       C w, C y, C previous, C dy, C d_previous, C (&terms)[4]) {
    const C a_before = a.a, moved = d.phi * w;
    a.step(s, momentum, w, dy, d_previous, terms);
    p.step(s, momentum, u, y, previous, terms);
    p.db -= d.phi * a_before;
    p.a -= moved;
    if (momentum) {
      const C of_m = d.beta * a_before - s.gamma * moved - d.gamma * (s.phi * w);
      terms[2] -= moved * (y - previous);
      p.a += of_m;
      p.carry -= of_m;
    }
  }
};

// proximal: whether there may be a threshold
template <typename C, bool proximal = false>
class SampleSchedule {
 public:
  template <typename Inputs>
  __device__ __forceinline__ SampleSchedule(const Inputs& p, int64_t sample)
      : phi_(p.phi.data + sample * p.phi.batch_stride),
        beta_(p.beta.data),
        gamma_(p.gamma.data),
        threshold_(proximal ? p.threshold.data : nullptr),
        phi_step_(p.phi.step_stride),
        beta_step_(p.beta.step_stride),
        gamma_step_(p.gamma.step_stride),
        threshold_step_(p.threshold.step_stride) {
    if (beta_) {
      beta_ += sample * p.beta.batch_stride;
      gamma_ += sample * p.gamma.batch_stride;
    }
    if (proximal && threshold_) threshold_ += sample * p.threshold.batch_stride;
  }
  __device__ __forceinline__ bool has_momentum() const { return beta_ != nullptr; }
  __device__ __forceinline__ StepCoefficients<C> at(int64_t t) const {
    StepCoefficients<C> s{__ldg(phi_ + t * phi_step_), 0, 0};
    if (beta_) s.beta = __ldg(beta_ + t * beta_step_), s.gamma = __ldg(gamma_ + t * gamma_step_);
    if (proximal && threshold_) s.threshold = __ldg(threshold_ + t * threshold_step_);
    return s;
  }

 private:
  const C *phi_, *beta_, *gamma_, *threshold_;
  int64_t phi_step_, beta_step_, gamma_step_, threshold_step_;
};

template <typename Inputs>
__host__ __device__ inline bool shares_schedule(const Inputs& p) {
  return p.phi.batch_stride == 0 && p.beta.batch_stride == 0 && p.gamma.batch_stride == 0 &&
         p.threshold.batch_stride == 0;
}

// A schedule that the batch shares, [k, 4] in the shared memory of a block; of one that it does not, or that is too long,
// a sample's own is read where it is.
template <typename C, bool momentum, bool proximal = false>
class BlockSchedule {
 public:
  // bytes that it takes of a block; 0: it is read where it is
  template <typename Inputs>
  static int64_t bytes(const Inputs& p) {
    const bool shared = shares_schedule(p);
    const int64_t bytes = p.k * 4 * static_cast<int64_t>(sizeof(C));
    return shared && bytes <= 16 * 1024 ? bytes : 0;
  }

  // copies it, if bytes says so, and synchronises the block
  template <typename Inputs>
  __device__ __forceinline__ BlockSchedule(const Inputs& p, int64_t bytes, unsigned char* shared)
      : shared_(bytes ? reinterpret_cast<C*>(shared) : nullptr), on_chip_(bytes != 0) {
    if (!on_chip_) return;
    const SampleSchedule<C, proximal> all(p, 0);
    for (int t = threadIdx.x; t < p.k; t += blockDim.x) {
      const StepCoefficients<C> s = all.at(t);
      store_pack<4>(shared_ + 4 * t, Pack<C, 4>{{s.phi, s.beta, s.gamma, s.threshold}});
    }
    __syncthreads();
  }
  __device__ __forceinline__ bool on_chip() const { return on_chip_; }
  // of any sample, on chip
  __device__ __forceinline__ StepCoefficients<C> at(int t) const {
    if constexpr (momentum || proximal) {
      const Pack<C, 4> s = load_pack<4>(shared_ + 4 * t);
      return {s.at[0], s.at[1], s.at[2], s.at[3]};
    } else {
      return {shared_[4 * t], 0, 0};
    }
  }
  template <typename Inputs>
  __device__ __forceinline__ StepCoefficients<C> at(const Inputs& p, int64_t sample, int t) const {
    return on_chip_ ? at(t) : SampleSchedule<C, proximal>(p, sample).at(t);
  }

 private:
  C* shared_;
  bool on_chip_;
};

// What a step has of coefficients, as bits: phi, beta, gamma, threshold.
constexpr int coefficients = 4;
template <typename Inputs>
__host__ __device__ inline int coefficients_per_step(const Inputs& p) {
  return (p.phi.step_stride != 0) | (p.beta.step_stride != 0) << 1 | (p.gamma.step_stride != 0) << 2 |
         (p.threshold.step_stride != 0) << 3;
}
template <typename Inputs>
__host__ __device__ inline int coefficients_per_sample(const Inputs& p) {
  if (p.B == 1) return 15;
  return (p.phi.batch_stride != 0) | (p.beta.batch_stride != 0) << 1 | (p.gamma.batch_stride != 0) << 2 |
         (p.threshold.batch_stride != 0) << 3;
}
// Steps in a row of partial sums: 1 where no coefficient varies over steps.
template <typename Inputs>
__host__ __device__ inline int64_t schedule_steps(const Inputs& p) {
  return coefficients_per_step(p) ? p.k : 1;
}

// Sums of dphi, dbeta, dgamma, d_threshold. What a coefficient shares over steps is added up in each thread and over threads once; what
// it does not, is added over threads at every step. Sums that a team completes go to the output itself, the others to a
// row of partial sums, [coefficients, steps], which sum_partials adds up.
//
// width: threads of a sample within a warp, a power of two. warps: of a team; if > 1, a team works on one sample.
// proximal: whether there may be a threshold.
template <typename C, int width, int warps, bool proximal = false>
class ScheduleGradient {
  static constexpr int summed = proximal ? coefficients : coefficients - 1;

 public:
  // own: coefficients whose sums a team completes, as bits; across_warps: shared [2, warps, 4]
  template <typename Backward>
  __device__ ScheduleGradient(const Backward& p, int own, C* across_warps)
      : phi_(p.dphi),
        beta_(p.dbeta),
        gamma_(p.dgamma),
        threshold_(p.d_threshold),
        partial_(nullptr),
        across_warps_(across_warps),
        k_(p.k),
        steps_(schedule_steps(p)),
        wanted_(p.dphi ? (p.dbeta ? 7 : 1) | (proximal && p.d_threshold ? 8 : 0) : 0),
        per_step_(coefficients_per_step(p) & wanted_),
        own_(own) {}

  // the row that takes the sums from here on; not needed where `own` is all of them
  __device__ __forceinline__ void begin_row(C* partial) {
    partial_ = partial;
    if (!partial_ || !wanted_) return;
    for (int64_t i = rank(); i < coefficients * steps_; i += 32 * warps) partial_[i] = 0;
    sync();
  }

  __device__ __forceinline__ bool wanted() const { return wanted_ != 0; }
  __device__ __forceinline__ bool varies_over_steps() const { return per_step_ != 0; }

  // adds a thread's terms of step t, which are zero where the sample is not in the batch
  __device__ __forceinline__ void add(int64_t t, int64_t sample, const C (&terms)[4]) {
#pragma unroll
    for (int i = 0; i < summed; ++i) sums_[i] += terms[i];
    if (per_step_) settle(per_step_, t, sample, terms, static_cast<int>(t & 1));
  }

  // warps > 1: call it once after the barrier that follows add
  __device__ __forceinline__ void collect(int64_t t, int64_t sample) {
    if (warps > 1 && per_step_) collect_across_warps(per_step_, t, sample, static_cast<int>(t & 1));
  }

  __device__ __forceinline__ void end_sample(int64_t sample) { end(own_, sample); }
  __device__ __forceinline__ void end_row() { end(~own_, 0); }

 private:
  static __device__ __forceinline__ int rank() { return threadIdx.x % (32 * warps); }
  static __device__ __forceinline__ void sync() {
    if constexpr (warps > 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  __device__ __forceinline__ void end(int which, int64_t sample) {
    which &= wanted_ & ~per_step_;
    if (!which) return;
    if (warps > 1) sync();
    settle(which, 0, sample, sums_, 0);
    if (warps > 1) {
      sync();
      collect_across_warps(which, 0, sample, 0);
    }
#pragma unroll
    for (int i = 0; i < summed; ++i) sums_[i] = which >> i & 1 ? C(0) : sums_[i];
  }

  __device__ __forceinline__ void settle(int which, int64_t t, int64_t sample, const C (&terms)[4], int parity) {
    if constexpr (warps > 1) {
      C v[4] = {terms[0], terms[1], terms[2], proximal ? terms[3] : C(0)};
      const int lane = rank() % 32;
      reduce_scatter<4, 32, 1>(v, lane);
      if (lane % 8 == 0) across_warps_[(parity * warps + rank() / 32) * 4 + lane / 8] = v[0];
    } else {
      if (which & own_) deliver_sums<width>(which & own_, t, sample, terms);
      if (which & ~own_) deliver_sums<32>(which & ~own_, t, sample, terms);
    }
  }

  template <int threads>
  __device__ __forceinline__ void deliver_sums(int which, int64_t t, int64_t sample, const C (&terms)[4]) {
    C v[4] = {terms[0], terms[1], terms[2], proximal ? terms[3] : C(0)};
    const int position = rank() % threads;
    reduce_scatter<4, threads, 1>(v, position);
    if (!holds_first_copy<4, threads>(position)) return;
    const int first = scattered_index<4, threads>(position);
#pragma unroll
    for (int n = 0; n < (threads < 4 ? 4 / threads : 1); ++n) {
      if (which >> (first + n) & 1) deliver(first + n, t, sample, v[n]);
    }
  }

  __device__ __forceinline__ void collect_across_warps(int which, int64_t t, int64_t sample, int parity) {
    const int i = rank();
    if (i >= summed || !(which >> i & 1)) return;
    C sum = 0;
    for (int warp = 0; warp < warps; ++warp) sum += across_warps_[(parity * warps + warp) * 4 + i];
    deliver(i, t, sample, sum);
  }

  __device__ __forceinline__ void deliver(int i, int64_t t, int64_t sample, C sum) {
    if (own_ >> i & 1) {
      C* out = i == 0 ? phi_ : i == 1 ? beta_ : i == 2 || !proximal ? gamma_ : threshold_;
      if (sample >= 0) out[per_step_ >> i & 1 ? sample * k_ + t : sample] = sum;
    } else {
      partial_[i * steps_ + t] += sum;
    }
  }

  C *phi_, *beta_, *gamma_, *threshold_, *partial_, *across_warps_;
  int64_t k_, steps_;
  int wanted_, per_step_, own_;
  C sums_[4] = {};
};

// The gradients that are sums over the batch: each team leaves a row [d_matrix, dphi, dbeta, dgamma, d_threshold] of partial
// sums, and sum_partials adds the rows up. nullptr: not wanted, or not such a sum.
template <typename Storage>
struct PartialSums {
  using C = compute_type<Storage>;
  C* partials;  // [rows, matrix_size + coefficients steps], a row for each team
  int64_t rows, matrix_size, steps;
  int64_t groups;  // each of `rows` rows, and with outputs of its own
  Storage* d_matrix;
  C* schedule[coefficients];
  int64_t schedule_size[coefficients];  // k or 1

  __host__ __device__ int64_t row_size() const { return matrix_size + coefficients * steps; }
  __host__ __device__ bool any() const { return d_matrix || schedule[0] || schedule[1] || schedule[2] || schedule[3]; }
  __host__ __device__ int64_t size() const { return groups * rows * row_size(); }
  __device__ C* row(int64_t i) const { return rows ? partials + i * row_size() : nullptr; }
};

// A block for each of the groups' pieces of columns.
template <typename Storage>
__global__ void __launch_bounds__(1024)
    sum_partials_kernel(const __grid_constant__ PartialSums<Storage> p, ColumnSums columns) {
  using C = compute_type<Storage>;
  const int64_t blocks = columns.blocks(p.row_size()), group = blockIdx.x / blocks;
  int64_t n;
  double sum;
  if (!columns.sum(p.partials + group * p.rows * p.row_size(), p.rows, p.row_size(), blockIdx.x % blocks, n, sum))
    return;
  if (n < p.matrix_size) {
    if (p.d_matrix) p.d_matrix[n] = to_storage<Storage>(static_cast<C>(sum));
    return;
  }
  const int64_t i = (n - p.matrix_size) / p.steps, t = (n - p.matrix_size) % p.steps;
  C* out = nullptr;
  int64_t size = 0;
#pragma unroll
  for (int c = 0; c < coefficients; ++c) {
    if (c == i) out = p.schedule[c], size = p.schedule_size[c];
  }
  if (out && t < size) out[group * size + t] = static_cast<C>(sum);
}

}  // namespace unrolled_kernels::cuda
