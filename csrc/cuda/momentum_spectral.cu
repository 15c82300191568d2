// Q = R diag(lambda) R': two products with R, or three in backward, and between them the diagonal recurrence.
//
// Floor of one sample, s bytes an element: forward (d^2 + 3d) s bytes, backward (d^2 + 5d) s, and d^2 s more where dR is
// wanted; 4 d^2 + 4kd flops. The steps are almost free, so that memory is the bound for any k; where the trajectory is
// returned, each of its points is a product more, as in the dense case.
//
// R is held as Q is in momentum_dense.cu: d <= 128 (float64: 64) in the registers of a team, read once; above, streamed.
// The recurrence runs in the column layout that R'b leaves. Backward keeps what it makes dR of, the right halves of the
// outer products, until the end, when R is no longer needed.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_stopping.cuh"
#include "cuda/streamed.cuh"
#include "cuda/tile.cuh"

namespace unrolled_kernels::cuda {
namespace {

// What a problem starts from, as it comes from memory: the tile's rows of b and y_0, and lambda in the column layout.
template <typename T, typename Storage>
struct SpectralStart {
  typename T::C b[T::rows], y0[T::rows], eigenvalues[T::own_columns];

  __device__ __forceinline__ void load(const T& tile, const MomentumInputs<Storage>& p, int64_t item) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int d = static_cast<int>(p.d);
    load_rows(tile, p.b + sample * p.b_stride, d, exists, b);
    load_rows(tile, p.y0 + sample * p.y0_stride, d, exists && p.y0, y0);
    load_entries(p.diagonal + sample * p.diagonal_stride, tile.column, d, exists, eigenvalues);
  }
};

// One problem's state in the eigenbasis, on the columns that a thread owns.
template <typename T, bool momentum>
struct SpectralState {
  using C = typename T::C;
  C eigenvalues[T::own_columns], b[T::own_columns], y[T::own_columns], previous[T::own_columns];

  template <typename Start>
  __device__ __forceinline__ SpectralState(const T& tile, const typename T::Memory& memory,
                                           const C (&q)[T::rows][T::columns], const Start& start, bool warm) {
    tile.transposed_product(q, start.b, memory, b);
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) y[j] = 0;
    if (warm) {
      T::sync();
      tile.transposed_product(q, start.y0, memory, y);
    }
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) {
      eigenvalues[j] = start.eigenvalues[j];
      previous[j] = y[j];
    }
  }
  __device__ __forceinline__ void step(const StepCoefficients<C>& s) {
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) {
      const C z = extrapolate(s, momentum, y[j], previous[j]);
      const C next = advance(s, momentum, y[j], previous[j], eigenvalues[j] * z + b[j]);
      previous[j] = y[j];
      y[j] = next;
    }
  }
};

template <typename Storage, int D, bool momentum, bool stops>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::forward_blocks())
    momentum_spectral_kernel(const __grid_constant__ MomentumForward<Storage> p,
                             const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                             const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const BlockSchedule<C, momentum> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  Arena arena(dynamic_shared_memory() + plan.schedule_bytes + team * plan.team_bytes);
  const TileMemory<T, Storage> memory(arena, d, 0);
  MatrixStream<T, Storage> matrices(p, memory.matrix);

  const Items<T> items(plan, p.B, team);
  const bool plain = schedule.on_chip() && !p.trajectory;
  C q[T::rows][T::columns];
  if (items.first < items.count) matrices.fetch(tile, items.first);
#pragma unroll 1
  for (int64_t item = items.first; item < items.count; item += items.step) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int64_t scheduled = exists ? sample : p.B - 1;
    SpectralStart<T, Storage> start;
    start.load(tile, p, item);
    if (item == items.first || p.matrix_stride != 0) matrices.take(tile, exists, q);
    SpectralState<T, momentum> state(tile, memory.vectors, q, start, p.y0 != nullptr);
    if (p.matrix_stride != 0 && item + items.step < items.count) matrices.fetch(tile, item + items.step);
    if constexpr (stops) {
      // y_t, rotated; y_0 as it came
      C y[T::own_rows], previous[T::own_rows] = {};
      load_entries(p.y0 + sample * p.y0_stride, tile.row, d, exists && p.y0, y);
      MovingProblem<T> moving(exists);
      const auto goes_on = [&](int t) {
        return moving.after(tile, memory.vectors, stopping, previous, y, sample, t, k,
                            [&] { store_entries(y, tile.row, d, exists, p.y + sample * d); });
      };
      for (int t = 0; t == 0 || goes_on(t - 1); ++t) {
        C x[T::columns];
        state.step(schedule.at(p, scheduled, t));
#pragma unroll
        for (int i = 0; i < T::own_rows; ++i) previous[i] = y[i];
        tile.columns_to_columns(state.y, memory.vectors.vectors + t % 2 * (T::problems * D), x);
        tile.product(q, x, y);
      }
      T::sync();
      continue;
    }
    // y_t to the output, rotated; y_0 itself is not
    const auto store = [&](int t, C* buffer) {
      C x[T::columns], rotated[T::own_rows];
      tile.columns_to_columns(state.y, buffer, x);
      tile.product(q, x, rotated);
      store_entries(rotated, tile.row, d, exists, p.y + (t * p.B + sample) * d);
    };
    if (p.trajectory || k == 0) {
      C y0[T::own_rows];
      load_entries(p.y0 + sample * p.y0_stride, tile.row, d, exists && p.y0, y0);
      store_entries(y0, tile.row, d, exists, p.y + sample * d);
    }
    if (plain) {
#pragma unroll 4
      for (int t = 0; t < k; ++t) state.step(schedule.at(t));
      if (k > 0) store(0, memory.vectors.vectors);
    } else {
      for_steps(0, k, memory.vectors.vectors, T::problems * D, [&](int t, C* buffer) {
        state.step(schedule.at(p, scheduled, t));
        if (p.trajectory || t + 1 == k) store(p.trajectory ? t + 1 : 0, buffer);
      });
    }
    T::sync();
  }
}

