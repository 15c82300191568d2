// Q = diag(q), or diag(1 + f^2): every element of the state is a recurrence of its own, run in registers.
//
// Floor of one element, s bytes: forward 3s bytes (q, b, y) and 4k flops, backward 5s bytes (q, b, grad_y, dq, db) and 10k
// flops, one s more for y_0 and its gradient each; float32 on an H200 is bound by memory up to k = 40 and k = 28, less the
// share of what backward computes twice.
//
// A thread takes 16 bytes (half types: 8) of consecutive elements of one sample, a warp one chunk after another, of which
// the next is on its way meanwhile. Backward keeps the iterates of `segment` steps in shared memory, a value for each
// element and step; for more steps, it recomputes them from (y_t, y_{t-1}) at the start of each segment. What a proximal
// map was given, v_t, it recomputes from y_t and y_{t-1} as well. Where all steps have the same coefficients these weigh sums
// over the steps, at the end. Second order is the same of y and of its tangent, of half as many elements.
// Where samples have the same schedule and their rows follow one another, the batch is one long sample.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_prox.cuh"
#include "cuda/momentum_stopping.cuh"

namespace unrolled_kernels::cuda {
namespace {

constexpr int block = 128, warps_of_block = block / 32, longest_segment = 16;

template <typename Storage>
constexpr int widest_pack = 16 / sizeof(compute_type<Storage>);

// A warp takes `runs` pieces of each sample in turn, chunk by chunk; where width < 32, of 32 / width samples at once.
struct DiagonalPlan {
  int64_t runs, chunks, chunks_of_run, grid;
  int64_t segment;                                           // steps whose iterates backward keeps at once
  int64_t schedule_bytes, iterates_bytes, checkpoint_bytes;  // of a block
  int64_t shared_bytes;                                      // all of them, or all but the checkpoints
  unsigned char* checkpoints;  // [grid, checkpoint_bytes] in the workspace, or nullptr: in shared memory
};

template <int width, int n>
struct DiagonalItem {
  int64_t sample, chunk, end;
  int first;  // element of the thread in a chunk
  bool exists;

  __device__ DiagonalItem(const DiagonalPlan& plan, int64_t B, int64_t item) : first(threadIdx.x % width * n) {
    // more than one run means few items, and 64-bit divisions are calls
    const int64_t group = plan.runs == 1 ? item : static_cast<unsigned>(item) / static_cast<unsigned>(plan.runs);
    sample = group * (32 / width) + threadIdx.x % 32 / width;
    exists = sample < B;
    if (!exists) sample = B - 1;
    chunk = (item - group * plan.runs) * plan.chunks_of_run;
    end = chunk + plan.chunks_of_run < plan.chunks ? chunk + plan.chunks_of_run : plan.chunks;
  }
  static __host__ __device__ int64_t count(int64_t B, int64_t runs) { return ceil_div(B, 32 / width) * runs; }
  __device__ int64_t element() const { return chunk * width * n + first; }
};

template <int n, typename Storage>
__device__ __forceinline__ void load_elements(const Storage* row, int64_t e, int64_t d, bool exists,
                                              compute_type<Storage> (&x)[n]) {
  if (exists && e + n <= d) {
    const Pack<Storage, n> pack = load_pack<n>(row + e);
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = to_compute(pack.at[i]);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) x[i] = exists && e + i < d ? to_compute(row[e + i]) : compute_type<Storage>(0);
  }
}
template <int n, typename Storage>
__device__ __forceinline__ void store_elements(const compute_type<Storage> (&x)[n], int64_t e, int64_t d, bool exists,
                                               Storage* row) {
  if (exists && e + n <= d) {
    Pack<Storage, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.at[i] = to_storage<Storage>(x[i]);
    stream_pack<n>(row + e, pack);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (exists && e + i < d) row[e + i] = to_storage<Storage>(x[i]);
    }
  }
}

// What a chunk starts from, as it comes from memory. tikhonov makes q and b from f, g and x.
template <int n, typename Storage>
struct DiagonalStart {
  compute_type<Storage> q[n], b[n], x[n], y[n];

