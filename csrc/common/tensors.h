// Tensors of the stable ABI as the pointers and strides that kernels take, and the dispatch over storage types.
#pragma once

#include <initializer_list>
#include <optional>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include "common/types.h"

namespace unrolled_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f(Storage()) for the storage type of a tensor.
template <typename F>
void dispatch_storage(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float: return f(float());
    case ScalarType::Double: return f(double());
    case ScalarType::Half: return f(half());
    case ScalarType::BFloat16: return f(bfloat16());
    default: STD_TORCH_CHECK(false, "unrolled_kernels: no kernels for dtype ", torch::headeronly::toString(type));
  }
}

inline ScalarType compute_scalar_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// An uninitialised contiguous tensor on the device of `like`, without the detour through the dispatcher.
inline Tensor allocate(const Tensor& like, ScalarType type, std::initializer_list<int64_t> sizes) {
  constexpr size_t max_dim = 4;
  STD_TORCH_CHECK(sizes.size() <= max_dim, "allocate: at most 4 dimensions");
  int64_t strides[max_dim], stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= sizes.begin()[i];
  }
  const int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  int32_t device_type = 0, device_index = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype,
                                                  device_type, device_index, &handle));
  return Tensor(handle);
}

// Copies x unless every sample is contiguous and the batch is not expanded. A size of 1 is a shared sample.
inline void make_samples_contiguous(Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  bool contiguous = sizes[0] <= 1 || strides[0] != 0;
  for (size_t i = sizes.size(); i-- > 1; expected *= sizes[i]) contiguous &= sizes[i] == 1 || strides[i] == expected;
  if (!contiguous) x = torch::stable::contiguous(x);
}

// The same, but an expanded batch is left as it is: samples that are the same in memory are read, not written.
inline void make_rows_contiguous(Tensor& x) {
  if (x.size(1) != 1 && x.stride(1) != 1) x = torch::stable::contiguous(x);
}

inline Tensor negative(const Tensor& x) {
  StableIValue stack[] = {torch::stable::detail::from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::neg", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

inline int64_t batch_stride(const Tensor& x) { return x.size(0) == 1 ? 0 : x.stride(0); }

template <typename T>
const T* data(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data(const Tensor& x) {
  return x.numel() == 0 ? nullptr : static_cast<T*>(x.mutable_data_ptr());
}

}  // namespace unrolled_kernels
