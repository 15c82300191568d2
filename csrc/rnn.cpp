// Ops of the family `rnn`: schemas, internal checks and allocation. No autograd, and canonical arguments only:
//
//     Q            [B or 1, d, d], 1 where one matrix serves the batch; its gradient is then summed over the batch
//     q, b, y0     [B, d], expanded where they are shared; y0 None is zero
//     weights      W1 [h_1, d], W2 [h_1, d], W^2 [h_2, h_1] ... W^L [h_L, h_{L-1}], V [d, h_L] in the compute dtype
//     y, grad_y    [B, d], or [k+1, B, d] with trajectory
//
// Strides are free. A gradient that is not needed comes back as an empty tensor, [0], those of the weights as none.
// Kernels have the weights, and their gradient, packed: one matrix after the other (rnn.h).
#include "rnn.h"

#include <cstring>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/rnn_launch.h"
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "cuda/call.h"
#include "cuda/rnn_kernels.h"
#endif

namespace unrolled_kernels {
namespace {

using OptionalTensor = std::optional<Tensor>;

// Copies n elements of `size` bytes between contiguous tensors of one device and dtype, from and to an element of each.
void copy_elements(const Tensor& from, int64_t first, Tensor& to, int64_t to_first, int64_t n, size_t size) {
  if (n == 0) return;
  if (from.is_cpu()) {
    std::memcpy(static_cast<char*>(to.mutable_data_ptr()) + to_first * size,
                static_cast<const char*>(from.const_data_ptr()) + first * size, n * size);
    return;
  }
  Tensor from_flat = torch::stable::flatten(from), to_flat = torch::stable::flatten(to);
  Tensor target = torch::stable::narrow(to_flat, 0, to_first, n);
  torch::stable::copy_(target, torch::stable::narrow(from_flat, 0, first, n));
}

// The tensors behind one call: as they came, or copied where a kernel needs other strides.
struct Arguments {
  OptionalTensor eigenvalues, matrix, b, y0, weights;
  std::vector<std::pair<int64_t, int64_t>> weight_sizes;  // rows and columns of W1, W2, W^2 ... W^L, V
  std::vector<int64_t> hidden_dims;
  int64_t k;
  bool trajectory;
  ScalarType storage;
  int64_t B, d;

  Arguments(const Tensor* eigenvalues_, const Tensor* matrix_, const Tensor& b_, const OptionalTensor& y0_,
            const std::vector<Tensor>& weights_, int64_t k, bool trajectory)
      : k(k), trajectory(trajectory), storage(b_.scalar_type()) {
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
    check_weights(weights_);
    int64_t size = 0;
    for (const auto& [rows, columns] : weight_sizes) size += rows * columns;
    weights = allocate(b_, compute_scalar_type(storage), {size});
    int64_t first = 0;
    for (const Tensor& W : weights_) {
      const Tensor contiguous = W.is_contiguous() ? W : torch::stable::contiguous(W);
      copy_elements(contiguous, 0, *weights, first, W.numel(), compute_size());
      first += W.numel();
    }
  }

  size_t compute_size() const { return storage == ScalarType::Double ? sizeof(double) : sizeof(float); }

