// Q = R diag(lambda) R': two products with R, or three in backward, and between them the diagonal recurrence.
//
// Floor of one sample, s bytes an element: forward (d^2 + 3d) s bytes, backward (d^2 + 5d) s, and d^2 s more where dR is
// wanted; 4 d^2 + 4kd flops. The steps are almost free, so that memory is the bound for any k; where the trajectory is
// returned, each of its points is a product more, as in the dense case.
//
// R is held as Q is in momentum_dense.cu: d <= 128 (float64: 64) in the registers of a team, read once; above, streamed.
// The recurrence runs in the column layout that R'b leaves.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/streamed.cuh"
#include "cuda/tile.cuh"

namespace unrolled_kernels::cuda {
namespace {

// (b, y_0) in the eigenbasis, for the columns that a thread owns; rows: the tile's
template <typename T, typename Storage, typename C = typename T::C>
__device__ __forceinline__ void rotate_inputs(const T& tile, const MomentumInputs<Storage>& p, int64_t sample,
                                              bool exists, const typename T::Memory& memory,
                                              const C (&q)[T::rows][T::columns], C (&b_rows)[T::rows],
                                              C (&y0_rows)[T::rows], C (&b)[T::own_columns], C (&y)[T::own_columns]) {
  const int d = static_cast<int>(p.d), row0 = tile.r * T::rows;
  load_entries(p.b + sample * p.b_stride, row0, d, exists, b_rows);
  load_entries(p.y0 + (p.y0 ? sample * p.y0_stride : 0), row0, d, exists && p.y0, y0_rows);
  tile.transposed_product(q, b_rows, memory, b);
#pragma unroll
  for (int j = 0; j < T::own_columns; ++j) y[j] = 0;
  if (p.y0) {
    T::sync();
    tile.transposed_product(q, y0_rows, memory, y);
  }
}

template <typename C, int n>
__device__ __forceinline__ void diagonal_step(const C (&eigenvalues)[n], const C (&b)[n], const StepCoefficients<C>& s,
                                              bool momentum, C (&y)[n], C (&previous)[n]) {
#pragma unroll
  for (int j = 0; j < n; ++j) {
    const C m = momentum ? y[j] - previous[j] : C(0);
    const C z = momentum ? y[j] + s.gamma * m : y[j], from = momentum ? y[j] + s.beta * m : y[j];
    previous[j] = y[j];
    y[j] = from - s.phi * (eigenvalues[j] * z + b[j]);
  }
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::blocks(4))
    momentum_spectral_kernel(const __grid_constant__ MomentumForward<Storage> p,
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
    Storage* out = p.y + sample * d;
    if (p.trajectory || k == 0) {
      // y_0 itself is not rotated
      C y0[T::own_rows];
      load_entries(p.y0 + (p.y0 ? sample * p.y0_stride : 0), tile.row, d, exists && p.y0, y0);
      store_entries(y0, tile.row, d, writes, out);
    }
    if (k == 0) continue;
    C b_rows[T::rows], y0_rows[T::rows];
    C eigenvalues[T::own_columns], b[T::own_columns], y[T::own_columns], previous[T::own_columns];
    load_entries(p.eigenvalues + sample * p.eigenvalues_stride, tile.column, d, exists, eigenvalues);
    rotate_inputs(tile, p, sample, exists, memory, q, b_rows, y0_rows, b, y);
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) previous[j] = y[j];
    for (int t = 0; t < k; ++t) {
      diagonal_step(eigenvalues, b, schedule.at(t), schedule.has_momentum(), y, previous);
      if (!p.trajectory && t + 1 < k) continue;
      C x[T::columns], rotated[T::own_rows];
      tile.columns_to_columns(y, memory, turn, x);
      tile.product(q, x, rotated);
      store_entries(rotated, tile.row, d, writes, p.trajectory ? out + (t + 1) * p.B * d : out);
    }
  }
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::blocks(2))
    momentum_spectral_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                      const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                                      const __grid_constant__ PartialSums<Storage> sums) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  using Memory = TileMemory<T, Storage, true>;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const int64_t items = ceil_div(p.B, T::problems), teams = static_cast<int64_t>(gridDim.x) * T::teams;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * T::teams + team;
  Arena arena(dynamic_shared_memory() + team * plan.team_bytes);
  const Memory memory(arena, d, plan.trajectory_on_chip ? plan.trajectory_size : 0);
  // y_0 ... y_{k-1} in the eigenbasis, [k, problems, D]
  C* trajectory = plan.trajectory_on_chip ? memory.trajectory : plan.trajectories + first * plan.trajectory_size;
  C* mine = trajectory + tile.problem * D + tile.column;
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
    const bool writes_columns = exists && tile.first_column_copy, writes_rows = exists && tile.first_row_copy;
    const Storage* cotangent = p.grad_y + sample * d;
    const int64_t step = p.B * p.d;

    C d_eigenvalues[T::own_columns] = {}, db_rows[T::own_rows] = {}, dy0_rows[T::own_rows] = {};
    if (k > 0) {
      C b_rows[T::rows], y0_rows[T::rows], rows[T::rows], x[T::columns];
      C eigenvalues[T::own_columns], b[T::own_columns], y[T::own_columns], previous[T::own_columns];
      C a[T::own_columns], carry[T::own_columns] = {}, db[T::own_columns] = {};
      load_entries(p.eigenvalues + sample * p.eigenvalues_stride, tile.column, d, exists, eigenvalues);
      rotate_inputs(tile, p, sample, exists, memory.vectors, q, b_rows, y0_rows, b, y);
      load_entries(cotangent + (p.trajectory ? p.k * step : 0), tile.r * T::rows, d, exists, rows);
      T::sync();
      tile.transposed_product(q, rows, memory.vectors, a);
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) previous[j] = y[j];
      for (int t = 0; t < k; ++t) {
        if (tile.first_column_copy) {
#pragma unroll
          for (int j = 0; j < T::own_columns; ++j) mine[t * T::problems * D + j] = y[j];
        }
        diagonal_step(eigenvalues, b, schedule.at(t), momentum, y, previous);
      }
      // the last point's share of dR, with y_k at hand
      tile.columns_to_columns(y, memory.vectors, turn, x);
      if (p.d_matrix) add_outer_product<T>(rows, x, dq);
      T::sync();

