// What the CUDA kernels need of the platform: conversions of the storage types, 16-byte vectors, asynchronous copies.
// Under UNROLLED_KERNELS_CUDA_ON_CPU, a test-only header executes the same sources on the CPU.
#pragma once

#ifdef UNROLLED_KERNELS_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/types.h"

namespace unrolled_kernels::cuda {

constexpr unsigned all_lanes = 0xffffffffu;

__host__ __device__ constexpr int log2_of(int n) { return n < 2 ? 0 : 1 + log2_of(n / 2); }
// elements of the widest pack that divides a vector of n
__host__ __device__ constexpr int pack_of(int n) { return n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1; }

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
__host__ __device__ constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }
__device__ __forceinline__ float to_compute(half x) {
  __half_raw raw;
  raw.x = x.bits;
  return __half2float(__half(raw));
}
__device__ __forceinline__ float to_compute(bfloat16 x) {
  __nv_bfloat16_raw raw;
  raw.x = x.bits;
  return __bfloat162float(__nv_bfloat16(raw));
}

template <typename Storage>
__device__ __forceinline__ Storage to_storage(compute_type<Storage> x) {
  return x;
}
template <>
__device__ __forceinline__ half to_storage<half>(float x) {
  return {static_cast<__half_raw>(__float2half_rn(x)).x};
}
template <>
__device__ __forceinline__ bfloat16 to_storage<bfloat16>(float x) {
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(x)).x};
}

// x, of which the compiler then knows nothing: what a loop makes of it is not kept in registers from turn to turn.
__device__ __forceinline__ int opaque(int x) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(x));
#endif
  return x;
}

#ifdef UNROLLED_KERNELS_CUDA_ON_CPU
__device__ inline unsigned char* dynamic_shared_memory() { return cuda_on_cpu::dynamic_shared_memory(); }
__device__ inline void copy_async_16(void* shared, const void* global) { cuda_on_cpu::copy_async(shared, global, 16); }
__device__ inline void wait_for_copies() { cuda_on_cpu::wait_for_copies(); }
__device__ inline void stream_16(uint4* to, const uint4& bits) { *to = bits; }
__device__ inline int cluster_rank() { return cuda_on_cpu::cluster_rank(); }
__device__ inline void cluster_barrier() { cuda_on_cpu::cluster_barrier(); }
__device__ inline void* shared_of_block(void* mine, int rank) { return cuda_on_cpu::shared_of_block(mine, rank); }
#else
__device__ __forceinline__ unsigned char* dynamic_shared_memory() {
  extern __shared__ __align__(16) unsigned char dynamic[];
  return dynamic;
}
// 16 bytes from global to shared memory, both aligned; past L1, since nobody else reads them
__device__ __forceinline__ void copy_async_16(void* shared, const void* global) {
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
// waits for the calling thread's copies only: a barrier has to follow
__device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_all;" ::: "memory"); }
__device__ __forceinline__ void stream_16(uint4* to, const uint4& bits) { __stcs(to, bits); }
// Of clusters, which there are from sm_90 on; before, no launch has more than one block in one.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// also orders what its threads wrote, to shared and to global memory
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// where `mine`, in the calling block's shared memory, is in that of another block of the cluster
__device__ __forceinline__ void* shared_of_block(void* mine, int rank) {
  void* other;
  asm("mapa.u64 %0, %1, %2;" : "=l"(other) : "l"(mine), "r"(rank));
  return other;
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_barrier() { __syncthreads(); }
__device__ __forceinline__ void* shared_of_block(void* mine, int) { return mine; }
#endif
#endif

// The blocks that work on a problem together: one, or a cluster of them, which write to each other's shared memory.
class Cluster {
 public:
  const int blocks;

  __device__ __forceinline__ explicit Cluster(int blocks) : blocks(blocks) {}
  __device__ __forceinline__ int rank() const { return blocks == 1 ? 0 : cluster_rank(); }
  __device__ __forceinline__ void sync() const {
    if (blocks == 1) {
      __syncthreads();
    } else {
      cluster_barrier();
    }
  }
  // `mine`, in shared memory, as the block of that rank has it
  template <typename T>
  __device__ __forceinline__ T* of_block(T* mine, int rank) const {
    return blocks == 1 ? mine : static_cast<T*>(shared_of_block(mine, rank));
  }
};

// n consecutive elements, moved in as few accesses as 16-byte ones allow.
template <typename T, int n>
struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Pack {
  T at[n];
};

template <int n, typename T>
__device__ __forceinline__ bool is_pack_aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % alignof(Pack<T, n>) == 0;
}
template <int n, typename T>
__device__ __forceinline__ Pack<T, n> load_pack(const T* p) {
  return *reinterpret_cast<const Pack<T, n>*>(p);
}
template <int n, typename T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, n>& v) {
  // as one vector: the compiler makes several stores of a struct's elements at times
  if constexpr (sizeof(Pack<T, n>) == 8) {
    uint2 bits;
    memcpy(&bits, &v, 8);
    *reinterpret_cast<uint2*>(p) = bits;
  } else if constexpr (sizeof(Pack<T, n>) == 16) {
    uint4 bits;
    memcpy(&bits, &v, 16);
    *reinterpret_cast<uint4*>(p) = bits;
  } else {
    *reinterpret_cast<Pack<T, n>*>(p) = v;
  }
}
// To global memory, in 16-byte stores even where the compiler would make four of one; for what is not read again soon.
template <int n, typename T>
__device__ __forceinline__ void stream_pack(T* p, const Pack<T, n>& v) {
  if constexpr (sizeof(Pack<T, n>) % 16 == 0) {
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof(Pack<T, n>) / 16); ++i) {
      uint4 bits;
      memcpy(&bits, reinterpret_cast<const unsigned char*>(&v) + 16 * i, 16);
      stream_16(reinterpret_cast<uint4*>(p) + i, bits);
    }
  } else {
    store_pack<n>(p, v);
  }
}

