// Ops of the family `momentum`: schemas, internal checks and allocation. No autograd, and canonical arguments only:
//
//     Q, R              [B or 1, d, d], 1 where one matrix serves the batch; its gradient is then summed over the batch
//     q, lambda, b, y0  [B, d], expanded where they are shared; y0 None is zero; f, g, x likewise
//     phi, beta, gamma  [B or 1, k or 1] in the compute dtype; beta and gamma both or neither
//     y, grad_y         [B, d], or [k+1, B, d] with trajectory
//
// Strides are free. A gradient that is not needed comes back as an empty tensor, [0].
#include "momentum.h"

#include <tuple>

#include "common/tensors.h"
#include "cpu/momentum_launch.h"
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "cuda/call.h"
#include "cuda/momentum_kernels.h"
#endif

namespace unrolled_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The tensors behind one call: as they came, or copied where a kernel needs other strides.
struct Arguments {
  Structure structure;
  OptionalTensor eigenvalues, matrix, observed, b, y0, phi, beta, gamma;
  int64_t k;
  bool trajectory;
  ScalarType storage, compute;
  int64_t B, d;

  Arguments(Structure structure, const Tensor* eigenvalues_, const Tensor* matrix_, const Tensor* observed_,
            const Tensor& b_, const OptionalTensor& y0_, const Tensor& phi_, const OptionalTensor& beta_,
            const OptionalTensor& gamma_, int64_t k, bool trajectory)
      : structure(structure),
        k(k),
        trajectory(trajectory),
        storage(b_.scalar_type()),
        compute(compute_scalar_type(storage)) {
    STD_TORCH_CHECK(b_.dim() == 2, "b: expected [B, d]");
    STD_TORCH_CHECK(k >= 0, "num_steps: expected a non-negative number");
    B = b_.size(0);
    d = b_.size(1);
    b = rows("b", b_);
    if (eigenvalues_) eigenvalues = rows("eigenvalues", *eigenvalues_);
    if (observed_) observed = rows("observed", *observed_);
    if (y0_) y0 = rows("y0", *y0_);
    if (matrix_) {
      STD_TORCH_CHECK(matrix_->dim() == 3 && (matrix_->size(0) == B || matrix_->size(0) == 1) &&
                          matrix_->size(1) == d && matrix_->size(2) == d,
                      "matrix: expected [B or 1, d, d]");
      check_type("matrix", *matrix_, storage);
      matrix = with_contiguous_samples(*matrix_);
    }
    phi = coefficient("step_sizes", phi_);
    STD_TORCH_CHECK(beta_.has_value() == gamma_.has_value(), "momentum and extrapolation: expected both or neither");
    if (beta_) {
      beta = coefficient("momentum", *beta_);
      gamma = coefficient("extrapolation", *gamma_);
    }
  }

  template <typename Storage>
  void fill(MomentumInputs<Storage>& p) const {
    p.B = B;
    p.d = d;
    p.k = k;
    p.matrix = matrix ? data<Storage>(*matrix) : nullptr;
    p.matrix_stride = matrix ? batch_stride(*matrix) : 0;
    p.eigenvalues = eigenvalues ? data<Storage>(*eigenvalues) : nullptr;
    p.eigenvalues_stride = eigenvalues ? batch_stride(*eigenvalues) : 0;
    p.observed = observed ? data<Storage>(*observed) : nullptr;
    p.observed_stride = observed ? batch_stride(*observed) : 0;
    p.b = data<Storage>(*b);
    p.b_stride = batch_stride(*b);
    p.y0 = y0 ? data<Storage>(*y0) : nullptr;
    p.y0_stride = y0 ? batch_stride(*y0) : 0;
    p.phi = schedule<Storage>(phi);
    p.beta = schedule<Storage>(beta);
    p.gamma = schedule<Storage>(gamma);
    p.trajectory = trajectory;
  }

 private:
  void check_type(const char* name, const Tensor& x, ScalarType type) const {
    STD_TORCH_CHECK(x.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(x.scalar_type()));
  }
  Tensor rows(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == d, name, ": expected [B, d]");
    check_type(name, x, storage);
    return with_contiguous_rows(x);
  }
  Tensor coefficient(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && (x.size(0) == B || x.size(0) == 1) && (x.size(1) == k || x.size(1) == 1), name,
                    ": expected [B or 1, num_steps or 1]");
    check_type(name, x, compute);
    // an expanded dimension has a gradient for each entry, so it must not pass for a shared one
    const bool expanded = (x.size(0) > 1 && x.stride(0) == 0) || (x.size(1) > 1 && x.stride(1) == 0);
    return expanded ? torch::stable::contiguous(x) : x;
  }
  template <typename Storage>
  static Coefficient<compute_type<Storage>> schedule(const OptionalTensor& x) {
    if (!x) return {nullptr, 0, 0};
    return {data<compute_type<Storage>>(*x), batch_stride(*x), x->size(1) == 1 ? 0 : x->stride(1)};
  }
};