#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) y[j] = mine[(k - 1) * T::problems * D + j];
      for (int t = k - 1; t >= 0; --t) {
        const StepCoefficients<C> s = schedule.at(t);
        C given[T::own_columns] = {};
        if (p.trajectory && t > 0) {
          load_entries(cotangent + t * step, tile.r * T::rows, d, exists, rows);
          tile.columns_to_columns(y, memory.vectors, turn, x);
          if (p.d_matrix) add_outer_product<T>(rows, x, dq);
          tile.transposed_product(q, rows, memory.vectors, given);
        }
        C d_phi = 0, d_beta = 0, d_gamma = 0;
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) {
          previous[j] = t > 0 ? mine[(t - 1) * T::problems * D + j] : y[j];
          const C m = momentum ? y[j] - previous[j] : C(0), z = momentum ? y[j] + s.gamma * m : y[j];
          const C w = eigenvalues[j] * a[j];
          y[j] = previous[j];
          d_phi -= w * z + a[j] * b[j];
          d_beta += a[j] * m;
          d_gamma -= s.phi * (w * m);
          db[j] -= s.phi * a[j];
          d_eigenvalues[j] -= s.phi * (a[j] * z);
          const C next = given[j] + carry[j] + (1 + s.beta) * a[j] - s.phi * (1 + s.gamma) * w;
          carry[j] = s.phi * s.gamma * w - s.beta * a[j];
          a[j] = next;
        }
        if (gradient.wanted()) gradient.add(t, exists ? sample : -1, writes_columns, d_phi, d_beta, d_gamma);
        if (T::warps > 1 && gradient.varies_over_steps()) {
          T::sync();
          gradient.collect(t, sample);
        }
      }
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) a[j] += carry[j];
      tile.columns_to_columns(db, memory.vectors, turn, x);
      if (p.d_matrix) add_outer_product<T>(b_rows, x, dq);
      tile.product(q, x, db_rows);
      tile.columns_to_columns(a, memory.vectors, turn, x);
      if (p.d_matrix) add_outer_product<T>(y0_rows, x, dq);
      tile.product(q, x, dy0_rows);
    }
    gradient.end_sample(exists ? sample : -1);

    C given[T::own_rows];
    load_entries(cotangent, tile.row, d, exists && (p.trajectory || k == 0), given);
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) dy0_rows[i] += given[i];
    if (p.db) store_entries(db_rows, tile.row, d, writes_rows, p.db + sample * d);
    if (p.dy0) store_entries(dy0_rows, tile.row, d, writes_rows, p.dy0 + sample * d);
    if (p.d_eigenvalues) store_entries(d_eigenvalues, tile.column, d, writes_columns, p.d_eigenvalues + sample * d);
    if (p.d_matrix && !sums.d_matrix) {
      Memory::store_gradient(tile, p, item, exists, memory.gradient, dq);
      clear<T>(dq);
    }
  }
  gradient.end_row();
  if (sums.d_matrix) Memory::store_partial(tile, d, dq, partial);
}

