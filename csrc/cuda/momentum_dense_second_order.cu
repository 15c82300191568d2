// Dense Q: the VJP of backward, for each sample two steps and their adjoints, of y and of its tangent along the cotangents
// (derived in unrolled_kernels/ops/momentum/manual.py).
//
// Floor of one sample: (3d^2 + 6d) s bytes, Q, its cotangent X and the gradient of Q, and 16 k d^2 flops: of a product in
// four, one is with X.
//
// As in momentum_dense.cu Q lies in the registers of a team. X is in the shared memory that Q came through, and is read in
// each of its products. What is kept of the steps is twice as much.
#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/tile.cuh"

namespace unrolled_kernels::cuda {
namespace {

// d: what belongs to the tangent
template <typename Storage, int D, bool momentum>
__global__ void __launch_bounds__(Tile<Storage, D, true>::block, Tile<Storage, D, true>::second_order_blocks)
    momentum_dense_second_order_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                       const __grid_constant__ MomentumForward<Storage> direction,
                                       const __grid_constant__ TilePlan<compute_type<Storage>> plan,
                                       const __grid_constant__ PartialSums<Storage> sums) {
  using T = Tile<Storage, D, true>;
  using C = typename T::C;
  constexpr int vector = T::problems * D, step = 4 * vector;
  const T tile;
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k), team = threadIdx.x / T::team;
  const BlockSchedule<C, momentum> schedule(p, plan.schedule_bytes, dynamic_shared_memory());
  Arena arena(dynamic_shared_memory() + plan.schedule_bytes + team * plan.team_bytes);
  const TileMemory<T, Storage, true> memory(arena, d, plan.trajectory_on_chip ? plan.trajectory_size : 0);
  C* const buffer = memory.vectors.vectors;
  const Items<T> items(plan, p.B, team);
  // b, y_{-1} = y_0 and their tangents, then for each step what dQ has of z_t and of dz_t, y_t and its tangent, which they
  // replace on the way back
  C* const ys = (plan.trajectory_on_chip ? memory.trajectory : plan.trajectories + items.first * plan.trajectory_size) +
                step + 2 * vector + tile.problem * D;
  constexpr int dys = vector, of_z = -2 * vector, of_dz = -vector;
  MatrixStream<T, Storage> matrices(p, memory.matrix), directions(direction, memory.matrix);
  // Q, and then X
  const Storage* const padded = matrices.padded(tile.problem);
  const auto partial = [&] { return sums.row(items.first); };
  ScheduleGradient<C, (T::threads < 32 ? T::threads : 32), T::warps> gradient(p, coefficients_per_sample(p),
                                                                              memory.vectors.across_warps);
  gradient.begin_row(partial() ? partial() + sums.matrix_size : nullptr);
  if (sums.d_matrix && items.first >= items.count) MatrixGradient<T>::clear_partial(tile, d, partial());

