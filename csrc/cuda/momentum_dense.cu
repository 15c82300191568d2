// Dense Q: k steps and their adjoint for one read of Q and, in backward, one write of dQ.
//
// Floor of one sample, s bytes an element, and float32 on an H200 at 4.3 TB/s and 60 TFLOP/s:
//
//     forward     (d^2 + 2d) s bytes       2 k d^2 flops       bound by memory up to k = 28
//     backward    (2d^2 + 3d) s            6 k d^2             bound by memory up to k = 18
//
// What bounds the kernels first, though, is the issue of instructions, of which an FMA is one: a step keeps what is not an
// FMA of its product to a minimum, which benchmarks/machine_code.py counts.
//
// d <= 128 (float64: 64): Q lies in the registers of a team, tile.cuh, while that of the team's next problems is copied to
// shared memory. Backward keeps z_t and a_t of all steps, and makes dQ = -sum over t of phi_t a_t z_t' of them at the
// end, in the registers that Q leaves. Where a proximal map ends the steps it keeps v_t as well, until a_t is made of it.
// Above, what momentum_resident.cu does not hold on chip: streamed.cuh, a block for each sample; Q in shared memory if it
// fits, else read from L2 for each product; dQ likewise, tile by tile. One Q for the batch is there momentum_shared.cu's.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_prox.cuh"
#include "cuda/momentum_stopping.cuh"
#include "cuda/streamed.cuh"
#include "cuda/tile.cuh"

namespace unrolled_kernels::cuda {
namespace {

// b and y_0 as they come from memory, for the rows that a thread owns.
template <typename T, typename Storage>
struct DenseStart {
  typename T::C b[T::own_rows], y[T::own_rows];

  __device__ __forceinline__ void load(const T& tile, const MomentumInputs<Storage>& p, int64_t item) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int d = static_cast<int>(p.d);
    load_entries(p.b + sample * p.b_stride, tile.row, d, exists, b);
    load_entries(p.y0 + sample * p.y0_stride, tile.row, d, exists && p.y0, y);
  }
};

// One problem's state on the rows that a thread owns, and its step.
template <typename T, bool momentum>
struct DenseState {
  using C = typename T::C;
  C b[T::own_rows], y[T::own_rows], previous[T::own_rows];
  C v[T::own_rows];  // v_t of the last step

  template <typename Start>
  __device__ __forceinline__ explicit DenseState(const Start& start) {
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) {
      b[i] = start.b[i];
      y[i] = previous[i] = start.y[i];
    }
  }
  // from y_t = 0, without the product
  template <typename Map>
  __device__ __forceinline__ void step_from_zero(const StepCoefficients<C>& s, const Map& map) {
    const C zero[T::own_rows] = {};
    finish(s, map, zero);
  }
  // buffer: of the exchange, another one than that of the last step
  template <typename Map>
  __device__ __forceinline__ void step(const T& tile, const C (&q)[T::rows][T::columns], const StepCoefficients<C>& s,
                                       const Map& map, C* buffer) {
    C z[T::own_rows], x[T::columns], qz[T::own_rows];
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) z[i] = extrapolate(s, momentum, y[i], previous[i]);
    tile.rows_to_columns(z, buffer, x);
    tile.product(q, x, qz);
    finish(s, map, qz);
  }

 private:
  template <typename Map>
  __device__ __forceinline__ void finish(const StepCoefficients<C>& s, const Map& map, const C (&qz)[T::own_rows]) {
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) {
      v[i] = advance(s, momentum, y[i], previous[i], qz[i] + b[i]);
      previous[i] = y[i];
      y[i] = map(s, i, v[i]);
    }
  }
};

