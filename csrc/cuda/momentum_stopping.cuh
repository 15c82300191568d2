// Samples that stop by themselves (Stopping of momentum.h), as all threads of a sample know it.
#pragma once

#include "cuda/schedule.cuh"

namespace unrolled_kernels::cuda {

// How many samples are at work in a warp may differ from one step to the next: whether any lane's still moves.
__device__ __forceinline__ bool any_lane(bool moves) { return __any_sync(all_lanes, moves) != 0; }

// Maxima, which are the same in whatever order they are taken.
template <typename C>
class StepSize {
 public:
  __device__ __forceinline__ void add(C y, C previous) {
    const C moved = y - previous;
    take(moved < 0 ? -moved : moved, y < 0 ? -y : y);
  }
  // over `threads` neighbours, the warps of a sample if these are more than one. across_warps: shared [2, warps, 2], of
  // which successive calls take halves in turn
  template <int threads>
  __device__ __forceinline__ void over_threads(C* across_warps, int64_t half) {
#pragma unroll
    for (int mask = 1; mask < (threads < 32 ? threads : 32); mask *= 2) {
      take(__shfl_xor_sync(all_lanes, change_, mask), __shfl_xor_sync(all_lanes, large_, mask));
    }
    if constexpr (threads > 32) {
      C* const of_warps = across_warps + half % 2 * (threads / 32 * 2);
      if (threadIdx.x % 32 == 0) {
        of_warps[threadIdx.x / 32 * 2] = change_;
        of_warps[threadIdx.x / 32 * 2 + 1] = large_;
      }
      __syncthreads();
      for (int warp = 0; warp < threads / 32; ++warp) take(of_warps[2 * warp], of_warps[2 * warp + 1]);
    }
  }

  // over the blocks of a sample, each of which has it over its threads. sizes: shared [2, blocks, 2], like across_warps
  __device__ __forceinline__ void over_blocks(const Cluster& cluster, C* sizes, int64_t half) {
    if (cluster.blocks == 1) return;
    C* const of_blocks = sizes + half % 2 * (cluster.blocks * 2);
    if (static_cast<int>(threadIdx.x) < cluster.blocks) {
      C* const there = cluster.of_block(of_blocks, threadIdx.x);
      there[cluster.rank() * 2] = change_;
      there[cluster.rank() * 2 + 1] = large_;
    }
    cluster.sync();
    for (int block = 0; block < cluster.blocks; ++block) take(of_blocks[2 * block], of_blocks[2 * block + 1]);
  }

  // max |y_{t+1} - y_t|
  __device__ __forceinline__ C change() const { return change_; }
  __device__ __forceinline__ bool is_small(C tolerance) const { return change_ <= tolerance * large_; }

 private:
  // a NaN stays one, and is no small change
  __device__ __forceinline__ void take(C change, C magnitude) {
    change_ = change > change_ || change != change ? change : change_;
    large_ = magnitude > large_ ? magnitude : large_;
  }

  C change_ = 0, large_ = 1;  // the latter max(1, max |y_{t+1}|)
};

// What a sample's first thread leaves of it where it stops, after step t.
template <typename C>
__device__ __forceinline__ void store_stop(const Stopping<C>& stopping, int64_t sample, int64_t t, C change) {
  stopping.taken[sample] = t + 1;
  stopping.residual[sample] = change;
}

// A problem of a team, tile.cuh, that moves until it stops.
template <typename T>
class MovingProblem {
  using C = typename T::C;

 public:
  __device__ __forceinline__ explicit MovingProblem(bool exists) : moves_(exists) {}

  // After step t of k, which led the rows that a thread owns from one place to another: store() where the problem stops.
  // Returns whether any of the team's problems goes on.
  template <typename Store>
  __device__ __forceinline__ bool after(const T& tile, const typename T::Memory& memory, const Stopping<C>& stopping,
                                        const C (&from)[T::own_rows], const C (&to)[T::own_rows], int64_t sample, int t,
                                        int k, Store store) {
    StepSize<C> size;
#pragma unroll
    for (int i = 0; i < T::own_rows; ++i) size.add(to[i], from[i]);
    size.template over_threads<T::threads>(memory.across_warps, t);
    if (moves_ && (t + 1 == k || size.is_small(stopping.tolerance))) {
      store();
      if (tile.rank % T::threads == 0) store_stop(stopping, sample, t, size.change());
      moves_ = false;
    }
    return T::warps == 1 ? any_lane(moves_) : moves_;
  }

 private:
  bool moves_;
};

// a copy for a kernel; without `taken` where no sample stops
template <typename Storage>
Stopping<compute_type<Storage>> stopping_of(const MomentumInputs<Storage>& p) {
  return p.stopping ? *p.stopping : Stopping<compute_type<Storage>>{};
}

}  // namespace unrolled_kernels::cuda
