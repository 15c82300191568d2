// The side of `rnn` that knows both torch and CUDA.
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "common/cuda_call.h"
#include "cuda/rnn_kernels.h"
#include "cuda/rnn_launch.h"

namespace unrolled_kernels {
namespace {

template <typename Problem>
void run(const Problem& p, int32_t device) {
  call_cuda(device,
            [&](void* workspace, void* stream, size_t* size) { return rnn_cuda_kernels(p, workspace, stream, size); });
}

}  // namespace

template <typename Storage>
void rnn_cuda(const RnnForward<Storage>& p, int32_t device) {
  run(p, device);
}
template <typename Storage>
void rnn_cuda(const RnnBackward<Storage>& p, int32_t device) {
  run(p, device);
}

#define UNROLLED_KERNELS_INSTANTIATE_CUDA(Storage)                    \
  template void rnn_cuda(const RnnForward<Storage>&, int32_t device); \
  template void rnn_cuda(const RnnBackward<Storage>&, int32_t device);
UNROLLED_KERNELS_INSTANTIATE_CUDA(float)
UNROLLED_KERNELS_INSTANTIATE_CUDA(double)
UNROLLED_KERNELS_INSTANTIATE_CUDA(half)
UNROLLED_KERNELS_INSTANTIATE_CUDA(bfloat16)

}  // namespace unrolled_kernels
#endif
