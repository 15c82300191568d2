// k cells of the RNN and their adjoint: one launch forward; one launch backward, and one that adds up the gradients of
// the weights that each block leaves. A block takes one tile of the batch after another, rnn_tile.cuh, and has what the
// steps read in shared memory, rnn_cell.cuh.
//
// Flops of one sample and step, P weights: 2 (P + d^2) forward; four times that backward, for the states, the hidden
// layers, the adjoints and the gradients. Q, b and the outputs cross memory once, whatever k is.
#include "cuda/launch.cuh"
#include "cuda/rnn_cell.cuh"
#include "cuda/rnn_kernels.h"

namespace unrolled_kernels::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(T::max_threads, T::blocks)
    rnn_kernel(const __grid_constant__ RnnForward<typename T::Storage> p,
               const __grid_constant__ RnnPlan<typename T::C> plan) {
  RnnCell<T> cell(p, plan);
  for (int64_t first = blockIdx.x * static_cast<int64_t>(T::samples); first < p.B; first += plan.grid * T::samples) {
    const int count = p.B - first < T::samples ? static_cast<int>(p.B - first) : T::samples;
    __syncthreads();
    cell.load_samples(first, count);
    __syncthreads();
    for (int64_t t = 0; t < p.k; ++t) {
      if (p.trajectory) cell.store(0, first, count, p.y + t * p.B * p.d);
      cell.hidden();
      cell.output();
    }
    cell.store(0, first, count, p.trajectory ? p.y + p.k * p.B * p.d : p.y);
  }
}

template <typename T>
__global__ void __launch_bounds__(T::max_threads, T::backward_blocks)
    rnn_backward_kernel(const __grid_constant__ RnnBackward<typename T::Storage> p,
                        const __grid_constant__ RnnPlan<typename T::C> plan) {
  using C = typename T::C;
  RnnCell<T> cell(p, plan);
  cell.clear_gradient();
  for (int64_t first = blockIdx.x * static_cast<int64_t>(T::samples); first < p.B; first += plan.grid * T::samples) {
    const int count = p.B - first < T::samples ? static_cast<int>(p.B - first) : T::samples;
    __syncthreads();
    cell.load_samples(first, count);
    cell.load(p.grad_y + (p.trajectory ? p.k * p.B * p.d : 0), p.d, first, count, plan.a);
    __syncthreads();
    for (int64_t t = 0; t < p.k; ++t) {
      cell.copy(cell.vector(0), cell.state(t));
      if (t + 1 == p.k) break;
      cell.hidden();
      cell.output();
    }
    for (int64_t t = p.k - 1; t >= 0; --t) {
      if (t + 1 < p.k) {
        cell.copy(cell.state(t), cell.vector(0));
        __syncthreads();
      }
      cell.hidden();
      cell.adjoint(t, p.d_weights, p.d_matrix, [&](int sample, int i) {
        const bool given = p.trajectory && sample < count;
        return given ? to_compute(p.grad_y[(t * p.B + first + sample) * p.d + i]) : C(0);
      });
    }
    cell.store_sums_over_steps(first, count, p);
    if (p.dy0) cell.store(plan.a, first, count, p.dy0);
  }
  __syncthreads();
  cell.store_gradient();
}

// Row n of the partial sums: the gradient of the weights, then that of a shared Q, as far as they are wanted.
template <typename Storage>
struct RnnSums {
  using C = compute_type<Storage>;
  const C* partials;
  int64_t rows, row_size, weights_size;
  C* d_weights;
  Storage* d_matrix;
};

template <typename Storage>
__global__ void __launch_bounds__(1024)
    sum_rnn_partials_kernel(const __grid_constant__ RnnSums<Storage> p, ColumnSums columns) {
  int64_t n;
  double sum;
  if (!columns.sum(p.partials, p.rows, p.row_size, blockIdx.x, n, sum)) return;
  const auto value = static_cast<compute_type<Storage>>(sum);
  if (n < p.weights_size) {
    p.d_weights[n] = value;
  } else {
    p.d_matrix[n - p.weights_size] = to_storage<Storage>(value);
  }
}

template <typename Storage>
const RnnBackward<Storage>* backward_of(const RnnForward<Storage>&) {
  return nullptr;
}
template <typename Storage>
const RnnBackward<Storage>* backward_of(const RnnBackward<Storage>& p) {
  return &p;
}