template <typename Storage, int D, bool momentum>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::backward_blocks())
    momentum_spectral_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                      const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                                      const __grid_constant__ PartialSums<Storage> sums) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  constexpr int vector = T::problems * D;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const BlockSchedule<C, momentum> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  Arena arena(dynamic_shared_memory() + plan.schedule_bytes + team * plan.team_bytes);
  const TileMemory<T, Storage> memory(arena, d, plan.trajectory_on_chip ? plan.trajectory_size : 0);
  const Items<T> items(plan, p.B, team);
  const bool plain = schedule.on_chip() && !p.trajectory;
  // db^, dy_0^, and the iterates in the eigenbasis, y_{-1}^ = y_0^, y_0^ ... y_k^: [problems, D] each
  C* db_hat = plan.trajectory_on_chip ? memory.trajectory : plan.trajectories + items.first * plan.trajectory_size;
  db_hat += tile.problem * D;
  C *dy0_hat = db_hat + vector, *ys = db_hat + 3 * vector;
  MatrixStream<T, Storage> matrices(p, memory.matrix);
  const auto partial = [&] { return sums.row(items.first); };
  ScheduleGradient<C, (T::threads < 32 ? T::threads : 32), T::warps> gradient(p, coefficients_per_sample(p),
                                                                              memory.vectors.across_warps);
  gradient.begin_row(partial() ? partial() + sums.matrix_size : nullptr);
  if (sums.d_matrix && items.first >= items.count) MatrixGradient<T>::clear_partial(tile, d, partial());

  if (items.first < items.count) matrices.fetch(tile, items.first);
#pragma unroll 1
  for (int64_t item = items.first; item < items.count; item += items.step) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int64_t scheduled = exists ? sample : p.B - 1, delivered = exists ? sample : -1;
    const auto cotangent = [&](int64_t t) { return p.grad_y + (t * p.B + sample) * d; };
    C d_eigenvalues[T::own_columns] = {}, db[T::own_rows] = {}, dy0[T::own_rows] = {};
    {
      C q[T::rows][T::columns];
      SpectralStart<T, Storage> start;
      start.load(tile, p, item);
      matrices.take(tile, exists, q);
      SpectralState<T, momentum> state(tile, memory.vectors, q, start, p.y0 != nullptr);
      C a[T::own_columns];
      {
        C rows[T::rows];
        load_rows(tile, cotangent(p.trajectory ? k : 0), d, exists, rows);
        T::sync();
        tile.transposed_product(q, rows, memory.vectors, a);
      }
      if (p.matrix_stride != 0 && item + items.step < items.count) matrices.fetch(tile, item + items.step);
      C* y_at = ys + tile.column;
      T::write(state.y, y_at - vector);
      T::write(state.y, y_at);
#pragma unroll(T::registers > 64 ? 1 : 2)
      for (int t = 0; t < k; ++t) {
        y_at += vector;
        state.step(plain ? schedule.at(t) : schedule.at(p, scheduled, t));
        T::write(state.y, y_at);
      }
      StepAdjoint<C> adjoint[T::own_columns];
      C y[T::own_columns];
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) {
        adjoint[j].a = a[j];
        y[j] = state.previous[j];
      }