  __device__ __forceinline__ void load(const MomentumInputs<Storage>& p, int64_t sample, int64_t e, bool exists) {
    load_elements(p.diagonal + sample * p.diagonal_stride, e, p.d, exists, q);
    load_elements(p.b + sample * p.b_stride, e, p.d, exists, b);
    load_elements(p.observed + sample * p.observed_stride, e, p.d, exists && p.observed, x);
    load_elements(p.y0 + sample * p.y0_stride, e, p.d, exists && p.y0, y);
  }
};
template <int n, typename Storage>
struct DiagonalBackwardStart : DiagonalStart<n, Storage> {
  compute_type<Storage> a[n];

  __device__ __forceinline__ void load(const MomentumBackward<Storage>& p, int64_t sample, int64_t e, bool exists) {
    DiagonalStart<n, Storage>::load(p, sample, e, exists);
    load_elements(p.grad_y + ((p.trajectory ? p.k * p.B : 0) + sample) * p.d, e, p.d, exists, a);
  }
};

// dual: behind q, b, y and previous those of the tangent
template <int n, typename C, bool momentum, bool dual = false>
struct DiagonalState {
  static constexpr int size = dual ? 2 * n : n;
  C q[size], b[size], y[size], previous[size];

  template <typename Start>
  __device__ __forceinline__ DiagonalState(const Start& start, bool tikhonov) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      q[i] = tikhonov ? 1 + start.q[i] * start.q[i] : start.q[i];
      b[i] = start.b[i] - start.x[i];
      y[i] = previous[i] = start.y[i];
    }
  }
  template <typename Storage>
  __device__ __forceinline__ void load_tangent(const MomentumInputs<Storage>& direction, int64_t sample, int64_t e,
                                               bool exists) {
    C rows[n];
    const auto load = [&](const Storage* x, C(&to)[size]) {
      load_elements(x + sample * direction.d, e, direction.d, exists && x, rows);
#pragma unroll
      for (int i = 0; i < n; ++i) to[n + i] = rows[i];
    };
    load(direction.diagonal, q);
    load(direction.b, b);
    load(direction.y0, y);
#pragma unroll
    for (int i = n; i < size; ++i) previous[i] = y[i];
  }
  // what y_{t+1} of element i is before a map; y: y_t
  __device__ __forceinline__ C advanced(const StepCoefficients<C>& s, int i, C y, C previous) const {
    return advance(s, momentum, y, previous, q[i] * extrapolate(s, momentum, y, previous) + b[i]);
  }
  template <typename Map>
  __device__ __forceinline__ void step(const StepCoefficients<C>& s, const Map& map) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const C next = map(s, i, advanced(s, i, y[i], previous[i]));
      previous[i] = y[i];
      y[i] = next;
    }
  }
  // with its tangent; d: of the coefficients
  __device__ __forceinline__ void step(const StepCoefficients<C>& s, const StepCoefficients<C>& d) {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const int of_d = n + i;
      const C z = extrapolate(s, momentum, y[i], previous[i]), g = q[i] * z + b[i];
      const C dz = extrapolate_tangent(s, d, momentum, y[i], previous[i], y[of_d], previous[of_d]);
      const C dg = q[i] * dz + (q[of_d] * z + b[of_d]);
      const C next = advance(s, momentum, y[i], previous[i], g);
      const C d_next = advance_tangent(s, d, momentum, y[i], previous[i], g, y[of_d], previous[of_d], dg);
      previous[i] = y[i], previous[of_d] = y[of_d];
      y[i] = next, y[of_d] = d_next;
    }
  }
};

// the gradient of q, or of f through q = 1 + f^2: f is read again, which is cheaper than to keep it
template <int n, typename Storage>
__device__ __forceinline__ void store_d_diagonal(const MomentumBackward<Storage>& p, int64_t sample, int64_t e,
                                                 bool exists, compute_type<Storage> (&dq)[n]) {
  if (!p.d_diagonal) return;
  if (p.observed) {
    compute_type<Storage> f[n];
    load_elements(p.diagonal + sample * p.diagonal_stride, e, p.d, exists, f);
#pragma unroll
    for (int i = 0; i < n; ++i) dq[i] *= 2 * f[i];
  }
  store_elements(dq, e, p.d, exists, p.d_diagonal + sample * p.d);
}

