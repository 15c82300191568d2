// The products of a shared Q by torch, whose library on a GPU is cuBLAS.
#pragma once

#include <cstdlib>
#include <optional>
#include <type_traits>

#include "common/tensors.h"
#include "cuda/momentum_kernels.h"

namespace unrolled_kernels::cuda {

// In float32 the products are as exact as torch's own: torch.backends.cuda.matmul.allow_tf32 holds for them too.
template <typename Storage>
class TorchProducts : public SharedProducts<compute_type<Storage>> {
  using C = compute_type<Storage>;

 public:
  // matrix: Q [d, d], contiguous, on the device of `like`
  TorchProducts(const Tensor& like, const Storage* matrix, int64_t d) : like_(like), matrix_(matrix), d_(d) {
    // as ops/momentum/function.py reads it
    const char* bytes = std::getenv("UNROLLED_KERNELS_KEPT_BYTES");
    if (bytes && *bytes) this->kept_bytes = std::atoll(bytes);
  }

  void multiply(const C* x, C* out, int64_t rows, bool transposed) override {
    const Tensor Q = matrix();
    product(view(x, rows), transposed ? Q : torch::stable::transpose(Q, 0, 1), view(out, rows));
  }
  void outer(const C* a, const C* z, int64_t rows, C* out) override {
    product(torch::stable::transpose(view(a, rows), 0, 1), view(z, rows), view(out, d_));
  }

 private:
  // Q in the compute type
  Tensor matrix() {
    if constexpr (std::is_same<Storage, C>::value) {
      return view(matrix_, d_);
    } else {
      if (!converted_) {
        converted_ = allocate(like_, scalar_type<C>(), {d_, d_});
        torch::stable::copy_(*converted_, view(matrix_, d_));
      }
      return *converted_;
    }
  }

  // a tensor [rows, d] of memory that outlives it
  template <typename T>
  Tensor view(const T* data, int64_t rows) const {
    const int64_t sizes[] = {rows, d_}, strides[] = {d_, 1};
    const int32_t type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(scalar_type<T>()));
    int32_t device_type = 0, device_index = 0;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like_.get(), &device_type));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like_.get(), &device_index));
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<T*>(data), 2, sizes, strides, 0, type,
                                                              device_type, device_index, &handle));
    return Tensor(handle);
  }

  template <typename T>
  static ScalarType scalar_type() {
    if (std::is_same<T, double>::value) return ScalarType::Double;
    if (std::is_same<T, half>::value) return ScalarType::Half;
    return std::is_same<T, float>::value ? ScalarType::Float : ScalarType::BFloat16;
  }

  // The variant that writes where it is told to, which autocast leaves in the dtype of its operands.
  static void product(const Tensor& a, const Tensor& b, const Tensor& out) {
    StableIValue stack[] = {torch::stable::detail::from(a), torch::stable::detail::from(b),
                            torch::stable::detail::from(out)};
    if (torch_call_dispatcher("aten::mm", "out", stack, TORCH_ABI_VERSION) != TORCH_SUCCESS) {
      throw_torch_error("aten::mm");
    }
    torch::stable::detail::to<Tensor>(stack[0]);  // the one reference to `out` that comes back
  }

  const Tensor& like_;
  const Storage* matrix_;
  const int64_t d_;
  std::optional<Tensor> converted_;
};

}  // namespace unrolled_kernels::cuda
