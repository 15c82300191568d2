// The CUDA kernels of `rnn` behind raw pointers; see rnn.h for what they compute and write, and momentum_kernels.h for
// what holds of every launcher: nothing is allocated, waited for, or left to another stream.
//
// size == nullptr: launches the kernels. `workspace` is aligned to 16 bytes, its contents may be anything, and it has to
// live until they have run. Otherwise: sets *size to the bytes that a workspace needs, and launches nothing.
// Returns nullptr, or why it did not launch.
#pragma once

#include <cstddef>

#include "rnn.h"

namespace unrolled_kernels::cuda {

template <typename Storage>
const char* rnn_kernels(const RnnForward<Storage>&, void* workspace, void* stream, size_t* size);
template <typename Storage>
const char* rnn_kernels(const RnnBackward<Storage>&, void* workspace, void* stream, size_t* size);

}  // namespace unrolled_kernels::cuda
