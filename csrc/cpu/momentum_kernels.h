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
  // [4, schedule_steps]: dphi, dbeta, dgamma, d_threshold of the samples in the chunk, of coefficients that are shared by
  // samples or where samples are cut; nullptr if the schedule's are not wanted
  double* schedule;
  Compute* d_matrix;  // [d, d], where the matrix is shared and its gradient wanted
};

template <typename Storage>
struct MomentumKernels {
  // `backward`: the same problem's, or nullptr for the plan of forward
  MomentumPlan (*plan)(const MomentumInputs<Storage>&, const MomentumBackward<Storage>* backward);
  void (*forward)(const MomentumForward<Storage>&, const MomentumPlan&, const MomentumChunk<compute_type<Storage>>&);
  void (*backward)(const MomentumBackward<Storage>&, const MomentumPlan&, const MomentumChunk<compute_type<Storage>>&);
};

// One matrix for the batch, so large that its products with samples are products of matrices (momentum_shared.cpp). Tile i takes
// samples [i B / tiles, (i + 1) B / tiles) and is a chunk.
struct SharedMomentumPlan : MomentumPlan {
  int64_t packs;        // 1: the matrix is packed for products with itself alone; 2: and with its transpose
  int64_t panels, row;  // it is packed as [panels, d, lanes], a state takes `row` elements
  int64_t terms;        // of a sample in the sum that is the matrix' gradient
  int64_t tile_rows;    // samples of the largest tile
  int64_t sums;         // of tiles that follow each other, which add up to a small matrix' gradient; 0: one, over slabs
  int64_t slab_tiles;  // tiles whose terms fit the second-level cache; sums do not depend on how many are taken at once
};

template <typename Compute>
struct SharedMomentumTile {
  int64_t begin, end;                         // samples
  void* scratch;                              // 64-byte aligned
  const Compute *packed, *packed_transposed;  // for products Q z and Q's
  // backward
  Compute *a, *z;    // [panels, (end - begin) terms, lanes]: the factors of the terms
  double* schedule;  // as in MomentumChunk
};

template <typename Storage>
struct SharedMomentumKernels {
  using Compute = compute_type<Storage>;
  SharedMomentumPlan (*plan)(const MomentumInputs<Storage>&, const MomentumBackward<Storage>* backward);
  // panel `panel` of Q for products Q z, or Q's if not `transposed`
  void (*pack)(const MomentumInputs<Storage>&, bool transposed, int64_t panel, Compute* out);
  void (*forward)(const MomentumForward<Storage>&, const SharedMomentumPlan&, const SharedMomentumTile<Compute>&);
  void (*backward)(const MomentumBackward<Storage>&, const SharedMomentumPlan&, const SharedMomentumTile<Compute>&);
  // rows [begin lanes, end lanes) of the matrix' gradient (+)= the terms of `count` tiles; `last`: no more come.
  // `sum` [d, row] is kept from call to call.
  void (*outer)(const MomentumBackward<Storage>&, const SharedMomentumPlan&, const SharedMomentumTile<Compute>* tiles,
                int64_t count, int64_t begin, int64_t end, bool accumulate, bool last, Compute* sum);
};

// Whether these kernels take the problem. Samples in lanes need no packing and leave no lane empty that belongs to a d,
// so that they are faster with small matrices where there are samples enough. An empty batch has no rows.
template <typename Storage>
bool is_shared(Structure structure, const MomentumInputs<Storage>& p) {
  if (structure == Structure::diagonal || !shares_matrix(p) || p.B == 0) return false;
  return p.d > (structure == Structure::dense && p.B >= 32 ? 40 : 16);
}

// Whether backward reads more than the adjoints of the steps: db and dy0 alone do not ask where they were.
template <typename Storage>
bool needs_iterates(const MomentumBackward<Storage>& p) {
  return !p.minimizer && (p.d_matrix || p.dphi || p.prox != Prox::none);
}

#define UNROLLED_KERNELS_DECLARE(isa)                        \
  namespace isa {                                            \
  template <typename Storage>                                \
  MomentumKernels<Storage> momentum_dense();                 \
  template <typename Storage>                                \
  SharedMomentumKernels<Storage> momentum_shared(Structure); \
  template <typename Storage>                                \
  MomentumKernels<Storage> momentum_diagonal();              \
  template <typename Storage>                                \
  MomentumKernels<Storage> momentum_spectral();              \
  }
UNROLLED_KERNELS_DECLARE(isa_baseline)
UNROLLED_KERNELS_DECLARE(isa_avx2)
UNROLLED_KERNELS_DECLARE(isa_avx512)
#undef UNROLLED_KERNELS_DECLARE

}  // namespace unrolled_kernels
