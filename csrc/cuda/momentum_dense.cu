// Dense Q: k steps and their adjoint for one read of Q and, in backward, one write of dQ.
//
// Floor of one sample, s bytes an element, and float32 on an H200 at 4.3 TB/s and 60 TFLOP/s:
//
//     forward     (d^2 + 2d) s bytes       2 k d^2 flops       bound by memory up to k = 28
//     backward    (2d^2 + 3d) s            6 k d^2             bound by memory up to k = 18
//
// d <= 128 (float64: 64): Q lies in the registers of a team, tile.cuh, together with dQ; Q of the team's next samples is
// copied to shared memory meanwhile. 32 elements of Q a thread leave room for 20 warps on a multiprocessor, 8 to 12 in
// backward, each with 4 KB on the way: more than the 26 KB that 4.3 TB/s at 800 ns need.
// Above: streamed.cuh, a block for each sample; Q in shared memory if it fits (float32: d <= 230 on an H200), else read
// from L2 for each product. dQ is the sum of k outer products, taken at the end tile by tile, so that it is written once.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/streamed.cuh"
#include "cuda/tile.cuh"

namespace unrolled_kernels::cuda {
namespace {

// One step on the rows that a thread owns.
template <typename T, typename C = typename T::C>
__device__ __forceinline__ void dense_step(const T& tile, const typename T::Memory& memory, int& turn,
                                           const C (&q)[T::rows][T::columns], const C (&b)[T::own_rows],
                                           const StepCoefficients<C>& s, bool momentum, bool y_is_zero,
                                           C (&y)[T::own_rows], C (&previous)[T::own_rows]) {
  C z[T::own_rows], qz[T::own_rows] = {};
#pragma unroll
  for (int i = 0; i < T::own_rows; ++i) z[i] = momentum ? y[i] + s.gamma * (y[i] - previous[i]) : y[i];
  if (!y_is_zero) {
    C x[T::columns];
    tile.rows_to_columns(z, memory, turn, x);
    tile.product(q, x, qz);
  }
#pragma unroll
  for (int i = 0; i < T::own_rows; ++i) {
    const C from = momentum ? y[i] + s.beta * (y[i] - previous[i]) : y[i];
    previous[i] = y[i];
    y[i] = from - s.phi * (qz[i] + b[i]);
  }
}

template <typename T, typename Storage>
__device__ __forceinline__ void load_start(const T& tile, const MomentumInputs<Storage>& p, int64_t sample, bool exists,
                                           typename T::C (&b)[T::own_rows], typename T::C (&y)[T::own_rows],
                                           typename T::C (&previous)[T::own_rows]) {
  const int d = static_cast<int>(p.d);
  load_entries(p.b + sample * p.b_stride, tile.row, d, exists, b);
  load_entries(p.y0 + (p.y0 ? sample * p.y0_stride : 0), tile.row, d, exists && p.y0, y);
#pragma unroll
  for (int i = 0; i < T::own_rows; ++i) previous[i] = y[i];
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::blocks(5))
    momentum_dense_kernel(const __grid_constant__ MomentumForward<Storage> p,
                          const __grid_constant__ TilePlan<compute_type<Storage>> plan) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  Arena arena(dynamic_shared_memory() + team * plan.team_bytes);
  const TileMemory<T, Storage, false> shared(arena, d, 0);
  const typename T::Memory& memory = shared.vectors;
  MatrixStream<T, Storage> matrices(p, shared.matrix);

