// Q = diag(q), or diag(1 + f^2): every element of the state is a recurrence of its own, run in registers.
//
// Floor of one element, s bytes: forward 3s bytes (q, b, y) and 4k flops, backward 5s bytes (q, b, grad_y, dq, db) and 10k
// flops, one s more for y_0 and its gradient each; float32 on an H200 is bound by memory up to k = 40 and k = 28, less the
// share of what backward computes twice.
//
// A thread takes 16 bytes (half types: 8) of consecutive elements of one sample, a warp one chunk after another. Backward
// recomputes the iterates in registers, four at a time, from every fourth pair of them, which is kept in shared memory: 1/2
// of a value for each element and step, and none up to k = 4.
// Where samples have the same schedule and their rows follow one another, the batch is one long sample.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"

namespace unrolled_kernels::cuda {
namespace {

constexpr int block = 128, warps_of_block = block / 32, segment = 4;

template <typename Storage>
constexpr int widest_pack = 16 / sizeof(compute_type<Storage>);

// A warp takes `runs` pieces of each sample in turn, chunk by chunk; where width < 32, of 32 / width samples at once.
struct DiagonalPlan {
  int64_t runs, chunks, chunks_of_run, grid;
  int64_t checkpoint_bytes;  // of a block
  int64_t shared_bytes;
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
    store_pack<n>(row + e, pack);
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (exists && e + i < d) row[e + i] = to_storage<Storage>(x[i]);
    }
  }
}

// q and b of a chunk; tikhonov makes them from f, g and x
template <int n, typename Storage>
__device__ __forceinline__ void load_energy(const MomentumInputs<Storage>& p, int64_t sample, int64_t e, bool exists,
                                            compute_type<Storage> (&q)[n], compute_type<Storage> (&b)[n]) {
  load_elements(p.eigenvalues + sample * p.eigenvalues_stride, e, p.d, exists, q);
  load_elements(p.b + sample * p.b_stride, e, p.d, exists, b);
  if (!p.observed) return;
  compute_type<Storage> x[n];
  load_elements(p.observed + sample * p.observed_stride, e, p.d, exists, x);
#pragma unroll
  for (int i = 0; i < n; ++i) {
    q[i] = 1 + q[i] * q[i];
    b[i] -= x[i];
  }
}

// the gradient of q, or of f through q = 1 + f^2: f is read again, which is cheaper than to keep it
template <int n, typename Storage>
__device__ __forceinline__ void store_d_eigenvalues(const MomentumBackward<Storage>& p, int64_t sample, int64_t e,
                                                    bool exists, compute_type<Storage> (&dq)[n]) {
  if (!p.d_eigenvalues) return;
  if (p.observed) {
    compute_type<Storage> f[n];
    load_elements(p.eigenvalues + sample * p.eigenvalues_stride, e, p.d, exists, f);
#pragma unroll
    for (int i = 0; i < n; ++i) dq[i] *= 2 * f[i];
  }
  store_elements(dq, e, p.d, exists, p.d_eigenvalues + sample * p.d);
}

template <typename C, int n>
__device__ __forceinline__ void diagonal_step(const C (&q)[n], const C (&b)[n], const StepCoefficients<C>& s,
                                              bool momentum, const C (&y)[n], const C (&previous)[n], C (&next)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const C m = momentum ? y[i] - previous[i] : C(0);
    const C z = momentum ? y[i] + s.gamma * m : y[i], from = momentum ? y[i] + s.beta * m : y[i];
    next[i] = from - s.phi * (q[i] * z + b[i]);
  }
}

template <typename C, int n>
__device__ __forceinline__ void assign(C (&to)[n], const C (&from)[n]) {
#pragma unroll
  for (int i = 0; i < n; ++i) to[i] = from[i];
}