template <typename C, int n>
__device__ __forceinline__ void assign(C (&to)[n], const C (&from)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

template <typename Storage, int n, int width, bool momentum, bool proximal>
__global__ void __launch_bounds__(block, proximal && sizeof(Storage) == 4 ? 6 : 0)
    momentum_diagonal_kernel(const __grid_constant__ MomentumForward<Storage> p,
                             const __grid_constant__ DiagonalPlan plan) {
  using C = compute_type<Storage>;
  const int k = static_cast<int>(p.k);
  const BlockSchedule<C, momentum, proximal> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  const bool plain = schedule.on_chip() && !p.trajectory;
  const int64_t items = DiagonalItem<width, n>::count(p.B, plan.runs);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * warps_of_block;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / 32; i < items; i += warps) {
    DiagonalItem<width, n> item(plan, p.B, i);
    Storage* out = p.y + item.sample * p.d;
    DiagonalStart<n, Storage> next;
    if (item.chunk < item.end) next.load(p, item.sample, item.element(), item.exists);
#pragma unroll 1
    while (item.chunk < item.end) {
      const int64_t e = item.element();
      DiagonalState<n, C, momentum> state(next, p.observed != nullptr);
      const ProximalMap<C, n, proximal> map(p, item.sample, e, item.exists);
      if (++item.chunk < item.end) next.load(p, item.sample, item.element(), item.exists);
      if (plain) {
#pragma unroll 4
        for (int t = 0; t < k; ++t) state.step(schedule.at(t), map);
      } else {
        for (int t = 0; t < k; ++t) {
          if (p.trajectory) store_elements(state.y, e, p.d, item.exists, out + t * p.B * p.d);
          state.step(schedule.at(p, item.sample, t), map);
        }
      }
      store_elements(state.y, e, p.d, item.exists, p.trajectory ? out + p.k * p.B * p.d : out);
    }
  }
}

constexpr int longest_of_a_warp = 256;

// Samples that stop by themselves. All of a sample takes a step before any of it takes the next, so that its state is in
// memory, [samples of a block, 2, d]: y_t and y_{t-1}, of which each thread reads what it wrote. `threads`: of a sample.
template <typename Storage, int threads>
__global__ void __launch_bounds__(threads > 32 ? threads : block)
    momentum_diagonal_stopping_kernel(const __grid_constant__ MomentumForward<Storage> p,
                                      const __grid_constant__ Stopping<compute_type<Storage>> stopping,
                                      compute_type<Storage>* states) {
  using C = compute_type<Storage>;
  constexpr int samples = threads > 32 ? 1 : block / threads;
  __shared__ C across_warps[2 * (threads / 32 + 1) * 2];
  const int group = threadIdx.x / threads, rank = threadIdx.x % threads;
  C* const state = states ? states + blockIdx.x * samples * 2 * p.d : reinterpret_cast<C*>(dynamic_shared_memory());
  for (int64_t first = static_cast<int64_t>(blockIdx.x) * samples; first < p.B;
       first += static_cast<int64_t>(gridDim.x) * samples) {
    bool moves = first + group < p.B;
    const int64_t sample = moves ? first + group : p.B - 1;
    const SampleSchedule<C, true> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    const auto entry = [&](const Storage* rows, int64_t stride, int64_t e) {
      return rows ? to_compute(rows[sample * stride + e]) : C(0);
    };
    C *y = state + group * 2 * p.d, *next = y + p.d;  // where y_{t+1} will be, y_{t-1} is
    for (int64_t e = rank; e < p.d; e += threads) y[e] = next[e] = entry(p.y0, p.y0_stride, e);
    for (int64_t t = 0; threads > 32 ? moves : any_lane(moves); ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      StepSize<C> size;
      for (int64_t e = rank; e < p.d; e += threads) {
        const C given = entry(p.diagonal, p.diagonal_stride, e), q = p.observed ? 1 + given * given : given;
        const C b = entry(p.b, p.b_stride, e) - entry(p.observed, p.observed_stride, e);
        const C v = advance(s, momentum, y[e], next[e], q * extrapolate(s, momentum, y[e], next[e]) + b);
        next[e] = ProximalMap<C, 1>(p, sample, e, true)(s, 0, v);
        size.add(next[e], y[e]);
      }
      C* const last = y;
      y = next, next = last;
      size.template over_threads<threads>(across_warps, t);
      if (!moves || (t + 1 < p.k && !size.is_small(stopping.tolerance))) continue;
      for (int64_t e = rank; e < p.d; e += threads) p.y[sample * p.d + e] = to_storage<Storage>(y[e]);
      if (rank == 0) store_stop(stopping, sample, t, size.change());
      moves = false;
    }
    // the first half across warps is written again
    if (threads > 32) __syncthreads();
  }
}