template <typename Problem>
void launch(const Tensor& like, Structure structure, const Problem& p) {
#ifdef UNROLLED_KERNELS_WITH_CUDA
  if (like.is_cuda()) {
    return cuda::call(like.get_device_index(), [&](void* workspace, void* stream, size_t* size) {
      return cuda::momentum_kernels(structure, p, workspace, stream, size);
    });
  }
#endif
  STD_TORCH_CHECK(like.is_cpu(), "unrolled_kernels: no kernels for this device");
  momentum_cpu(structure, p);
}

Tensor run_forward(const Arguments& args) {
  const Tensor& b = *args.b;
  Tensor y = args.trajectory ? allocate(b, args.storage, {args.k + 1, args.B, args.d})
                             : allocate(b, args.storage, {args.B, args.d});
  dispatch_storage(args.storage, [&](auto type) {
    MomentumForward<decltype(type)> p;
    args.fill(p);
    p.y = mutable_data<decltype(type)>(y);
    launch(b, args.structure, p);
  });
  return y;
}

struct Gradients {
  Tensor matrix, eigenvalues, b, y0, phi, beta, gamma;
};

Gradients run_backward(const Tensor& grad_y_, const Arguments& args, bool needs_eigenvalues, bool needs_matrix,
                       bool needs_schedule) {
  const Tensor& b = *args.b;
  const Tensor grad_y = grad_y_.is_contiguous() ? grad_y_ : torch::stable::contiguous(grad_y_);
  STD_TORCH_CHECK(
      grad_y.numel() == args.B * args.d * (args.trajectory ? args.k + 1 : 1) && grad_y.scalar_type() == args.storage,
      "grad_y: expected the shape and dtype of y");
  const auto schedule_gradient = [&](const OptionalTensor& x) {
    if (!needs_schedule || !x) return allocate(b, args.compute, {0});
    Tensor grad = allocate(b, args.compute, {x->size(0), x->size(1)});
    // without steps there is nothing to sum, and a coefficient without columns must not look unwanted to the kernels
    if (args.k == 0) torch::stable::zero_(grad);
    return grad;
  };
  Gradients grads{
      needs_matrix ? allocate(b, args.storage, {args.matrix->size(0), args.d, args.d}) : allocate(b, args.storage, {0}),
      needs_eigenvalues ? allocate(b, args.storage, {args.B, args.d}) : allocate(b, args.storage, {0}),
      allocate(b, args.storage, {args.B, args.d}),
      allocate(b, args.storage, {args.B, args.d}),
      schedule_gradient(args.phi),
      schedule_gradient(args.beta),
      schedule_gradient(args.gamma)};
  dispatch_storage(args.storage, [&](auto type) {
    using Storage = decltype(type);
    using Compute = compute_type<Storage>;
    MomentumBackward<Storage> p{};
    args.fill(p);
    p.grad_y = data<Storage>(grad_y);
    p.d_matrix = mutable_data<Storage>(grads.matrix);
    p.d_eigenvalues = mutable_data<Storage>(grads.eigenvalues);
    p.db = mutable_data<Storage>(grads.b);
    p.dy0 = mutable_data<Storage>(grads.y0);
    if (args.k > 0) {
      p.dphi = mutable_data<Compute>(grads.phi);
      p.dbeta = mutable_data<Compute>(grads.beta);
      p.dgamma = mutable_data<Compute>(grads.gamma);
    }
    launch(b, args.structure, p);
  });
  return grads;
}

Tensor momentum_dense(const Tensor& Q, const Tensor& b, const OptionalTensor& y0, const Tensor& step_sizes,
                      const OptionalTensor& momentum, const OptionalTensor& extrapolation, int64_t num_steps,
                      bool trajectory) {
  return run_forward(
      {Structure::dense, nullptr, &Q, nullptr, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory});
}

Tensor momentum_diagonal(const Tensor& q, const Tensor& b, const OptionalTensor& y0, const Tensor& step_sizes,
                         const OptionalTensor& momentum, const OptionalTensor& extrapolation, int64_t num_steps,
                         bool trajectory) {
  return run_forward(
      {Structure::diagonal, &q, nullptr, nullptr, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory});
}

Tensor momentum_spectral(const Tensor& eigenvalues, const Tensor& eigenvectors, const Tensor& b,
                         const OptionalTensor& y0, const Tensor& step_sizes, const OptionalTensor& momentum,
                         const OptionalTensor& extrapolation, int64_t num_steps, bool trajectory) {
  return run_forward({Structure::spectral, &eigenvalues, &eigenvectors, nullptr, b, y0, step_sizes, momentum,
                      extrapolation, num_steps, trajectory});
}