  const int64_t items = ceil_div(p.B, T::problems), teams = static_cast<int64_t>(gridDim.x) * T::teams;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * T::teams + team;
  int turn = 0;
  C q[T::rows][T::columns];
  if (first < items) matrices.fetch(tile, first);
  for (int64_t item = first; item < items; item += teams) {
    const bool exists = item * T::problems + tile.problem < p.B;
    const int64_t sample = exists ? item * T::problems + tile.problem : p.B - 1;
    if (item == first || p.matrix_stride != 0) {
      matrices.take(tile, exists, q);
      if (p.matrix_stride != 0 && item + teams < items) matrices.fetch(tile, item + teams);
    }
    const SampleSchedule<C> schedule(p, sample);
    const bool writes = exists && tile.first_row_copy;
    C b[T::own_rows], y[T::own_rows], previous[T::own_rows];
    load_start(tile, p, sample, exists, b, y, previous);
    Storage* out = p.y + sample * d;
    for (int t = 0; t < k; ++t) {
      if (p.trajectory) store_entries(y, tile.row, d, writes, out + t * p.B * d);
      dense_step(tile, memory, turn, q, b, schedule.at(t), schedule.has_momentum(), t == 0 && !p.y0, y, previous);
    }
    store_entries(y, tile.row, d, writes, p.trajectory ? out + p.k * p.B * d : out);
  }
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::blocks(2))
    momentum_dense_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                   const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                                   const __grid_constant__ PartialSums<Storage> sums) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const int64_t items = ceil_div(p.B, T::problems), teams = static_cast<int64_t>(gridDim.x) * T::teams;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * T::teams + team;
  Arena arena(dynamic_shared_memory() + team * plan.team_bytes);
  using Memory = TileMemory<T, Storage, true>;
  const Memory memory(arena, d, plan.trajectory_on_chip ? plan.trajectory_size : 0);
  // y_0 ... y_{k-1}, [k, problems, D]
  C* trajectory = plan.trajectory_on_chip ? memory.trajectory : plan.trajectories + first * plan.trajectory_size;
  C* mine = trajectory + tile.problem * D;
  MatrixStream<T, Storage> matrices(p, memory.matrix);
  C* partial = sums.row(first);
  ScheduleGradient<C, (T::threads < 32 ? T::threads : 32), T::warps> gradient(p, coefficients_per_sample(p),
                                                                              memory.vectors.across_warps);
  gradient.begin_row(partial ? partial + sums.matrix_size : nullptr);

  int turn = 0;
  C q[T::rows][T::columns], dq[T::rows][T::columns] = {};
  if (first < items) matrices.fetch(tile, first);
  for (int64_t item = first; item < items; item += teams) {
    const bool exists = item * T::problems + tile.problem < p.B;
    const int64_t sample = exists ? item * T::problems + tile.problem : p.B - 1;
    if (item == first || p.matrix_stride != 0) {
      matrices.take(tile, exists, q);
      if (p.matrix_stride != 0 && item + teams < items) matrices.fetch(tile, item + teams);
    }
    const SampleSchedule<C> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    {
      C b[T::own_rows], y[T::own_rows], previous[T::own_rows];
      load_start(tile, p, sample, exists, b, y, previous);
      for (int t = 0; t < k; ++t) {
        if (tile.first_row_copy) {
#pragma unroll
          for (int i = 0; i < T::own_rows; ++i) mine[t * T::problems * D + tile.row + i] = y[i];
        }
        if (t + 1 < k) {
          dense_step(tile, memory.vectors, turn, q, b, schedule.at(t), momentum, t == 0 && !p.y0, y, previous);
        }
      }
    }
    T::sync();

    C a[T::own_columns], carry[T::own_columns] = {}, b[T::own_columns], db[T::own_columns] = {}, y[T::own_columns] = {};
    const Storage* cotangent = p.grad_y + sample * d;
    load_entries(cotangent + (p.trajectory ? p.k * p.B * d : 0), tile.column, d, exists, a);
    load_entries(p.b + sample * p.b_stride, tile.column, d, exists, b);
    if (k > 0) {
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) y[j] = mine[(k - 1) * T::problems * D + tile.column + j];
    }
    for (int t = k - 1; t >= 0; --t) {
      const StepCoefficients<C> s = schedule.at(t);
      C z[T::own_columns], m[T::own_columns], previous[T::own_columns], given[T::own_columns], w[T::own_columns];
      load_entries(cotangent + t * p.B * d, tile.column, d, exists && p.trajectory, given);
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) {
        previous[j] = t > 0 ? mine[(t - 1) * T::problems * D + tile.column + j] : y[j];
        m[j] = momentum ? y[j] - previous[j] : C(0);
        z[j] = momentum ? y[j] + s.gamma * m[j] : y[j];
        y[j] = previous[j];
      }
      C x[T::columns], a_rows[T::rows];
      tile.columns_to_tile(z, a, memory.vectors, turn, x, a_rows);
      if (T::warps > 1 && t + 1 < k) gradient.collect(t + 1, sample);
      tile.transposed_product(q, a_rows, memory.vectors, w);
      if (p.d_matrix) {
#pragma unroll
        for (int j = 0; j < T::columns; ++j) x[j] *= -s.phi;
        add_outer_product<T>(a_rows, x, dq);
      }
      C d_phi = 0, d_beta = 0, d_gamma = 0;
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) {
        d_phi -= w[j] * z[j] + a[j] * b[j];
        d_beta += a[j] * m[j];
        d_gamma -= s.phi * (w[j] * m[j]);
        db[j] -= s.phi * a[j];
        const C next = given[j] + carry[j] + (1 + s.beta) * a[j] - s.phi * (1 + s.gamma) * w[j];
        carry[j] = s.phi * s.gamma * w[j] - s.beta * a[j];
        a[j] = next;
      }
      if (gradient.wanted())
        gradient.add(t, exists ? sample : -1, exists && tile.first_column_copy, d_phi, d_beta, d_gamma);
    }
    if (T::warps > 1 && k > 0) {
      T::sync();
      gradient.collect(0, sample);
    }
    gradient.end_sample(exists ? sample : -1);

    const bool writes = exists && tile.first_column_copy;
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) a[j] += carry[j];
    if (p.db) store_entries(db, tile.column, d, writes, p.db + sample * d);
    if (p.dy0) store_entries(a, tile.column, d, writes, p.dy0 + sample * d);
    if (p.d_matrix && !sums.d_matrix) {
      Memory::store_gradient(tile, p, item, exists, memory.gradient, dq);
      clear<T>(dq);
    }
  }
  gradient.end_row();
  if (sums.d_matrix) Memory::store_partial(tile, d, dq, partial);
}