struct NoDirection {};
template <typename Storage, bool dual>
using Direction = std::conditional_t<dual, MomentumForward<Storage>, NoDirection>;

// dual: second order. constant: all steps have the same coefficients, no map, and y_k is the only output.
template <typename Storage, int n, int width, bool momentum, bool proximal, bool dual, bool constant>
__global__ void __launch_bounds__(block, proximal || dual ? 3 : 4)
    momentum_diagonal_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                      const __grid_constant__ Direction<Storage, dual> direction,
                                      const __grid_constant__ DiagonalPlan plan,
                                      const __grid_constant__ PartialSums<Storage> sums) {
  using C = compute_type<Storage>;
  constexpr int kept = DiagonalState<n, C, momentum, dual>::size;
  using State = Pack<C, kept>;
  const int k = static_cast<int>(p.k), segment = static_cast<int>(plan.segment);
  const int segments = (k + segment - 1) / segment;
  const BlockSchedule<C, momentum, proximal> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  const bool plain = schedule.on_chip() && !p.trajectory;
  const int64_t items = DiagonalItem<width, n>::count(p.B, plan.runs),
                warps = static_cast<int64_t>(gridDim.x) * warps_of_block;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / 32;
  // of one segment from step t on: y_{t-1}, y_t ..., [segment + 1, block]
  unsigned char* iterates_bytes = dynamic_shared_memory() + plan.schedule_bytes;
  State* const iterates = reinterpret_cast<State*>(iterates_bytes) + threadIdx.x;
  // (y_t, y_{t-1}) at the start of each segment but the last: [segments - 1, 2, block]
  State* const checkpoints =
      reinterpret_cast<State*>(plan.checkpoints ? plan.checkpoints + blockIdx.x * plan.checkpoint_bytes
                                                : iterates_bytes + plan.iterates_bytes) +
      threadIdx.x;
  const bool row_for_item = plan.chunks > 1;
  ScheduleGradient<C, width, 1, proximal> gradient(p, row_for_item ? 0 : coefficients_per_sample(p), nullptr);
  if (!row_for_item) gradient.begin_row(sums.row(warp));
  for (int64_t i = warp; i < items; i += warps) {
    DiagonalItem<width, n> item(plan, p.B, i);
    const int64_t delivered = item.exists ? item.sample : -1;
    const Storage* cotangent = p.grad_y + item.sample * p.d;
    if (row_for_item) gradient.begin_row(sums.row(i));
    DiagonalBackwardStart<n, Storage> next;
    if (item.chunk < item.end) next.load(p, item.sample, item.element(), item.exists);
#pragma unroll 1
    while (item.chunk < item.end) {
      const int64_t e = item.element();
      DiagonalState<n, C, momentum, dual> state(next, p.observed != nullptr);
      if constexpr (dual) state.load_tangent(direction, item.sample, e, item.exists);
      ProximalMap<C, n, proximal> map(p, item.sample, e, item.exists);
      using Adjoint = std::conditional_t<constant, ConstantStepAdjoint<C>, StepAdjoint<C>>;
      std::conditional_t<dual, SecondOrderAdjoint<C>, Adjoint> adjoint[n];
      // of what the cotangents are, and of y
      const auto given_to = [&](int j) -> C& {
        if constexpr (dual) {
          return adjoint[j].a.a;
        } else {
          return adjoint[j].a;
        }
      };
      const auto of_y = [&](int j) -> Adjoint& {
        if constexpr (dual) {
          return adjoint[j].p;
        } else {
          return adjoint[j];
        }
      };
      C dq[n] = {};
#pragma unroll
      for (int j = 0; j < n; ++j) {
        of_y(j) = Adjoint{dual ? C(0) : next.a[j]};
        given_to(j) = next.a[j];
      }
      if (++item.chunk < item.end) next.load(p, item.sample, item.element(), item.exists);
      const auto tangents = [&](int t) {
        if constexpr (dual) {
          if (direction.phi.data) return SampleSchedule<C>(direction, item.sample).at(t);
        }
        return StepCoefficients<C>{};
      };
      [[maybe_unused]] const auto store_tangent = [&](const auto& state, int t) {
        C dy[n];
#pragma unroll
        for (int j = 0; j < n; ++j) dy[j] = state.y[kept - n + j];
        if constexpr (dual) {
          store_elements(dy, e, p.d, item.exists, direction.y + (t * p.B + item.sample) * p.d);
        }
      };
      const auto coefficients_at = [&](int t) { return plain ? schedule.at(t) : schedule.at(p, item.sample, t); };
      const StepCoefficients<C> of_all = constant ? coefficients_at(0) : StepCoefficients<C>{};
      const auto coefficients = [&](int t) { return constant ? of_all : coefficients_at(t); };
      const auto keep = [](const auto& v, State* to) {
        State pack;
        assign(pack.at, v);
        store_pack<kept>(&to->at[0], pack);
      };
      // forward from step t
      const auto step = [&](int t) {
        if constexpr (dual) {
          if (direction.y && p.trajectory) store_tangent(state, t);
          state.step(coefficients(t), tangents(t));
        } else {
          state.step(coefficients(t), map);
        }
      };
#pragma unroll 1
      for (int c = 0; c + 1 < segments; ++c) {
        keep(state.y, checkpoints + 2 * c * block);
        keep(state.previous, checkpoints + (2 * c + 1) * block);
#pragma unroll 4
        for (int s = 0; s < segment; ++s) step(c * segment + s);
      }
#pragma unroll 1
      for (int c = segments - 1; c >= 0; --c) {
        const int first = c * segment, last = k < first + segment ? k : first + segment;
        if (c + 1 < segments) {
          assign(state.y, load_pack<kept>(&checkpoints[2 * c * block].at[0]).at);
          assign(state.previous, load_pack<kept>(&checkpoints[(2 * c + 1) * block].at[0]).at);
        }
        State* at = iterates;
        keep(state.previous, at);
#pragma unroll 4
        for (int t = first; t + 1 < last; ++t) {
          at += block;
          keep(state.y, at);
          step(t);
        }
        if constexpr (dual) {
          if (direction.y && p.trajectory) store_tangent(state, last - 1);
          if (direction.y && last == k) {
            auto end = state;
            end.step(coefficients(k - 1), tangents(k - 1));
            store_tangent(end, p.trajectory ? k : 0);
          }
        }
        // y_t of the last step is still in registers
#pragma unroll 2
        for (int t = last - 1; t >= first; --t) {
          C previous[kept], terms[4] = {};
          assign(previous, load_pack<kept>(&at->at[0]).at);
          at -= block;
          const StepCoefficients<C> s = coefficients(t), ds = tangents(t);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const C y = state.y[j];
            if constexpr (dual) {
              const int of_d = n + j;
              const C dy = state.y[of_d], d_previous = previous[of_d], X = state.q[of_d];
              const C a = adjoint[j].a.a, pa = adjoint[j].p.a, z = extrapolate(s, momentum, y, previous[j]);
              const C dz = extrapolate_tangent(s, ds, momentum, y, previous[j], dy, d_previous);
              dq[j] -= (s.phi * pa + ds.phi * a) * z + s.phi * a * dz;
              terms[0] -= pa * (state.q[j] * z + state.b[j]) + a * (state.q[j] * dz + (X * z + state.b[of_d]));
              adjoint[j].step(s, ds, momentum, state.q[j] * pa + X * a, state.q[j] * a, y, previous[j], dy, d_previous,
                              terms);
              state.y[j] = previous[j], state.y[of_d] = d_previous;
            } else if constexpr (constant) {
              const C phi_q = s.phi * state.q[j], z = extrapolate(s, momentum, y, previous[j]);
              adjoint[j].step(momentum, phi_q, s.beta - s.gamma * phi_q, z, state.q[j] * z + state.b[j],
                              y - previous[j]);
              state.y[j] = previous[j];
            } else {
              if constexpr (proximal) {
                adjoint[j].a = map.adjoint(s, j, state.advanced(s, j, y, previous[j]), adjoint[j].a, terms);
              }
              const C a = adjoint[j].a, z = extrapolate(s, momentum, y, previous[j]);
              dq[j] -= s.phi * a * z;
              terms[0] -= a * (state.q[j] * z + state.b[j]);
              adjoint[j].step(s, momentum, state.q[j] * a, y, previous[j], terms);
              state.y[j] = previous[j];
            }
          }
          if constexpr (constant) continue;
          // z_0 without y_0 and m_0 are zero, and q a may overflow: the one is not multiplied by it, the other leaves it
          if (t == 0) terms[2] = 0;
          if (!plain && p.trajectory) {
            C given[n];
            load_elements(cotangent + t * p.B * p.d, e, p.d, item.exists, given);
#pragma unroll
            for (int j = 0; j < n; ++j) given_to(j) += given[j];
          }
          gradient.add(t, delivered, terms);
        }
      }
      C a[n], db[n];
#pragma unroll
      for (int j = 0; j < n; ++j) {
        if constexpr (constant) {
          a[j] = adjoint[j].direct;
          db[j] = -of_all.phi * adjoint[j].sum;
          dq[j] = -of_all.phi * adjoint[j].sum_z;
        } else {
          a[j] = of_y(j).a + of_y(j).carry;
          db[j] = of_y(j).db;
        }
      }
      if constexpr (constant) {
        C terms[4] = {};
#pragma unroll
        for (int j = 0; j < n; ++j) adjoint[j].add_terms(of_all.phi * state.q[j], terms);
        gradient.add(0, delivered, terms);
      }
      store_d_diagonal(p, item.sample, e, item.exists, dq);
      if (p.db) store_elements(db, e, p.d, item.exists, p.db + item.sample * p.d);
      if (p.dy0) store_elements(a, e, p.d, item.exists, p.dy0 + item.sample * p.d);
      map.store(p, item.sample, e, item.exists);
    }
    gradient.end_sample(delivered);
    if (row_for_item) gradient.end_row();
  }
  if (!row_for_item) gradient.end_row();
}

