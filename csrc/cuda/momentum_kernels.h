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

#include "momentum.h"

namespace unrolled_kernels::cuda {

template <typename Storage>
const char* momentum_dense(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_dense(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_diagonal(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_diagonal(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_spectral(const MomentumForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* momentum_spectral(const MomentumBackward<Storage>&, void* workspace, void* stream, size_t* size);

template <typename Problem>
const char* momentum_kernels(Structure structure, const Problem& p, void* workspace, void* stream, size_t* size) {
  switch (structure) {
    case Structure::dense: return momentum_dense(p, workspace, stream, size);
    case Structure::diagonal: return momentum_diagonal(p, workspace, stream, size);
    default: return momentum_spectral(p, workspace, stream, size);
  }
}

}  // namespace unrolled_kernels::cuda
