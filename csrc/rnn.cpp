// Ops of the family `rnn`: schemas, internal checks and allocation. No autograd, and canonical arguments only:
//
//     Q            [B or 1, d, d], 1 where one matrix serves the batch; its gradient is then summed over the batch
//     q, b, y0     [B, d], expanded where they are shared; y0 None is zero
//     weights      [P] in the compute dtype, packed as in rnn.h
//     y, grad_y    [B, d], or [k+1, B, d] with trajectory
//
// Strides are free. A gradient that is not needed comes back as an empty tensor, [0].
#include "rnn.h"

#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/rnn_launch.h"
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "cuda/rnn_launch.h"
#endif

namespace unrolled_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The tensors behind one call: as they came, or copied where a kernel needs other strides.
struct Arguments {
  OptionalTensor eigenvalues, matrix, b, y0, weights;
  std::vector<int64_t> hidden_dims;
  int64_t k;
  bool trajectory;
  ScalarType storage;
  int64_t B, d;

  Arguments(const Tensor* eigenvalues_, const Tensor* matrix_, const Tensor& b_, const OptionalTensor& y0_,
            const Tensor& weights_, std::vector<int64_t> hidden_dims_, int64_t k, bool trajectory)
      : hidden_dims(std::move(hidden_dims_)), k(k), trajectory(trajectory), storage(b_.scalar_type()) {
    STD_TORCH_CHECK(b_.dim() == 2, "b: expected [B, d]");
    STD_TORCH_CHECK(k >= 0, "num_steps: expected a non-negative number");
    B = b_.size(0);
    d = b_.size(1);
    STD_TORCH_CHECK(d <= max_rnn_dim, "b: expected d <= ", max_rnn_dim, ", got ", d);
    b = rows("b", b_);
    if (eigenvalues_) eigenvalues = rows("eigenvalues", *eigenvalues_);
    if (y0_) y0 = rows("y0", *y0_);
    if (matrix_) {
      STD_TORCH_CHECK(matrix_->dim() == 3 && (matrix_->size(0) == B || matrix_->size(0) == 1) &&
                          matrix_->size(1) == d && matrix_->size(2) == d && matrix_->scalar_type() == storage,
                      "matrix: expected [B or 1, d, d] in the dtype of b");
      matrix = with_contiguous_samples(*matrix_);
    }
    STD_TORCH_CHECK(!hidden_dims.empty() && hidden_dims.size() <= max_rnn_layers, "hidden_dims: expected 1 to ",
                    max_rnn_layers, " widths, got ", hidden_dims.size());
    for (const int64_t width : hidden_dims) {
      STD_TORCH_CHECK(width >= 0 && width <= max_rnn_width, "hidden_dims: expected widths up to ", max_rnn_width,
                      ", got ", width);
    }
    RnnInputs<float> sizes{};
    fill_sizes(sizes);
    STD_TORCH_CHECK(weights_.dim() == 1 && weights_.size(0) == rnn_weights_size(sizes) &&
                        weights_.scalar_type() == compute_scalar_type(storage),
                    "weights: expected [P] in the compute dtype, P = ", rnn_weights_size(sizes));
    weights = weights_.is_contiguous() ? weights_ : torch::stable::contiguous(weights_);
  }

  template <typename Storage>
  void fill(RnnInputs<Storage>& p) const {
    fill_sizes(p);
    p.k = k;
    p.weights = data<compute_type<Storage>>(*weights);
    p.matrix = matrix ? data<Storage>(*matrix) : nullptr;
    p.matrix_stride = matrix ? batch_stride(*matrix) : 0;
    p.eigenvalues = eigenvalues ? data<Storage>(*eigenvalues) : nullptr;
    p.eigenvalues_stride = eigenvalues ? batch_stride(*eigenvalues) : 0;
    p.b = data<Storage>(*b);
    p.b_stride = batch_stride(*b);
    p.y0 = y0 ? data<Storage>(*y0) : nullptr;
    p.y0_stride = y0 ? batch_stride(*y0) : 0;
    p.trajectory = trajectory;
  }

 private:
  template <typename Storage>
  void fill_sizes(RnnInputs<Storage>& p) const {
    p.B = B;
    p.d = d;
    p.num_layers = static_cast<int>(hidden_dims.size());
    for (size_t l = 0; l < hidden_dims.size(); ++l) p.hidden_dims[l] = hidden_dims[l];
  }
  Tensor rows(const char* name, const Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == d && x.scalar_type() == storage, name,
                    ": expected [B, d] in the dtype of b");
    return with_contiguous_rows(x);
  }
};

template <typename Problem>
void launch(const Tensor& like, const Problem& p) {
#ifdef UNROLLED_KERNELS_WITH_CUDA
  if (like.is_cuda()) return rnn_cuda(p, like.get_device_index());
#endif
  STD_TORCH_CHECK(like.is_cpu(), "unrolled_kernels: no kernels for this device");
  rnn_cpu(p);
}

