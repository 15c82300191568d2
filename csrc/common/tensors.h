// Tensors of the stable ABI as the pointers and strides that kernels take, and the dispatch over storage types.
#pragma once

#include <initializer_list>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/macros/Macros.h>

#include "common/host.h"
#include "common/types.h"

// The text of the last error behind the stable ABI, which torch keeps from 2.13 on; an older one lacks the symbol.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace unrolled_kernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f(), which runs a kernel. What it says where there is no memory for scratch is in the words of torch's own
// allocator, which programs look for.
template <typename F>
void with_scratch(const F& f) {
  try {
    f();
  } catch (const std::bad_alloc&) {
    throw std::runtime_error(
        "DefaultCPUAllocator: can't allocate memory: there is too little for the kernel's scratch");
  }
}

// Calls f(Storage()) for the storage type of a tensor, as with_scratch does.
template <typename F>
void dispatch_storage(ScalarType type, F f) {
  with_scratch([&] {
    switch (type) {
      case ScalarType::Float: return f(float());
      case ScalarType::Double: return f(double());
      case ScalarType::Half: return f(half());
      case ScalarType::BFloat16: return f(bfloat16());
      default: STD_TORCH_CHECK(false, "unrolled_kernels: no kernels for dtype ", torch::headeronly::toString(type));
    }
  });
}

inline size_t element_size(ScalarType type) {
  if (type == ScalarType::Long) return sizeof(int64_t);
  return type == ScalarType::Double ? sizeof(double) : type == ScalarType::Float ? sizeof(float) : sizeof(half);
}

inline ScalarType compute_scalar_type(ScalarType storage) {
  return storage == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Throws the error of torch behind a call that failed, with its text, or with `otherwise` where torch does not keep it.
[[noreturn]] inline void throw_torch_error(const std::string& otherwise) {
  const auto what = &torch_exception_get_what_without_backtrace;
  const std::string message = what ? what() : otherwise;
  // "CUDA out of memory. Tried to allocate"; that of a CPU is an ordinary RuntimeError in torch too
  if (host.out_of_memory && message.find("out of memory") != std::string::npos) host.out_of_memory(message.c_str());
  throw std::runtime_error(message);
}

inline Tensor empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype, size_t bytes,
                            int32_t device_type, int32_t device_index) {
  AtenTensorHandle handle = nullptr;
  if (aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, &handle) != TORCH_SUCCESS) {
    const bool cpu = device_type == aoti_torch_device_type_cpu();
    const char* const text = cpu ? "DefaultCPUAllocator: can't allocate memory: you tried to allocate "
                                 : "CUDA out of memory. Tried to allocate ";
    throw_torch_error(text + std::to_string(bytes) + " bytes");
  }
  return Tensor(handle);
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
  return empty_strided(static_cast<int64_t>(sizes.size()), sizes.begin(), strides, dtype, stride * element_size(type),
                       device_type, device_index);
}

inline Tensor as_contiguous(const Tensor& x) {
  try {
    return torch::stable::contiguous(x);
  } catch (const std::runtime_error& error) {
    throw_torch_error(error.what());
  }
}

// How the kernels find the matrices of a batch, see MomentumInputs.
struct MatrixLayout {
  bool transposed = false, separate = false;
};

// Brings matrices [B or 1, d, d] to a layout that the kernels read, by a copy only where there is no other way: samples
// are contiguous, or on a CPU their transposes are. An expanded batch becomes the one matrix that it is; where each
// sample is to have a gradient, a CPU's kernels still do not need it more than once.
inline MatrixLayout prepare_matrix(Tensor& x, bool needs_gradient) {
  const int64_t d = x.size(2);
  MatrixLayout layout;
  if (x.size(0) > 1 && x.stride(0) == 0 && (x.is_cpu() || !needs_gradient)) {
    layout.separate = needs_gradient;
    x = torch::stable::narrow(x, 0, 0, 1);
  }
  const bool repeated = x.size(0) > 1 && x.stride(0) == 0;
  if (!repeated && (d <= 1 || (x.stride(1) == d && x.stride(2) == 1))) return layout;
  // one matrix for all is not worth another way of reading it
  layout.transposed = x.is_cpu() && x.size(0) > 1 && x.stride(1) == 1 && x.stride(2) == d;
  if (!layout.transposed) x = as_contiguous(x);
  return layout;
}

// Copies x unless rows are contiguous. An expanded batch is left as it is: rows that are the same in memory are read, not
// written.
inline void make_rows_contiguous(Tensor& x) {
  if (x.size(1) != 1 && x.stride(1) != 1) x = as_contiguous(x);
}

inline Tensor negative(const Tensor& x) {
  StableIValue stack[] = {torch::stable::detail::from(x)};
  if (torch_call_dispatcher("aten::neg", "", stack, TORCH_ABI_VERSION) != TORCH_SUCCESS) throw_torch_error("aten::neg");
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