template <typename Storage>
struct DenseStreamedMemory {
  using C = compute_type<Storage>;
  C *z, *g, *y, *previous;

  __host__ __device__ DenseStreamedMemory(Arena& arena, int64_t d) {
    for (C** vector : {&z, &g, &y, &previous}) *vector = arena.take<C>(StreamedMatrix<Storage>::padded(d));
  }
};

template <typename Storage>
struct DenseStreamedBackwardMemory {
  using C = compute_type<Storage>;
  C *z, *g, *m, *a, *carry, *db, *partials, *across_warps;

  __host__ __device__ DenseStreamedBackwardMemory(Arena& arena, int64_t d) {
    const int64_t n = StreamedMatrix<Storage>::padded(d), warps = StreamedMatrix<Storage>::warps;
    for (C** vector : {&z, &g, &a, &carry, &db}) *vector = arena.take<C>(n);
    m = g;
    partials = arena.take<C>(warps * n);
    across_warps = arena.take<C>(2 * warps * 4);
  }
};

template <typename Storage>
__global__ void __launch_bounds__(StreamedMatrix<Storage>::block)
    momentum_dense_streamed_kernel(const __grid_constant__ MomentumForward<Storage> p,
                                   const __grid_constant__ StreamedPlan plan) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const DenseStreamedMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    const SampleSchedule<C> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    const Storage* b = p.b + sample * p.b_stride;
    Storage* out = p.y + sample * p.d;
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      v.y[e] = v.previous[e] = p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0);
      v.g[e] = 0;
      if (p.trajectory || p.k == 0) out[e] = to_storage<Storage>(v.y[e]);
    }
    for (int64_t t = 0; t < p.k; ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        v.z[e] = momentum ? v.y[e] + s.gamma * (v.y[e] - v.previous[e]) : v.y[e];
      }
      if (t > 0 || p.y0) {
        __syncthreads();
        matrix.product(v.z, v.g);
        __syncthreads();
      }
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C y = v.y[e], from = momentum ? y + s.beta * (y - v.previous[e]) : y;
        v.previous[e] = y;
        v.y[e] = from - s.phi * (v.g[e] + to_compute(b[e]));
        if (p.trajectory) out[(t + 1) * p.B * p.d + e] = to_storage<Storage>(v.y[e]);
        if (!p.trajectory && t + 1 == p.k) out[e] = to_storage<Storage>(v.y[e]);
      }
    }
  }
}

