// A matrix [d, d] of any size in shared or global memory, read by a block for each product; vectors are arrays in shared
// memory (or, if they are too long even for that, in the workspace).
//
// A warp takes 8 rows at a time and 128 of their columns: 4 a lane, so that 32 FMAs go with one 16-byte read of the
// vector, and the matrix is read in whole lines. What a thread of an elementwise pass owns: entries rank, rank + block ...
#pragma once

#include "cuda/launch.cuh"

namespace unrolled_kernels::cuda {

template <typename Storage>
__host__ __device__ constexpr int64_t streamed_matrix_bytes(int64_t d) {
  return round_up(d * d * static_cast<int64_t>(sizeof(Storage)), 16) + 16;
}

template <typename Storage>
struct StreamedMatrix {
  using C = compute_type<Storage>;
  static constexpr int block = 512, warps = block / 32, rows = 8, columns = 4, width = 32 * columns;

  const Storage* m;
  int64_t d;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool packs;  // rows begin at multiples of a pack

  __device__ StreamedMatrix(const Storage* m, int64_t d)
      : m(m), d(d), packs(d % columns == 0 && is_pack_aligned<columns>(m)) {}

  // entries that a vector takes in memory
  static __host__ __device__ int64_t padded(int64_t d) { return round_up(d, rows); }

  __device__ __forceinline__ int64_t column(int64_t first, int j) const {
    return packs ? first + columns * lane + j : first + 32 * j + lane;
  }

  __device__ __forceinline__ void tile(int64_t row, int64_t first, C (&q)[rows][columns]) const {
#pragma unroll
    for (int i = 0; i < rows; ++i) {
      Pack<Storage, columns> pack{};
      const Storage* from = m + (row + i) * d;
      if (packs) {
        if (row + i < d && column(first, 0) < d) pack = load_pack<columns>(from + column(first, 0));
      } else {
#pragma unroll
        for (int j = 0; j < columns; ++j) {
          if (row + i < d && column(first, j) < d) pack.at[j] = from[column(first, j)];
        }
      }
#pragma unroll
      for (int j = 0; j < columns; ++j) q[i][j] = to_compute(pack.at[j]);
    }
  }

  __device__ __forceinline__ void entries(const C* x, int64_t first, C (&v)[columns]) const {
    if (packs) {
      Pack<C, columns> pack{};
      if (column(first, 0) < d) pack = load_pack<columns>(x + column(first, 0));
#pragma unroll
      for (int j = 0; j < columns; ++j) v[j] = pack.at[j];
    } else {
#pragma unroll
      for (int j = 0; j < columns; ++j) v[j] = column(first, j) < d ? x[column(first, j)] : C(0);
    }
  }

  // out = M x
  __device__ void product(const C* x, C* out) const {
    for (int64_t row = warp * rows; row < d; row += warps * rows) {
      C sum[rows] = {};
      for (int64_t first = 0; first < d; first += width) {
        C q[rows][columns], v[columns];
        tile(row, first, q);
        entries(x, first, v);
#pragma unroll
        for (int i = 0; i < rows; ++i) {
#pragma unroll
          for (int j = 0; j < columns; ++j) sum[i] += q[i][j] * v[j];
        }
      }
      reduce_scatter<rows, 32, 1>(sum, lane);
      const int64_t mine = row + scattered_index<rows, 32>(lane);
      if (holds_first_copy<rows, 32>(lane) && mine < d) out[mine] = sum[0];
    }
  }

  // partials [warps, padded]: the sum over warps is M'a
  __device__ void transposed_product(const C* a, C* partials) const {
    C* mine = partials + warp * padded(d);
    for (int64_t first = 0; first < d; first += width) {
      C sum[columns] = {};
      for (int64_t row = warp * rows; row < d; row += warps * rows) {
        C q[rows][columns];
        tile(row, first, q);
#pragma unroll
        for (int i = 0; i < rows; ++i) {
          const C factor = row + i < d ? a[row + i] : C(0);
#pragma unroll
          for (int j = 0; j < columns; ++j) sum[j] += q[i][j] * factor;
        }
      }
#pragma unroll
      for (int j = 0; j < columns; ++j) {
        if (column(first, j) < d) mine[column(first, j)] = sum[j];
      }
    }
  }
  __device__ __forceinline__ C sum_of_partials(const C* partials, int64_t entry) const {
    C sum = partials[entry];
#pragma unroll
    for (int i = 1; i < warps; ++i) sum += partials[i * padded(d) + entry];
    return sum;
  }

  // out [d, d] = sum over t of left_t right_t', plus what is there if `accumulate`; left, right [count, padded]
  template <typename Out>
  __device__ void outer_products(const C* left, const C* right, int64_t count, bool accumulate, Out* out) const {
    for (int64_t row = warp * rows; row < d; row += warps * rows) {
      for (int64_t first = 0; first < d; first += width) {
        C sum[rows][columns] = {};
        for (int64_t t = 0; t < count; ++t) {
          C v[columns];
          entries(right + t * padded(d), first, v);
#pragma unroll
          for (int i = 0; i < rows; ++i) {
            const C factor = row + i < d ? left[t * padded(d) + row + i] : C(0);
#pragma unroll
            for (int j = 0; j < columns; ++j) sum[i][j] += factor * v[j];
          }
        }
#pragma unroll
        for (int i = 0; i < rows; ++i) {
#pragma unroll
          for (int j = 0; j < columns; ++j) {
            if (row + i >= d || column(first, j) >= d) continue;
            Out* p = out + (row + i) * d + column(first, j);
            *p = to_storage<Out>(accumulate ? to_compute(*p) + sum[i][j] : sum[i][j]);
          }
        }
      }
    }
  }
};

// The matrix of a sample, copied to shared memory where the plan says so. Synchronises the block.
template <typename Storage>
__device__ const Storage* streamed_matrix(const MomentumInputs<Storage>& p, const StreamedPlan& plan, Arena& shared,
                                          int64_t sample) {
  const Storage* matrix = p.matrix + sample * p.matrix_stride;
  __syncthreads();
  if (!plan.matrix_on_chip) return matrix;
  unsigned char* buffer = shared.take<unsigned char>(streamed_matrix_bytes<Storage>(p.d));
  matrix = copy_to_shared<StreamedMatrix<Storage>::block>(matrix, static_cast<int>(p.d * p.d), buffer, threadIdx.x);
  wait_for_copies();
  __syncthreads();
  return matrix;
}

}  // namespace unrolled_kernels::cuda
