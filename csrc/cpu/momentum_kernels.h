// What the launcher of `momentum` (momentum_cpu.cpp) and its CPU kernels (momentum_{dense,diagonal,spectral}.cpp)
// agree on.
//
// The work is a row of tiles, cut into chunks by the plan. A plan depends on the problem and never on the number of
// threads, and sums over chunks are taken in their order: results are bit-equal run to run and for any thread count.
#pragma once

#ifdef UNROLLED_KERNELS_NAMESPACE
#error "include this before cpu/simd/simd.h: its functions are compiled once, for the baseline"
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/simd/isa.h"
#include "momentum.h"

namespace unrolled_kernels {

struct MomentumPlan {
  const char* variant;
  int64_t lanes;             // values a vector holds
  int64_t tiles, chunks;     // chunk c takes tiles [c tiles / chunks, (c + 1) tiles / chunks)
  int64_t tiles_per_sample;  // > 1 where a sample is cut; a chunk is then one tile
  int64_t schedule_steps;    // columns of MomentumChunk::schedule: k, or 1 where no coefficient varies over steps
  size_t scratch_bytes;      // of one chunk at work
};

// The part of the outputs that is a sum over samples comes back for each chunk.
template <typename Compute>
struct MomentumChunk {
  int64_t begin, end;  // tiles
  void* scratch;       // 64-byte aligned
  double* schedule;    // [3, schedule_steps]: dphi, dbeta, dgamma of the samples in the chunk, of coefficients that
                       // are shared by samples or where samples are cut; nullptr if the schedule's are not wanted
  Compute* d_matrix;   // [d, d], where the matrix is shared and its gradient wanted
};

template <typename Storage>
struct MomentumKernels {
  // `backward`: the same problem's, or nullptr for the plan of forward
  MomentumPlan (*plan)(const MomentumInputs<Storage>&, const MomentumBackward<Storage>* backward);
  void (*forward)(const MomentumForward<Storage>&, const MomentumPlan&, const MomentumChunk<compute_type<Storage>>&);
  void (*backward)(const MomentumBackward<Storage>&, const MomentumPlan&, const MomentumChunk<compute_type<Storage>>&);
};

#define UNROLLED_KERNELS_DECLARE(isa)           \
  namespace isa {                               \
  template <typename Storage>                   \
  MomentumKernels<Storage> momentum_dense();    \
  template <typename Storage>                   \
  MomentumKernels<Storage> momentum_diagonal(); \
  template <typename Storage>                   \
  MomentumKernels<Storage> momentum_spectral(); \
  }
UNROLLED_KERNELS_DECLARE(isa_baseline)
UNROLLED_KERNELS_DECLARE(isa_avx2)
UNROLLED_KERNELS_DECLARE(isa_avx512)
#undef UNROLLED_KERNELS_DECLARE

}  // namespace unrolled_kernels