  template <typename Storage>
  void fill(RnnInputs<Storage>& p) const {
    p.B = B;
    p.d = d;
    p.k = k;
    p.num_layers = static_cast<int>(hidden_dims.size());
    for (size_t l = 0; l < hidden_dims.size(); ++l) p.hidden_dims[l] = hidden_dims[l];
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
  void check_weights(const std::vector<Tensor>& weights_) {
    const size_t layers = weights_.size() - 2;
    STD_TORCH_CHECK(weights_.size() > 2 && layers <= max_rnn_layers,
                    "weights: expected W1, W2, W^2 ... W^L, V with L "
                    "from 1 to ",
                    max_rnn_layers, ", got ", weights_.size(), " matrices");
    for (size_t i = 0; i < weights_.size(); ++i) {
      const Tensor& W = weights_[i];
      STD_TORCH_CHECK(W.dim() == 2, "weights: expected matrices");
      const int64_t rows = i == layers + 1 ? d : i == 1 ? hidden_dims[0] : W.size(0);
      const int64_t columns = i < 2 ? d : hidden_dims.back();
      STD_TORCH_CHECK(W.size(0) == rows && W.size(1) == columns && W.scalar_type() == compute_scalar_type(storage),
                      "weights: expected [", rows, ", ", columns, "] in the compute dtype for matrix ", i);
      STD_TORCH_CHECK(rows <= max_rnn_width, "weights: expected widths up to ", max_rnn_width, ", got ", rows);
      weight_sizes.emplace_back(rows, columns);
      if (i != 1 && i <= layers) hidden_dims.push_back(rows);
    }
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
  if (like.is_cuda()) {
    return cuda::call(like.get_device_index(), [&](void* workspace, void* stream, size_t* size) {
      return cuda::rnn_kernels(p, workspace, stream, size);
    });
  }
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

using Gradients = std::tuple<Tensor, Tensor, Tensor, std::vector<Tensor>>;

// Gradients of Q (of whichever structure), b, y0 and the weights.
Gradients run_backward(const Tensor& grad_y_, const Arguments& args, bool needs_Q, bool needs_weights) {
  const Tensor& b = *args.b;
  const Tensor grad_y = grad_y_.is_contiguous() ? grad_y_ : torch::stable::contiguous(grad_y_);
  STD_TORCH_CHECK(
      grad_y.numel() == args.B * args.d * (args.trajectory ? args.k + 1 : 1) && grad_y.scalar_type() == args.storage,
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
  std::vector<Tensor> matrices;
  int64_t first = 0;
  for (const auto& [rows, columns] : args.weight_sizes) {
    if (!needs_weights) break;
    matrices.push_back(allocate(b, compute_scalar_type(args.storage), {rows, columns}));
    copy_elements(d_weights, first, matrices.back(), 0, rows * columns, args.compute_size());
    first += rows * columns;
  }
  return {d_Q, db, dy0, std::move(matrices)};
}

Tensor rnn_dense(const Tensor& Q, const Tensor& b, const OptionalTensor& y0, std::vector<Tensor> weights,
                 int64_t num_steps, bool trajectory) {
  return run_forward({nullptr, &Q, b, y0, weights, num_steps, trajectory});
}

Tensor rnn_diagonal(const Tensor& q, const Tensor& b, const OptionalTensor& y0, std::vector<Tensor> weights,
                    int64_t num_steps, bool trajectory) {
  return run_forward({&q, nullptr, b, y0, weights, num_steps, trajectory});
}

Gradients rnn_dense_backward(const Tensor& grad_y, const Tensor& Q, const Tensor& b, const OptionalTensor& y0,
                             std::vector<Tensor> weights, int64_t num_steps, bool trajectory, bool needs_Q,
                             bool needs_weights) {
  return run_backward(grad_y, {nullptr, &Q, b, y0, weights, num_steps, trajectory}, needs_Q, needs_weights);
}

Gradients rnn_diagonal_backward(const Tensor& grad_y, const Tensor& q, const Tensor& b, const OptionalTensor& y0,
                                std::vector<Tensor> weights, int64_t num_steps, bool trajectory, bool needs_q,
                                bool needs_weights) {
  return run_backward(grad_y, {&q, nullptr, b, y0, weights, num_steps, trajectory}, needs_q, needs_weights);
}

#define UNROLLED_KERNELS_REST "Tensor b, Tensor? y0, Tensor[] weights, int num_steps, bool trajectory"

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
        ", bool needs_Q, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor[])");
  m.def("rnn_diagonal_backward(Tensor grad_y, Tensor q, " UNROLLED_KERNELS_REST
        ", bool needs_q, bool needs_weights) -> (Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) { unrolled_kernels::register_kernels(m); }
#ifdef UNROLLED_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CUDA, m) { unrolled_kernels::register_kernels(m); }
#endif