// p as one long sample, if it can be seen so
template <typename Problem>
Problem flattened(Problem p) {
  const auto dense = [&](const void* data, int64_t stride) { return !data || stride == p.d; };
  const auto bound = [&](const auto& x) { return x.single || dense(x.data, x.batch_stride); };
  if (p.B > 1 && shares_schedule(p) && bound(p.lower) && bound(p.upper) && bound(p.weight) &&
      dense(p.diagonal, p.diagonal_stride) && dense(p.observed, p.observed_stride) && dense(p.b, p.b_stride) &&
      dense(p.y0, p.y0_stride)) {
    p.d *= p.B;
    p.B = 1;
    p.diagonal_stride = p.observed_stride = p.b_stride = p.y0_stride = 0;
    p.lower.batch_stride = p.upper.batch_stride = p.weight.batch_stride = 0;
  }
  return p;
}

// whether every access to n elements from a multiple of n on is to an aligned address
template <int n, typename Storage>
bool takes_packs(const MomentumInputs<Storage>& p, std::initializer_list<const Storage*> outputs) {
  const auto aligned = [](const Storage* x, int64_t stride) {
    return reinterpret_cast<uintptr_t>(x) % alignof(Pack<Storage, n>) == 0 && stride % n == 0;
  };
  for (const Storage* x : outputs) {
    if (!aligned(x, 0)) return false;
  }
  return p.d > 32 && (p.d % n == 0 || (p.B == 1 && !p.trajectory)) && aligned(p.diagonal, p.diagonal_stride) &&
         aligned(p.observed, p.observed_stride) && aligned(p.b, p.b_stride) && aligned(p.y0, p.y0_stride);
}