template <typename Storage>
struct SpectralStreamedMemory {
  using C = compute_type<Storage>;
  C *x, *b, *y, *previous, *partials;

  __host__ __device__ SpectralStreamedMemory(Arena& arena, int64_t d) {
    const int64_t n = StreamedMatrix<Storage>::padded(d);
    for (C** vector : {&x, &b, &y, &previous}) *vector = arena.take<C>(n);
    partials = arena.take<C>(StreamedMatrix<Storage>::warps * n);
  }
};

template <typename Storage>
struct SpectralStreamedBackwardMemory {
  using C = compute_type<Storage>;
  C *b, *a, *carry, *d_eigenvalues, *x, *partials, *across_warps;

  __host__ __device__ SpectralStreamedBackwardMemory(Arena& arena, int64_t d) {
    const int64_t n = StreamedMatrix<Storage>::padded(d), warps = StreamedMatrix<Storage>::warps;
    for (C** vector : {&b, &a, &carry, &d_eigenvalues, &x}) *vector = arena.take<C>(n);
    partials = arena.take<C>(warps * n);
    across_warps = arena.take<C>(2 * warps * 4);
  }
};

// to = M'from, each thread the entries that it owns. Synchronises the block before and after.
template <typename M, typename C>
__device__ void rotate(const M& matrix, const C* from, C* partials, C* to) {
  __syncthreads();
  matrix.transposed_product(from, partials);
  __syncthreads();
  for (int64_t e = threadIdx.x; e < matrix.d; e += M::block) to[e] = matrix.sum_of_partials(partials, e);
}

template <typename Storage>
__global__ void __launch_bounds__(StreamedMatrix<Storage>::block)
    momentum_spectral_streamed_kernel(const __grid_constant__ MomentumForward<Storage> p,
                                      const __grid_constant__ StreamedPlan plan) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const SpectralStreamedMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    const Storage *b = p.b + sample * p.b_stride, *y0 = p.y0 ? p.y0 + sample * p.y0_stride : nullptr;
    const Storage* eigenvalues = p.eigenvalues + sample * p.eigenvalues_stride;
    Storage* out = p.y + sample * p.d;
    if (p.trajectory || p.k == 0) {
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) out[e] = y0 ? y0[e] : to_storage<Storage>(C(0));
    }
    if (p.k == 0) continue;
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    const SampleSchedule<C> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      v.x[e] = to_compute(b[e]);
      v.y[e] = 0;
    }
    rotate(matrix, v.x, v.partials, v.b);
    if (y0) {
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) v.x[e] = to_compute(y0[e]);
      rotate(matrix, v.x, v.partials, v.y);
    }
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) v.previous[e] = v.y[e];
    for (int64_t t = 0; t < p.k; ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        C eigenvalue[1] = {to_compute(eigenvalues[e])}, b_e[1] = {v.b[e]}, y[1] = {v.y[e]},
          previous[1] = {v.previous[e]};
        diagonal_step(eigenvalue, b_e, s, momentum, y, previous);
        v.y[e] = y[0];
        v.previous[e] = previous[0];
      }
      if (!p.trajectory && t + 1 < p.k) continue;
      __syncthreads();
      matrix.product(v.y, v.x);
      __syncthreads();
      Storage* to = p.trajectory ? out + (t + 1) * p.B * p.d : out;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) to[e] = to_storage<Storage>(v.x[e]);
    }
  }
}

