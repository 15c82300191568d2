// The ops of momentum.cpp as plain functions: what _C hands to _C_autograd, which calls them without the dispatcher.
#pragma once

#include <cstdint>
#include <optional>

#include <torch/csrc/stable/tensor.h>

namespace unrolled_kernels {

struct MomentumOps {
  static constexpr int64_t num_tensors = 13;
  // forward's arguments in their order, and the gradient of each
  using Tensors = std::optional<torch::stable::Tensor>[num_tensors];

  // What momentum_backward differentiates: all steps, those from `first` on, or the minimizer.
  struct Differentiated {
    int64_t first = 0;
    std::optional<torch::stable::Tensor> y_begun, m_begun, minimizer;
  };

  torch::stable::Tensor (*forward)(const Tensors& tensors, int64_t num_steps, bool trajectory);
  // momentum_begun
  void (*forward_begun)(const Tensors& tensors, int64_t num_steps, int64_t first, torch::stable::Tensor& y,
                        torch::stable::Tensor& y_begun, torch::stable::Tensor& m_begun);
  void (*backward)(const torch::stable::Tensor& grad_y, const Tensors& tensors, int64_t num_steps, bool trajectory,
                   int64_t needs, const Differentiated& what, Tensors& grads);
  // momentum_second_order, without cotangents of coefficients' gradients. `needs`: of `grads`, bit i for the argument i.
  void (*second_order)(const torch::stable::Tensor& grad_y, const Tensors& tensors, const Tensors& cotangents,
                       int64_t num_steps, bool trajectory, bool needs_grad_y, int64_t needs,
                       torch::stable::Tensor& grad_of_grad_y, Tensors& grads);
};

extern const MomentumOps momentum_ops;
// the name of the capsule
inline constexpr char momentum_ops_name[] = "unrolled_kernels._C.momentum_ops";

}  // namespace unrolled_kernels