template <typename Storage, int D, bool momentum, bool proximal, bool stops>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::forward_blocks(proximal, stops))
    momentum_dense_kernel(const __grid_constant__ MomentumForward<Storage> p,
                          const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                          const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const BlockSchedule<C, momentum, proximal> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  Arena arena(dynamic_shared_memory() + plan.schedule_bytes + team * plan.team_bytes);
  const TileMemory<T, Storage> memory(arena, d, 0);
  MatrixStream<T, Storage> matrices(p, memory.matrix);

  const Items<T> items(plan, p.B, team);
  const bool plain = schedule.on_chip() && !p.trajectory;  // one test a step of what is rare
  C q[T::rows][T::columns];
  DenseStart<T, Storage> next;
  if (items.first < items.count) {
    matrices.fetch(tile, items.first);
    next.load(tile, p, items.first);
  }
#pragma unroll 1
  for (int64_t item = items.first; item < items.count; item += items.step) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const ProximalMap<C, T::own_rows, proximal> map(p, sample, tile.row, exists);
    if (item == items.first || p.matrix_stride != 0) matrices.take(tile, exists, q);
    DenseState<T, momentum> state(next);
    if (item + items.step < items.count) {
      if (p.matrix_stride != 0) matrices.fetch(tile, item + items.step);
      next.load(tile, p, item + items.step);
    }
    const int64_t scheduled = exists ? sample : p.B - 1;
    const auto store = [&](int t) { store_entries(state.y, tile.row, d, exists, p.y + (t * p.B + sample) * d); };
    int first = 0;
    if (!p.y0 && k > 0) {
      if (p.trajectory) store(0);
      state.step_from_zero(schedule.at(p, scheduled, 0), map);
      first = 1;
    }
    if constexpr (stops) {
      MovingProblem<T> moving(exists);
      const auto goes_on = [&](int t) {
        return moving.after(tile, memory.vectors, stopping, state.previous, state.y, sample, t, k, [&] { store(0); });
      };
      for (int t = first; t == 0 || goes_on(t - 1); ++t) {
        state.step(tile, q, schedule.at(p, scheduled, t), map, memory.vectors.vectors + t % 2 * (T::problems * D));
      }
      if (p.matrix_stride == 0) T::sync();
      continue;
    }
    for_steps(first, k, memory.vectors.vectors, T::problems * D, [&](int t, C* buffer) {
      StepCoefficients<C> s;
      if (plain) {
        s = schedule.at(t);
      } else {
        if (p.trajectory) store(t);
        s = schedule.at(p, scheduled, t);
      }
      state.step(tile, q, s, map, buffer);
    });
    store(p.trajectory ? k : 0);
    // the exchange begins with the same buffer again
    if (p.matrix_stride == 0) T::sync();
  }
}

