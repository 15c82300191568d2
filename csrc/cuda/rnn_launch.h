// Launches the CUDA kernels of `rnn` on the current stream of a device, with a workspace from torch's allocator.
#pragma once

#include "rnn.h"

namespace unrolled_kernels {

template <typename Storage>
void rnn_cuda(const RnnForward<Storage>& p, int32_t device);
template <typename Storage>
void rnn_cuda(const RnnBackward<Storage>& p, int32_t device);

}  // namespace unrolled_kernels