// Bytes between p and the last multiple of 16 before it.
__device__ __forceinline__ int misalignment(const void* p) {
  return static_cast<int>(reinterpret_cast<uintptr_t>(p) % 16);
}

// Which of n elements from p on 16-byte accesses reach: those in [first, last).
struct AlignedRange {
  int first, last;
  template <typename T>
  __device__ __forceinline__ AlignedRange(const T* p, int n) {
    constexpr int pack = 16 / sizeof(T);
    first = (16 - misalignment(p)) % 16 / static_cast<int>(sizeof(T));
    first = first < n ? first : n;
    last = first + (n - first) / pack * pack;
  }
};

// `threads` threads start to copy n elements into shared memory that has room for 16 bytes more. They will lie at the
// returned address, which is as far from a multiple of 16 as the source is.
template <int threads, typename T>
__device__ __forceinline__ T* copy_to_shared(const T* from, int n, unsigned char* shared, int rank) {
  constexpr int pack = 16 / sizeof(T);
  T* to = reinterpret_cast<T*>(shared + misalignment(from));
  const AlignedRange range(from, n);
  for (int i = range.first + pack * rank; i < range.last; i += pack * threads) copy_async_16(to + i, from + i);
#pragma unroll 1
  for (int i = rank; i < range.first + n - range.last; i += threads) {
    const int edge = i < range.first ? i : i - range.first + range.last;
    to[edge] = from[edge];
  }
  return to;
}

// The way back; `shared` holds n elements and is as far from a multiple of 16 as the target is.
template <int threads, typename T>
__device__ __forceinline__ void copy_from_shared(const T* shared, int n, T* to, int rank) {
  constexpr int pack = 16 / sizeof(T);
  const AlignedRange range(to, n);
  for (int i = range.first + pack * rank; i < range.last; i += pack * threads) {
    store_pack<pack>(to + i, load_pack<pack>(shared + i));
  }
#pragma unroll 1
  for (int i = rank; i < range.first + n - range.last; i += threads) {
    const int edge = i < range.first ? i : i - range.first + range.last;
    to[edge] = shared[edge];
  }
}

// Sum over `width` threads, `stride` lanes apart, of n values each, left scattered: thread `position` of them ends with
// held = max(1, n / width) sums at v[0] ..., the first of index scattered_index<n, width>(position). n, width: powers of
// two. Where width > n, neighbours hold copies. Takes n - n/width + max(0, log2(width / n)) shuffles.
//
// free: of the first halvings, those for which each thread has what it keeps in the lower half already, so that nothing
// is selected. Value i is then at v[i ^ (position * n / width)], as far as the bits of these halvings go.
template <int n, int width, int stride, int free = 0, typename C>
__device__ __forceinline__ void reduce_scatter(C (&v)[n], int position) {
  if constexpr (width > 1) {
    constexpr int half_width = width / 2;
    if constexpr (n > 1) {
      const bool upper = free == 0 && (position & half_width);
      C kept[n / 2];
#pragma unroll
      for (int i = 0; i < n / 2; ++i) {
        const C sent = upper ? v[i] : v[i + n / 2];
        const C mine = upper ? v[i + n / 2] : v[i];
        kept[i] = mine + __shfl_xor_sync(all_lanes, sent, half_width * stride);
      }
      reduce_scatter<n / 2, half_width, stride, (free > 0 ? free - 1 : 0)>(kept, position);
#pragma unroll
      for (int i = 0; i < (n > width ? n / width : 1); ++i) v[i] = kept[i];
    } else {
      v[0] += __shfl_xor_sync(all_lanes, v[0], half_width * stride);
      reduce_scatter<1, half_width, stride>(v, position);
    }
  }
}
template <int n, int width>
__device__ __forceinline__ int scattered_index(int position) {
  if constexpr (n >= width) {
    return position * (n / width);
  } else {
    return position / (width / n);
  }
}
// True for one thread of those that hold copies of the same sum.
template <int n, int width>
__device__ __forceinline__ bool holds_first_copy(int position) {
  if constexpr (n >= width) {
    return true;
  } else {
    return position % (width / n) == 0;
  }
}

// Hands out consecutive pieces of a block's shared memory, or of a workspace; without a base it only counts bytes.
class Arena {
 public:
  __host__ __device__ explicit Arena(void* base) : base_(static_cast<unsigned char*>(base)) {}
  template <typename T>
  __host__ __device__ T* take(int64_t elements) {
    unsigned char* p = base_ ? base_ + used_ : nullptr;
    used_ += round_up(elements * static_cast<int64_t>(sizeof(T)), 16);
    return reinterpret_cast<T*>(p);
  }
  __host__ __device__ int64_t used() const { return used_; }

 private:
  unsigned char* base_;
  int64_t used_ = 0;
};

}  // namespace unrolled_kernels::cuda