  const bool warm = p.y0 || direction.y0;
  if (items.first < items.count) matrices.fetch_padded(tile, items.first);
#pragma unroll 1
  for (int64_t item = items.first; item < items.count; item += items.step) {
    const int64_t sample = item * T::problems + tile.problem;
    const bool exists = sample < p.B;
    const int64_t scheduled = exists ? sample : p.B - 1, delivered = exists ? sample : -1;
    const auto coefficients = [&](int t) { return schedule.at(p, scheduled, t); };
    const auto tangents = [&](int t) {
      return direction.phi.data ? SampleSchedule<C>(direction, scheduled).at(t) : StepCoefficients<C>{};
    };
    C q[T::rows][T::columns];
    matrices.wait();
    tile.load_whole(padded, q);
    T::sync();
    if (direction.matrix) {
      directions.fetch_padded(tile, item);
      directions.wait();
    }
    {
      C b[T::own_rows], y[T::own_rows], previous[T::own_rows];
      C db[T::own_rows], dy[T::own_rows], d_previous[T::own_rows];
      load_entries(p.b + sample * p.b_stride, tile.row, d, exists, b);
      load_entries(p.y0 + sample * p.y0_stride, tile.row, d, exists && p.y0, y);
      load_entries(direction.b + sample * d, tile.row, d, exists && direction.b, db);
      load_entries(direction.y0 + sample * d, tile.row, d, exists && direction.y0, dy);
#pragma unroll
      for (int i = 0; i < T::own_rows; ++i) previous[i] = y[i], d_previous[i] = dy[i];
      const auto keep = [&](int t) {
        C* const at = ys + t * step + tile.row;
        T::write(y, at);
        T::write(dy, at + dys);
      };
      keep(-1);
      T::write(b, ys - step + of_z + tile.row);
      T::write(db, ys - step + of_dz + tile.row);
      const auto store = [&](int t) { store_entries(dy, tile.row, d, exists, direction.y + (t * p.B + sample) * d); };
      // of the last step only dy_k asks for more than y_{k-1}
      const int steps = direction.y ? k : k - 1;
#pragma unroll 1
      for (int t = 0; t < steps; ++t) {
        keep(t);
        if (direction.y && p.trajectory) store(t);
        const StepCoefficients<C> s = coefficients(t), ds = tangents(t);
        C g[T::own_rows] = {}, dg[T::own_rows] = {};
        if (t > 0 || warm) {
          C z[T::own_rows], dz[T::own_rows], x[T::columns], sum[T::rows] = {};
#pragma unroll
          for (int i = 0; i < T::own_rows; ++i) {
            z[i] = extrapolate(s, momentum, y[i], previous[i]);
            dz[i] = extrapolate_tangent(s, ds, momentum, y[i], previous[i], dy[i], d_previous[i]);
          }
          tile.rows_to_columns(z, buffer, x);
          tile.product(q, x, g);
          if (direction.matrix) {
            const int of_X = opaque(tile.first_whole());
#pragma unroll
            for (int i = 0; i < T::rows; ++i) {
              C row[T::columns];
              T::load_whole_row(padded, of_X, i, row);
              tile.multiply_row(row, x, sum[i]);
            }
          }
          tile.rows_to_columns(dz, buffer + vector, x);
          tile.multiply(q, x, sum);
          tile.sum_over_columns(sum, dg);
        }
#pragma unroll
        for (int i = 0; i < T::own_rows; ++i) {
          g[i] += b[i];
          dg[i] += db[i];
          const C next = advance(s, momentum, y[i], previous[i], g[i]);
          const C d_next = advance_tangent(s, ds, momentum, y[i], previous[i], g[i], dy[i], d_previous[i], dg[i]);
          previous[i] = y[i], d_previous[i] = dy[i];
          y[i] = next, dy[i] = d_next;
        }
      }
      if (direction.y) {
        store(p.trajectory ? k : 0);
      } else {
        keep(k - 1);
      }
    }
    T::sync();

    SecondOrderAdjoint<C> adjoint[T::own_columns];
    C given[T::own_columns];
    load_entries(p.grad_y + ((p.trajectory ? p.k * p.B : 0) + sample) * d, tile.column, d, exists, given);
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) {
      adjoint[j].p.a = 0;
      adjoint[j].a.a = given[j];
    }
#pragma unroll 1
    for (int t = k - 1; t >= 0; --t) {
      C a[T::own_columns], pa[T::own_columns], u[T::own_columns], w[T::own_columns], terms[4] = {};
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) a[j] = adjoint[j].a.a, pa[j] = adjoint[j].p.a;
      {
        C rows[T::rows], sum[T::columns] = {};
        tile.columns_to_rows(a, buffer, rows);
        if (T::warps > 1 && t + 1 < k) gradient.collect(t + 1, delivered);
        tile.transposed_product(q, rows, memory.vectors, w);
        if (direction.matrix) {
          const int of_X = opaque(tile.first_whole());
#pragma unroll
          for (int i = 0; i < T::rows; ++i) {
            C row[T::columns];
            T::load_whole_row(padded, of_X, i, row);
            tile.multiply_transposed_row(row, rows[i], sum);
          }
        }
        // a block synchronises here, which its next product asks for
        tile.columns_to_rows(pa, buffer + vector, rows);
        tile.multiply_transposed(q, rows, sum);
        tile.sum_over_rows(sum, memory.vectors, u);
      }
      const StepCoefficients<C> s = coefficients(t), ds = tangents(t);
      C b[T::own_columns], y[T::own_columns], previous[T::own_columns];
      C db[T::own_columns], dy[T::own_columns], d_previous[T::own_columns];
      C* const at = ys + t * step + tile.column;
      T::read(at, y);
      T::read(at - step, previous);
      T::read(at + dys, dy);
      T::read(at + dys - step, d_previous);
      T::read(ys - step + of_z + tile.column, b);
      T::read(ys - step + of_dz + tile.column, db);
#pragma unroll
      for (int j = 0; j < T::own_columns; ++j) {
        const C z = extrapolate(s, momentum, y[j], previous[j]);
        const C dz = extrapolate_tangent(s, ds, momentum, y[j], previous[j], dy[j], d_previous[j]);
        terms[0] -= pa[j] * b[j] + a[j] * db[j];
        if (t > 0 || warm) terms[0] -= u[j] * z + w[j] * dz;
        adjoint[j].step(s, ds, momentum, u[j], w[j], y[j], previous[j], dy[j], d_previous[j], terms);
        pa[j] = -s.phi * pa[j] - ds.phi * a[j];
        a[j] *= -s.phi;
        y[j] = z, dy[j] = dz;
      }
      T::write(y, at);
      T::write(dy, at + dys);
      T::write(pa, at + of_z);
      T::write(a, at + of_dz);
      // m_0 is zero, and w may overflow
      if (t == 0) terms[2] = 0;
      if (p.trajectory) {
        load_entries(p.grad_y + (t * p.B + sample) * d, tile.column, d, exists, given);
#pragma unroll
        for (int j = 0; j < T::own_columns; ++j) adjoint[j].a.a += given[j];
      }
      gradient.add(t, delivered, terms);
    }
    T::sync();
    if (T::warps > 1) gradient.collect(0, delivered);
    gradient.end_sample(delivered);
    if (item + items.step < items.count) matrices.fetch_padded(tile, item + items.step);

    C of_b[T::own_columns], of_y0[T::own_columns];
