// A block's memory and the cell of the RNN on it, forward and backward.
//
// What a block keeps, C = compute type, S samples, n = stride of a vector, features = entries of all vectors:
//
//     vectors      [features, n]             y, g, b, q, h^1 ... h^L, of which forward has two; in backward a, e and
//                                            two deltas
//     weights      RnnTile::matrix_index; in backward their transposes, too, so that both products read packs
//     matrix       Q: one, likewise, or S of them, with four samples side by side
//     gradient     [strands, d_weights and dQ if shared] sums over the tiles of this block
//     trajectory   [2, k, d, n]              y_t and e_t
//
// Backward keeps y_t and replays the hidden layers of each step, for one forward step in four. In float32, 8 samples, d = 5,
// three layers of 20, k = 20: 5 KB instead of 34 KB with the hidden layers. e_t, 5 KB more, is kept so that the gradients
// of Q, q and b are written once.
#pragma once

#include "cuda/rnn_tile.cuh"

namespace unrolled_kernels::cuda {

// `size` elements in shared memory, from byte `offset` on, or, if they do not fit, elsewhere.
struct RnnPart {
  int64_t size, offset;
  bool on_chip;
};

template <typename C>
struct RnnPlan {
  int64_t k;  // steps that the trajectory has room for
  int d, num_matrices;
  bool backward;
  RnnLayer layers[max_rnn_layers + 2];
  int64_t transposed_matrix;    // first element of Q' of a shared Q
  int g, b, q, a, e, delta[2];  // where vectors begin; y is the first
  int features;
  RnnPart vectors, weights, matrix, gradient, trajectory;
  int64_t weights_gradient_size, gradient_size;  // of one strand: that of the weights, and with that of a shared Q
  bool shared_matrix, diagonal;

  int64_t grid, shared_bytes, slot_bytes;
  int threads;
  unsigned char* slots;  // [grid] pieces of the workspace for what is not on chip
  C* partials;           // [grid, gradient_size], the gradient of each block
};

template <typename T>
class RnnCell {
  using Storage = typename T::Storage;
  using C = typename T::C;

 public:
  __device__ RnnCell(const RnnInputs<Storage>& p, const RnnPlan<C>& plan) : p_(p), plan_(plan), d_(plan.d) {
    unsigned char* const on_chip = dynamic_shared_memory();
    Arena slot(plan.slots + blockIdx.x * plan.slot_bytes);
    const auto place = [&](const RnnPart& part) {
      if (T::on_chip || part.on_chip) return reinterpret_cast<C*>(on_chip + part.offset);
      return slot.take<C>(part.size);
    };
    vectors_ = place(plan.vectors);
    matrix_ = place(plan.matrix);
    gradient_ = plan.partials + blockIdx.x * plan.gradient_size;
    if (T::on_chip || plan.gradient.on_chip) gradient_ = reinterpret_cast<C*>(on_chip + plan.gradient.offset);
    weights_ = p.weights;
    if (has_weights()) weights_ = copy_weights(reinterpret_cast<C*>(on_chip + plan.weights.offset));
    trajectory_ = plan.trajectory.on_chip ? reinterpret_cast<C*>(on_chip + plan.trajectory.offset)
                                          : slot.take<C>(plan.trajectory.size);
    if (plan.shared_matrix) copy_matrix(p.matrix, d_, d_, matrix_, matrix_ + plan.transposed_matrix);
  }

  __device__ __forceinline__ C* vector(int feature) const { return vectors_ + feature * T::stride; }
  __device__ __forceinline__ C* state(int64_t t) const { return trajectory_ + t * (d_ * T::stride); }
  __device__ __forceinline__ C* message(int64_t t) const { return state(plan_.k + t); }

  // The operands of the samples [first, first + count); zero beyond.
  __device__ void load_samples(int64_t first, int count) {
    load(p_.b, p_.b_stride, first, count, plan_.b);
    load(p_.y0, p_.y0_stride, first, p_.y0 ? count : 0, 0);
    if (plan_.diagonal) load(p_.diagonal, p_.diagonal_stride, first, count, plan_.q);
    if (plan_.diagonal || plan_.shared_matrix) return;
    const int size = d_ * d_;
    for (int n = threadIdx.x; n < T::samples * size; n += blockDim.x) {
      const int sample = n / size, element = n % size;
      matrix_[T::own_matrix_index(d_, sample, element)] =
          sample < count ? to_compute(p_.matrix[(first + sample) * p_.matrix_stride + element]) : C(0);
    }
  }
  // rows [d] of a tensor as a vector
  __device__ void load(const Storage* from, int64_t from_stride, int64_t first, int count, int feature) {
    for_entries(T::samples, [&](int sample, int i, int) {
      vector(feature)[i * T::stride + sample] =
          sample < count ? to_compute(from[(first + sample) * from_stride + i]) : C(0);
    });
  }
  // The inverse, to rows that are contiguous.
  __device__ void store(int feature, int64_t first, int count, Storage* to) const {
    for_entries(count, [&](int sample, int i, int n) {
      to[first * d_ + n] = to_storage<Storage>(vector(feature)[i * T::stride + sample]);
    });
  }
  __device__ void copy(const C* from, C* to) const {
    for (int n = threadIdx.x; n < d_ * T::stride; n += blockDim.x) to[n] = from[n];
  }
  __device__ void clear_gradient() const {
    for (int64_t n = threadIdx.x; n < plan_.gradient.size; n += blockDim.x) gradient_[n] = 0;
  }
  __device__ void store_gradient() const {
    const int64_t size = plan_.gradient_size;
    C* partial = plan_.partials + blockIdx.x * size;
    if (partial == gradient_) return;
    for (int64_t n = threadIdx.x; n < size; n += blockDim.x) {
      C sum = gradient_[n];
      for (int strand = 1; strand < T::strands; ++strand) sum += gradient_[strand * size + n];
      partial[n] = sum;
    }
  }