template <typename Storage, int n, int width>
__global__ void __launch_bounds__(block) momentum_diagonal_kernel(const __grid_constant__ MomentumForward<Storage> p,
                                                                  const __grid_constant__ DiagonalPlan plan) {
  using C = compute_type<Storage>;
  const int64_t items = DiagonalItem<width, n>::count(p.B, plan.runs);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * warps_of_block;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / 32; i < items; i += warps) {
    DiagonalItem<width, n> item(plan, p.B, i);
    const SampleSchedule<C> schedule(p, item.sample);
    for (; item.chunk < item.end; ++item.chunk) {
      const int64_t e = item.element();
      C q[n], b[n], y[n], previous[n], next[n];
      load_energy(p, item.sample, e, item.exists, q, b);
      load_elements(p.y0 + (p.y0 ? item.sample * p.y0_stride : 0), e, p.d, item.exists && p.y0, y);
      assign(previous, y);
      Storage* out = p.y + item.sample * p.d;
      for (int64_t t = 0; t < p.k; ++t) {
        if (p.trajectory) store_elements(y, e, p.d, item.exists, out + t * p.B * p.d);
        diagonal_step(q, b, schedule.at(t), schedule.has_momentum(), y, previous, next);
        assign(previous, y);
        assign(y, next);
      }
      store_elements(y, e, p.d, item.exists, p.trajectory ? out + p.k * p.B * p.d : out);
    }
  }
}

template <typename Storage, int n, int width>
__global__ void __launch_bounds__(block, 2)
    momentum_diagonal_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                      const __grid_constant__ DiagonalPlan plan,
                                      const __grid_constant__ PartialSums<Storage> sums) {
  using C = compute_type<Storage>;
  using State = Pack<C, n>;
  const int64_t items = DiagonalItem<width, n>::count(p.B, plan.runs),
                warps = static_cast<int64_t>(gridDim.x) * warps_of_block;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * warps_of_block + threadIdx.x / 32;
  // (y_t, y_{t-1}) for t = 0, 4, 8 ..., all but the last: [segments - 1, 2, block]
  State* checkpoints = reinterpret_cast<State*>(plan.checkpoints ? plan.checkpoints + blockIdx.x * plan.checkpoint_bytes
                                                                 : dynamic_shared_memory()) +
                       threadIdx.x;
  const int64_t segments = ceil_div(p.k, segment);
  const bool momentum = p.beta.data != nullptr, row_for_item = plan.chunks > 1;
  ScheduleGradient<C, width, 1> gradient(p, row_for_item ? 0 : coefficients_per_sample(p), nullptr);
  if (!row_for_item) gradient.begin_row(sums.row(warp));
  for (int64_t i = warp; i < items; i += warps) {
    DiagonalItem<width, n> item(plan, p.B, i);
    const SampleSchedule<C> schedule(p, item.sample);
    const int64_t sample = item.exists ? item.sample : -1;
    if (row_for_item) gradient.begin_row(sums.row(i));
    for (; item.chunk < item.end; ++item.chunk) {
      const int64_t e = item.element();
      const Storage* cotangent = p.grad_y + item.sample * p.d;
      C q[n], b[n], a[n], carry[n] = {}, db[n] = {}, dq[n] = {};
      C ys[segment + 1][n];  // ys[i + 1] = y_{t+i}, t the first step of the segment
      load_energy(p, item.sample, e, item.exists, q, b);
      load_elements(p.y0 + (p.y0 ? item.sample * p.y0_stride : 0), e, p.d, item.exists && p.y0, ys[1]);
      load_elements(cotangent + (p.trajectory ? p.k * p.B * p.d : 0), e, p.d, item.exists, a);
      assign(ys[0], ys[1]);
      for (int64_t c = 0; c + 1 < segments; ++c) {
        store_pack<n>(&checkpoints[2 * c * block].at[0], *reinterpret_cast<State*>(ys[1]));
        store_pack<n>(&checkpoints[(2 * c + 1) * block].at[0], *reinterpret_cast<State*>(ys[0]));
#pragma unroll
        for (int s = 0; s < segment; ++s) {
          C next[n];
          diagonal_step(q, b, schedule.at(c * segment + s), momentum, ys[1], ys[0], next);
          assign(ys[0], ys[1]);
          assign(ys[1], next);
        }
      }
      for (int64_t c = segments - 1; c >= 0; --c) {
        if (c + 1 < segments) {
          const State y = checkpoints[2 * c * block], previous = checkpoints[(2 * c + 1) * block];
          assign(ys[1], y.at);
          assign(ys[0], previous.at);
        }
#pragma unroll
        for (int s = 0; s + 1 < segment; ++s) {
          if (c * segment + s + 1 < p.k) {
            diagonal_step(q, b, schedule.at(c * segment + s), momentum, ys[s + 1], ys[s], ys[s + 2]);
          }
        }
#pragma unroll
        for (int s = segment - 1; s >= 0; --s) {
          const int64_t t = c * segment + s;
          if (t >= p.k) continue;
          const StepCoefficients<C> step = schedule.at(t);
          C given[n], d_phi = 0, d_beta = 0, d_gamma = 0;
          load_elements(cotangent + t * p.B * p.d, e, p.d, item.exists && p.trajectory, given);
#pragma unroll
          for (int j = 0; j < n; ++j) {
            const C m = momentum ? ys[s + 1][j] - ys[s][j] : C(0);
            const C z = momentum ? ys[s + 1][j] + step.gamma * m : ys[s + 1][j], w = q[j] * a[j];
            d_phi -= w * z + a[j] * b[j];
            d_beta += a[j] * m;
            d_gamma -= step.phi * (w * m);
            db[j] -= step.phi * a[j];
            dq[j] -= step.phi * (a[j] * z);
            const C next = given[j] + carry[j] + (1 + step.beta) * a[j] - step.phi * (1 + step.gamma) * w;
            carry[j] = step.phi * step.gamma * w - step.beta * a[j];
            a[j] = next;
          }
          if (gradient.wanted()) gradient.add(t, sample, item.exists, d_phi, d_beta, d_gamma);
        }
      }
#pragma unroll
      for (int j = 0; j < n; ++j) a[j] += carry[j];
      store_d_eigenvalues(p, item.sample, e, item.exists, dq);
      if (p.db) store_elements(db, e, p.d, item.exists, p.db + item.sample * p.d);
      if (p.dy0) store_elements(a, e, p.d, item.exists, p.dy0 + item.sample * p.d);
    }
    gradient.end_sample(sample);
    if (row_for_item) gradient.end_row();
  }
  if (!row_for_item) gradient.end_row();
}

