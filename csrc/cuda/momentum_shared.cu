// One dense Q for the batch, too large for a team's registers: a step is one product of matrices, which a library makes,
// and one kernel for all the rest of it.
//
//     forward     k products of [B, d] with Q'
//     backward    k - 1 of them again, unless the iterates were kept, k with Q, and dQ, one product of [d, k B] and [k B, d]
//
// Between the products lie, in the compute type, y_t and y_{t-1} (backward: all of them, replaced by z_t on the way back),
// z_t where there is momentum, Q z_t, the adjoint's state, and for dQ -phi_t a_t of all steps. Backward takes as many
// samples at a time as fit into SharedProducts::kept_bytes, so that what it needs is bounded whatever k is.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_prox.cuh"
#include "cuda/momentum_stopping.cuh"

namespace unrolled_kernels::cuda {
namespace {

constexpr int block = 256, warps = block / 32;

// The samples [first, first + rows) at work; arrays are [rows, d], one after the other where there are several.
template <typename Storage>
struct SharedBatch {
  using C = compute_type<Storage>;
  int64_t first, rows, size;  // size: of an array
  int64_t kept;               // y_t lies in place t % kept
  C *ys, *z, *qz;
  C* vs;  // v_t of all steps, where backward needs them
  // backward
  C *a, *carry, *db, *w, *as;
  const Storage* iterates;  // y_t of all samples, where they were kept; zs are then places of their own
  C* zs;

