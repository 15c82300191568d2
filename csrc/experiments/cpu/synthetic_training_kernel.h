// What the launcher of `synthetic_training` and its kernel agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/isa.h"
#include "experiments/synthetic_training.h"

namespace unrolled_kernels {

template <typename C>
struct SyntheticTrainingKernel {
  size_t (*scratch_bytes)(const SyntheticTraining<C>&);
  // all epochs of one model; scratch is 64-byte aligned
  void (*train)(const SyntheticTraining<C>&, int64_t model, void* scratch);
};

#define UNROLLED_KERNELS_DECLARE(isa)                     \
  namespace isa {                                         \
  template <typename C>                                   \
  SyntheticTrainingKernel<C> synthetic_training_kernel(); \
  }
UNROLLED_KERNELS_DECLARE(isa_baseline)
UNROLLED_KERNELS_DECLARE(isa_avx2)
UNROLLED_KERNELS_DECLARE(isa_avx512)
#undef UNROLLED_KERNELS_DECLARE

}  // namespace unrolled_kernels