// p as one long sample, if it can be seen so
template <typename Problem>
Problem flattened(Problem p) {
  const auto dense = [&](const void* data, int64_t stride) { return !data || stride == p.d; };
  const bool one_schedule =
      p.phi.batch_stride == 0 && (!p.beta.data || (p.beta.batch_stride == 0 && p.gamma.batch_stride == 0));
  if (p.B > 1 && one_schedule && dense(p.eigenvalues, p.eigenvalues_stride) && dense(p.observed, p.observed_stride) &&
      dense(p.b, p.b_stride) && dense(p.y0, p.y0_stride)) {
    p.d *= p.B;
    p.B = 1;
    p.eigenvalues_stride = p.observed_stride = p.b_stride = p.y0_stride = 0;
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
  return p.d > 32 && (p.d % n == 0 || (p.B == 1 && !p.trajectory)) && aligned(p.eigenvalues, p.eigenvalues_stride) &&
         aligned(p.observed, p.observed_stride) && aligned(p.b, p.b_stride) && aligned(p.y0, p.y0_stride);
}

template <typename... Parameters>
DiagonalPlan plan_diagonal(const Device& device, void (*kernel)(Parameters...), int64_t B, int64_t d, int n, int width,
                           int64_t checkpoint_bytes) {
  DiagonalPlan plan{};
  const int64_t groups = ceil_div(B, 32 / width), target = static_cast<int64_t>(device.multiprocessors) * 64;
  plan.chunks = ceil_div(d, width * n);
  plan.runs = ceil_div(target, groups) < plan.chunks ? ceil_div(target, groups) : plan.chunks;
  plan.chunks_of_run = ceil_div(plan.chunks, plan.runs);
  plan.runs = ceil_div(plan.chunks, plan.chunks_of_run);
  plan.checkpoint_bytes = checkpoint_bytes;
  plan.shared_bytes = checkpoint_bytes <= device.shared_memory ? checkpoint_bytes : 0;
  plan.grid = persistent_grid(device, kernel, ceil_div(groups * plan.runs, warps_of_block), block, plan.shared_bytes);
  return plan;
}

// f(std::integral_constant<int, n>, std::integral_constant<int, width>)
template <typename Storage, typename F>
const char* with_layout(const MomentumInputs<Storage>& p, std::initializer_list<const Storage*> outputs, F f) {
  constexpr int n = widest_pack<Storage>;
  if (takes_packs<n>(p, outputs)) return f(std::integral_constant<int, n>(), std::integral_constant<int, 32>());
  if (p.d > 8) return f(std::integral_constant<int, 1>(), std::integral_constant<int, 32>());
  return f(std::integral_constant<int, 1>(), std::integral_constant<int, 8>());
}

}  // namespace