  __device__ __forceinline__ C* y(int64_t t) const { return ys + t % kept * size; }
};

// y_t, from y_{t-1}, y_{t-2} and Q z_{t-1}, and z_t, for the next product. t = 0: from y_0. out: nullptr in backward.
// Rows whose samples have stopped are left alone; their products, which the batch has together, go on.
template <typename Storage, bool proximal>
__global__ void __launch_bounds__(block)
    momentum_shared_kernel(const __grid_constant__ MomentumInputs<Storage> p,
                           const __grid_constant__ SharedBatch<Storage> batch, int64_t t, Storage* out,
                           const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using C = compute_type<Storage>;
  __shared__ C across_warps[2 * warps * 2];
  int64_t half = 0;
  const bool has_product = t > 1 || p.y0, store = out && (p.trajectory || t == p.k);
  if (store && p.trajectory) out += t * p.B * p.d;
  for (int64_t row = blockIdx.x; row < batch.rows; row += gridDim.x) {
    const int64_t sample = batch.first + row;
    if (stopping.taken && t > 0 && stopping.taken[sample] > 0) continue;
    const SampleSchedule<C, proximal> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    StepSize<C> size;
    const StepCoefficients<C> last = t > 0 ? schedule.at(t - 1) : StepCoefficients<C>{};
    const StepCoefficients<C> next = momentum && t < p.k ? schedule.at(t) : StepCoefficients<C>{};
    for (int64_t e = threadIdx.x; e < p.d; e += block) {
      const int64_t i = row * p.d + e;
      C y, previous;
      if (t == 0) {
        y = previous = p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0);
      } else {
        previous = batch.y(t - 1)[i];
        const C before = momentum && t > 1 ? batch.y(t - 2)[i] : previous;
        const C g = (has_product ? batch.qz[i] : C(0)) + to_compute(p.b[sample * p.b_stride + e]);
        const C v = advance(last, momentum, previous, before, g);
        y = ProximalMap<C, 1, proximal>(p, sample, e, true)(last, 0, v);
        if (proximal && batch.vs) batch.vs[(t - 1) * batch.size + i] = v;
      }
      batch.y(t)[i] = y;
      if (momentum && t < p.k) batch.z[i] = extrapolate(next, true, y, previous);
      if (store) out[sample * p.d + e] = to_storage<Storage>(y);
      if (stopping.taken) size.add(y, previous);
    }
    if (!stopping.taken) continue;
    if (t == 0) {
      if (threadIdx.x == 0) stopping.taken[sample] = 0;
      continue;
    }
    size.template over_threads<block>(across_warps, half++);
    if (t < p.k && !size.is_small(stopping.tolerance)) continue;
    for (int64_t e = threadIdx.x; e < p.d; e += block) {
      out[sample * p.d + e] = to_storage<Storage>(batch.y(t)[row * p.d + e]);
    }
    if (threadIdx.x == 0) store_stop(stopping, sample, t - 1, size.change());
  }
}

// The adjoint back through step t + 1, whose product Q'a is in w, and to the product of step t. t = k - 1: from grad_y.
// t = -1: to the outputs.
template <typename Storage, bool proximal>
__global__ void __launch_bounds__(block)
    momentum_shared_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                    const __grid_constant__ SharedBatch<Storage> batch, int64_t t,
                                    const __grid_constant__ PartialSums<Storage> sums) {
  using C = compute_type<Storage>;
  __shared__ C across_warps[warps * coefficients];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, own = coefficients_per_sample(p);
  const int per_step = coefficients_per_step(p);
  C* const partial = sums.row(blockIdx.x);
  const auto iterate = [&](int64_t step, int64_t row, int64_t e) {
    if (batch.iterates) return to_compute(batch.iterates[(step * p.B + batch.first + row) * p.d + e]);
    return batch.y(step)[row * p.d + e];
  };
  // adds the block's sum of the terms of a step to the gradients of the coefficients
  const auto add = [&](int64_t step, int64_t sample, C(&terms)[coefficients]) {
    if (!p.dphi) return;
    reduce_scatter<coefficients, 32, 1>(terms, lane);
    if (lane % 8 == 0) across_warps[warp * coefficients + lane / 8] = terms[0];
    __syncthreads();
    const int i = threadIdx.x;
    C* out = i == 0 ? p.dphi : i == 1 ? p.dbeta : i == 2 ? p.dgamma : i == 3 ? p.d_threshold : nullptr;
    if (out) {
      C sum = 0;
      for (int n = 0; n < warps; ++n) sum += across_warps[n * coefficients + i];
      const int64_t at = per_step >> i & 1 ? step : 0;
      out = own >> i & 1 ? out + (per_step >> i & 1 ? sample * p.k : sample) + at : partial + i * sums.steps + at;
      *out += sum;
    }
    __syncthreads();
  };
  for (int64_t row = blockIdx.x; row < batch.rows; row += gridDim.x) {
    const int64_t sample = batch.first + row;
    const SampleSchedule<C, proximal> schedule(p, sample);
    const bool momentum = schedule.has_momentum(), first = t + 1 == p.k;
    const StepCoefficients<C> last = first ? StepCoefficients<C>{} : schedule.at(t + 1);
    const StepCoefficients<C> next = t >= 0 ? schedule.at(t) : StepCoefficients<C>{};
    const Storage* given = p.grad_y + sample * p.d + (p.trajectory ? (t + 1) * p.B * p.d : 0);
    C terms[coefficients] = {}, of_map[coefficients] = {};
    for (int64_t e = threadIdx.x; e < p.d; e += block) {
      const int64_t i = row * p.d + e;
      StepAdjoint<C> adjoint{};
      if (first) {
        adjoint.a = to_compute(given[e]);
      } else {
        adjoint = {batch.a[i], batch.carry[i], batch.db[i]};
        const C y = iterate(t + 1, row, e), previous = t >= 0 ? iterate(t, row, e) : y;
        const C z = extrapolate(last, momentum, y, previous);
        // the product of y_0 = 0 is not made: what it gives is in dy_0 alone, and may overflow
        const C w = t >= 0 || p.y0 ? batch.w[i] : C(0);
        terms[0] -= w * z + adjoint.a * to_compute(p.b[sample * p.b_stride + e]);
        adjoint.step(last, momentum, w, y, previous, terms);
        if (p.trajectory) adjoint.a += to_compute(given[e]);
        if (p.d_matrix) batch.zs[(t + 1) * batch.size + i] = z;
      }
      ProximalMap<C, 1, proximal> map(p, sample, e, true);
      if (t >= 0) {
        if constexpr (proximal) adjoint.a = map.adjoint(next, 0, batch.vs[t * batch.size + i], adjoint.a, of_map);
        if (p.d_matrix) batch.as[t * batch.size + i] = -next.phi * adjoint.a;
        batch.a[i] = adjoint.a;
        batch.carry[i] = adjoint.carry;
        batch.db[i] = adjoint.db;
      } else {
        if (p.db) p.db[sample * p.d + e] = to_storage<Storage>(adjoint.db);
        if (p.dy0) p.dy0[sample * p.d + e] = to_storage<Storage>(adjoint.a + adjoint.carry);
      }
      if (t >= 0 || first) map.store(p, sample, e, true, !first);
    }
    if (!first) add(t + 1, sample, terms);
    if (proximal && t >= 0) add(t, sample, of_map);
  }
}