template <typename Storage, int D, bool momentum, bool proximal>
__global__ void __launch_bounds__(Tile<Storage, D>::block, Tile<Storage, D>::backward_blocks(proximal))
    momentum_dense_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                   const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                                   const __grid_constant__ PartialSums<Storage> sums) {
  using T = Tile<Storage, D>;
  using C = typename T::C;
  constexpr int vector = T::problems * D;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const BlockSchedule<C, momentum, proximal> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  Arena arena(dynamic_shared_memory() + plan.schedule_bytes + team * plan.team_bytes);
  const TileMemory<T, Storage> memory(arena, d, plan.trajectory_on_chip ? plan.trajectory_size : 0);
  const Items<T> items(plan, p.B, team);
  const bool plain = schedule.on_chip() && !p.trajectory;
  // y_{-1} = y_0, y_0 ... y_{k-1}, replaced by z_t on the way back, a_t, the adjoint of y_{t+1}, and with a map v_t:
  // [problems, D] each
  C* ys = plan.trajectory_on_chip ? memory.trajectory : plan.trajectories + items.first * plan.trajectory_size;
  ys += vector + tile.problem * D;
  C* as = ys + k * vector;
  C* vs = as + k * vector;
  MatrixStream<T, Storage> matrices(p, memory.matrix);
  const auto partial = [&] { return sums.row(items.first); };
  ScheduleGradient<C, (T::threads < 32 ? T::threads : 32), T::warps, proximal> gradient(p, coefficients_per_sample(p),
                                                                                        memory.vectors.across_warps);
  gradient.begin_row(partial() ? partial() + sums.matrix_size : nullptr);
  if (sums.d_matrix && items.first >= items.count) MatrixGradient<T>::clear_partial(tile, d, partial());

  if (items.first < items.count) matrices.fetch(tile, items.first);
#pragma unroll 1
  for (int64_t item = items.first; item < items.count; item += items.step) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int64_t scheduled = exists ? sample : p.B - 1, delivered = exists ? sample : -1;
    StepAdjoint<C> adjoint[T::own_columns];
    ProximalMap<C, T::own_columns, proximal> map(p, sample, tile.column, exists);
    {
      C q[T::rows][T::columns];
      DenseStart<T, Storage> start;
      start.load(tile, p, item);
      const ProximalMap<C, T::own_rows, proximal> row_map(p, sample, tile.row, exists);
      matrices.take(tile, exists, q);
      DenseState<T, momentum> state(start);
      if (p.matrix_stride != 0 && item + items.step < items.count) matrices.fetch(tile, item + items.step);
      T::write(state.y, ys - vector + tile.row);
      C *y_at = ys + tile.row, *v_at = vs + tile.row;
      const auto keep_v = [&] {
        if constexpr (proximal) T::write(state.v, v_at), v_at += vector;
      };
      // of the last step only a map asks for more than y_{k-1}: for v_{k-1}
      const int steps = proximal ? k : k - 1;
      int first = 0;
      if (!p.y0 && steps > 0) {
        T::write(state.y, y_at);
        y_at += vector;
        state.step_from_zero(schedule.at(p, scheduled, 0), row_map);
        keep_v();
        first = 1;
      }
      for_steps(first, steps, memory.vectors.vectors, vector, [&](int t, C* buffer) {
        T::write(state.y, y_at);
        y_at += vector;
        state.step(tile, q, plain ? schedule.at(t) : schedule.at(p, scheduled, t), row_map, buffer);
        keep_v();
      });
      if (!proximal && k > 0) T::write(state.y, y_at);
      T::sync();

      C y[T::own_columns] = {}, b[T::own_columns], a[T::own_columns];
      load_entries(p.b + sample * p.b_stride, tile.column, d, exists, b);
      load_entries(p.grad_y + ((p.trajectory ? p.k * p.B : 0) + sample) * d, tile.column, d, exists, a);
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) adjoint[j].a = a[j];
      y_at = ys + (k - 1) * vector + tile.column;
      C* a_at = as + (k - 1) * vector + tile.column;
      v_at = vs + (k - 1) * vector + tile.column;
      if (k > 0) T::read(y_at, y);
      // the steps in reverse: the i-th of them is step k - 1 - i
      for_steps(0, k, memory.vectors.vectors, vector, [&](int i, C* buffer) {
        const int t = k - 1 - i;
        const StepCoefficients<C> s = plain ? schedule.at(t) : schedule.at(p, scheduled, t);
        C previous[T::own_columns], a[T::own_columns], a_rows[T::rows], terms[4] = {};
        if constexpr (proximal) {
          C v[T::own_columns];
          T::read(v_at, v);
          v_at -= vector;
#pragma unroll
          for (int j = 0; j < T::own_columns; ++j) adjoint[j].a = map.adjoint(s, j, v[j], adjoint[j].a, terms);
        }
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) a[j] = adjoint[j].a;
        T::write(a, a_at);
        T::read(y_at - vector, previous);
        if (momentum) {
          C z[T::own_columns];
#pragma unroll
          for (int j = 0; j < T::own_columns; ++j) z[j] = extrapolate(s, true, y[j], previous[j]);
          T::write(z, y_at);
        }
        y_at -= vector;
        a_at -= vector;
        tile.columns_to_rows(a, buffer, a_rows);
        if (T::warps > 1 && i > 0) gradient.collect(t + 1, delivered);
        C w[T::own_columns];
        tile.transposed_product(q, a_rows, memory.vectors, w);
        C along = 0;
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) {
          along += w[j] * extrapolate(s, momentum, y[j], previous[j]);
          terms[0] -= adjoint[j].a * b[j];
          adjoint[j].step(s, momentum, w[j], y[j], previous[j], terms);
          y[j] = previous[j];
        }
        // z_0 without y_0 and m_0 are zero, and Q'a_1, which is in dy_0 alone, may overflow
        if (t > 0 || p.y0) terms[0] -= along;
        if (t == 0) terms[2] = 0;
        if (!plain && p.trajectory) {
          C given[T::own_columns];
          load_entries(p.grad_y + (t * p.B + sample) * d, tile.column, d, exists, given);
#pragma unroll
          for (int j = 0; j < T::own_columns; ++j) adjoint[j].a += given[j];
        }
        gradient.add(t, delivered, terms);
      });
    }
    if (T::warps > 1 && k > 0) {
      T::sync();
      gradient.collect(0, delivered);
    }
    gradient.end_sample(delivered);

    C a[T::own_columns], db[T::own_columns];
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) {
      a[j] = adjoint[j].a + adjoint[j].carry;
      db[j] = adjoint[j].db;
    }
    if (p.db) store_entries(db, tile.column, d, exists, p.db + sample * d);
    if (p.dy0) store_entries(a, tile.column, d, exists, p.dy0 + sample * d);
    map.store(p, sample, tile.column, exists);
    if (!p.d_matrix) continue;
    T::sync();
    MatrixGradient<T> d_matrix;
    const C *as_at = as, *zs_at = ys;
