// What the contracts and all kernels share: the storage types (float, double, half, bfloat16) and the type each computes
// in. No framework headers.
#pragma once
#include <cstdint>

// Storage types that the CUDA kernels are compiled for; tests of float32 alone need not wait for the others.
#ifndef UNROLLED_KERNELS_CUDA_TYPES
#define UNROLLED_KERNELS_CUDA_TYPES(_) _(float) _(double) _(half) _(bfloat16)
#endif

namespace unrolled_kernels {

struct half {
  uint16_t bits;
};
struct bfloat16 {
  uint16_t bits;
};

template <typename Storage>
struct ComputeTypeOf {
  using type = Storage;
};
template <>
struct ComputeTypeOf<half> {
  using type = float;
};
template <>
struct ComputeTypeOf<bfloat16> {
  using type = float;
};
template <typename Storage>
using compute_type = typename ComputeTypeOf<Storage>::type;

// A type as an argument.
template <typename T>
struct Type {
  using type = T;
};

// One matrix for a batch that is not a single sample: its gradient is then a sum over the batch, unless it is separate.
// `p`: MomentumInputs or RnnInputs.
template <typename Inputs>
constexpr bool shares_matrix(const Inputs& p) {
  return p.matrix && p.matrix_stride == 0 && p.B != 1 && !p.separate;
}

}  // namespace unrolled_kernels
