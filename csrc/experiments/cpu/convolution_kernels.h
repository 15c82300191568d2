// What the launcher of `dncnn` and its CPU kernels agree on. A plan depends on the sizes alone, never on the number of
// threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/isa.h"
#include "experiments/dncnn.h"

namespace unrolled_kernels {

struct ConvolutionPlan {
  int64_t chunks;  // each some rows of one image
  int64_t rows;
  size_t scratch_bytes;  // of one chunk, 64-byte aligned
};

template <typename T>
struct ConvolutionKernels {
  ConvolutionPlan (*plan)(const Convolution<T>&);
  void (*forward)(const ConvolutionForward<T>&, const ConvolutionPlan&, int64_t chunk, void* scratch);
  void (*backward)(const ConvolutionBackward<T>&, const ConvolutionPlan&, int64_t chunk, void* scratch);
};

#define UNROLLED_KERNELS_DECLARE(isa)          \
  namespace isa {                              \
  template <typename T>                        \
  ConvolutionKernels<T> convolution_kernels(); \
  }
UNROLLED_KERNELS_DECLARE(isa_baseline)
UNROLLED_KERNELS_DECLARE(isa_avx2)
UNROLLED_KERNELS_DECLARE(isa_avx512)
#undef UNROLLED_KERNELS_DECLARE

}  // namespace unrolled_kernels