#pragma unroll 1
    for (int t = 0; t < k; ++t, as_at += vector, zs_at += vector) {
      d_matrix.add(tile, -(plain ? schedule.at(t) : schedule.at(p, scheduled, t)).phi, as_at, zs_at);
    }
    if (sums.d_matrix) {
      d_matrix.add_to_partial(tile, d, item == items.first, partial());
    } else if (exists) {
      d_matrix.store(tile, d, p.d_matrix + sample * d * d);
    }
  }
  gradient.end_row();
}

template <typename Storage>
struct DenseStreamedMemory {
  using C = compute_type<Storage>;
  C *z, *g, *y, *previous, *across_warps;

  __host__ __device__ DenseStreamedMemory(Arena& arena, int64_t d) {
    for (C** vector : {&z, &g, &y, &previous}) *vector = arena.take<C>(StreamedMatrix<Storage>::padded(d));
    across_warps = arena.take<C>(2 * StreamedMatrix<Storage>::warps * 2);
  }
};

template <typename Storage>
struct DenseStreamedBackwardMemory {
  using C = compute_type<Storage>;
  C *z, *g, *a, *carry, *db, *partials, *across_warps;

  __host__ __device__ DenseStreamedBackwardMemory(Arena& arena, int64_t d) {
    const int64_t n = StreamedMatrix<Storage>::padded(d), warps = StreamedMatrix<Storage>::warps;
    for (C** vector : {&z, &g, &a, &carry, &db}) *vector = arena.take<C>(n);
    partials = arena.take<C>(warps * n);
    across_warps = arena.take<C>(2 * warps * 4);
  }
};

