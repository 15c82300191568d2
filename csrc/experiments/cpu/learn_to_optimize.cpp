// One model at a time on one core. Step sizes: samples in lanes, and every state of a vector of them in registers. An
// RNN: the forward and backward kernels of `rnn` on a minibatch, its samples gathered into rows.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/rnn_kernels.h"
#include "experiments/cpu/learn_to_optimize_kernel.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "experiments/cpu/epochs.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

template <typename C>
class StepSizeTrainer {
  static constexpr int64_t W = lanes<C>;
  using V = Vector<C>;

 public:
  StepSizeTrainer(const StepSizeTraining<C>& p, void* scratch) : p_(p), arena_(scratch), at_(p.P, arena_) {
    natural_ = arena_.take<int64_t>(p.n);
    rows_ = arena_.take<C>(p.n * 3 * p.d);
    lanes_ = arena_.take<C>(3 * p.d * W);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void train(int64_t model) {
    for (int64_t i = 0; i < p_.n; ++i) natural_[i] = i;
    // lanes without a sample hold numbers too
    fill_zero(lanes_, 3 * p_.d * W);
    const auto place = [](int64_t i) { return i; };
    at_.load_model(p_, model, place);
    const C* samples = p_.samples + p_.set_of_model[model] * 3 * p_.d * p_.n;
    for (int64_t i = 0; i < p_.n; ++i) {
      for (int64_t c = 0; c < 3 * p_.d; ++c) rows_[i * 3 * p_.d + c] = samples[c * p_.n + i];
    }
    p_.mu[model] > 0 ? epochs<true>(model) : epochs<false>(model);
    at_.store_model(p_, model, place);
  }

 private:
  template <bool accelerated>
  void epochs(int64_t model) {
    train_epochs(
        p_, model, at_,
        [&](const int64_t* order, int64_t count) {
          const C phi = step_size(model);
          const C slope = phi * (1 - phi / p_.largest[model]);  // dphi / dlogit
          at_.grad[0] = slope * sum<accelerated, true>(model, order, count) / static_cast<C>(count);
        },
        [&] { return sum<accelerated, false>(model, natural_, p_.n) / static_cast<C>(p_.n); });
  }

  C step_size(int64_t model) const { return p_.largest[model] / (1 + std::exp(-at_.theta[0])); }

  // of the losses of these samples, or of their derivatives by phi
  template <bool accelerated, bool tangent>
  C sum(int64_t model, const int64_t* index, int64_t count) {
    const C phi = step_size(model), mu = p_.mu[model], root = std::sqrt(mu * phi);
    const C beta = (1 - root) / (1 + root), slope = -mu / (root * (1 + root) * (1 + root));
    V total{};
    for (int64_t first = 0; first < count; first += W) {
      const int64_t here = min(W, count - first);
      for (int64_t l = 0; l < here; ++l) {
        const C* row = rows_ + index[first + l] * 3 * p_.d;
        for (int64_t c = 0; c < 3 * p_.d; ++c) lanes_[c * W + l] = row[c];
      }
      V squared{}, product{};
      for_constant_blocks<5>(p_.d, [&](int64_t c, auto size) {
        add_residuals<accelerated, tangent, decltype(size)::value>(c, p_.num_steps[model], phi, beta, slope, squared,
                                                                   product);
      });
      const V loss = sqrt(squared);
      // as torch has it, no derivative where the loss is zero
      total += keep_lanes<C>(tangent ? (loss > 0 ? product / loss : V{}) : loss, here);
    }
    return sum_lanes<C>(total);
  }

  // coordinates c ... c + D - 1 of r = y_k - ystar: adds r'r, and r'dr/dphi
  template <bool accelerated, bool tangent, int D>
  UNROLLED_KERNELS_INLINE void add_residuals(int64_t first, int64_t k, C phi, C beta, C slope, V& squared,
                                             V& product) const {
    V lambda[D], p[D] = {}, before[D] = {}, dp[D] = {}, d_before[D] = {};
#pragma GCC unroll 8
    for (int c = 0; c < D; ++c) lambda[c] = load(lanes_ + (first + c) * W);
    for (int64_t t = 0; t < k; ++t) {
#pragma GCC unroll 8
      for (int c = 0; c < D; ++c) {
        const V move = p[c] - before[c], z = accelerated ? p[c] + beta * move : p[c];
        const V shrink = 1 - phi * lambda[c];
        if (tangent) {
          const V dz = accelerated ? dp[c] + beta * (dp[c] - d_before[c]) + slope * move : dp[c];
          d_before[c] = dp[c];
          dp[c] = shrink * dz - lambda[c] * z + 1;
        }
        before[c] = p[c];
        p[c] = shrink * z + phi;
      }
    }
#pragma GCC unroll 8
    for (int c = 0; c < D; ++c) {
      const V b = load(lanes_ + (p_.d + first + c) * W), y_star = load(lanes_ + (2 * p_.d + first + c) * W);
      const V r = -b * p[c] - y_star;
      squared += r * r;
      product -= r * b * dp[c];
    }
  }

  const StepSizeTraining<C>& p_;
  Arena arena_;
  Parameters<C> at_;
  int64_t* natural_;  // 0 ... n-1
  C *rows_, *lanes_;  // [n, 3, d], [3, d, W]
};

template <typename C>
class RnnTrainer {
 public:
  RnnTrainer(const RnnTraining<C>& p, void* scratch) : p_(p), arena_(scratch), at_(p.P, arena_) {
    const int64_t largest = min(p.batch_size, p.n);
    matrices_ = arena_.take<C>(largest * p.d * p.d);
    b_ = arena_.take<C>(largest * p.d);
    y_star_ = arena_.take<C>(largest * p.d);
    y_ = arena_.take<C>(p.n * p.d);
    grad_y_ = arena_.take<C>(largest * p.d);
    // a plan asks which pointers there are, not what they point to
    cells_.d = p.d, cells_.num_layers = p.num_layers, cells_.weights = p.theta;
    cells_.matrix = p.matrices, cells_.matrix_stride = p.d * p.d;
    cells_.b = p.b, cells_.b_stride = p.d;
    for (int l = 0; l < p.num_layers; ++l) cells_.hidden_dims[l] = p.hidden_dims[l];
    cells_.grad_y = p.y_star;
    cells_.d_weights = p.theta;
    int64_t bytes = 0;
    for (int64_t m = 0; m < p.M; ++m) {
      cells_.k = p.num_steps[m];
      for (const int64_t count : {largest, p.n % p.batch_size, p.n}) {
        if (count == 0) continue;
        cells_.B = count;
        bytes = max(bytes, static_cast<int64_t>(kernels_.plan(cells_, nullptr).scratch_bytes));
        bytes = max(bytes, static_cast<int64_t>(kernels_.plan(cells_, &cells_).scratch_bytes));
      }
    }
    kernel_scratch_ = arena_.take<char>(bytes);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void train(int64_t model) {
    const auto place = [](int64_t i) { return i; };
    at_.load_model(p_, model, place);
    cells_.k = p_.num_steps[model];
    cells_.weights = at_.theta, cells_.matrix = matrices_, cells_.b = b_;
    cells_.grad_y = grad_y_, cells_.d_weights = at_.grad;
    const int64_t first = p_.set_of_model[model] * p_.n;
    const C *matrices = p_.matrices + first * p_.d * p_.d, *b = p_.b + first * p_.d, *y_star = p_.y_star + first * p_.d;
    train_epochs(
        p_, model, at_,
        [&](const int64_t* order, int64_t count) {
          for (int64_t i = 0; i < count; ++i) {
            copy_elements(matrices_ + i * p_.d * p_.d, matrices + order[i] * p_.d * p_.d, p_.d * p_.d);
            copy_elements(b_ + i * p_.d, b + order[i] * p_.d, p_.d);
            copy_elements(y_star_ + i * p_.d, y_star + order[i] * p_.d, p_.d);
          }
          run(matrices_, b_, count);
          losses(y_star_, count, true);
          cells_.B = count;
          const RnnPlan plan = kernels_.plan(cells_, &cells_);
          kernels_.backward(cells_, plan, {0, plan.tiles, kernel_scratch_, at_.grad, nullptr});
        },
        [&] {
          run(matrices, b, p_.n);
          return losses(y_star, p_.n, false);
        });
    at_.store_model(p_, model, place);
  }

 private:
  // y_k of `count` samples to y_
  void run(const C* matrices, const C* b, int64_t count) {
    RnnForward<C> p{cells_, y_};
    p.B = count, p.matrix = matrices, p.b = b;
    const RnnPlan plan = kernels_.plan(p, nullptr);
    kernels_.forward(p, plan, {0, plan.tiles, kernel_scratch_, nullptr, nullptr});
  }

  // the mean of |y_k - ystar|, and its gradient by y_k to grad_y_
  C losses(const C* y_star, int64_t count, bool gradient) const {
    C sum = 0;
    for (int64_t i = 0; i < count; ++i) {
      const C *y = y_ + i * p_.d, *target = y_star + i * p_.d;
      C squared = 0;
      for (int64_t c = 0; c < p_.d; ++c) squared += (y[c] - target[c]) * (y[c] - target[c]);
      const C loss = std::sqrt(squared);
      sum += loss;
      if (!gradient) continue;
      // as torch has it, no derivative where the loss is zero
      const C scale = loss > 0 || loss != loss ? 1 / (loss * static_cast<C>(count)) : 0;
      for (int64_t c = 0; c < p_.d; ++c) grad_y_[i * p_.d + c] = scale * (y[c] - target[c]);
    }
    return sum / static_cast<C>(count);
  }

  const RnnTraining<C>& p_;
  const RnnKernels<C> kernels_ = rnn_kernels<C>();
  Arena arena_;
  Parameters<C> at_;
  RnnBackward<C> cells_{};
  C *matrices_, *b_, *y_star_, *y_, *grad_y_;
  char* kernel_scratch_;
};

template <template <typename> class Trainer, template <typename> class Problem, typename C>
TrainingKernel<Problem<C>> kernel() {
  return {[](const Problem<C>& p) { return Trainer<C>(p, nullptr).scratch_bytes(); },
          [](const Problem<C>& p, int64_t model, void* scratch) { Trainer<C>(p, scratch).train(model); }};
}

}  // namespace

template <typename C>
TrainingKernel<StepSizeTraining<C>> step_size_training_kernel() {
  return kernel<StepSizeTrainer, StepSizeTraining, C>();
}
template <typename C>
TrainingKernel<RnnTraining<C>> rnn_training_kernel() {
  return kernel<RnnTrainer, RnnTraining, C>();
}
template TrainingKernel<StepSizeTraining<float>> step_size_training_kernel();
template TrainingKernel<StepSizeTraining<double>> step_size_training_kernel();
template TrainingKernel<RnnTraining<float>> rnn_training_kernel();
template TrainingKernel<RnnTraining<double>> rnn_training_kernel();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