template <typename Storage>
__global__ void __launch_bounds__(StreamedMatrix<Storage>::block)
    momentum_dense_streamed_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                            const __grid_constant__ StreamedPlan plan,
                                            const __grid_constant__ PartialSums<Storage> sums) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  const int64_t n = M::padded(p.d);
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const DenseStreamedBackwardMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  C* partial = sums.row(blockIdx.x);
  ScheduleGradient<C, 32, M::warps> gradient(p, coefficients_per_sample(p), v.across_warps);
  gradient.begin_row(partial ? partial + sums.matrix_size : nullptr);
  C *a = v.a, *carry = v.carry, *m = v.m;
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    // y_t, replaced by z_t on the way back, and -phi_t times the adjoint of y_{t+1}: [k, padded] each
    C* ys = (plan.trajectory_on_chip ? rest : slot).template take<C>(0);
    C* as = ys + p.k * n;
    const SampleSchedule<C> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    const Storage* b = p.b + sample * p.b_stride;
    const Storage* cotangent = p.grad_y + sample * p.d;
    __syncthreads();
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      if (p.k > 0) ys[e] = p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0);
      v.g[e] = 0;
    }
    for (int64_t t = 0; t + 1 < p.k; ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      const C *y = ys + t * n, *previous = t > 0 ? y - n : y;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        v.z[e] = momentum ? y[e] + s.gamma * (y[e] - previous[e]) : y[e];
      }
      if (t > 0 || p.y0) {
        __syncthreads();
        matrix.product(v.z, v.g);
        __syncthreads();
      }
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C from = momentum ? y[e] + s.beta * (y[e] - previous[e]) : y[e];
        ys[(t + 1) * n + e] = from - s.phi * (v.g[e] + to_compute(b[e]));
      }
    }
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      a[e] = to_compute(cotangent[(p.trajectory ? p.k * p.B * p.d : 0) + e]);
      carry[e] = v.db[e] = 0;
    }
    for (int64_t t = p.k - 1; t >= 0; --t) {
      const StepCoefficients<C> s = schedule.at(t);
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        m[e] = momentum && t > 0 ? ys[t * n + e] - ys[(t - 1) * n + e] : C(0);
        if (momentum) ys[t * n + e] += s.gamma * m[e];
        as[t * n + e] = -s.phi * a[e];
      }
      __syncthreads();
      if (t + 1 < p.k) gradient.collect(t + 1, sample);
      matrix.transposed_product(a, v.partials);
      __syncthreads();
      C d_phi = 0, d_beta = 0, d_gamma = 0;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C w = matrix.sum_of_partials(v.partials, e),
                given = p.trajectory ? to_compute(cotangent[t * p.B * p.d + e]) : C(0);
        d_phi -= w * ys[t * n + e] + a[e] * to_compute(b[e]);
        d_beta += a[e] * m[e];
        d_gamma -= s.phi * (w * m[e]);
        v.db[e] -= s.phi * a[e];
        const C next = given + carry[e] + (1 + s.beta) * a[e] - s.phi * (1 + s.gamma) * w;
        carry[e] = s.phi * s.gamma * w - s.beta * a[e];
        a[e] = next;
      }
      if (gradient.wanted()) gradient.add(t, sample, true, d_phi, d_beta, d_gamma);
    }
    __syncthreads();
    if (p.k > 0) gradient.collect(0, sample);
    gradient.end_sample(sample);
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      if (p.db) p.db[sample * p.d + e] = to_storage<Storage>(v.db[e]);
      if (p.dy0) p.dy0[sample * p.d + e] = to_storage<Storage>(a[e] + carry[e]);
    }
    if (!p.d_matrix) continue;
    if (sums.d_matrix) {
      matrix.outer_products(as, ys, p.k, sample != blockIdx.x, partial);
    } else {
      matrix.outer_products(as, ys, p.k, false, p.d_matrix + sample * p.d * p.d);
    }
  }
  gradient.end_row();
}

}  // namespace