Tensor run_forward(const Arguments& args) {
  const Tensor& b = *args.b;
  Tensor y = args.trajectory ? allocate(b, args.storage, {args.k + 1, args.B, args.d})
                             : allocate(b, args.storage, {args.B, args.d});
  dispatch_storage(args.storage, [&](auto type) {
    RnnForward<decltype(type)> p{};
    args.fill(p);
    p.y = mutable_data<decltype(type)>(y);
    launch(b, p);
  });
  return y;
}

using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Gradients of Q (of whichever structure), b, y0 and the weights.
FourTensors run_backward(const Tensor& grad_y_, const Arguments& args, bool needs_Q, bool needs_weights) {
  const Tensor& b = *args.b;
  const Tensor grad_y = grad_y_.is_contiguous() ? grad_y_ : torch::stable::contiguous(grad_y_);
  STD_TORCH_CHECK(grad_y.numel() == args.B * args.d * (args.trajectory ? args.k + 1 : 1) &&
                      grad_y.scalar_type() == args.storage,
                  "grad_y: expected the shape and dtype of y");
  Tensor d_Q = !needs_Q      ? allocate(b, args.storage, {0})
               : args.matrix ? allocate(b, args.storage, {args.matrix->size(0), args.d, args.d})
                             : allocate(b, args.storage, {args.B, args.d});
  Tensor db = allocate(b, args.storage, {args.B, args.d}), dy0 = allocate(b, args.storage, {args.B, args.d});
  Tensor d_weights = allocate(b, compute_scalar_type(args.storage), {needs_weights ? args.weights->numel() : 0});
  dispatch_storage(args.storage, [&](auto type) {
    using Storage = decltype(type);
    RnnBackward<Storage> p{};
    args.fill(p);
    p.grad_y = data<Storage>(grad_y);
    (args.matrix ? p.d_matrix : p.d_eigenvalues) = mutable_data<Storage>(d_Q);
    p.db = mutable_data<Storage>(db);
    p.dy0 = mutable_data<Storage>(dy0);
    p.d_weights = mutable_data<compute_type<Storage>>(d_weights);
    launch(b, p);
  });
  return {d_Q, db, dy0, d_weights};
}

Tensor rnn_dense(const Tensor& Q, const Tensor& b, const OptionalTensor& y0, const Tensor& weights,
                 std::vector<int64_t> hidden_dims, int64_t num_steps, bool trajectory) {
  return run_forward({nullptr, &Q, b, y0, weights, std::move(hidden_dims), num_steps, trajectory});
}

Tensor rnn_diagonal(const Tensor& q, const Tensor& b, const OptionalTensor& y0, const Tensor& weights,
                    std::vector<int64_t> hidden_dims, int64_t num_steps, bool trajectory) {
  return run_forward({&q, nullptr, b, y0, weights, std::move(hidden_dims), num_steps, trajectory});
}

FourTensors rnn_dense_backward(const Tensor& grad_y, const Tensor& Q, const Tensor& b, const OptionalTensor& y0,
                               const Tensor& weights, std::vector<int64_t> hidden_dims, int64_t num_steps,
                               bool trajectory, bool needs_Q, bool needs_weights) {
  return run_backward(grad_y, {nullptr, &Q, b, y0, weights, std::move(hidden_dims), num_steps, trajectory}, needs_Q,
                      needs_weights);
}

FourTensors rnn_diagonal_backward(const Tensor& grad_y, const Tensor& q, const Tensor& b, const OptionalTensor& y0,
                                  const Tensor& weights, std::vector<int64_t> hidden_dims, int64_t num_steps,
                                  bool trajectory, bool needs_q, bool needs_weights) {
  return run_backward(grad_y, {&q, nullptr, b, y0, weights, std::move(hidden_dims), num_steps, trajectory}, needs_q,
                      needs_weights);
}

#define UNROLLED_KERNELS_REST \
  "Tensor b, Tensor? y0, Tensor weights, int[] hidden_dims, int num_steps, bool trajectory"

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("rnn_dense", TORCH_BOX(&rnn_dense));
  m.impl("rnn_diagonal", TORCH_BOX(&rnn_diagonal));
  m.impl("rnn_dense_backward", TORCH_BOX(&rnn_dense_backward));
  m.impl("rnn_diagonal_backward", TORCH_BOX(&rnn_diagonal_backward));
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def("rnn_dense(Tensor Q, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("rnn_diagonal(Tensor q, " UNROLLED_KERNELS_REST ") -> Tensor");
  m.def("rnn_dense_backward(Tensor grad_y, Tensor Q, " UNROLLED_KERNELS_REST
        ", bool needs_Q, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rnn_diagonal_backward(Tensor grad_y, Tensor q, " UNROLLED_KERNELS_REST
        ", bool needs_q, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) { unrolled_kernels::register_kernels(m); }
#ifdef UNROLLED_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CUDA, m) { unrolled_kernels::register_kernels(m); }
#endif