// Where everything lies for tiles T. What does not fit in `limit` bytes of shared memory is in the workspace, the weights
// where they are; false if that is against T::on_chip.
template <typename T, typename Problem>
bool plan_rnn(const Device& device, const Problem& p, int64_t limit, RnnPlan<typename T::C>& plan) {
  using C = typename T::C;
  const auto* backward = backward_of(p);
  const int d = static_cast<int>(p.d);
  plan = {};
  plan.d = d;
  plan.k = backward ? p.k : 0;
  plan.backward = backward;
  plan.diagonal = p.diagonal;
  plan.shared_matrix = p.matrix && p.matrix_stride == 0;

  const auto take = [&](int64_t entries) {
    plan.features += static_cast<int>(entries);
    return plan.features - static_cast<int>(entries);
  };
  const int y = take(d);
  plan.g = take(d);
  plan.b = take(d);
  if (plan.diagonal) plan.q = take(d);

  int64_t packed = 0, widest = d;
  const auto add_layer = [&](int64_t rows, int64_t columns, int input, int output) {
    const int m = static_cast<int>(rows), n = static_cast<int>(columns);
    const int64_t at = plan.weights.size, transposed_at = at + T::matrix_size(m, n);
    plan.layers[plan.num_matrices++] = {m, n, packed, {at, transposed_at}, input, output};
    plan.weights.size = transposed_at + (backward ? T::matrix_size(n, m) : 0);
    packed += rows * columns;
    widest = rows > widest ? rows : widest;
  };
  // forward has a hidden layer and the one before, in two places by turns
  int64_t widest_hidden = 0;
  for (int l = 0; l < p.num_layers; ++l) {
    widest_hidden = p.hidden_dims[l] > widest_hidden ? p.hidden_dims[l] : widest_hidden;
  }
  int places[2] = {}, h = 0;
  for (int l = 0; l < p.num_layers; ++l) {
    const int before = h;
    if (backward || l < 2) places[l % 2] = take(backward ? p.hidden_dims[l] : widest_hidden);
    h = places[l % 2];
    if (l > 0) {
      add_layer(p.hidden_dims[l], p.hidden_dims[l - 1], before, h);
      continue;
    }
    add_layer(p.hidden_dims[0], d, y, h);
    add_layer(p.hidden_dims[0], d, plan.g, h);
  }
  add_layer(d, p.hidden_dims[p.num_layers - 1], h, y);

  plan.transposed_matrix = T::matrix_size(d, d);
  if (plan.shared_matrix) plan.matrix.size = (backward ? 2 : 1) * plan.transposed_matrix;
  if (p.matrix && !plan.shared_matrix) plan.matrix.size = T::sample_lanes * T::own_matrix_stride(p.d);
  if (backward) {
    plan.a = take(d);
    plan.e = take(d);
    for (int& delta : plan.delta) delta = take(widest);
    plan.weights_gradient_size = backward->d_weights ? packed : 0;
    plan.gradient_size = plan.weights_gradient_size + (plan.shared_matrix && backward->d_matrix ? p.d * p.d : 0);
    plan.gradient.size = T::strands * plan.gradient_size;
    plan.trajectory.size = 2 * p.k * p.d * T::stride;
  }

  plan.vectors.size = static_cast<int64_t>(plan.features) * T::stride;
  for (RnnPart* part : {&plan.vectors, &plan.weights, &plan.matrix, &plan.gradient, &plan.trajectory}) {
    const int64_t bytes = round_up(part->size * static_cast<int64_t>(sizeof(C)), 16);
    part->offset = plan.shared_bytes;
    // two blocks on a multiprocessor are worth more than a trajectory there
    part->on_chip = plan.shared_bytes + bytes <= (part == &plan.trajectory ? device.shared_memory / 2 : limit);
    const bool has_place = part == &plan.weights || part == &plan.gradient;
    if (part->on_chip) plan.shared_bytes += bytes;
    if (!part->on_chip && !has_place) plan.slot_bytes += bytes;
  }
  // as few turns as the most threads take, and no more threads than those
  const int64_t groups = ceil_div(widest, T::outputs), turns = ceil_div(groups * T::sample_lanes, T::max_threads);
  plan.threads = static_cast<int>(round_up(ceil_div(groups, turns) * T::sample_lanes, 32));
  return !T::on_chip || (plan.vectors.on_chip && plan.weights.on_chip && plan.matrix.on_chip && plan.gradient.on_chip);
}

template <typename T>
struct TypeOf {
  using type = T;
};

// f(TypeOf<T>(), plan) with the tiles T for this problem.
template <typename Storage, typename Problem, typename F>
const char* with_plan(const Device& device, const Problem& p, F f) {
  RnnPlan<compute_type<Storage>> plan;
  const int64_t limit = device.shared_memory;
  if constexpr (std::is_same<Storage, float>::value) {
    using Many = RnnTile<float, 128, 5, true>;
    using Some = RnnTile<float, 32, 4, true>;
    using Few = RnnTile<float, 8, 1, true>;
    const auto fill_the_device = [&](int samples) { return ceil_div(p.B, samples) >= device.multiprocessors; };
    // two blocks on a multiprocessor, so that one works while the other waits at a barrier
    if (fill_the_device(Many::samples) && plan_rnn<Many>(device, p, limit / 2, plan)) return f(TypeOf<Many>(), plan);
    if (fill_the_device(Some::samples) && plan_rnn<Some>(device, p, limit, plan)) return f(TypeOf<Some>(), plan);
    if (plan_rnn<Few>(device, p, limit, plan)) return f(TypeOf<Few>(), plan);
  }
  using Any = RnnTile<Storage, 16, 4, false>;
  plan_rnn<Any>(device, p, limit, plan);
  return f(TypeOf<Any>(), plan);
}