  // g and the hidden layers of y. Ends with a barrier.
  __device__ __forceinline__ void hidden() const {
    const C* b = vector(plan_.b);
    tile_.for_outputs(d_, [&](int first, Sums& sums) {
      multiply_by_matrix<false>(vector(0), first, sums);
      tile_.store(sums, first, d_, vector(plan_.g),
                  [&](C sum, int i, int sample) { return sum + b[i * T::stride + sample]; });
    });
    __syncthreads();
    for (int l = 1; l + 1 < plan_.num_matrices; ++l) {
      const RnnLayer& layer = plan_.layers[l];
      tile_.for_outputs(layer.rows, [&](int first, Sums& sums) {
        if (l == 1) multiply<false>(plan_.layers[0], vector(0), first, sums);
        multiply<false>(layer, vector(layer.input), first, sums);
        // a NaN stays
        tile_.store(sums, first, layer.rows, vector(layer.output),
                    [](C sum, int, int) { return sum < 0 ? C(0) : sum; });
      });
      __syncthreads();
    }
  }

  // y = V h^L, after hidden. Ends with a barrier.
  __device__ __forceinline__ void output() const {
    const RnnLayer& V = plan_.layers[plan_.num_matrices - 1];
    tile_.for_outputs(V.rows, [&](int first, Sums& sums) {
      multiply<false>(V, vector(V.input), first, sums);
      tile_.store(sums, first, V.rows, vector(0), [](C sum, int, int) { return sum; });
    });
    __syncthreads();
  }

  // a = the adjoint of y_t, of a = that of y_{t+1}, after hidden; given(sample, i): the cotangent of y_t itself. Adds to
  // the gradient, leaves e in message(t), and ends with a barrier.
  template <typename Given>
  __device__ __forceinline__ void adjoint(int64_t t, bool needs_weights, bool needs_matrix, Given given) const {
    const C* above = vector(plan_.a);
    for (int l = plan_.num_matrices - 1; l > 1; --l) {
      const RnnLayer& layer = plan_.layers[l];
      const C* h = vector(layer.input);
      C* delta = vector(plan_.delta[l % 2]);
      if (needs_weights) add_outer_products(layer, above, h);
      tile_.for_outputs(layer.columns, [&](int first, Sums& sums) {
        multiply<true>(layer, above, first, sums);
        tile_.store(sums, first, layer.columns, delta,
                    [&](C sum, int i, int sample) { return h[i * T::stride + sample] > 0 ? sum : C(0); });
      });
      __syncthreads();
      above = delta;
    }
    const RnnLayer &W1 = plan_.layers[0], &W2 = plan_.layers[1];
    if (needs_weights) {
      add_outer_products(W1, above, vector(0));
      add_outer_products(W2, above, vector(plan_.g));
    }
    tile_.for_outputs(d_, [&](int first, Sums& sums) {
      multiply<true>(W2, above, first, sums);
      const auto same = [](C sum, int, int) { return sum; };
      tile_.store(sums, first, d_, vector(plan_.e), same);
      tile_.store(sums, first, d_, message(t), same);
    });
    __syncthreads();
    const C* e = vector(plan_.e);
    if (needs_matrix && plan_.shared_matrix) {
      const int64_t size = plan_.gradient_size;
      tile_.add_outer_products(e, vector(0), d_, d_, gradient_ + size - d_ * d_, size);
    }
    tile_.for_outputs(d_, [&](int first, Sums& sums) {
      multiply<true>(W1, above, first, sums);
      multiply_by_matrix<true>(e, first, sums);
      tile_.store(sums, first, d_, vector(plan_.a), [&](C sum, int i, int sample) { return sum + given(sample, i); });
    });
    __syncthreads();
  }