template <typename Storage>
const char* momentum_dense(const MomentumForward<Storage>& p, void* workspace, void* stream, size_t* size) {
  if (p.B == 0 || p.d == 0) return nullptr;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  return with_tile<Storage>(p.d, [&](auto tag) -> const char* {
    constexpr int D = decltype(tag)::value;
    if constexpr (D > 0) {
      if (size) return nullptr;
      using T = Tile<Storage, D>;
      const auto kernel = momentum_dense_kernel<Storage, D>;
      const auto plan = plan_tiles<T, TileMemory<T, Storage, false>>(device, kernel, p, 0);
      return launch(kernel, plan.grid, T::block, T::teams * plan.team_bytes, stream, p, plan);
    } else {
      const auto kernel = momentum_dense_streamed_kernel<Storage>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<DenseStreamedMemory<Storage>>(
          device, kernel, p, threads, streamed_matrix_bytes<Storage>(p.d), 0, INT64_MAX);
      if (size) {
        *size = static_cast<size_t>(plan.grid * plan.slot_bytes);
        return nullptr;
      }
      plan.slots = static_cast<unsigned char*>(workspace);
      return launch(kernel, plan.grid, threads, plan.shared_bytes, stream, p, plan);
    }
  });
}

template <typename Storage>
const char* momentum_dense(const MomentumBackward<Storage>& p, void* workspace, void* stream, size_t* size) {
  using C = compute_type<Storage>;
  if (p.B == 0 || p.d == 0) return size ? nullptr : clear_sums(p, stream);
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  return with_tile<Storage>(p.d, [&](auto tag) -> const char* {
    constexpr int D = decltype(tag)::value;
    PartialSums<Storage> sums = partial_sums(p);
    Arena arena(workspace);
    const char* error = nullptr;
    if constexpr (D > 0) {
      using T = Tile<Storage, D>;
      const auto kernel = momentum_dense_backward_kernel<Storage, D>;
      auto plan = plan_tiles<T, TileMemory<T, Storage, true>>(device, kernel, p, p.k * T::problems * D);
      sums.rows = sums.any() ? plan.grid * T::teams : 0;
      sums.partials = arena.take<C>(sums.size());
      plan.trajectories = arena.take<C>(plan.workspace_size(plan.grid * T::teams));
      if (!size) error = launch(kernel, plan.grid, T::block, T::teams * plan.team_bytes, stream, p, plan, sums);
    } else {
      const auto kernel = momentum_dense_streamed_backward_kernel<Storage>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<DenseStreamedBackwardMemory<Storage>>(
          device, kernel, p, threads, streamed_matrix_bytes<Storage>(p.d),
          2 * p.k * StreamedMatrix<Storage>::padded(p.d) * static_cast<int64_t>(sizeof(C)), streamed_grid_limit(sums));
      sums.rows = sums.any() ? plan.grid : 0;
      sums.partials = arena.take<C>(sums.size());
      plan.slots = arena.take<unsigned char>(plan.grid * plan.slot_bytes);
      if (!size) error = launch(kernel, plan.grid, threads, plan.shared_bytes, stream, p, plan, sums);
    }
    if (size) *size = static_cast<size_t>(arena.used());
    return error || size ? error : sum_partials(sums, stream);
  });
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                  \
  template const char* momentum_dense(const MomentumForward<Storage>&, void*, void*, size_t*); \
  template const char* momentum_dense(const MomentumBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