// The largest index within a block is an int.
template <typename Storage>
const char* check_sizes(const RnnInputs<Storage>& p) {
  int64_t largest = p.d;
  for (int l = 0; l < p.num_layers; ++l) largest = p.hidden_dims[l] > largest ? p.hidden_dims[l] : largest;
  return largest <= 8192 ? nullptr : "rnn: d and hidden_dims of at most 8192 expected; use backend='eager' beyond";
}

template <typename Storage>
int64_t packed_weights_size(const RnnInputs<Storage>& p) {
  int64_t size = 2 * p.hidden_dims[0] * p.d + p.d * p.hidden_dims[p.num_layers - 1];
  for (int l = 1; l < p.num_layers; ++l) size += p.hidden_dims[l] * p.hidden_dims[l - 1];
  return size;
}

// What is left to do where there are no samples: sums of nothing.
template <typename Storage>
const char* clear_rnn_sums(const RnnBackward<Storage>& p, void* stream) {
  const auto clear = [&](void* to, int64_t bytes) {
    if (!to || bytes == 0) return cudaSuccess;
    return cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  };
  using C = compute_type<Storage>;
  cudaError_t error = clear(p.d_weights, packed_weights_size(p) * static_cast<int64_t>(sizeof(C)));
  if (error == cudaSuccess && p.matrix_stride == 0) {
    error = clear(p.d_matrix, p.d * p.d * static_cast<int64_t>(sizeof(Storage)));
  }
  return describe(error);
}

}  // namespace

template <typename Storage>
const char* rnn_kernels(const RnnForward<Storage>& p, void* workspace, void* stream, size_t* size) {
  if (p.B == 0 || p.d == 0) return nullptr;
  if (const char* error = check_sizes(p)) return error;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  return with_plan<Storage>(device, p, [&](auto tile, auto& plan) -> const char* {
    using T = typename decltype(tile)::type;
    const auto kernel = rnn_kernel<T>;
    plan.grid = persistent_grid(device, kernel, ceil_div(p.B, T::samples), plan.threads, plan.shared_bytes);
    if (size) {
      *size = static_cast<size_t>(plan.grid * plan.slot_bytes);
      return nullptr;
    }
    plan.slots = static_cast<unsigned char*>(workspace);
    return launch(kernel, plan.grid, plan.threads, plan.shared_bytes, stream, p, plan);
  });
}

template <typename Storage>
const char* rnn_kernels(const RnnBackward<Storage>& p, void* workspace, void* stream, size_t* size) {
  if (p.B == 0 || p.d == 0) return size ? nullptr : clear_rnn_sums(p, stream);
  if (const char* error = check_sizes(p)) return error;
  const Device device;
  if (device.error != cudaSuccess) return describe(device.error);
  return with_plan<Storage>(device, p, [&](auto tile, auto& plan) -> const char* {
    using T = typename decltype(tile)::type;
    const auto kernel = rnn_backward_kernel<T>;
    plan.grid = persistent_grid(device, kernel, ceil_div(p.B, T::samples), plan.threads, plan.shared_bytes);
    Arena arena(workspace);
    plan.partials = arena.take<typename T::C>(plan.grid * plan.gradient_size);
    plan.slots = arena.take<unsigned char>(plan.grid * plan.slot_bytes);
    if (size) {
      *size = static_cast<size_t>(arena.used());
      return nullptr;
    }
    const char* error = launch(kernel, plan.grid, plan.threads, plan.shared_bytes, stream, p, plan);
    if (error || plan.gradient_size == 0) return error;
    const RnnSums<Storage> sums{plan.partials, plan.grid, plan.gradient_size, plan.weights_gradient_size,
                                p.d_weights,   p.d_matrix};
    const ColumnSums columns(sums.rows, sums.row_size);
    return launch(sum_rnn_partials_kernel<Storage>, columns.blocks(sums.row_size), columns.threads(),
                  columns.shared_bytes(), stream, sums, columns);
  });
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                          \
  template const char* rnn_kernels(const RnnForward<Storage>&, void*, void*, size_t*); \
  template const char* rnn_kernels(const RnnBackward<Storage>&, void*, void*, size_t*);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
