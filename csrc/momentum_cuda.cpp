// The side of `momentum` that knows both torch and CUDA.
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "common/cuda_call.h"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_launch.h"

namespace unrolled_kernels {
namespace {

template <typename Problem>
void run(Structure structure, const Problem& p, int32_t device) {
  call_cuda(device, [&](void* workspace, void* stream, size_t* size) {
    return momentum_cuda_kernels(structure, p, workspace, stream, size);
  });
}

}  // namespace

template <typename Storage>
void momentum_cuda(Structure structure, const MomentumForward<Storage>& p, int32_t device) {
  run(structure, p, device);
}
template <typename Storage>
void momentum_cuda(Structure structure, const MomentumBackward<Storage>& p, int32_t device) {
  run(structure, p, device);
}

#define UNROLLED_KERNELS_INSTANTIATE_CUDA(Storage)                                         \
  template void momentum_cuda(Structure, const MomentumForward<Storage>&, int32_t device); \
  template void momentum_cuda(Structure, const MomentumBackward<Storage>&, int32_t device);
UNROLLED_KERNELS_INSTANTIATE_CUDA(float)
UNROLLED_KERNELS_INSTANTIATE_CUDA(double)
UNROLLED_KERNELS_INSTANTIATE_CUDA(half)
UNROLLED_KERNELS_INSTANTIATE_CUDA(bfloat16)

}  // namespace unrolled_kernels
#endif
