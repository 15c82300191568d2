// What a training loop does around its gradient: epochs, a step of the optimizer, and the parameters that are kept.
//
// A file that includes this includes <cmath>, and on x86-64 <immintrin.h>, before "cpu/simd/simd.h".
#pragma once

#include "cpu/simd/arena.h"
#include "experiments/cpu/vector_math.h"
#include "experiments/training.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

constexpr double beta1 = 0.9, beta2 = 0.999, adam_eps = 1e-8;

// The parameters of one model in training. `size` is a whole number of vectors: what pads them is zero, and stays so.
template <typename C>
struct Parameters {
  int64_t size;
  C *theta, *m, *v, *best, *grad;

  Parameters(int64_t elements, Arena& arena) : size(ceil_div(elements, lanes<C>) * lanes<C>) {
    for (C** x : {&theta, &m, &v, &best, &grad}) *x = arena.take<C>(size);
  }

  // place(i) is where parameter i of [P] stands
  template <typename Place>
  void load_model(const Training<C>& p, int64_t model, const Place& place) const {
    for (C* x : {theta, m, v, best, grad}) fill_zero(x, size);
    for (int64_t i = 0; i < p.P; ++i) {
      theta[place(i)] = p.theta[model * p.P + i];
      m[place(i)] = p.first_moment[model * p.P + i];
      v[place(i)] = p.second_moment[model * p.P + i];
      best[place(i)] = p.best_theta[model * p.P + i];
    }
  }
  template <typename Place>
  void store_model(const Training<C>& p, int64_t model, const Place& place) const {
    for (int64_t i = 0; i < p.P; ++i) {
      p.theta[model * p.P + i] = theta[place(i)];
      p.first_moment[model * p.P + i] = m[place(i)];
      p.second_moment[model * p.P + i] = v[place(i)];
      p.best_theta[model * p.P + i] = best[place(i)];
    }
  }

  // as in torch.optim
  void adam(const Training<C>& p, C learning_rate, int64_t step) const {
    using V = Vector<C>;
    const C b1 = static_cast<C>(1 - beta1), b2 = static_cast<C>(beta2), b3 = static_cast<C>(1 - beta2);
    const C decay = static_cast<C>(p.weight_decay), eps = static_cast<C>(adam_eps);
    const C rate = static_cast<C>(learning_rate / (1 - std::pow(beta1, static_cast<double>(step))));
    const C correction = static_cast<C>(1 / std::sqrt(1 - std::pow(beta2, static_cast<double>(step))));
    for (int64_t i = 0; i < size; i += lanes<C>) {
      const V x = load(theta + i), g = load(grad + i) + decay * x;
      V mean = load(m + i);
      mean += b1 * (g - mean);
      const V square = b2 * load(v + i) + b3 * (g * g);
      store(m + i, mean);
      store(v + i, square);
      store(theta + i, x - rate * mean / (sqrt(square) * correction + eps));
    }
  }

  void sgd(const Training<C>& p, C learning_rate) const {
    const C decay = static_cast<C>(p.weight_decay);
    for (int64_t i = 0; i < size; i += lanes<C>) {
      const Vector<C> x = load(theta + i);
      store(theta + i, x - learning_rate * (load(grad + i) + decay * x));
    }
  }
};

// gradient(samples, count) leaves the mean gradient of a minibatch in x.grad; mean_loss() is that of all samples
template <typename C, typename Gradient, typename Loss>
UNROLLED_KERNELS_INLINE void train_epochs(const Training<C>& p, int64_t model, const Parameters<C>& x,
                                          const Gradient& gradient, const Loss& mean_loss) {
  const int64_t steps = ceil_div(p.n, p.batch_size);
  for (int64_t e = 0; e < p.E; ++e) {
    if (e > 0) Poll::look();
    const int64_t* order = p.orders + (e * p.S + p.set_of_model[model]) * p.n;
    const int64_t epoch = p.first_epoch + e;
    for (int64_t i = 0; i < steps; ++i) {
      const int64_t first = i * p.batch_size;
      gradient(order + first, min(p.batch_size, p.n - first));
      p.adam ? x.adam(p, p.learning_rates[model], epoch * steps + i + 1) : x.sgd(p, p.learning_rates[model]);
    }
    const C loss = mean_loss();
    // false for NaN: a model that diverged keeps its last good parameters
    if (loss < p.best_loss[model]) {
      p.best_loss[model] = loss;
      p.best_epoch[model] = epoch + 1;
      copy_vectors(x.theta, x.size, x.best);
    }
  }
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