// sum = dQ of the samples so far: that of the last of them is in `part`
template <typename Storage>
__global__ void __launch_bounds__(block)
    momentum_shared_sum_kernel(const compute_type<Storage>* part, compute_type<Storage>* sum, int64_t size, bool first,
                               Storage* d_matrix) {
  for (int64_t i = blockIdx.x * static_cast<int64_t>(block) + threadIdx.x; i < size; i += gridDim.x * block) {
    sum[i] = first ? part[i] : sum[i] + part[i];
    d_matrix[i] = to_storage<Storage>(sum[i]);
  }
}

// blocks for so many rows, each with some of them
int64_t blocks_of(const Device& device, int64_t rows) {
  const int64_t most = static_cast<int64_t>(device.multiprocessors) * (2048 / block);
  return rows < most ? rows : most;
}

// All y_t for t <= last, and Q z_t between them.
template <typename Storage>
const char* run_steps(const Device& device, const MomentumInputs<Storage>& p, const SharedBatch<Storage>& batch,
                      int64_t last, Storage* out, SharedProducts<compute_type<Storage>>& products, void* stream) {
  const auto kernel =
      p.prox == Prox::none ? momentum_shared_kernel<Storage, false> : momentum_shared_kernel<Storage, true>;
  for (int64_t t = 0; t <= last; ++t) {
    const auto* z = p.beta.data ? batch.z : batch.ys + (t - 1) % batch.kept * batch.size;
    if (t > 1 || (t == 1 && p.y0)) products.multiply(z, batch.qz, batch.rows, false);
    if (const char* error =
            launch(kernel, blocks_of(device, batch.rows), block, 0, stream, p, batch, t, out, stopping_of(p))) {
      return error;
    }
  }
  return nullptr;
}

}  // namespace

template <typename Storage>
const char* momentum_shared(const MomentumForward<Storage>& p, SharedProducts<compute_type<Storage>>& products,
                            void* workspace, void* stream, size_t* size) {
  using C = compute_type<Storage>;
  if (p.B == 0 || p.d == 0) return nullptr;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  SharedBatch<Storage> batch{};
  batch.rows = p.B;
  batch.size = p.B * p.d;
  batch.kept = 2;
  Arena arena(workspace);
  batch.ys = arena.take<C>(2 * batch.size);
  batch.qz = arena.take<C>(batch.size);
  batch.z = arena.take<C>(p.beta.data ? batch.size : 0);
  if (size) {
    *size = static_cast<size_t>(arena.used());
    return nullptr;
  }
  return run_steps<Storage>(device, p, batch, p.k, p.y, products, stream);
}

