// The scratch of a chunk of work, and how many chunks a problem is cut into.
#pragma once

#include "cpu/simd/simd.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// Hands out consecutive pieces of a chunk's scratch; without a base it only counts them, for the plan.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<char*>(base)) {}
  template <typename C>
  C* take(int64_t elements) {
    char* p = base_ ? base_ + used_ : nullptr;
    used_ += ceil_div(elements * static_cast<int64_t>(sizeof(C)), 64) * 64;
    return reinterpret_cast<C*>(p);
  }
  size_t used() const { return static_cast<size_t>(used_); }

 private:
  char* base_;
  int64_t used_ = 0;
};

template <typename C>
UNROLLED_KERNELS_NOINLINE void fill_zero(C* p, int64_t elements) {
  for (int64_t i = 0; i < elements; ++i) p[i] = 0;
}

template <typename C>
UNROLLED_KERNELS_NOINLINE void copy_vectors(const C* from, int64_t elements, C* to) {
  for (int64_t i = 0; i < elements; i += lanes<C>) store(to + i, load(from + i));
}

// Chunks of equal size for any machine: a power of two, so that two, four ... threads share them evenly, each worth the
// few microseconds that waking a thread takes.
inline int64_t chunks_for(int64_t tiles, double flops, int64_t limit) {
  int64_t chunks = 1;
  while (2 * chunks <= min(tiles, limit) && flops >= 2.5e5 * static_cast<double>(2 * chunks)) chunks *= 2;
  return tiles == 0 ? 0 : chunks;
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
