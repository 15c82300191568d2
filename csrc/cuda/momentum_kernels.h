// The CUDA kernels of `momentum` behind raw pointers; see momentum.h for what they compute and write.
//
// Nothing here allocates, waits for the device, or uses a stream other than the one given, so that every call can be
// captured in a CUDA graph. All pointers are of the current device.
//
// size == nullptr: launches the kernels. `workspace` is aligned to 16 bytes, its contents may be anything, and it has to
// live until they have run. Otherwise: sets *size to the bytes that a workspace needs, and launches nothing.
// Returns nullptr, or the CUDA runtime's description of what went wrong.
#pragma once

#include <cstddef>
#include <type_traits>

#include "momentum.h"

namespace unrolled_kernels::cuda {

template <typename Storage>
const char* momentum_dense(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_dense(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);
// Second order: where there are tangents, and the tiles of tile.cuh take Q.
template <typename Storage>
const char* momentum_dense_second_order(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);
// Own Q beyond the tiles of momentum_dense, held on chip. runs: whether it is, on this device; if not, nothing is done.
template <typename Storage>
const char* momentum_resident(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size, bool& runs);
template <typename Storage>
const char* momentum_resident(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size,
                              bool& runs);
// Products of matrices with the one Q that a batch shares, on the stream of the kernels. Everything is contiguous and in the
// compute type.
template <typename C>
class SharedProducts {
 public:
  int64_t kept_bytes = 1 << 28;  // that the iterates of the samples at work may take in backward

  virtual ~SharedProducts() = default;
  // out [rows, d] = x Q', a row being Q times one of x [rows, d]; transposed: x Q
  virtual void multiply(const C* x, C* out, int64_t rows, bool transposed) = 0;
  // out [d, d] = a'z, of [rows, d] both
  virtual void outer(const C* a, const C* z, int64_t rows, C* out) = 0;
};
template <typename Storage>
const char* momentum_shared(const MomentumForward<Storage>&, SharedProducts<compute_type<Storage>>&, void* workspace,
                            void* stream, size_t* size);
template <typename Storage>
const char* momentum_shared(const MomentumBackward<Storage>&, SharedProducts<compute_type<Storage>>&, void* workspace,
                            void* stream, size_t* size);
template <typename Storage>
const char* momentum_diagonal(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_diagonal(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_spectral(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_spectral(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);

// Whether the steps are products of matrices: one Q for the batch, and none of tile.cuh's tiles takes it.
template <typename Storage>
bool takes_products(const MomentumInputs<Storage>& p) {
  return shares_matrix(p) && p.d > (sizeof(Storage) > sizeof(float) ? 64 : 128);
}

template <template <typename> class Problem, typename Storage>
const char* momentum_kernels(Structure structure, const Problem<Storage>& p,
                             SharedProducts<compute_type<Storage>>& products, void* workspace, void* stream,
                             size_t* size) {
  if constexpr (std::is_same_v<Problem<Storage>, MomentumBackward<Storage>>) {
    if (p.tangents && structure == Structure::dense) return momentum_dense_second_order(p, workspace, stream, size);
  }
  switch (structure) {
    case Structure::dense: {
      if (takes_products(p)) return momentum_shared(p, products, workspace, stream, size);
      bool runs = false;
      const char* error = momentum_resident(p, workspace, stream, size, runs);
      return runs ? error : momentum_dense(p, workspace, stream, size);
    }
    case Structure::diagonal: return momentum_diagonal(p, workspace, stream, size);
    default: return momentum_spectral(p, workspace, stream, size);
  }
}

}  // namespace unrolled_kernels::cuda