template <typename Storage>
const char* momentum_shared(const MomentumBackward<Storage>& p, SharedProducts<compute_type<Storage>>& products,
                            void* workspace, void* stream, size_t* size) {
  using C = compute_type<Storage>;
  if (p.B == 0 || p.d == 0) return size ? nullptr : clear_sums(p, stream);
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  const bool proximal = p.prox != Prox::none, replays = !p.iterates || proximal;
  const int64_t arrays =
      (replays ? p.k + 1 : 0) + (p.d_matrix ? p.k : 0) + (p.d_matrix && !replays ? p.k : 0) + (proximal ? p.k : 0) + 6;
  const int64_t fitting = products.kept_bytes / (arrays * p.d * static_cast<int64_t>(sizeof(C)));
  const int64_t rows = fitting < 1 ? 1 : fitting < p.B ? fitting : p.B;

  SharedBatch<Storage> batch{};
  batch.size = rows * p.d;
  batch.kept = p.k + 1;
  batch.iterates = replays ? nullptr : p.iterates;
  Arena arena(workspace);
  batch.ys = arena.take<C>(replays ? batch.kept * batch.size : 0);
  batch.zs = replays ? batch.ys : arena.take<C>(p.d_matrix ? p.k * batch.size : 0);
  batch.as = arena.take<C>(p.d_matrix ? p.k * batch.size : 0);
  batch.vs = proximal ? arena.take<C>(p.k * batch.size) : nullptr;
  for (C** x : {&batch.z, &batch.qz, &batch.a, &batch.carry, &batch.db, &batch.w}) *x = arena.take<C>(batch.size);
  C* const part = arena.take<C>(p.d_matrix ? p.d * p.d : 0);
  C* const sum = arena.take<C>(p.d_matrix ? p.d * p.d : 0);
  PartialSums<Storage> sums = partial_sums(p);
  sums.matrix_size = 0;
  sums.d_matrix = nullptr;
  sums.rows = sums.any() ? blocks_of(device, rows) : 0;
  sums.partials = arena.take<C>(sums.size());
  if (size) {
    *size = static_cast<size_t>(arena.used());
    return nullptr;
  }

  const char* error = clear_sums(p, stream);
  if (!error && sums.any()) {
    error = describe(cudaMemsetAsync(sums.partials, 0, static_cast<size_t>(sums.size()) * sizeof(C),
                                     static_cast<cudaStream_t>(stream)));
  }
  const auto kernel =
      proximal ? momentum_shared_backward_kernel<Storage, true> : momentum_shared_backward_kernel<Storage, false>;
  for (int64_t first = 0; first < p.B && !error; first += rows) {
    batch.first = first;
    batch.rows = p.B - first < rows ? p.B - first : rows;
    batch.size = batch.rows * p.d;
    if (replays && p.k > 0) {
      error = run_steps<Storage>(device, p, batch, proximal ? p.k : p.k - 1, nullptr, products, stream);
    }
    for (int64_t t = p.k - 1; t >= -1 && !error; --t) {
      if (t + 1 < p.k && (t >= 0 || p.y0)) products.multiply(batch.a, batch.w, batch.rows, true);
      error = launch(kernel, blocks_of(device, batch.rows), block, 0, stream, p, batch, t, sums);
    }
    if (error || !p.d_matrix || p.k == 0) continue;
    products.outer(batch.as, batch.zs, p.k * batch.rows, part);
    error = launch(momentum_shared_sum_kernel<Storage>, blocks_of(device, ceil_div(p.d * p.d, block)), block, 0, stream,
                   static_cast<const C*>(part), sum, p.d * p.d, first == 0, p.d_matrix);
  }
  return error ? error : sum_partials(sums, stream);
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                                          \
  template const char* momentum_shared(const MomentumForward<Storage>&, SharedProducts<compute_type<Storage>>&, void*, \
                                       void*, size_t*);                                                                \
  template const char* momentum_shared(const MomentumBackward<Storage>&, SharedProducts<compute_type<Storage>>&,       \
                                       void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