template <typename... Parameters>
DiagonalPlan plan_diagonal(const Device& device, void (*kernel)(Parameters...), int64_t B, int64_t d, int n, int width,
                           int64_t schedule_bytes, int64_t k, int64_t state_bytes) {
  DiagonalPlan plan{};
  const int64_t groups = ceil_div(B, 32 / width), target = static_cast<int64_t>(device.multiprocessors) * 64;
  plan.chunks = ceil_div(d, width * n);
  plan.runs = ceil_div(target, groups) < plan.chunks ? ceil_div(target, groups) : plan.chunks;
  plan.chunks_of_run = ceil_div(plan.chunks, plan.runs);
  plan.runs = ceil_div(plan.chunks, plan.chunks_of_run);
  // a multiprocessor is to hold two blocks: where a schedule or checkpoints are in the way of that, they are not on chip
  const int64_t limit = device.shared_memory / 2;
  if (state_bytes > 0) {
    const int64_t fits = limit / state_bytes - 1, most = k < longest_segment ? k : longest_segment;
    plan.segment = fits < 1 || most < 1 ? 1 : fits < most ? fits : most;
    plan.iterates_bytes = (plan.segment + 1) * state_bytes;
    plan.checkpoint_bytes = k > plan.segment ? 2 * (ceil_div(k, plan.segment) - 1) * state_bytes : 0;
  }
  plan.schedule_bytes = plan.iterates_bytes + schedule_bytes <= limit ? schedule_bytes : 0;
  plan.shared_bytes = plan.schedule_bytes + plan.iterates_bytes;
  if (plan.shared_bytes + plan.checkpoint_bytes <= limit) plan.shared_bytes += plan.checkpoint_bytes;
  plan.grid = persistent_grid(device, kernel, ceil_div(groups * plan.runs, warps_of_block), block, plan.shared_bytes);
  return plan;
}

