// The sum over the rows of a matrix, in an order that depends on the number of rows alone.
#pragma once

#include "cuda/platform.cuh"

namespace unrolled_kernels::cuda {

// How a block is divided: `columns` columns, and for each `strands` threads that share its rows.
struct ColumnSums {
  int columns = 1, strands = 1;

  __host__ __device__ ColumnSums(int64_t rows, int64_t row_size) {
    while (columns < 32 && columns < row_size) columns *= 2;
    while (strands * columns < 1024 && strands * 4 < rows) strands *= 2;
  }
  __host__ __device__ int threads() const { return strands * columns; }
  __host__ __device__ int64_t shared_bytes() const { return threads() * static_cast<int64_t>(sizeof(double)); }
  __host__ __device__ int64_t blocks(int64_t row_size) const { return ceil_div(row_size, columns); }

  // The sum of column n = block * columns + threadIdx.x % columns of m [rows, row_size]; true for the one thread that has
  // it. Strand s adds up the rows s, s + strands, ..., then the strands are added pairwise.
  template <typename C>
  __device__ __forceinline__ bool sum(const C* m, int64_t rows, int64_t row_size, int64_t block, int64_t& n,
                                      double& sum) const {
    double* sums = reinterpret_cast<double*>(dynamic_shared_memory());
    const int strand = threadIdx.x / columns;
    n = block * columns + threadIdx.x % columns;
    sum = 0;
    if (n < row_size) {
      for (int64_t row = strand; row < rows; row += strands) sum += m[row * row_size + n];
    }
    sums[threadIdx.x] = sum;
    for (int half_strands = strands / 2; half_strands > 0; half_strands /= 2) {
      __syncthreads();
      if (strand < half_strands) sums[threadIdx.x] += sums[threadIdx.x + half_strands * columns];
    }
    sum = sums[threadIdx.x];
    return strand == 0 && n < row_size;
  }
};

}  // namespace unrolled_kernels::cuda
