// One model at a time on one core: its parameters, optimizer state and samples stay in the first-level cache.
//
// In training the network runs with hidden units in lanes (without hidden units, with outputs in lanes), one sample after
// another: gradients of weights are then sums of vectors, with no reduction across lanes. Everything behind the logits
// runs with samples in lanes; a transpose of W samples stands between. The evaluation has samples in lanes throughout.
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "experiments/cpu/synthetic_training_kernel.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "experiments/cpu/epochs.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

constexpr int64_t X = synthetic_inputs, O = synthetic_outputs;
constexpr int64_t columns = 2 * O + 1;  // bh, ystar, fixed: what a sample needs behind the network

// What p(lambda) is: steps of GD or NAG whose coefficients stay, any schedule, or its limit 1 / lambda.
enum class Steps { plain, nesterov, any, limit };

template <typename C>
class Trainer {
  static constexpr int64_t W = lanes<C>;
  static constexpr int64_t rest_size = ceil_div(columns, W) * W;
  using V = Vector<C>;

 public:
  Trainer(const SyntheticTraining<C>& p, void* scratch)
      : p_(p),
        arena_(scratch),
        units_(ceil_div(p.h ? p.h : O, W) * W),
        outs_((X + 1) * units_),
        bias2_((X + 1 + O) * units_),
        at_(p.h ? bias2_ + O : outs_, arena_) {
    place_ = arena_.take<int64_t>(p.P);
    x_ = arena_.take<C>(p.n * X);
    rest_ = arena_.take<C>(p.n * rest_size);
    groups_ = arena_.take<C>(ceil_div(p.n, W) * (X + columns) * W);
    rows_ = arena_.take<C>(W * units_);
    lanes_ = arena_.take<C>(columns * W);
    out_grad_ = arena_.take<C>(O * W);
  }

  size_t scratch_bytes() const { return arena_.used(); }

  void train(int64_t model) {
    place_parameters();
    // lanes without a sample hold numbers too
    fill_zero(rows_, W * units_);
    fill_zero(lanes_, columns * W);
    const auto place = [this](int64_t i) { return place_[i]; };
    at_.load_model(p_, model, place);
    load_samples(model);
    switch (kind()) {
      case Steps::plain: p_.h ? epochs<Steps::plain, true>(model) : epochs<Steps::plain, false>(model); break;
      case Steps::nesterov: p_.h ? epochs<Steps::nesterov, true>(model) : epochs<Steps::nesterov, false>(model); break;
      case Steps::any: p_.h ? epochs<Steps::any, true>(model) : epochs<Steps::any, false>(model); break;
      case Steps::limit: p_.h ? epochs<Steps::limit, true>(model) : epochs<Steps::limit, false>(model);
    }
    at_.store_model(p_, model, place);
  }

 private:
  // -- memory: units in lanes, W1' [10, units], b1 [units], W2 [3, units], b2 [3], padded with zeros that stay zero

  void place_parameters() {
    int64_t next = 0;
    const int64_t first = p_.h ? p_.h : O;
    for (int64_t u = 0; u < first; ++u) {
      for (int64_t i = 0; i < X; ++i) place_[next++] = i * units_ + u;
    }
    for (int64_t u = 0; u < first; ++u) place_[next++] = X * units_ + u;
    if (!p_.h) return;
    for (int64_t c = 0; c < O; ++c) {
      for (int64_t u = 0; u < p_.h; ++u) place_[next++] = outs_ + c * units_ + u;
    }
    for (int64_t c = 0; c < O; ++c) place_[next++] = bias2_ + c;
  }

  void load_samples(int64_t model) {
    const C* samples = p_.samples + p_.set_of_model[model] * (X + 2 * O) * p_.n;
    fill_zero(rest_, p_.n * rest_size);
    fill_zero(groups_, ceil_div(p_.n, W) * (X + columns) * W);
    for (int64_t s = 0; s < p_.n; ++s) {
      C* lane = groups_ + s / W * (X + columns) * W + s % W;
      for (int64_t i = 0; i < X; ++i) lane[i * W] = x_[s * X + i] = samples[i * p_.n + s];
      for (int64_t c = 0; c < columns; ++c) {
        const C value = c < 2 * O ? samples[(X + c) * p_.n + s] : p_.fixed[model * p_.n + s];
        lane[(X + c) * W] = rest_[s * rest_size + c] = value;
      }
    }
    k_ = p_.num_steps[model];
    schedule_ = p_.schedules + model * p_.K * 3;
  }

