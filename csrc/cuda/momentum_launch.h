// Launches the CUDA kernels of `momentum` on the current stream of a device, with a workspace from torch's allocator.
#pragma once

#include "momentum.h"

namespace unrolled_kernels {

template <typename Storage>
void momentum_cuda(Structure structure, const MomentumForward<Storage>& p, int32_t device);
template <typename Storage>
void momentum_cuda(Structure structure, const MomentumBackward<Storage>& p, int32_t device);

}  // namespace unrolled_kernels
