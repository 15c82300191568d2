// What the emulation has to find: one small kernel with every ingredient that the real ones use, and a place for each bug.
// BUG: the number of the bug to plant, 0 for none. Exits with 0 if the result is right.
#include <cstdio>
#include <cstdlib>

#include "cuda/platform.cuh"

#ifndef BUG
#define BUG 0
#endif

using namespace unrolled_kernels::cuda;

constexpr int threads = 64, d = 32;

// out[b] = sum over i, j of Q[b, i, j] y[b, j], a warp for each sample, a block for two; d_total: its sum over the batch
__global__ void sums_kernel(const float* Q, const float* y, float* out, float* total, int B) {
  float* shared = reinterpret_cast<float*>(dynamic_shared_memory());  // [2, d] of y, of row sums, then [2, 2, d]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int sample = blockIdx.x * 2 + warp;
  const bool exists = sample < B;
#if BUG == 1  // a lane beyond the batch leaves before the barrier
  if (!exists) return;
#endif
#if BUG == 2  // reads beyond the batch
  const int source = sample;
#else
  const int source = exists ? sample : B - 1;
#endif
#if BUG == 3  // 16-byte copy from an address that is not a multiple of it
  const int shift = 1;
#else
  const int shift = 0;
#endif
  float* row = shared + warp * d;
  if (lane < d / 4) copy_async_16(row + 4 * lane, y + source * d + 4 * lane + (lane == 0 ? shift : 0));
#if BUG != 4  // the copies are never waited for
  wait_for_copies();
#endif
#if BUG != 5  // nor made visible to the other lanes
  __syncwarp();
#endif
  float sum = 0;
  for (int j = 0; j < d; ++j) sum += Q[(source * d + lane) * d + j] * row[j];
#if BUG == 6  // shared memory beyond what the launch asked for
  float* sums = shared + 7 * d + warp * d + 1;
#else
  float* sums = shared + 2 * d + warp * d;
#endif
#if BUG == 7  // part of it is never written
  if (lane % 7) sums[lane] = sum;
#else
  sums[lane] = sum;
#endif
#if BUG == 8  // only one warp reaches the barrier
  if (warp == 0) __syncthreads();
#elif BUG != 9  // no barrier between the warps
  __syncthreads();
#endif
  float other = shared[2 * d + (1 - warp) * d + lane];
#if BUG == 10  // shuffles that only some lanes take part in
  if (lane < 20) sum += __shfl_xor_sync(all_lanes, sum, 16);
#else
  sum += __shfl_xor_sync(all_lanes, sum, 16);
#endif
  other += __shfl_xor_sync(all_lanes, other, 16);
  for (int mask = 8; mask > 0; mask /= 2) {
#if BUG == 11  // lanes disagree about the operation
    if (lane < 16) {
      sum += __shfl_xor_sync(all_lanes, sum, mask);
    } else {
      sum += __shfl_xor_sync(all_lanes, sum, mask);
    }
#else
    sum += __shfl_xor_sync(all_lanes, sum, mask);
#endif
    other += __shfl_xor_sync(all_lanes, other, mask);
  }
  float passed = static_cast<float>(lane);
  for (int turn = 0; turn < 2; ++turn) {
#if BUG == 13  // an exchange goes through the buffer of the last one, with one barrier for each
    float* buffer = shared + 4 * d + warp * d;
#else
    float* buffer = shared + 4 * d + (turn * 2 + warp) * d;
#endif
    buffer[lane] = passed;
    __syncwarp();
    passed = buffer[(lane + 1) % 32];
  }
  if (passed != static_cast<float>((lane + 2) % 32)) sum = -1;
  // two sums of 1 + i over two lanes, of which the lane of position p keeps the p-th
  const int position = lane % 2;
#if BUG == 14  // values in their natural order where a halving takes them as exchanged
  float parts[2] = {1, 2};
#else
  float parts[2] = {1.0f + position, 2.0f - position};
#endif
  reduce_scatter<2, 2, 1, 1>(parts, position);
  if (parts[0] != 2.0f * (1 + position)) sum = -1;
  if (lane == 0 && exists) out[sample] = sum;
#if BUG == 12  // both warps add to one place
  if (lane == 0 && exists) total[blockIdx.x] += sum;
#else
  if (threadIdx.x == 0) total[blockIdx.x] += sum + (sample + 1 < B ? other : 0);
#endif
}

int main() {
  const int B = 5, blocks = 3;
  // of the exact size, for the address sanitizer
  float* Q = static_cast<float*>(aligned_alloc(16, sizeof(float) * B * d * d));
  float* y = static_cast<float*>(aligned_alloc(16, sizeof(float) * B * d));
  float *out = new float[B](), *total = new float[blocks]();
  for (int i = 0; i < B * d * d; ++i) Q[i] = static_cast<float>(i % 7 - 3);
  for (int i = 0; i < B * d; ++i) y[i] = static_cast<float>(i % 5 - 2);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 8 * d * sizeof(float);
  const cudaError_t error = cudaLaunchKernelEx(&config, sums_kernel, Q, y, out, total, B);
  if (error != cudaSuccess) {
    printf("%s\n", cudaGetErrorString(error));
    return 2;
  }
  // small integers: exact in any order
  float expected_totals[blocks] = {};
  for (int b = 0; b < B; ++b) {
    float expected = 0;
    for (int i = 0; i < d; ++i) {
      for (int j = 0; j < d; ++j) expected += Q[(b * d + i) * d + j] * y[b * d + j];
    }
    expected_totals[b / 2] += expected;
    if (!(out[b] == expected)) return printf("sample %d: %g, expected %g\n", b, out[b], expected), 3;
  }
  for (int n = 0; n < blocks; ++n) {
    if (!(total[n] == expected_totals[n]))
      return printf("block %d: %g, expected %g\n", n, total[n], expected_totals[n]), 3;
  }
  free(Q);
  free(y);
  delete[] out;
  delete[] total;
  return 0;
}
