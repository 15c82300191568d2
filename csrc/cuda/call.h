// A call of CUDA kernels from torch: device guard, current stream, workspace, errors.
#pragma once

#include <dlfcn.h>

#include <optional>
#include <string>

#include <torch/csrc/stable/accelerator.h>

#include "common/tensors.h"

namespace unrolled_kernels::cuda {

// Looked up at the first use: a torch without CUDA lacks the symbol, and could not import a library that refers to it.
inline void* current_stream(int32_t device) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, "unrolled_kernels: this torch was built without CUDA: install one with it");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(function(device, &stream));
  return stream;
}

// Uninitialised bytes; the caching allocator hands them out again in the order of the stream, so they may be freed while
// kernels that use them are still to run.
inline Tensor allocate_workspace(size_t bytes, int32_t device) {
  const int64_t size = static_cast<int64_t>(bytes), stride = 1;
  return empty_strided(1, &size, &stride, aoti_torch_dtype_uint8(), bytes, aoti_torch_device_type_cuda(), device);
}

inline void check(const char* error) {
  if (!error) return;
  std::string hint;
  if (std::string(error).find("no kernel image") != std::string::npos) {
    hint = " (the extension was built for other GPUs: set TORCH_CUDA_ARCH_LIST to this one's and build again)";
  } else if (std::string(error).find("driver version") != std::string::npos) {
    hint = " (update the NVIDIA driver, or build the extension with an older CUDA toolkit)";
  }
  STD_TORCH_CHECK(false, "unrolled_kernels: CUDA: ", error, hint);
}

// launcher(workspace, stream, size): one of the functions of cuda/*_kernels.h.
template <typename F>
void call(int32_t device, F launcher) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* const stream = current_stream(device);
  size_t bytes = 0;
  check(launcher(nullptr, stream, &bytes));
  std::optional<Tensor> workspace;
  if (bytes > 0) workspace = allocate_workspace(bytes, device);
  check(launcher(workspace ? workspace->mutable_data_ptr() : nullptr, stream, nullptr));
}

}  // namespace unrolled_kernels::cuda