// Pairs of vectors whose outer products make dR, and room for the iterates: see below.
template <typename Storage>
__host__ __device__ int64_t spectral_pairs(const MomentumInputs<Storage>& p) {
  return p.trajectory && p.k > 0 ? p.k + 2 : 3;
}
template <typename Storage>
__host__ __device__ int64_t spectral_iterates(const MomentumInputs<Storage>& p) {
  return p.k > 0 ? p.k + 2 : 3;
}

template <typename Storage>
__global__ void __launch_bounds__(StreamedMatrix<Storage>::block)
    momentum_spectral_streamed_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                               const __grid_constant__ StreamedPlan plan,
                                               const __grid_constant__ PartialSums<Storage> sums) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  const int64_t n = M::padded(p.d), step = p.B * p.d, pairs = spectral_pairs(p);
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const SpectralStreamedBackwardMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  C* partial = sums.row(blockIdx.x);
  ScheduleGradient<C, 32, M::warps> gradient(p, coefficients_per_sample(p), v.across_warps);
  gradient.begin_row(partial ? partial + sums.matrix_size : nullptr);
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    // left   b     y_0     the cotangents of y_1 ... y_k, or of y_k alone
    // right  db^   dy_0^   y_1^ ... y_k^; until the end y_0^ is in the place of dy_0^
    C* left = (plan.trajectory_on_chip ? rest : slot).template take<C>(0);
    C *right = left + pairs * n, *db = right, *ys = right + n;
    const SampleSchedule<C> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    const Storage *b = p.b + sample * p.b_stride, *y0 = p.y0 ? p.y0 + sample * p.y0_stride : nullptr;
    const Storage *eigenvalues = p.eigenvalues + sample * p.eigenvalues_stride, *cotangent = p.grad_y + sample * p.d;
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      left[e] = to_compute(b[e]);
      left[n + e] = y0 ? to_compute(y0[e]) : C(0);
      for (int64_t i = 2; i < pairs; ++i)
        left[i * n + e] = to_compute(cotangent[(p.trajectory && p.k > 0 ? i - 1 : 0) * step + e]);
      v.d_eigenvalues[e] = v.carry[e] = db[e] = ys[e] = 0;
    }
    if (p.k > 0) {
      rotate(matrix, left, v.partials, v.b);
      if (y0) rotate(matrix, left + n, v.partials, ys);
      rotate(matrix, left + (pairs - 1) * n, v.partials, v.a);
      for (int64_t t = 0; t < p.k; ++t) {
        const StepCoefficients<C> s = schedule.at(t);
        for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
          C eigenvalue[1] = {to_compute(eigenvalues[e])}, b_e[1] = {v.b[e]}, y[1] = {ys[t * n + e]};
          C previous[1] = {ys[(t > 0 ? t - 1 : 0) * n + e]};
          diagonal_step(eigenvalue, b_e, s, momentum, y, previous);
          ys[(t + 1) * n + e] = y[0];
        }
      }
      for (int64_t t = p.k - 1; t >= 0; --t) {
        const StepCoefficients<C> s = schedule.at(t);
        const bool given = p.trajectory && t > 0;
        if (given) rotate(matrix, left + (t + 1) * n, v.partials, v.x);
        C d_phi = 0, d_beta = 0, d_gamma = 0;
        for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
          const C y = ys[t * n + e], m = momentum && t > 0 ? y - ys[(t - 1) * n + e] : C(0);
          const C z = momentum ? y + s.gamma * m : y, a = v.a[e], w = to_compute(eigenvalues[e]) * a;
          d_phi -= w * z + a * v.b[e];
          d_beta += a * m;
          d_gamma -= s.phi * (w * m);
          db[e] -= s.phi * a;
          v.d_eigenvalues[e] -= s.phi * (a * z);
          v.a[e] = (given ? v.x[e] : C(0)) + v.carry[e] + (1 + s.beta) * a - s.phi * (1 + s.gamma) * w;
          v.carry[e] = s.phi * s.gamma * w - s.beta * a;
        }
        if (gradient.wanted()) gradient.add(t, sample, true, d_phi, d_beta, d_gamma);
        if (gradient.varies_over_steps()) {
          __syncthreads();
          gradient.collect(t, sample);
        }
      }
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        if (!p.trajectory) right[2 * n + e] = ys[p.k * n + e];
        right[n + e] = v.a[e] + v.carry[e];
      }
      __syncthreads();
      matrix.product(db, v.x);
      matrix.product(right + n, v.a);
      __syncthreads();
    }
    gradient.end_sample(sample);
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      const C given = p.trajectory || p.k == 0 ? to_compute(cotangent[e]) : C(0);
      if (p.db) p.db[sample * p.d + e] = to_storage<Storage>(p.k > 0 ? v.x[e] : C(0));
      if (p.dy0) p.dy0[sample * p.d + e] = to_storage<Storage>(p.k > 0 ? given + v.a[e] : given);
      if (p.d_eigenvalues) p.d_eigenvalues[sample * p.d + e] = to_storage<Storage>(v.d_eigenvalues[e]);
    }
    if (!p.d_matrix) continue;
    if (sums.d_matrix) {
      matrix.outer_products(left, right, p.k > 0 ? pairs : 0, sample != blockIdx.x, partial);
    } else {
      matrix.outer_products(left, right, p.k > 0 ? pairs : 0, false, p.d_matrix + sample * p.d * p.d);
    }
  }
  gradient.end_row();
}

}  // namespace