template <typename Storage>
const char* momentum_diagonal(const MomentumForward<Storage>& problem, void*, void* stream, size_t* size) {
  if (problem.B == 0 || problem.d == 0 || size) return nullptr;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  const MomentumForward<Storage> p = flattened(problem);
  return with_layout<Storage>(p, {p.y}, [&](auto n_tag, auto width_tag) -> const char* {
    constexpr int n = decltype(n_tag)::value, width = decltype(width_tag)::value;
    const auto kernel = momentum_diagonal_kernel<Storage, n, width>;
    const DiagonalPlan plan = plan_diagonal(device, kernel, p.B, p.d, n, width, 0);
    return launch(kernel, plan.grid, block, 0, stream, p, plan);
  });
}

template <typename Storage>
const char* momentum_diagonal(const MomentumBackward<Storage>& problem, void* workspace, void* stream, size_t* size) {
  using C = compute_type<Storage>;
  if (problem.B == 0 || problem.d == 0) return size ? nullptr : clear_sums(problem, stream);
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  const MomentumBackward<Storage> p = flattened(problem);
  const std::initializer_list<const Storage*> arrays = {p.grad_y, p.d_eigenvalues, p.db, p.dy0};
  return with_layout<Storage>(p, arrays, [&](auto n_tag, auto width_tag) -> const char* {
    constexpr int n = decltype(n_tag)::value, width = decltype(width_tag)::value;
    const auto kernel = momentum_diagonal_backward_kernel<Storage, n, width>;
    const int64_t checkpoints = p.k > segment ? 2 * (ceil_div(p.k, segment) - 1) : 0;
    DiagonalPlan plan = plan_diagonal(device, kernel, p.B, p.d, n, width,
                                      checkpoints * block * static_cast<int64_t>(sizeof(Pack<C, n>)));
    PartialSums<Storage> over_batch = partial_sums(p), over_runs = over_batch;
    const int own = coefficients_per_sample(p);
    if (plan.chunks > 1 && p.dphi) {
      // a row for each run of each sample: added up by sample, or all of them
      C* const outputs[3] = {p.dphi, p.dbeta, p.dgamma};
      for (int i = 0; i < 3; ++i) over_runs.schedule[i] = own >> i & 1 ? outputs[i] : nullptr;
      over_runs.groups = p.B;
      over_runs.rows = plan.runs;
      over_batch.rows = p.B * plan.runs;
    } else if (over_batch.any()) {
      over_batch.rows = plan.grid * warps_of_block;
    }
    Arena arena(workspace);
    over_batch.partials = over_runs.partials = arena.take<C>(over_batch.size());
    unsigned char* slots = arena.take<unsigned char>(plan.shared_bytes ? 0 : plan.grid * plan.checkpoint_bytes);
    plan.checkpoints = plan.shared_bytes ? nullptr : slots;
    if (size) {
      *size = static_cast<size_t>(arena.used());
      return nullptr;
    }
    const char* error = launch(kernel, plan.grid, block, plan.shared_bytes, stream, p, plan, over_batch);
    if (!error && plan.chunks > 1) error = sum_partials(over_runs, stream);
    return error ? error : sum_partials(over_batch, stream);
  });
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                     \
  template const char* momentum_diagonal(const MomentumForward<Storage>&, void*, void*, size_t*); \
  template const char* momentum_diagonal(const MomentumBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