#pragma unroll(T::registers > 64 ? 1 : 2)
      for (int t = k - 1; t >= 0; --t) {
        C previous[T::own_columns], terms[4] = {};
        y_at -= vector;
        T::read(y_at - vector, previous);
        const StepCoefficients<C> s = plain ? schedule.at(t) : schedule.at(p, scheduled, t);
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) {
          const C a = adjoint[j].a, z = extrapolate(s, momentum, y[j], previous[j]);
          d_eigenvalues[j] -= s.phi * a * z;
          terms[0] -= a * (state.eigenvalues[j] * z + state.b[j]);
          adjoint[j].step(s, momentum, state.eigenvalues[j] * a, y[j], previous[j], terms);
          y[j] = previous[j];
        }
        // see momentum_diagonal.cu
        if (t == 0) terms[2] = 0;
        if (!plain && p.trajectory && t > 0) {
          C rows[T::rows], given[T::own_columns];
          load_rows(tile, cotangent(t), d, exists, rows);
          T::sync();
          tile.transposed_product(q, rows, memory.vectors, given);
#pragma unroll
          for (int j = 0; j < T::own_columns; ++j) adjoint[j].a += given[j];
        }
        gradient.add(t, delivered, terms);
        if (T::warps > 1 && gradient.varies_over_steps()) {
          T::sync();
          gradient.collect(t, delivered);
        }
      }
      if (k > 0) {
        C x[T::columns], db_columns[T::own_columns], dy0_columns[T::own_columns];
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) {
          db_columns[j] = adjoint[j].db;
          dy0_columns[j] = adjoint[j].a + adjoint[j].carry;
        }
        T::write(db_columns, db_hat + tile.column);
        T::write(dy0_columns, dy0_hat + tile.column);
        T::sync();
        tile.read_columns(db_hat, x);
        tile.product(q, x, db);
        tile.read_columns(dy0_hat, x);
        tile.product(q, x, dy0);
      }
    }
    gradient.end_sample(delivered);

    C given[T::own_rows];
    load_entries(cotangent(0), tile.row, d, exists && (p.trajectory || k == 0), given);
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) dy0[i] += given[i];
    if (p.db) store_entries(db, tile.row, d, exists, p.db + sample * d);
    if (p.dy0) store_entries(dy0, tile.row, d, exists, p.dy0 + sample * d);
    if (p.d_diagonal) store_entries(d_eigenvalues, tile.column, d, exists, p.d_diagonal + sample * d);
    if (p.d_matrix) {
      MatrixGradient<T> d_matrix;
      if (k > 0) {
        d_matrix.add(tile, p.b + sample * p.b_stride, d, exists, db_hat);
        if (p.y0) d_matrix.add(tile, p.y0 + sample * p.y0_stride, d, exists, dy0_hat);
#pragma unroll 1
        for (int t = p.trajectory ? 1 : k; t <= k; ++t) {
          d_matrix.add(tile, cotangent(p.trajectory ? t : 0), d, exists, ys + t * vector);
        }
      }
      if (sums.d_matrix) {
        d_matrix.add_to_partial(tile, d, item == items.first, partial());
      } else if (exists) {
        d_matrix.store(tile, d, p.d_matrix + sample * d * d);
      }
    }
    T::sync();
  }
  gradient.end_row();
}

template <typename Storage>
struct SpectralStreamedMemory {
  using C = compute_type<Storage>;
  C *x, *b, *y, *previous, *partials, *last, *across_warps;