template <typename Storage, bool proximal>
__global__ void __launch_bounds__(StreamedMatrix<Storage>::block)
    momentum_dense_streamed_kernel(const __grid_constant__ MomentumForward<Storage> p,
                                   const __grid_constant__ StreamedPlan plan,
                                   const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using M = StreamedMatrix<Storage>;
  using C = typename M::C;
  Arena shared(dynamic_shared_memory()), slot(plan.slots + blockIdx.x * plan.slot_bytes);
  const DenseStreamedMemory<Storage> v(plan.vectors_on_chip ? shared : slot, p.d);
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    const SampleSchedule<C, proximal> schedule(p, sample);
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
        v.z[e] = extrapolate(s, momentum, v.y[e], v.previous[e]);
      }
      if (t > 0 || p.y0) {
        __syncthreads();
        matrix.product(v.z, v.g);
        __syncthreads();
      }
      StepSize<C> size;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C y = v.y[e], next = advance(s, momentum, y, v.previous[e], v.g[e] + to_compute(b[e]));
        v.y[e] = ProximalMap<C, 1, proximal>(p, sample, e, true)(s, 0, next);
        v.previous[e] = y;
        if (p.trajectory) out[(t + 1) * p.B * p.d + e] = to_storage<Storage>(v.y[e]);
        if (!p.trajectory && t + 1 == p.k) out[e] = to_storage<Storage>(v.y[e]);
        if (stopping.taken) size.add(v.y[e], y);
      }
      if (!stopping.taken) continue;
      size.template over_threads<M::block>(v.across_warps, t);
      if (t + 1 < p.k && !size.is_small(stopping.tolerance)) continue;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) out[e] = to_storage<Storage>(v.y[e]);
      if (threadIdx.x == 0) store_stop(stopping, sample, t, size.change());
      break;
    }
  }
}