Tensor momentum_tikhonov(const Tensor& f, const Tensor& observed, const Tensor& b, const OptionalTensor& y0,
                         const Tensor& step_sizes, const OptionalTensor& momentum, const OptionalTensor& extrapolation,
                         int64_t num_steps, bool trajectory) {
  return run_forward(
      {Structure::diagonal, &f, nullptr, &observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory});
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using SevenTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SixTensors momentum_dense_backward(const Tensor& grad_y, const Tensor& Q, const Tensor& b, const OptionalTensor& y0,
                                   const Tensor& step_sizes, const OptionalTensor& momentum,
                                   const OptionalTensor& extrapolation, int64_t num_steps, bool trajectory,
                                   bool needs_Q, bool needs_schedule) {
  const Gradients g = run_backward(
      grad_y,
      {Structure::dense, nullptr, &Q, nullptr, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory},
      false, needs_Q, needs_schedule);
  return {g.matrix, g.b, g.y0, g.phi, g.beta, g.gamma};
}

SixTensors momentum_diagonal_backward(const Tensor& grad_y, const Tensor& q, const Tensor& b, const OptionalTensor& y0,
                                      const Tensor& step_sizes, const OptionalTensor& momentum,
                                      const OptionalTensor& extrapolation, int64_t num_steps, bool trajectory,
                                      bool needs_q, bool needs_schedule) {
  const Gradients g = run_backward(
      grad_y,
      {Structure::diagonal, &q, nullptr, nullptr, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory},
      needs_q, false, needs_schedule);
  return {g.eigenvalues, g.b, g.y0, g.phi, g.beta, g.gamma};
}

SevenTensors momentum_spectral_backward(const Tensor& grad_y, const Tensor& eigenvalues, const Tensor& eigenvectors,
                                        const Tensor& b, const OptionalTensor& y0, const Tensor& step_sizes,
                                        const OptionalTensor& momentum, const OptionalTensor& extrapolation,
                                        int64_t num_steps, bool trajectory, bool needs_eigenvalues,
                                        bool needs_eigenvectors, bool needs_schedule) {
  const Gradients g = run_backward(grad_y,
                                   {Structure::spectral, &eigenvalues, &eigenvectors, nullptr, b, y0, step_sizes,
                                    momentum, extrapolation, num_steps, trajectory},
                                   needs_eigenvalues, needs_eigenvectors, needs_schedule);
  return {g.eigenvalues, g.matrix, g.b, g.y0, g.phi, g.beta, g.gamma};
}

SixTensors momentum_tikhonov_backward(const Tensor& grad_y, const Tensor& f, const Tensor& observed, const Tensor& b,
                                      const OptionalTensor& y0, const Tensor& step_sizes,
                                      const OptionalTensor& momentum, const OptionalTensor& extrapolation,
                                      int64_t num_steps, bool trajectory, bool needs_f, bool needs_schedule) {
  const Gradients g = run_backward(
      grad_y,
      {Structure::diagonal, &f, nullptr, &observed, b, y0, step_sizes, momentum, extrapolation, num_steps, trajectory},
      needs_f, false, needs_schedule);
  return {g.eigenvalues, g.b, g.y0, g.phi, g.beta, g.gamma};
}

#define UNROLLED_KERNELS_REST                                                                         \
  "Tensor b, Tensor? y0, Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, int num_steps, " \
  "bool trajectory"
#define UNROLLED_KERNELS_SIX "Tensor, Tensor, Tensor, Tensor, Tensor, Tensor"

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("momentum_dense", TORCH_BOX(&momentum_dense));
  m.impl("momentum_diagonal", TORCH_BOX(&momentum_diagonal));
  m.impl("momentum_spectral", TORCH_BOX(&momentum_spectral));
  m.impl("momentum_tikhonov", TORCH_BOX(&momentum_tikhonov));
  m.impl("momentum_dense_backward", TORCH_BOX(&momentum_dense_backward));
  m.impl("momentum_diagonal_backward", TORCH_BOX(&momentum_diagonal_backward));
  m.impl("momentum_spectral_backward", TORCH_BOX(&momentum_spectral_backward));
  m.impl("momentum_tikhonov_backward", TORCH_BOX(&momentum_tikhonov_backward));
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def("momentum_dense(Tensor Q, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("momentum_diagonal(Tensor q, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("momentum_spectral(Tensor eigenvalues, Tensor eigenvectors, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("momentum_tikhonov(Tensor f, Tensor observed, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("momentum_dense_backward(Tensor grad_y, Tensor Q, " UNROLLED_KERNELS_REST
        ", bool needs_Q, bool needs_schedule) -> (" UNROLLED_KERNELS_SIX ")");
  m.def("momentum_diagonal_backward(Tensor grad_y, Tensor q, " UNROLLED_KERNELS_REST
        ", bool needs_q, bool needs_schedule) -> (" UNROLLED_KERNELS_SIX ")");
  m.def("momentum_tikhonov_backward(Tensor grad_y, Tensor f, Tensor observed, " UNROLLED_KERNELS_REST
        ", bool needs_f, bool needs_schedule) -> (" UNROLLED_KERNELS_SIX ")");
  m.def("momentum_spectral_backward(Tensor grad_y, Tensor eigenvalues, Tensor eigenvectors, " UNROLLED_KERNELS_REST
        ", bool needs_eigenvalues, bool needs_eigenvectors, bool needs_schedule) -> (" UNROLLED_KERNELS_SIX
        ", Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) { unrolled_kernels::register_kernels(m); }
#ifdef UNROLLED_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CUDA, m) { unrolled_kernels::register_kernels(m); }
#endif
