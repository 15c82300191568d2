// Products of the RNN cell for a tile of the batch, which a block works on.
//
// A vector of every sample of the tile is an array [n, stride], samples side by side. A thread computes `outputs` entries
// of a product for `width` samples: for each entry of the input it reads `outputs` weights and one 16-byte vector
// (float32), and does outputs x width FMAs. With 128 samples a warp is one group of entries for all of them: its lanes
// read the same weights, four at a time. Fewer samples have more threads a sample, which are done sooner where there are
// too few of them to fill the device.
#pragma once

#include "cuda/platform.cuh"
#include "rnn.h"

namespace unrolled_kernels::cuda {

// One of the weights, W1, W2, W^2 ... W^L, V, [rows, columns], and the vectors that it takes and gives.
struct RnnLayer {
  int rows, columns;
  int64_t offset;      // of its first element among the weights of the contract
  int64_t on_chip[2];  // and in shared memory, as a product reads it: of W and, in backward, of W'
  int input, output;   // first entry among the block's vectors
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
  // shares of the samples that have sums of gradients of their own, so that enough threads add to them
  static constexpr int strands = samples > 32 ? samples / 32 : 1;
  // an odd number of 16-byte vectors (float32), so that eight lanes that read eight entries meet in no bank
  static constexpr int stride = samples + width;

  // Where a product reads an element of a matrix in shared memory: the rows that a thread takes lie together, a pack of
  // each by turns, so that one address serves all of them. Groups of rows are an odd number of packs apart likewise.
  static __host__ __device__ int packs(int columns) { return static_cast<int>(ceil_div(columns, width)) | 1; }
  static __host__ __device__ int64_t matrix_size(int rows, int columns) {
    return ceil_div(rows, outputs) * packs(columns) * outputs * width;
  }
  static __device__ int matrix_index(int columns, int i, int j) {
    return ((i / outputs * packs(columns) + j / width) * outputs + i % outputs) * width + j % width;
  }
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

  // sums += M x, of one matrix for all samples, as matrix_index has it
  __device__ __forceinline__ void multiply(const C* m, int columns, const C* x, int first,
                                           C (&sums)[outputs][width]) const {
    m += first * packs(columns) * width;
    x += sample;
    const auto add = [&](int count) {
      Pack<C, width> weights[outputs];
#pragma unroll
      for (int r = 0; r < outputs; ++r) weights[r] = load_pack<width>(m + r * width);
#pragma unroll
      for (int j = 0; j < width; ++j) {
        if (j >= count) break;
        const Pack<C, width> v = load_pack<width>(x + j * stride);
#pragma unroll
        for (int r = 0; r < outputs; ++r) {
#pragma unroll
          for (int p = 0; p < width; ++p) sums[r][p] += weights[r].at[j] * v.at[p];
        }
      }
      m += outputs * width;
      x += width * stride;
    };
#pragma unroll 1
    for (int left = columns / width; left > 0; --left) add(width);
    if (columns % width) add(columns % width);
  }

  // the same of M, or M', in rows that follow each other in global memory
  template <bool transposed>
  __device__ __forceinline__ void multiply_global(const C* m, int rows, int columns, const C* x, int first,
                                                  C (&sums)[outputs][width]) const {
    const int n = transposed ? columns : rows, inner = transposed ? rows : columns;
    const int step = transposed ? columns : 1;
    const C* from[outputs];
#pragma unroll
    for (int r = 0; r < outputs; ++r) {
      from[r] = m + (first + r < n ? first + r : n - 1) * (transposed ? 1 : columns);
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

  // gradient [rows, columns] += the sum over a strand's samples of a x', for each strand, which are strand_size apart;
  // the same thread adds to an element at every call
  __device__ __forceinline__ void add_outer_products(const C* a, const C* x, int rows, int columns, C* gradient,
                                                     int64_t strand_size) const {
    // entries of one thread lie apart, so that lanes read and write adjacent ones
    const int row_lanes = static_cast<int>(ceil_div(rows, outputs));
    const int column_lanes = static_cast<int>(ceil_div(columns, width));
    const int lanes = row_lanes * column_lanes;
#pragma unroll 1
    for (int n = threadIdx.x; n < lanes * strands; n += blockDim.x) {
      const int strand = strands > 1 ? n / lanes : 0, lane = n - strand * lanes;
      const int row = lane / column_lanes, column = lane % column_lanes;
      C sums[outputs][width] = {};
#pragma unroll 2
      for (int s = strand * width; s < samples; s += strands * width) {
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
          if (i < rows && j < columns) gradient[strand * strand_size + i * columns + j] += sums[r][c];
        }
      }
    }
  }
};

}  // namespace unrolled_kernels::cuda
