// Ops of the family `rnn`: schemas, internal checks and allocation. No autograd, and canonical arguments only:
//
//     matrix        Q, [B or 1, d, d], 1 where one serves the batch: its gradient is then summed; or diagonal
//     diagonal      q where Q = diag(q), [B, d]
//     b, y0         [B, d]; no y0: zero
//     weights       W1 [h_1, d], W2 [h_1, d], W^2 [h_2, h_1] ... W^L [h_L, h_{L-1}], V [d, h_L] in the compute dtype
//     y, grad_y     [B, d], or [k+1, B, d] with trajectory
//
// Strides are free, and rows may be expanded. `needs`: bit i for the gradient of forward's argument i; what is not needed
// is neither computed nor allocated, and comes back as an empty tensor, [0], or list. Kernels have the weights, and their
// gradient, packed: one matrix after the other (rnn.h).
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

// bits of `needs`
enum : int64_t {
  need_matrix = 1 << 0,
  need_diagonal = 1 << 1,
  need_b = 1 << 2,
  need_y0 = 1 << 3,
  need_weights = 1 << 4,
};

// The tensors of one call, copied where a kernel needs other strides.
struct Arguments {
  OptionalTensor matrix, diagonal;
  Tensor b;
  OptionalTensor y0;
  const std::vector<Tensor>& weights;
  int64_t k;
  bool trajectory;
  bool needs_matrix = false;
  // what check() finds
  MatrixLayout layout{};
  int64_t B = 0, d = 0;
  ScalarType storage{}, compute{};
  std::vector<std::pair<int64_t, int64_t>> weight_sizes{};  // rows and columns of W1, W2, W^2 ... W^L, V
  std::vector<int64_t> hidden_dims{};
  OptionalTensor packed{};  // the weights one after the other

  void check() {
    STD_TORCH_CHECK(b.dim() == 2, "b: expected [B, d]");
    STD_TORCH_CHECK(k >= 0, "num_steps: expected a non-negative number");
    STD_TORCH_CHECK(matrix.has_value() != diagonal.has_value(), "matrix, diagonal: expected one of them");
    B = b.size(0);
    d = b.size(1);
    storage = b.scalar_type();
    compute = compute_scalar_type(storage);
    STD_TORCH_CHECK(d <= max_rnn_dim, "b: expected d <= ", max_rnn_dim, ", got ", d);
    check_rows("b", b);
    if (diagonal) check_rows("diagonal", *diagonal);
    if (y0) check_rows("y0", *y0);
    if (matrix) {
      STD_TORCH_CHECK(matrix->dim() == 3 && (matrix->size(0) == B || matrix->size(0) == 1) && matrix->size(1) == d &&
                          matrix->size(2) == d && matrix->scalar_type() == storage,
                      "matrix: expected [B or 1, d, d] in the dtype of b");
      layout = prepare_matrix(*matrix, needs_matrix);
    }
    check_weights();
    int64_t size = 0;
    for (const auto& [rows, columns] : weight_sizes) size += rows * columns;
    packed = allocate(b, compute, {size});
    int64_t first = 0;
    for (const Tensor& W : weights) {
      const Tensor whole = W.is_contiguous() ? W : as_contiguous(W);
      copy_elements(whole, 0, *packed, first, W.numel(), compute_size());
      first += W.numel();
    }
  }

  size_t compute_size() const { return compute == ScalarType::Double ? sizeof(double) : sizeof(float); }

  template <typename Storage>
  void fill(RnnInputs<Storage>& p) const {
    p.B = B;
    p.d = d;
    p.k = k;
    p.num_layers = static_cast<int>(hidden_dims.size());
    for (size_t l = 0; l < hidden_dims.size(); ++l) p.hidden_dims[l] = hidden_dims[l];
    p.weights = data<compute_type<Storage>>(*packed);
    p.matrix = matrix ? data<Storage>(*matrix) : nullptr;
    p.matrix_stride = matrix ? batch_stride(*matrix) : 0;
    p.diagonal = diagonal ? data<Storage>(*diagonal) : nullptr;
    p.diagonal_stride = diagonal ? batch_stride(*diagonal) : 0;
    p.b = data<Storage>(b);
    p.b_stride = batch_stride(b);
    p.y0 = y0 ? data<Storage>(*y0) : nullptr;
    p.y0_stride = y0 ? batch_stride(*y0) : 0;
    p.transposed = layout.transposed;
    p.separate = layout.separate;
    p.trajectory = trajectory;
  }