template <typename Storage>
const char* momentum_spectral(const MomentumForward<Storage>& p, void* workspace, void* stream, size_t* size) {
  if (p.B == 0 || p.d == 0) return nullptr;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  return with_tile<Storage>(p.d, [&](auto tag) -> const char* {
    constexpr int D = decltype(tag)::value;
    if constexpr (D > 0) {
      if (size) return nullptr;
      using T = Tile<Storage, D>;
      const auto kernel = momentum_spectral_kernel<Storage, D>;
      const auto plan = plan_tiles<T, TileMemory<T, Storage, false>>(device, kernel, p, 0);
      return launch(kernel, plan.grid, T::block, T::teams * plan.team_bytes, stream, p, plan);
    } else {
      const auto kernel = momentum_spectral_streamed_kernel<Storage>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<SpectralStreamedMemory<Storage>>(
          device, kernel, p, threads, p.trajectory ? streamed_matrix_bytes<Storage>(p.d) : 0, 0, INT64_MAX);
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
const char* momentum_spectral(const MomentumBackward<Storage>& p, void* workspace, void* stream, size_t* size) {
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
      const auto kernel = momentum_spectral_backward_kernel<Storage, D>;
      auto plan = plan_tiles<T, TileMemory<T, Storage, true>>(device, kernel, p, p.k * T::problems * D);
      sums.rows = sums.any() ? plan.grid * T::teams : 0;
      sums.partials = arena.take<C>(sums.size());
      plan.trajectories = arena.take<C>(plan.workspace_size(plan.grid * T::teams));
      if (!size) error = launch(kernel, plan.grid, T::block, T::teams * plan.team_bytes, stream, p, plan, sums);
    } else {
      const auto kernel = momentum_spectral_streamed_backward_kernel<Storage>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      const int64_t vectors = spectral_pairs(p) + spectral_iterates(p);
      StreamedPlan plan = plan_streamed<SpectralStreamedBackwardMemory<Storage>>(
          device, kernel, p, threads, p.trajectory ? streamed_matrix_bytes<Storage>(p.d) : 0,
          vectors * StreamedMatrix<Storage>::padded(p.d) * static_cast<int64_t>(sizeof(C)), streamed_grid_limit(sums));
      sums.rows = sums.any() ? plan.grid : 0;
      sums.partials = arena.take<C>(sums.size());
      plan.slots = arena.take<unsigned char>(plan.grid * plan.slot_bytes);
      if (!size) error = launch(kernel, plan.grid, threads, plan.shared_bytes, stream, p, plan, sums);
    }
    if (size) *size = static_cast<size_t>(arena.used());
    return error || size ? error : sum_partials(sums, stream);
  });
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                     \
  template const char* momentum_spectral(const MomentumForward<Storage>&, void*, void*, size_t*); \
  template const char* momentum_spectral(const MomentumBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