  Steps kind() const {
    if (k_ < 0) return Steps::limit;
    for (int64_t t = 0; t < k_; ++t) {
      const double *now = schedule_ + 3 * t, *first = schedule_;
      if (now[1] != now[2] || now[0] != first[0] || now[1] != first[1]) return Steps::any;
    }
    return k_ > 0 && schedule_[1] != 0 ? Steps::nesterov : Steps::plain;
  }

  // -- training

  template <Steps steps, bool hidden>
  void epochs(int64_t model) {
    train_epochs(
        p_, model, at_, [this](const int64_t* order, int64_t count) { gradient<steps, hidden>(order, count); },
        [this] { return mean_loss<steps, hidden>(); });
  }

  template <Steps steps, bool hidden>
  void gradient(const int64_t* order, int64_t count) {
    fill_zero(at_.grad, at_.size);
    V bias[O] = {};
    for (int64_t first = 0; first < count; first += W) {
      const int64_t* index = order + first;
      const int64_t here = min(W, count - first);
      network<hidden>(index, here);
      gather(index, here);
      V share[O], p[O], dp[O], residual[O];
      logits<hidden>(share);
      softmax(share);
      const V loss = losses<steps, true>(share, lanes_, p, dp, residual);
      const V scale = static_cast<C>((p_.L - p_.mu) / static_cast<double>(count)) / loss;
      V u[O], mean{};
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) {
        u[c] = -scale * residual[c] * load(lanes_ + c * W) * dp[c];
        mean += share[c] * u[c];
      }
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) {
        const V o = keep_lanes<C>(share[c] * (u[c] - mean), here);
        bias[c] += o;
        store(out_grad_ + c * W, o);
      }
      backward<hidden>(index, here);
    }
    if (hidden) {
      for (int64_t c = 0; c < O; ++c) at_.grad[bias2_ + c] = sum_lanes<C>(bias[c]);
    }
  }

  template <Steps steps, bool hidden>
  C mean_loss() {
    V sum{};
    const C* group = groups_;
    for (int64_t first = 0; first < p_.n; first += W, group += (X + columns) * W) {
      V share[O], p[O], dp[O], residual[O];
      logits_of_group<hidden>(group, share);
      softmax(share);
      sum += keep_lanes<C>(losses<steps, false>(share, group + X * W, p, dp, residual), min(W, p_.n - first));
    }
    return sum_lanes<C>(sum) / static_cast<C>(p_.n);
  }

  // -- the network, units in lanes

  // rows_ [count, units] = relu(W1 x + b1), or W x + b
  template <bool hidden>
  void network(const int64_t* index, int64_t count) {
    for (int64_t u = 0; u < units_; u += W) {
      V w[X + 1];
#pragma GCC unroll 16
      for (int i = 0; i <= X; ++i) w[i] = load(at_.theta + i * units_ + u);
      for (int64_t s = 0; s < count; ++s) {
        const C* x = x_ + index[s] * X;
        V sum = w[X];
#pragma GCC unroll 16
        for (int i = 0; i < X; ++i) sum += w[i] * broadcast(x[i]);
        // a NaN stays
        if (hidden) sum = sum < 0 ? V{} : sum;
        store(rows_ + s * units_ + u, sum);
      }
    }
  }

  // Adds the gradients of `count` samples; rows_ become those of W1 x + b1, or of W x + b.
  template <bool hidden>
  void backward(const int64_t* index, int64_t count) {
    for (int64_t u = 0; u < units_; u += W) {
      hidden ? backward_outputs(u, count) : transpose_outputs(u);
      V d1[X + 1];
#pragma GCC unroll 16
      for (int i = 0; i <= X; ++i) d1[i] = load(at_.grad + i * units_ + u);
      for (int64_t s = 0; s < count; ++s) {
        const C* x = x_ + index[s] * X;
        const V e = load(rows_ + s * units_ + u);
#pragma GCC unroll 16
        for (int i = 0; i < X; ++i) d1[i] += e * broadcast(x[i]);
        d1[X] += e;
      }
#pragma GCC unroll 16
      for (int i = 0; i <= X; ++i) store(at_.grad + i * units_ + u, d1[i]);
    }
  }

  void backward_outputs(int64_t u, int64_t count) {
    V w2[O], d2[O];
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) {
      w2[c] = load(at_.theta + outs_ + c * units_ + u);
      d2[c] = load(at_.grad + outs_ + c * units_ + u);
    }
    for (int64_t s = 0; s < count; ++s) {
      const V h = load(rows_ + s * units_ + u);
      V e{};
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) {
        const V o = broadcast(out_grad_[c * W + s]);
        e += w2[c] * o;
        d2[c] += h * o;
      }
      store(rows_ + s * units_ + u, h <= 0 ? V{} : e);
    }
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) store(at_.grad + outs_ + c * units_ + u, d2[c]);
  }

  void transpose_outputs(int64_t u) {
    V r[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) r[i] = u + i < O ? load(out_grad_ + (u + i) * W) : V{};
    transpose<C>(r);
#pragma GCC unroll 16
    for (int s = 0; s < W; ++s) store(rows_ + s * units_ + u, r[s]);
  }

  // -- behind the network, samples in lanes

  // from rows_
  template <bool hidden>
  void logits(V (&logit)[O]) const {
    for (int c = 0; c < O; ++c) logit[c] = hidden ? broadcast(at_.theta[bias2_ + c]) : V{};
    for (int64_t u = 0; u < units_; u += W) {
      V r[W];
#pragma GCC unroll 16
      for (int s = 0; s < W; ++s) r[s] = load(rows_ + s * units_ + u);
      transpose<C>(r);
      if (hidden) {
#pragma GCC unroll 3
        for (int c = 0; c < O; ++c) {
          const C* w = at_.theta + outs_ + c * units_ + u;
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) logit[c] += r[i] * broadcast(w[i]);
        }
      } else {
        for (int i = 0; i < W && u + i < O; ++i) logit[u + i] = r[i];
      }
    }
  }

  // from x [10, W]
  template <bool hidden>
  void logits_of_group(const C* group, V (&logit)[O]) const {
    V x[X];
#pragma GCC unroll 16
    for (int i = 0; i < X; ++i) x[i] = load(group + i * W);
    const auto first_layer = [&](int64_t u) {
      V sum = broadcast(at_.theta[X * units_ + u]);
#pragma GCC unroll 16
      for (int i = 0; i < X; ++i) sum += x[i] * broadcast(at_.theta[i * units_ + u]);
      return sum;
    };
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) logit[c] = hidden ? broadcast(at_.theta[bias2_ + c]) : first_layer(c);
    for (int64_t u = 0; hidden && u < p_.h; ++u) {
      V h = first_layer(u);
      h = h < 0 ? V{} : h;
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) logit[c] += h * broadcast(at_.theta[outs_ + c * units_ + u]);
    }
  }

  static void softmax(V (&x)[O]) {
    V largest = x[0];
    for (int c = 1; c < O; ++c) largest = largest < x[c] ? x[c] : largest;
    V sum{};
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) {
      x[c] = exp_negative<C>(x[c] - largest);
      sum += x[c];
    }
    const V inverse = static_cast<C>(1) / sum;
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) x[c] *= inverse;
  }

  // lanes_ [7, W], rows of rest_
  void gather(const int64_t* index, int64_t count) {
    for (int64_t first = 0; first < columns; first += W) {
      V r[W];
#pragma GCC unroll 16
      for (int l = 0; l < W; ++l) r[l] = l < count ? load(rest_ + index[l] * rest_size + first) : V{};
      transpose<C>(r);
#pragma GCC unroll 16
      for (int c = 0; c < W; ++c) {
        if (first + c < columns) store(lanes_ + (first + c) * W, r[c]);
      }
    }
  }

  // The loss of each sample, of its part rest [7, W].
  template <Steps steps, bool tangent>
  V losses(const V (&share)[O], const C* rest, V (&p)[O], V (&dp)[O], V (&residual)[O]) const {
    recurrence<steps, tangent>(share, p, dp);
    V squared = load(rest + 2 * O * W);
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) {
      residual[c] = -load(rest + c * W) * p[c] - load(rest + (O + c) * W);
      squared += residual[c] * residual[c];
    }
    return sqrt(squared);
  }

  template <Steps steps, bool tangent>
  void recurrence(const V (&share)[O], V (&p)[O], V (&dp)[O]) const {
    if constexpr (steps == Steps::limit || steps == Steps::any) {
      V lambda[O];
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) lambda[c] = static_cast<C>(p_.mu) + static_cast<C>(p_.L - p_.mu) * share[c];
      return steps == Steps::limit ? limit(lambda, p, dp) : any<tangent>(lambda, p, dp);
    }
    // the first step, from zero
    const double step_size = k_ > 0 ? schedule_[0] : 0, momentum = k_ > 0 ? schedule_[1] : 0;
    const C phi = static_cast<C>(step_size), beta = static_cast<C>(momentum);
    V shrink[O], before[O] = {}, d_before[O] = {};
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) {
      shrink[c] = static_cast<C>(1 - step_size * p_.mu) - static_cast<C>(step_size * (p_.L - p_.mu)) * share[c];
      p[c] = broadcast(phi);
      dp[c] = V{};
    }
    for (int64_t t = 1; t < k_; ++t) {
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) {
        const V z = steps == Steps::nesterov ? (1 + beta) * p[c] - beta * before[c] : p[c];
        if (tangent) {
          const V dz = steps == Steps::nesterov ? (1 + beta) * dp[c] - beta * d_before[c] : dp[c];
          d_before[c] = dp[c];
          dp[c] = shrink[c] * dz - phi * z;
        }
        before[c] = p[c];
        p[c] = shrink[c] * z + phi;
      }
    }
  }

  static void limit(const V (&lambda)[O], V (&p)[O], V (&dp)[O]) {
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) {
      p[c] = static_cast<C>(1) / lambda[c];
      dp[c] = -p[c] * p[c];
    }
  }

  template <bool tangent>
  void any(const V (&lambda)[O], V (&p)[O], V (&dp)[O]) const {
    V before[O] = {}, d_before[O] = {};
#pragma GCC unroll 3
    for (int c = 0; c < O; ++c) p[c] = dp[c] = V{};
    for (int64_t t = 0; t < k_; ++t) {
      const C phi = static_cast<C>(schedule_[3 * t]), beta = static_cast<C>(schedule_[3 * t + 1]);
      const C gamma = static_cast<C>(schedule_[3 * t + 2]);
#pragma GCC unroll 3
      for (int c = 0; c < O; ++c) {
        const V move = p[c] - before[c], z = p[c] + gamma * move;
        if (tangent) {
          const V d_move = dp[c] - d_before[c], dz = dp[c] + gamma * d_move;
          d_before[c] = dp[c];
          dp[c] += beta * d_move - phi * (lambda[c] * dz + z);
        }
        before[c] = p[c];
        p[c] += beta * move - phi * (lambda[c] * z - 1);
      }
    }
  }

  const SyntheticTraining<C>& p_;
  Arena arena_;
  int64_t units_, outs_, bias2_;
  Parameters<C> at_;
  int64_t* place_;                // of each parameter
  C *x_, *rest_, *groups_;        // [n, 10], [n, 7 or more], [groups, 17, W]
  C *rows_, *lanes_, *out_grad_;  // [W, units], [7, W], [3, W]
  int64_t k_ = 0;
  const double* schedule_ = nullptr;  // [k, 3]
};

template <typename C>
size_t scratch_bytes(const SyntheticTraining<C>& p) {
  return Trainer<C>(p, nullptr).scratch_bytes();
}

template <typename C>
void train(const SyntheticTraining<C>& p, int64_t model, void* scratch) {
  Trainer<C>(p, scratch).train(model);
}

}  // namespace

template <typename C>
SyntheticTrainingKernel<C> synthetic_training_kernel() {
  return {scratch_bytes<C>, train<C>};
}
template SyntheticTrainingKernel<float> synthetic_training_kernel();
template SyntheticTrainingKernel<double> synthetic_training_kernel();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
