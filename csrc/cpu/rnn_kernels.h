// What the launcher of `rnn` (rnn_cpu.cpp) and its CPU kernels (rnn_cells.cpp) agree on. As for `momentum`, a plan depends
// on the problem and never on the number of threads, and sums over chunks are taken in their order.
#pragma once

#ifdef UNROLLED_KERNELS_NAMESPACE
#error "include this before cpu/simd/simd.h: its functions are compiled once, for the baseline"
#endif

#include <cstddef>
#include <cstdint>

#include "cpu/simd/isa.h"
#include "rnn.h"

namespace unrolled_kernels {

struct RnnPlan {
  const char* variant;
  int64_t lanes;          // values a vector holds
  int groups;             // vectors of samples in a tile
  int64_t tiles, chunks;  // chunk c takes tiles [c tiles / chunks, (c + 1) tiles / chunks)
  int64_t segment;        // steps of backward whose adjoints are kept until the weights' gradients are taken from them
  size_t scratch_bytes;   // of one chunk at work
};

// The part of the outputs that is a sum over samples comes back for each chunk, written in full.
template <typename Compute>
struct RnnChunk {
  int64_t begin, end;  // tiles
  void* scratch;       // 64-byte aligned
  Compute* d_weights;  // [P], laid out as the weights; nullptr: not wanted
  Compute* d_matrix;   // [d, d], where the matrix is shared and its gradient wanted
};

template <typename Storage>
struct RnnKernels {
  // `backward`: the same problem's, or nullptr for the plan of forward
  RnnPlan (*plan)(const RnnInputs<Storage>&, const RnnBackward<Storage>* backward);
  void (*forward)(const RnnForward<Storage>&, const RnnPlan&, const RnnChunk<compute_type<Storage>>&);
  void (*backward)(const RnnBackward<Storage>&, const RnnPlan&, const RnnChunk<compute_type<Storage>>&);
};

namespace isa_baseline {
template <typename Storage>
RnnKernels<Storage> rnn_kernels();
}
namespace isa_avx2 {
template <typename Storage>
RnnKernels<Storage> rnn_kernels();
}
namespace isa_avx512 {
template <typename Storage>
RnnKernels<Storage> rnn_kernels();
}

// elements of the packed weights
template <typename Inputs>
int64_t rnn_weights_size(const Inputs& p) {
  int64_t size = 2 * p.hidden_dims[0] * p.d + p.d * p.hidden_dims[p.num_layers - 1];
  for (int l = 1; l < p.num_layers; ++l) size += p.hidden_dims[l] * p.hidden_dims[l - 1];
  return size;
}

}  // namespace unrolled_kernels