#pragma unroll
    for (int j = 0; j < T::own_columns; ++j) {
      of_b[j] = adjoint[j].p.db;
      of_y0[j] = adjoint[j].p.a + adjoint[j].p.carry;
    }
    if (p.db) store_entries(of_b, tile.column, d, exists, p.db + sample * d);
    if (p.dy0) store_entries(of_y0, tile.column, d, exists, p.dy0 + sample * d);
    if (!p.d_matrix) continue;
    MatrixGradient<T> d_matrix;
#pragma unroll 1
    for (int t = 0; t < k; ++t) {
      const C* const at = ys + t * step;
      d_matrix.add(tile, C(1), at + of_z, at);
      d_matrix.add(tile, C(1), at + of_dz, at + dys);
    }
    if (sums.d_matrix) {
      d_matrix.add_to_partial(tile, d, item == items.first, partial());
    } else if (exists) {
      d_matrix.store(tile, d, p.d_matrix + sample * d * d);
    }
  }
  gradient.end_row();
}

}  // namespace

template <typename Storage>
const char* momentum_dense_second_order(const MomentumBackward<Storage>& p, void* workspace, void* stream,
                                        size_t* size) {
  using C = compute_type<Storage>;
  const char* none = "second order has no kernel for this dtype, or for a dense Q as large as this";
  if constexpr (std::is_same_v<Storage, C>) {
    if (p.B == 0 || p.d == 0) return size ? nullptr : clear_sums(p, stream);
    const Device device;
    if (device.error != cudaSuccess) return describe(device.error);
    return with_tile<Storage>(p.d, [&](auto tag) -> const char* {
      constexpr int D = decltype(tag)::value;
      if constexpr (D > 0) {
        using T = Tile<Storage, D, true>;
        return with_momentum(p, [&](auto momentum) -> const char* {
          const auto kernel = momentum_dense_second_order_kernel<Storage, D, momentum>;
          auto plan =
              plan_tiles<T, TileMemory<T, Storage, true>, momentum>(device, kernel, p, 4 * (p.k + 1) * T::problems * D);
          PartialSums<Storage> sums = partial_sums(p);
          sums.rows = sums.any() ? plan.grid * plan.teams : 0;
          Arena arena(workspace);
          sums.partials = arena.take<C>(sums.size());
          plan.trajectories = arena.take<C>(plan.workspace_size());
          if (size) {
            *size = static_cast<size_t>(arena.used());
            return nullptr;
          }
          const char* error = launch(kernel, plan.grid, plan.teams * T::team, plan.shared_bytes(), stream, p,
                                     direction_of(p), plan, sums);
          return error ? error : sum_partials(sums, stream);
        });
      } else {
        return none;
      }
    });
  } else {
    return none;
  }
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage) \
  template const char* momentum_dense_second_order(const MomentumBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