 private:
  void check_weights() {
    const size_t layers = weights.size() - 2;
    STD_TORCH_CHECK(weights.size() > 2 && layers <= max_rnn_layers,
                    "weights: expected W1, W2, W^2 ... W^L, V with L from 1 to ", max_rnn_layers, ", got ",
                    weights.size(), " matrices");
    for (size_t i = 0; i < weights.size(); ++i) {
      const Tensor& W = weights[i];
      STD_TORCH_CHECK(W.dim() == 2, "weights: expected matrices");
      const int64_t rows = i == layers + 1 ? d : i == 1 ? hidden_dims[0] : W.size(0);
      const int64_t columns = i < 2 ? d : hidden_dims.back();
      STD_TORCH_CHECK(W.size(0) == rows && W.size(1) == columns && W.scalar_type() == compute, "weights: expected [",
                      rows, ", ", columns, "] in the compute dtype for matrix ", i);
      STD_TORCH_CHECK(rows <= max_rnn_width, "weights: expected widths up to ", max_rnn_width, ", got ", rows);
      weight_sizes.emplace_back(rows, columns);
      if (i != 1 && i <= layers) hidden_dims.push_back(rows);
    }
  }
  void check_rows(const char* name, Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == d && x.scalar_type() == storage, name,
                    ": expected [B, d] in the dtype of b");
    make_rows_contiguous(x);
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

Tensor rnn(OptionalTensor matrix, OptionalTensor diagonal, Tensor b, OptionalTensor y0, std::vector<Tensor> weights,
           int64_t num_steps, bool trajectory) {
  Arguments args{matrix, diagonal, b, y0, weights, num_steps, trajectory};
  args.check();
  Tensor y = trajectory ? allocate(b, args.storage, {args.k + 1, args.B, args.d})
                        : allocate(b, args.storage, {args.B, args.d});
  if (args.k == 0) {
    y0 ? torch::stable::copy_(y, *y0) : torch::stable::zero_(y);
    return y;
  }
  dispatch_storage(args.storage, [&](auto type) {
    RnnForward<decltype(type)> p{};
    args.fill(p);
    p.y = mutable_data<decltype(type)>(y);
    launch(b, p);
  });
  return y;
}

// of the arguments of forward, in their order
using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<Tensor>>;

Gradients rnn_backward(Tensor grad_y, OptionalTensor matrix, OptionalTensor diagonal, Tensor b, OptionalTensor y0,
                       std::vector<Tensor> weights, int64_t num_steps, bool trajectory, int64_t needs) {
  Arguments args{matrix, diagonal, b, y0, weights, num_steps, trajectory, (needs & need_matrix) != 0};
  args.check();
  STD_TORCH_CHECK(
      grad_y.numel() == args.B * args.d * (trajectory ? args.k + 1 : 1) && grad_y.scalar_type() == args.storage,
      "grad_y: expected the shape and dtype of y");
  if (!grad_y.is_contiguous()) grad_y = as_contiguous(grad_y);

  const auto nothing = [&] { return allocate(b, args.storage, {0}); };
  const auto rows = [&](bool needed) { return needed ? allocate(b, args.storage, {args.B, args.d}) : nothing(); };
  Tensor d_matrix =
      matrix && needs & need_matrix ? allocate(b, args.storage, {matrix->size(0), args.d, args.d}) : nothing();
  Tensor d_diagonal = rows(diagonal && needs & need_diagonal);
  Tensor db = rows(needs & need_b), dy0 = rows(y0 && needs & need_y0);
  Tensor d_packed = allocate(b, args.compute, {needs & need_weights ? args.packed->numel() : 0});
  const auto run = [&](auto type) {
    using Storage = decltype(type);
    RnnBackward<Storage> p{};
    args.fill(p);
    p.grad_y = data<Storage>(grad_y);
    p.d_matrix = mutable_data<Storage>(d_matrix);
    p.d_diagonal = mutable_data<Storage>(d_diagonal);
    p.db = mutable_data<Storage>(db);
    p.dy0 = mutable_data<Storage>(dy0);
    p.d_weights = mutable_data<compute_type<Storage>>(d_packed);
    launch(b, p);
  };
  if (args.k > 0) {
    dispatch_storage(args.storage, run);
  } else {
    // y_0 came back and nothing else counts, whatever it is: its product with zero may be NaN
    for (Tensor* grad : {&d_matrix, &d_diagonal, &db, &d_packed}) torch::stable::zero_(*grad);
    if (dy0.numel() > 0) torch::stable::copy_(dy0, trajectory ? torch::stable::select(grad_y, 0, 0) : grad_y);
  }
  std::vector<Tensor> d_weights;
  int64_t first = 0;
  for (const auto& [rows, columns] : args.weight_sizes) {
    if (!(needs & need_weights)) break;
    d_weights.push_back(allocate(b, args.compute, {rows, columns}));
    copy_elements(d_packed, first, d_weights.back(), 0, rows * columns, args.compute_size());
    first += rows * columns;
  }
  return {d_matrix, d_diagonal, db, dy0, std::move(d_weights)};
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("rnn", TORCH_BOX(&rnn));
  m.impl("rnn_backward", TORCH_BOX(&rnn_backward));
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def(
      "rnn(Tensor? matrix, Tensor? diagonal, Tensor b, Tensor? y0, Tensor[] weights, SymInt num_steps, "
      "bool trajectory) -> Tensor");
  m.def(
      "rnn_backward(Tensor grad_y, Tensor? matrix, Tensor? diagonal, Tensor b, Tensor? y0, Tensor[] weights, "
      "SymInt num_steps, bool trajectory, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor[])");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) { unrolled_kernels::register_kernels(m); }
#ifdef UNROLLED_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CUDA, m) { unrolled_kernels::register_kernels(m); }
#endif