template <typename Storage, bool proximal>
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
  ScheduleGradient<C, 32, M::warps, proximal> gradient(p, coefficients_per_sample(p), v.across_warps);
  gradient.begin_row(partial ? partial + sums.matrix_size : nullptr);
  C *a = v.a, *carry = v.carry;
  for (int64_t sample = blockIdx.x; sample < p.B; sample += gridDim.x) {
    Arena rest = shared;
    const M matrix(streamed_matrix(p, plan, rest, sample), p.d);
    // y_t, replaced by z_t on the way back, -phi_t times the adjoint of y_{t+1}, and with a map v_t: [k, padded] each
    C* ys = (plan.trajectory_on_chip ? rest : slot).template take<C>(0);
    C* as = ys + p.k * n;
    C* vs = as + p.k * n;
    const SampleSchedule<C, proximal> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    const Storage* b = p.b + sample * p.b_stride;
    const Storage* cotangent = p.grad_y + sample * p.d;
    __syncthreads();
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      if (p.k > 0) ys[e] = p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0);
      v.g[e] = 0;
      ProximalMap<C, 1, proximal>(p, sample, e, true).store(p, sample, e, true);
    }
    for (int64_t t = 0; t + (proximal ? 0 : 1) < p.k; ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      const C *y = ys + t * n, *previous = t > 0 ? y - n : y;
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        v.z[e] = extrapolate(s, momentum, y[e], previous[e]);
      }
      if (t > 0 || p.y0) {
        __syncthreads();
        matrix.product(v.z, v.g);
        __syncthreads();
      }
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C next = advance(s, momentum, y[e], previous[e], v.g[e] + to_compute(b[e]));
        if (proximal) vs[t * n + e] = next;
        if (t + 1 < p.k) ys[(t + 1) * n + e] = ProximalMap<C, 1, proximal>(p, sample, e, true)(s, 0, next);
      }
    }
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      a[e] = to_compute(cotangent[(p.trajectory ? p.k * p.B * p.d : 0) + e]);
      carry[e] = v.db[e] = 0;
    }
    for (int64_t t = p.k - 1; t >= 0; --t) {
      const StepCoefficients<C> s = schedule.at(t);
      C terms[4] = {};
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        if constexpr (proximal) {
          ProximalMap<C, 1> map(p, sample, e, true);
          a[e] = map.adjoint(s, 0, vs[t * n + e], a[e], terms);
          map.store(p, sample, e, true, true);
        }
        as[t * n + e] = -s.phi * a[e];
      }
      __syncthreads();
      if (t + 1 < p.k) gradient.collect(t + 1, sample);
      // Q'a_1, which may overflow, is in dy_0 alone
      const bool cold = t == 0 && !p.y0;
      if (!cold) matrix.transposed_product(a, v.partials);
      __syncthreads();
      for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
        const C w = cold ? C(0) : matrix.sum_of_partials(v.partials, e);
        const C y = ys[t * n + e], previous = ys[(t > 0 ? t - 1 : 0) * n + e],
                z = extrapolate(s, momentum, y, previous);
        StepAdjoint<C> adjoint{a[e], carry[e], v.db[e]};
        terms[0] = terms[0] - w * z - adjoint.a * to_compute(b[e]);
        adjoint.step(s, momentum, w, y, previous, terms);
        if (p.trajectory) adjoint.a += to_compute(cotangent[t * p.B * p.d + e]);
        ys[t * n + e] = z;
        a[e] = adjoint.a;
        carry[e] = adjoint.carry;
        v.db[e] = adjoint.db;
      }
      if (gradient.wanted()) gradient.add(t, sample, terms);
    }
    __syncthreads();
    if (p.k > 0) gradient.collect(0, sample);
    gradient.end_sample(sample);
    for (int64_t e = threadIdx.x; e < p.d; e += M::block) {
      if (p.db) p.db[sample * p.d + e] = to_storage<Storage>(v.db[e]);
      if (p.dy0) p.dy0[sample * p.d + e] = to_storage<Storage>(a[e] + carry[e]);
    }
    if (p.d_matrix) matrix.outer_products(as, ys, p.k, false, p.d_matrix + sample * p.d * p.d);
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
      return with_forward_method(p, [&](auto momentum, auto proximal, auto stops) {
        const auto kernel = momentum_dense_kernel<Storage, D, momentum, proximal, stops>;
        const auto plan = plan_tiles<T, TileMemory<T, Storage>, momentum>(device, kernel, p, 0);
        return launch(kernel, plan.grid, plan.teams * T::team, plan.shared_bytes(), stream, p, plan, stopping_of(p));
      });
    } else {
      const auto kernel = p.prox == Prox::none ? momentum_dense_streamed_kernel<Storage, false>
                                               : momentum_dense_streamed_kernel<Storage, true>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<DenseStreamedMemory<Storage>>(
          device, kernel, p, threads, streamed_matrix_bytes<Storage>(p.d), 0, INT64_MAX);
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
      error = with_method(p, [&](auto momentum, auto proximal) -> const char* {
        const auto kernel = momentum_dense_backward_kernel<Storage, D, momentum, proximal>;
        auto plan = plan_tiles<T, TileMemory<T, Storage>, momentum>(device, kernel, p,
                                                                    ((proximal ? 3 : 2) * p.k + 1) * T::problems * D);
        sums.rows = sums.any() ? plan.grid * plan.teams : 0;
        sums.partials = arena.take<C>(sums.size());
        plan.trajectories = arena.take<C>(plan.workspace_size());
        if (size) return nullptr;
        return launch(kernel, plan.grid, plan.teams * T::team, plan.shared_bytes(), stream, p, plan, sums);
      });
    } else {
      const auto kernel = p.prox == Prox::none ? momentum_dense_streamed_backward_kernel<Storage, false>
                                               : momentum_dense_streamed_backward_kernel<Storage, true>;
      constexpr int threads = StreamedMatrix<Storage>::block;
      StreamedPlan plan = plan_streamed<DenseStreamedBackwardMemory<Storage>>(
          device, kernel, p, threads, streamed_matrix_bytes<Storage>(p.d),
          (p.prox == Prox::none ? 2 : 3) * p.k * StreamedMatrix<Storage>::padded(p.d) * static_cast<int64_t>(sizeof(C)),
          INT64_MAX);
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