// f(std::integral_constant<int, n>, std::integral_constant<int, width>)
template <int n, typename Storage, typename F>
const char* with_layout(const MomentumInputs<Storage>& p, std::initializer_list<const Storage*> outputs, F f) {
  if (takes_packs<n>(p, outputs)) return f(std::integral_constant<int, n>(), std::integral_constant<int, 32>());
  if (p.d > 8) return f(std::integral_constant<int, 1>(), std::integral_constant<int, 32>());
  return f(std::integral_constant<int, 1>(), std::integral_constant<int, 8>());
}

template <typename Storage>
const char* launch_stopping(const Device& device, const MomentumForward<Storage>& p, void* workspace, void* stream,
                            size_t* size) {
  using C = compute_type<Storage>;
  const auto run = [&](auto threads) -> const char* {
    const auto kernel = momentum_diagonal_stopping_kernel<Storage, threads>;
    constexpr int samples = threads > 32 ? 1 : block / threads;
    const int64_t bytes = samples * 2 * p.d * static_cast<int64_t>(sizeof(C));
    const bool on_chip = bytes <= device.shared_memory / 2;
    const int64_t grid =
        persistent_grid(device, kernel, ceil_div(p.B, samples), samples * threads, on_chip ? bytes : 0);
    if (size) {
      *size = static_cast<size_t>(on_chip ? 0 : grid * bytes);
      return nullptr;
    }
    C* const states = on_chip ? nullptr : static_cast<C*>(workspace);
    return launch(kernel, grid, samples * threads, on_chip ? bytes : 0, stream, p, stopping_of(p), states);
  };
  if (p.d <= 8) return run(std::integral_constant<int, 8>());
  if (p.d <= longest_of_a_warp) return run(std::integral_constant<int, 32>());
  return run(std::integral_constant<int, 256>());
}

}  // namespace

template <typename Storage>
const char* momentum_diagonal(const MomentumForward<Storage>& problem, void* workspace, void* stream, size_t* size) {
  if (problem.B == 0 || problem.d == 0 || (size && !problem.stopping)) return nullptr;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  if (problem.stopping) return launch_stopping(device, problem, workspace, stream, size);
  const MomentumForward<Storage> p = flattened(problem);
  return with_layout<widest_pack<Storage>>(p, {p.y}, [&](auto n, auto width) {
    return with_method(p, [&](auto momentum, auto proximal) {
      const auto kernel = momentum_diagonal_kernel<Storage, n, width, momentum, proximal>;
      const int64_t schedule_bytes = BlockSchedule<compute_type<Storage>, momentum>::bytes(p);
      const DiagonalPlan plan = plan_diagonal(device, kernel, p.B, p.d, n, width, schedule_bytes, 0, 0);
      return launch(kernel, plan.grid, block, plan.shared_bytes, stream, p, plan);
    });
  });
}

