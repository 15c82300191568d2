// What the launchers of `step_size_training` and `rnn_training` and their kernels agree on.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/simd/isa.h"
#include "experiments/learn_to_optimize.h"

namespace unrolled_kernels {

template <typename Problem>
struct TrainingKernel {
  size_t (*scratch_bytes)(const Problem&);
  // all epochs of one model; scratch is 64-byte aligned
  void (*train)(const Problem&, int64_t model, void* scratch);
};

#define UNROLLED_KERNELS_DECLARE(isa)                              \
  namespace isa {                                                  \
  template <typename C>                                            \
  TrainingKernel<StepSizeTraining<C>> step_size_training_kernel(); \
  template <typename C>                                            \
  TrainingKernel<RnnTraining<C>> rnn_training_kernel();            \
  }
UNROLLED_KERNELS_DECLARE(isa_baseline)
UNROLLED_KERNELS_DECLARE(isa_avx2)
UNROLLED_KERNELS_DECLARE(isa_avx512)
#undef UNROLLED_KERNELS_DECLARE

}  // namespace unrolled_kernels
