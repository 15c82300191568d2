// Products of the RNN cell for a tile of the batch, which a block works on.
//
// A vector of every sample of the tile is an array [n, stride], samples side by side. A thread computes `outputs` entries
// of a product for `width` samples: for each entry of the input it reads `outputs` weights and one 16-byte vector
// (float32), and does outputs x width FMAs. Shared memory delivers 32 words a clock to 128 FMA units: a tile of 4 x 4, 2
// FMAs a word, is bound to half of their rate; one of 1 x 4, 0.8 a word, to a fifth, but it has four times the threads
// and is done sooner where there are too few samples to fill the device.
#pragma once

#include "cuda/platform.cuh"
#include "rnn.h"

namespace unrolled_kernels::cuda {

// One of the weights, W1, W2, W^2 ... W^L, V, [rows, columns], and the vectors that it takes and gives.
struct RnnLayer {
  int rows, columns, stride;  // elements between rows
  int64_t offset;             // of its first element in the weights that the kernel reads
  int64_t packed;             // and in those of the contract
  int input, output;          // first entry among the block's vectors
};

// on_chip: vectors, matrices and the gradient of the weights are in shared memory, which the compiler then knows.
template <typename Storage_, int samples_, int outputs_, bool on_chip_>
struct RnnTile {
  using Storage = Storage_;
  using C = compute_type<Storage>;
  static constexpr int samples = samples_, outputs = outputs_, width = 4, max_threads = 256;
  // blocks of max_threads on a multiprocessor at least: left alone, the compiler saves registers where it need not, and
  // spills
  static constexpr int blocks = sizeof(C) == 4 ? 2 : 1, backward_blocks = outputs == 1 ? blocks : 1;
  static constexpr bool on_chip = on_chip_;
  static constexpr int sample_lanes = samples / width;
  // an odd number of 16-byte vectors (float32), so that eight lanes that read eight entries meet in no bank
  static constexpr int stride = samples + width;

  // elements that the matrices [d, d] of a tile take, as read by multiply_own
  static __host__ __device__ int64_t own_matrix_stride(int64_t d) { return width * (d * d | 1); }
  static __host__ __device__ int64_t own_matrix_index(int64_t d, int sample, int64_t element) {
    return sample / width * own_matrix_stride(d) + element * width + sample % width;
  }

  const int sample = threadIdx.x % sample_lanes * width;
  const int output_lane = threadIdx.x / sample_lanes, output_lanes = blockDim.x / sample_lanes;

  // f(first, sums) for each of the thread's groups of the n entries of a product
  template <typename F>
  __device__ __forceinline__ void for_outputs(int n, F f) const {
#pragma unroll 1
    for (int first = output_lane * outputs; first < n; first += output_lanes * outputs) {
      C sums[outputs][width] = {};
      f(first, sums);
    }
  }

  // to = f(sums, entry, sample), of a vector of n entries
  template <typename F>
  __device__ __forceinline__ void store(const C (&sums)[outputs][width], int first, int n, C* to, F f) const {
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      if (first + r >= n) break;
      Pack<C, width> pack;
#pragma unroll
      for (int p = 0; p < width; ++p) pack.at[p] = f(sums[r][p], first + r, sample + p);
      store_pack<width>(to + (first + r) * stride + sample, pack);
    }
  }

  // sums += M x, or M'x, of one matrix for all samples
  template <bool transposed>
  __device__ __forceinline__ void multiply(const C* m, int rows, int columns, int row_stride, const C* x, int first,
                                           C (&sums)[outputs][width]) const {
    const int n = transposed ? columns : rows, inner = transposed ? rows : columns;
    const int step = transposed ? row_stride : 1;
    const C* from[outputs];
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      const int entry = first + r < n ? first + r : n - 1;
      from[r] = m + entry * (transposed ? 1 : row_stride);
    }
    x += sample;
#pragma unroll 4
    for (int i = 0; i < inner; ++i) {
      const Pack<C, width> v = load_pack<width>(x + i * stride);
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        const C weight = from[r][i * step];
#pragma unroll
        for (int p = 0; p < width; ++p) sums[r][p] += weight * v.at[p];
      }
    }
  }

  // sums += Q x, or Q'x, of a matrix for each sample
  template <bool transposed>
  __device__ __forceinline__ void multiply_own(const C* matrices, int d, const C* x, int first,
                                               C (&sums)[outputs][width]) const {
    const C* from[outputs];
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      const int entry = first + r < d ? first + r : d - 1;
      from[r] = matrices + own_matrix_index(d, sample, entry * (transposed ? 1 : d));
    }
    x += sample;
#pragma unroll 4
    for (int j = 0; j < d; ++j) {
      const Pack<C, width> v = load_pack<width>(x + j * stride);
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
        const Pack<C, width> q = load_pack<width>(from[r] + j * (transposed ? width * d : width));
#pragma unroll
        for (int p = 0; p < width; ++p) sums[r][p] += q.at[p] * v.at[p];
      }
    }
  }

  // gradient [rows, columns] += the sum over the samples of a x'; the same thread adds to an element at every call
  __device__ __forceinline__ void add_outer_products(const C* a, const C* x, int rows, int columns, C* gradient) const {
    // entries of one thread lie apart, so that lanes read and write adjacent ones
    const int row_lanes = static_cast<int>(ceil_div(rows, outputs));
    const int column_lanes = static_cast<int>(ceil_div(columns, width));
#pragma unroll 1
    for (int n = threadIdx.x; n < row_lanes * column_lanes; n += blockDim.x) {
      const int row = n / column_lanes, column = n % column_lanes;
      C sums[outputs][width] = {};
#pragma unroll 2
      for (int s = 0; s < samples; s += width) {
        Pack<C, width> left[outputs], right[width];
#pragma unroll
        for (int r = 0; r < outputs; ++r) {
          const int i = row + r * row_lanes;
          left[r] = load_pack<width>(a + (i < rows ? i : rows - 1) * stride + s);
        }
#pragma unroll
        for (int c = 0; c < width; ++c) {
          const int j = column + c * column_lanes;
          right[c] = load_pack<width>(x + (j < columns ? j : columns - 1) * stride + s);
        }
#pragma unroll
        for (int r = 0; r < outputs; ++r) {
#pragma unroll
          for (int c = 0; c < width; ++c) {
#pragma unroll
            for (int p = 0; p < width; ++p) sums[r][c] += left[r].at[p] * right[c].at[p];
          }
        }
      }
#pragma unroll
      for (int r = 0; r < outputs; ++r) {
#pragma unroll
        for (int c = 0; c < width; ++c) {
          const int i = row + r * row_lanes, j = column + c * column_lanes;
          if (i < rows && j < columns) gradient[i * columns + j] += sums[r][c];
        }
      }
    }
  }
};

}  // namespace unrolled_kernels::cuda