template <typename Storage>
const char* momentum_diagonal(const MomentumBackward<Storage>& problem, void* workspace, void* stream, size_t* size) {
  using C = compute_type<Storage>;
  if (problem.B == 0 || problem.d == 0) return size ? nullptr : clear_sums(problem, stream);
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  const MomentumBackward<Storage> p = flattened(problem);
  const auto run = [&](auto n, auto width, auto momentum, auto proximal, auto dual, auto constant,
                       const auto& direction) -> const char* {
    const auto kernel = momentum_diagonal_backward_kernel<Storage, n, width, momentum, proximal, dual, constant>;
    constexpr int kept = DiagonalState<n, C, momentum, dual>::size;
    DiagonalPlan plan = plan_diagonal(device, kernel, p.B, p.d, n, width, BlockSchedule<C, momentum>::bytes(p), p.k,
                                      block * static_cast<int64_t>(sizeof(Pack<C, kept>)));
    PartialSums<Storage> over_batch = partial_sums(p), over_runs = over_batch;
    const int own = coefficients_per_sample(p);
    if (plan.chunks > 1 && p.dphi) {
      // a row for each run of each sample: added up by sample, or all of them
      C* const outputs[] = {p.dphi, p.dbeta, p.dgamma, p.d_threshold};
      for (int i = 0; i < coefficients; ++i) over_runs.schedule[i] = own >> i & 1 ? outputs[i] : nullptr;
      over_runs.groups = p.B;
      over_runs.rows = plan.runs;
      over_batch.rows = p.B * plan.runs;
    } else if (over_batch.any()) {
      over_batch.rows = plan.grid * warps_of_block;
    }
    Arena arena(workspace);
    over_batch.partials = over_runs.partials = arena.take<C>(over_batch.size());
    const bool on_chip = plan.shared_bytes == plan.schedule_bytes + plan.iterates_bytes + plan.checkpoint_bytes;
    unsigned char* slots = arena.take<unsigned char>(on_chip ? 0 : plan.grid * plan.checkpoint_bytes);
    plan.checkpoints = on_chip ? nullptr : slots;
    if (size) {
      *size = static_cast<size_t>(arena.used());
      return nullptr;
    }
    const char* error = launch(kernel, plan.grid, block, plan.shared_bytes, stream, p, direction, plan, over_batch);
    if (!error && plan.chunks > 1) error = sum_partials(over_runs, stream);
    return error ? error : sum_partials(over_batch, stream);
  };
  if (p.tangents) {
    if constexpr (std::is_same_v<Storage, C>) {
      const MomentumForward<Storage> direction = direction_of(p);
      const std::initializer_list<const Storage*> arrays = {
          p.grad_y, p.d_diagonal, p.db, p.dy0, direction.diagonal, direction.b, direction.y0, direction.y};
      return with_layout<widest_pack<Storage> / 2>(p, arrays, [&](auto n, auto width) {
        return with_momentum(p, [&](auto momentum) {
          return run(n, width, momentum, std::false_type(), std::true_type(), std::false_type(), direction);
        });
      });
    } else {
      return "second order has no kernel for this dtype";
    }
  }
  return with_layout<widest_pack<Storage>>(p, {p.grad_y, p.d_diagonal, p.db, p.dy0}, [&](auto n, auto width) {
    return with_method(p, [&](auto momentum, auto proximal) {
      if constexpr (!proximal) {
        if (coefficients_per_step(p) == 0 && !p.trajectory) {
          return run(n, width, momentum, proximal, std::false_type(), std::true_type(), NoDirection());
        }
      }
      return run(n, width, momentum, proximal, std::false_type(), std::false_type(), NoDirection());
    });
  });
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                     \
  template const char* momentum_diagonal(const MomentumForward<Storage>&, void*, void*, size_t*); \
  template const char* momentum_diagonal(const MomentumBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