  __host__ __device__ SpectralStreamedMemory(Arena& arena, int64_t d) {
    const int64_t n = StreamedMatrix<Storage>::padded(d);
    for (C** vector : {&x, &b, &y, &previous, &last}) *vector = arena.take<C>(n);
    partials = arena.take<C>(StreamedMatrix<Storage>::warps * n);
    across_warps = arena.take<C>(2 * StreamedMatrix<Storage>::warps * 2);
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
                                      const __grid_constant__ StreamedPlan plan,
                                      const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const SpectralStreamedMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    const Storage *b = p.b + sample * p.b_stride, *y0 = p.y0 ? p.y0 + sample * p.y0_stride : nullptr;
    const Storage* eigenvalues = p.diagonal + sample * p.diagonal_stride;
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
        const C y = v.y[e], z = extrapolate(s, momentum, y, v.previous[e]);
        v.y[e] = advance(s, momentum, y, v.previous[e], to_compute(eigenvalues[e]) * z + v.b[e]);
        v.previous[e] = y;
      }
      if (!p.trajectory && t + 1 < p.k && !stopping.taken) continue;
      __syncthreads();
      matrix.product(v.y, v.x);
      __syncthreads();
      Storage* to = p.trajectory ? out + (t + 1) * p.B * p.d : out;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) to[e] = to_storage<Storage>(v.x[e]);
      if (!stopping.taken) continue;
      StepSize<C> size;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        size.add(v.x[e], t > 0 ? v.last[e] : y0 ? to_compute(y0[e]) : C(0));
        v.last[e] = v.x[e];
      }
      size.template over_threads<M::block>(v.across_warps, t);
      if (t + 1 < p.k && !size.is_small(stopping.tolerance)) continue;
      if (threadIdx.x == 0) store_stop(stopping, sample, t, size.change());
      break;
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
    const Storage *eigenvalues = p.diagonal + sample * p.diagonal_stride, *cotangent = p.grad_y + sample * p.d;
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
          const C y = ys[t * n + e], previous = ys[(t > 0 ? t - 1 : 0) * n + e];
          const C g = to_compute(eigenvalues[e]) * extrapolate(s, momentum, y, previous) + v.b[e];
          ys[(t + 1) * n + e] = advance(s, momentum, y, previous, g);
        }
      }
      for (int64_t t = p.k - 1; t >= 0; --t) {
        const StepCoefficients<C> s = schedule.at(t);
        const bool given = p.trajectory && t > 0;
        if (given) rotate(matrix, left + (t + 1) * n, v.partials, v.x);
        C terms[4] = {};
        for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
          const C y = ys[t * n + e], previous = ys[(t > 0 ? t - 1 : 0) * n + e];
          StepAdjoint<C> adjoint{v.a[e], v.carry[e], db[e]};
          const C eigenvalue = to_compute(eigenvalues[e]), z = extrapolate(s, momentum, y, previous);
          v.d_eigenvalues[e] -= s.phi * (adjoint.a * z);
          terms[0] -= adjoint.a * (eigenvalue * z + v.b[e]);
          adjoint.step(s, momentum, eigenvalue * adjoint.a, y, previous, terms);
          if (given) adjoint.a += v.x[e];
          v.a[e] = adjoint.a;
          v.carry[e] = adjoint.carry;
          db[e] = adjoint.db;
        }
        if (t == 0) terms[2] = 0;
        if (gradient.wanted()) gradient.add(t, sample, terms);
        if (gradient.varies_over_steps()) {
          __syncthreads();
          gradient.collect(t, sample);
        }
      }
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        if (!p.trajectory) right[2 * n + e] = ys[p.k * n + e];
        // without y_0 it may not be finite, and counts for nothing
        right[n + e] = y0 ? v.a[e] + v.carry[e] : C(0);
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
      if (p.d_diagonal) p.d_diagonal[sample * p.d + e] = to_storage<Storage>(v.d_eigenvalues[e]);
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
      return with_forward_method(p, [&](auto momentum, auto, auto stops) {
        const auto kernel = momentum_spectral_kernel<Storage, D, momentum, stops>;
        const auto plan = plan_tiles<T, TileMemory<T, Storage>, momentum>(device, kernel, p, 0);
        return launch(kernel, plan.grid, plan.teams * T::team, plan.shared_bytes(), stream, p, plan, stopping_of(p));
      });
    } else {
      const auto kernel = momentum_spectral_streamed_kernel<Storage>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<SpectralStreamedMemory<Storage>>(
          device, kernel, p, threads, p.trajectory || p.stopping ? streamed_matrix_bytes<Storage>(p.d) : 0, 0,
          INT64_MAX);
      if (size) {
        *size = static_cast<size_t>(plan.grid * plan.slot_bytes);
        return nullptr;
      }
      plan.slots = static_cast<unsigned char*>(workspace);
      return launch(kernel, plan.grid, threads, plan.shared_bytes, stream, p, plan, stopping_of(p));
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
      error = with_momentum(p, [&](auto momentum) -> const char* {
        const auto kernel = momentum_spectral_backward_kernel<Storage, D, momentum>;
        auto plan = plan_tiles<T, TileMemory<T, Storage>, momentum>(device, kernel, p, (p.k + 4) * T::problems * D);
        sums.rows = sums.any() ? plan.grid * plan.teams : 0;
        sums.partials = arena.take<C>(sums.size());
        plan.trajectories = arena.take<C>(plan.workspace_size());
        if (size) return nullptr;
        return launch(kernel, plan.grid, plan.teams * T::team, plan.shared_bytes(), stream, p, plan, sums);
      });
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