  // The gradients that are sums over the steps of what the trajectory holds.
  __device__ void store_sums_over_steps(int64_t first, int count, const RnnBackward<Storage>& p) const {
    for_entries(count, [&](int sample, int i, int n) {
      C of_e = 0, of_products = 0;
      for (int64_t t = 0; t < p.k; ++t) {
        const C e = message(t)[i * T::stride + sample];
        of_e += e;
        of_products += e * state(t)[i * T::stride + sample];
      }
      if (p.db) p.db[first * d_ + n] = to_storage<Storage>(of_e);
      if (p.d_diagonal) p.d_diagonal[first * d_ + n] = to_storage<Storage>(of_products);
    });
    if (!p.d_matrix || plan_.shared_matrix) return;
    // a thread: one column and `outputs` rows of the matrices of four samples
    const int row_groups = static_cast<int>(ceil_div(d_, T::outputs));
    for (int n = threadIdx.x; n < T::sample_lanes * row_groups * d_; n += blockDim.x) {
      const int j = n % d_, row = n / d_ % row_groups * T::outputs, sample = n / d_ / row_groups * T::width;
      Sums sums = {};
      for (int64_t t = 0; t < p.k; ++t) {
        const auto y = load_pack<T::width>(state(t) + j * T::stride + sample);
#pragma unroll
        for (int r = 0; r < T::outputs; ++r) {
          const int i = row + r < d_ ? row + r : d_ - 1;
          const auto e = load_pack<T::width>(message(t) + i * T::stride + sample);
#pragma unroll
          for (int s = 0; s < T::width; ++s) sums[r][s] += e.at[s] * y.at[s];
        }
      }
#pragma unroll
      for (int s = 0; s < T::width; ++s) {
        Storage* to = p.d_matrix + (first + sample + s) * d_ * d_ + j;
#pragma unroll
        for (int r = 0; r < T::outputs; ++r) {
          if (sample + s < count && row + r < d_) to[(row + r) * d_] = to_storage<Storage>(sums[r][s]);
        }
      }
    }
  }

 private:
  using Sums = C[T::outputs][T::width];

  // f(sample, i, n) for n = sample d + i
  template <typename F>
  __device__ __forceinline__ void for_entries(int count, F f) const {
    for (int n = threadIdx.x; n < count * d_; n += blockDim.x) f(n / d_, n % d_, n);
  }

  __device__ const C* copy_weights(C* to) const {
    for (int l = 0; l < plan_.num_matrices; ++l) {
      const RnnLayer& layer = plan_.layers[l];
      copy_matrix(p_.weights + layer.offset, layer.rows, layer.columns, to + layer.on_chip[0], to + layer.on_chip[1]);
    }
    return to;
  }
  // M, and in backward M', as products read them
  template <typename From>
  __device__ void copy_matrix(const From* m, int rows, int columns, C* to, C* transposed) const {
    for (int n = threadIdx.x; n < rows * columns; n += blockDim.x) {
      const int i = n / columns, j = n % columns;
      to[T::matrix_index(columns, i, j)] = to_compute(m[n]);
      if (plan_.backward) transposed[T::matrix_index(rows, j, i)] = to_compute(m[n]);
    }
  }
  // whether the weights are in shared memory
  __device__ __forceinline__ bool has_weights() const { return T::on_chip || plan_.weights.on_chip; }

  template <bool transposed>
  __device__ __forceinline__ void multiply(const RnnLayer& layer, const C* x, int first, Sums& sums) const {
    if (has_weights()) {
      tile_.multiply(weights_ + layer.on_chip[transposed], transposed ? layer.rows : layer.columns, x, first, sums);
    } else {
      tile_.template multiply_global<transposed>(weights_ + layer.offset, layer.rows, layer.columns, x, first, sums);
    }
  }
  // sums += Q x, or Q'x
  template <bool transposed>
  __device__ __forceinline__ void multiply_by_matrix(const C* x, int first, Sums& sums) const {
    if (plan_.shared_matrix) {
      tile_.multiply(matrix_ + (transposed ? plan_.transposed_matrix : 0), d_, x, first, sums);
    } else if (!plan_.diagonal) {
      tile_.template multiply_own<transposed>(matrix_, d_, x, first, sums);
    } else {
      const C* q = vector(plan_.q);
#pragma unroll
      for (int r = 0; r < T::outputs; ++r) {
        const int at = (first + r < d_ ? first + r : d_ - 1) * T::stride + tile_.sample;
        const auto factors = load_pack<T::width>(q + at), v = load_pack<T::width>(x + at);
#pragma unroll
        for (int s = 0; s < T::width; ++s) sums[r][s] += factors.at[s] * v.at[s];
      }
    }
  }
  __device__ __forceinline__ void add_outer_products(const RnnLayer& layer, const C* a, const C* x) const {
    tile_.add_outer_products(a, x, layer.rows, layer.columns, gradient_ + layer.offset, plan_.gradient_size);
  }

  const RnnInputs<Storage>& p_;
  const RnnPlan<C>& plan_;
  const int d_;
  const T tile_;
  C *vectors_, *matrix_, *gradient_, *trajectory_;
  const C* weights_;
};

}  // namespace unrolled_kernels::cuda
