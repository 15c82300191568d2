// Runs the CPU kernels, forward and backward, on every kind of problem, for the sanitizers to watch over.
//
//     driver FAMILY      momentum | rnn | synthetic_training | learn_to_optimize | convolution
//                        large: several chunks, for threads to share
//                        huge: the last samples of tensors of more than 2^31 elements, in memory that is not there
//
//     driver FAMILY sums   prints what the outputs add up to too, to compare one build with another
//
// Every array has a heap allocation of its exact size, every other one off any alignment but its own. Outputs and the
// kernels' scratch come full of NaN: an output that is not finite was not written, or made of what was not. Two threads
// must give the bits that one gives.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

#include <sys/mman.h>

#include "cpu/launch.h"
#include "cpu/momentum_launch.h"
#include "cpu/rnn_launch.h"
#include "experiments/cpu/convolution_kernels.h"
#include "experiments/cpu/learn_to_optimize_kernel.h"
#include "experiments/cpu/synthetic_training_kernel.h"

// the scratch of for_chunks
void* operator new(size_t bytes, std::align_val_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, static_cast<size_t>(alignment), bytes)) abort();
  return memset(p, 0xff, bytes);
}
void operator delete(void* p, std::align_val_t) noexcept { free(p); }

using namespace unrolled_kernels;

namespace {

int64_t problems = 0;
bool print_sums = false;
uint64_t state = 1;

uint64_t draw(uint64_t limit) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return (state >> 33) % limit;
}
bool flip() { return draw(2) == 1; }
double uniform(double low, double high) { return low + (high - low) * static_cast<double>(draw(1 << 20)) / (1 << 20); }

template <typename T>
class Array {
 public:
  explicit Array(int64_t size) : size_(size), shift_(flip() ? 1 : 0) {
    memory_ = static_cast<T*>(malloc((size_ + shift_) * sizeof(T)));
    memset(static_cast<void*>(data()), 0xff, size_ * sizeof(T));
  }
  Array(int64_t size, double low, double high) : Array(size) {
    for (int64_t i = 0; i < size; ++i) convert(uniform(low, high), data() + i);
  }
  Array(Array&& other) : memory_(other.memory_), size_(other.size_), shift_(other.shift_) { other.memory_ = nullptr; }
  ~Array() { free(memory_); }

  T* data() const { return memory_ + shift_; }
  int64_t size() const { return size_; }

 private:
  T* memory_;
  int64_t size_, shift_;
};

// of outputs in float or double; what is rounded to half the bits depends on the order of sums
double value(double x) { return x; }
double value(half) { return 0; }
double value(bfloat16) { return 0; }

bool finite(double x) { return std::isfinite(x); }
bool finite(half x) { return (x.bits & 0x7c00) != 0x7c00; }
bool finite(bfloat16 x) { return (x.bits & 0x7f80) != 0x7f80; }

// What a call writes; the pointers of the problem are set to it anew for every run.
class Outputs {
 public:
  template <typename T>
  void add(T*& pointer, int64_t size) {
    const Array<T>* array = new Array<T>(size);
    pointer = array->data();
    const char* bytes = reinterpret_cast<const char*>(array->data());
    check_.push_back([array] {
      for (int64_t i = 0; i < array->size(); ++i) {
        if (!finite(array->data()[i])) return false;
      }
      return true;
    });
    sums_.push_back([array] {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < array->size(); ++i) {
        const double x = value(array->data()[i]);
        sum += static_cast<double>(1 + i % 7) * x, magnitude += 7 * std::abs(x);
      }
      printf("%.9e %.9e\n", sum, magnitude);
    });
    bytes_.push_back({bytes, size * static_cast<int64_t>(sizeof(T))});
    free_.push_back([array] { delete array; });
  }
  ~Outputs() {
    for (auto& f : free_) f();
  }

  bool written() const {
    for (const auto& f : check_) {
      if (!f()) return false;
    }
    return true;
  }
  // a line for each output: a sum of its elements with weights up to 7, and 7 times that of their magnitudes
  void print_sums() const {
    for (const auto& f : sums_) f();
  }
  bool operator==(const Outputs& other) const {
    for (size_t i = 0; i < bytes_.size(); ++i) {
      if (bytes_[i].size && memcmp(bytes_[i].data, other.bytes_[i].data, bytes_[i].size) != 0) return false;
    }
    return true;
  }

 private:
  struct Bytes {
    const char* data;
    int64_t size;
  };
  std::vector<Bytes> bytes_;
  std::vector<std::function<bool()>> check_;
  std::vector<std::function<void()>> sums_;
  std::vector<std::function<void()>> free_;
};

// Calls run(outputs), which adds its outputs and fills them, with one thread and with two.
template <typename F>
void check(const char* what, int64_t B, int64_t d, int64_t k, const F& run) {
  ++problems;
  Outputs one, two;
  const uint64_t before = state;
  torch::stable::num_threads = 1;
  run(one);
  state = before;
  torch::stable::num_threads = 2;
  run(two);
  const char* error = !one.written()  ? "an output is not finite"
                      : !(one == two) ? "threads change the result"
                                      : nullptr;
  if (print_sums) one.print_sums();
  if (!error) return;
  fprintf(stderr, "%s, B = %ld, d = %ld, k = %ld: %s\n", what, static_cast<long>(B), static_cast<long>(d),
          static_cast<long>(k), error);
  exit(1);
}

enum class Kind { dense, shared_dense, diagonal, tikhonov, spectral, shared_spectral };
constexpr Kind kinds[] = {Kind::dense,    Kind::shared_dense, Kind::diagonal,
                          Kind::tikhonov, Kind::spectral,     Kind::shared_spectral};

template <typename Storage>
void momentum(Kind kind, int64_t B, int64_t d, int64_t k) {
  using C = compute_type<Storage>;
  const bool shared = kind == Kind::shared_dense || kind == Kind::shared_spectral;
  const bool dense = kind == Kind::dense || kind == Kind::shared_dense;
  const bool elementwise = kind == Kind::diagonal || kind == Kind::tikhonov;
  const auto structure = dense ? Structure::dense : elementwise ? Structure::diagonal : Structure::spectral;
  MomentumInputs<Storage> in{};
  in.B = B, in.d = d, in.k = k, in.trajectory = flip();

  const int64_t matrices = elementwise ? 0 : shared ? 1 : B;
  const Array<Storage> matrix(matrices * d * d, 0, 0.5 / static_cast<double>(d));
  if (!elementwise) in.matrix = matrix.data(), in.matrix_stride = matrices == 1 ? 0 : d * d;
  in.transposed = matrices > 1 && flip();
  in.separate = shared && B > 1 && flip();

  // [B, d], or one row for all; the rows of some lie apart
  std::vector<Array<Storage>> rows;
  const auto add_rows = [&](const Storage*& data, int64_t& stride) {
    stride = flip() || B <= 1 ? 0 : d + static_cast<int64_t>(draw(3));
    rows.emplace_back(B == 0 ? 0 : (B - 1) * stride + d, 0.1, 0.9);
    data = rows.back().data();
  };
  if (!dense) add_rows(in.diagonal, in.diagonal_stride);
  if (kind == Kind::tikhonov) add_rows(in.observed, in.observed_stride);
  add_rows(in.b, in.b_stride);
  if (flip()) add_rows(in.y0, in.y0_stride);

  std::vector<Array<C>> coefficients;
  const bool per_sample = flip() && B != 1, per_step = flip() && k != 1;
  int64_t schedule_size = 1;
  const auto add_coefficient = [&](Coefficient<C>& c) {
    schedule_size = (per_sample ? B : 1) * (per_step ? k : 1);
    coefficients.emplace_back(schedule_size, 0.2, 0.6);
    c = {coefficients.back().data(), per_sample ? (per_step ? k : 1) : 0, per_step ? 1 : 0};
  };
  add_coefficient(in.phi);
  if (flip()) add_coefficient(in.beta), add_coefficient(in.gamma);

  // a proximal map: bounds or weights [B, d], one row for all, or one number
  std::vector<Array<C>> bounds;
  const auto add_bound = [&](Rows<C>& x, double low, double high) {
    const bool single = flip();
    const int64_t stride = single || flip() || B <= 1 ? 0 : d + static_cast<int64_t>(draw(3));
    bounds.emplace_back(B == 0 ? 0 : single ? 1 : (B - 1) * stride + d, low, high);
    x = {bounds.back().data(), stride, single};
  };
  if (structure != Structure::spectral) {
    in.prox = static_cast<Prox>(draw(4));
    if (in.prox == Prox::box) add_bound(in.lower, -0.4, -0.1);
    if (in.prox == Prox::box && flip()) add_bound(in.upper, 0.1, 0.4);
    if (in.prox == Prox::l1) add_bound(in.weight, 0, 0.2);
    if (in.prox == Prox::soft_threshold) add_coefficient(in.threshold);
  }

  const int64_t y_size = (in.trajectory ? k + 1 : 1) * B * d;
  check("momentum", B, d, k, [&](Outputs& outputs) {
    MomentumForward<Storage> p{};
    static_cast<MomentumInputs<Storage>&>(p) = in;
    outputs.add(p.y, y_size);
    momentum_cpu(structure, p);
  });
  // where a sample stops may differ between two builds, by what rounding decides
  if (k > 0 && !in.trajectory && !print_sums) {
    check("momentum, stopping", B, d, k, [&](Outputs& outputs) {
      MomentumForward<Storage> p{};
      static_cast<MomentumInputs<Storage>&>(p) = in;
      std::vector<int64_t> taken(B);
      Stopping<C> stopping{C(0.05), taken.data(), nullptr};
      outputs.add(stopping.residual, B);
      outputs.add(p.y, y_size);
      p.stopping = &stopping;
      momentum_cpu(structure, p);
      for (const int64_t steps : taken) {
        if (steps < 1 || steps > k) abort();
      }
    });
  }
  const Array<Storage> grad_y(y_size, -1, 1);
  check("momentum, backward", B, d, k, [&](Outputs& outputs) {
    MomentumBackward<Storage> p{};
    static_cast<MomentumInputs<Storage>&>(p) = in;
    p.grad_y = grad_y.data();
    if (!elementwise && flip()) outputs.add(p.d_matrix, (in.separate ? B : matrices) * d * d);
    if (!dense && flip()) outputs.add(p.d_diagonal, B * d);
    outputs.add(p.db, B * d);
    outputs.add(p.dy0, B * d);
    // as the op does it: no schedule without steps
    if (k > 0 && flip()) {
      outputs.add(p.dphi, schedule_size);
      if (in.beta.data) outputs.add(p.dbeta, schedule_size), outputs.add(p.dgamma, schedule_size);
      if (in.threshold.data) outputs.add(p.d_threshold, schedule_size);
    }
    if (in.lower.data && flip()) outputs.add(p.d_lower, B * d);
    if (in.upper.data && flip()) outputs.add(p.d_upper, B * d);
    if (in.weight.data && flip()) outputs.add(p.d_weight, B * d);
    momentum_cpu(structure, p);
  });
  if (k == 0) return;

  // gradients of other kinds: of the last steps alone, of a minimizer, with iterates that were kept, and second order
  const auto add_gradients = [&](Outputs& outputs, MomentumBackward<Storage>& p) {
    if (!elementwise) outputs.add(p.d_matrix, (in.separate ? B : matrices) * d * d);
    if (!dense) outputs.add(p.d_diagonal, B * d);
    outputs.add(p.db, B * d);
  };
  const auto add_schedule = [&](Outputs& outputs, MomentumBackward<Storage>& p) {
    const int64_t size = (per_sample ? B : 1) * (per_step ? p.k : 1);
    outputs.add(p.dphi, size);
    if (in.beta.data) outputs.add(p.dbeta, size), outputs.add(p.dgamma, size);
    if (in.threshold.data) outputs.add(p.d_threshold, size);
  };
  if (k > 1 && !(dense && in.trajectory)) {
    const int64_t first = 1 + static_cast<int64_t>(draw(k - 1));
    check("momentum, last steps", B, d, k, [&](Outputs& outputs) {
      MomentumBackward<Storage> p{};
      static_cast<MomentumInputs<Storage>&>(p) = in;
      p.grad_y = grad_y.data();
      const Array<Storage> y(y_size), y_begun(B * d), m_begun(B * d);
      if (dense) {
        MomentumForward<Storage> forward{};
        static_cast<MomentumInputs<Storage>&>(forward) = in;
        forward.y = y.data(), forward.begun = first, forward.y_begun = y_begun.data();
        if (in.beta.data) forward.m_begun = m_begun.data();
        momentum_cpu(structure, forward);
        p.y0 = y_begun.data(), p.y0_stride = d, p.k = k - first;
        if (in.beta.data) p.m0 = m_begun.data();
        for (Coefficient<C>* c : {&p.phi, &p.beta, &p.gamma, &p.threshold}) {
          if (c->data) c->data += first * c->step_stride;
        }
      } else {
        p.first = first;
      }
      add_gradients(outputs, p), add_schedule(outputs, p);
      momentum_cpu(structure, p);
    });
  }
  if (!in.trajectory) {
    const Array<Storage> minimizer(B * d, -1, 1);
    check("momentum, minimizer", B, d, k, [&](Outputs& outputs) {
      MomentumBackward<Storage> p{};
      static_cast<MomentumInputs<Storage>&>(p) = in;
      p.grad_y = grad_y.data(), p.minimizer = minimizer.data();
      add_gradients(outputs, p);
      if (in.weight.data && flip()) outputs.add(p.d_weight, B * d);
      momentum_cpu(structure, p);
    });
  }
  if constexpr (std::is_same_v<Storage, C>) {
    if (kind == Kind::shared_dense && in.prox != Prox::box) {
      check("momentum, kept iterates", B, d, k, [&](Outputs& outputs) {
        const Array<Storage> iterates((k + 1) * B * d);
        MomentumForward<Storage> forward{};
        static_cast<MomentumInputs<Storage>&>(forward) = in;
        forward.trajectory = true, forward.y = iterates.data();
        momentum_cpu(structure, forward);
        MomentumBackward<Storage> p{};
        static_cast<MomentumInputs<Storage>&>(p) = in;
        p.grad_y = grad_y.data(), p.iterates = iterates.data();
        add_gradients(outputs, p), add_schedule(outputs, p);
        outputs.add(p.dy0, B * d);
        momentum_cpu(structure, p);
      });
    }
    if (structure == Structure::spectral || in.prox != Prox::none || in.observed) return;
    MomentumTangents<Storage> tangents{};
    std::vector<Array<Storage>> directions;
    const auto add_direction = [&](const Storage*& data, int64_t size) {
      if (flip()) return;
      directions.emplace_back(size, -1, 1);
      data = directions.back().data();
    };
    const int64_t own = in.separate ? B : matrices;
    if (dense) add_direction(tangents.matrix, own * d * d), tangents.matrix_stride = own > 1 ? d * d : 0;
    if (!dense) add_direction(tangents.diagonal, B * d);
    add_direction(tangents.b, B * d);
    add_direction(tangents.y0, B * d);
    if (flip()) {
      add_coefficient(tangents.phi);
      if (in.beta.data) add_coefficient(tangents.beta), add_coefficient(tangents.gamma);
    }
    const bool wants_y = flip();
    check("momentum, second order", B, d, k, [&](Outputs& outputs) {
      MomentumTangents<Storage> along = tangents;
      if (wants_y) outputs.add(along.y, y_size);
      MomentumBackward<Storage> p{};
      static_cast<MomentumInputs<Storage>&>(p) = in;
      p.grad_y = grad_y.data(), p.tangents = &along;
      add_gradients(outputs, p), add_schedule(outputs, p);
      outputs.add(p.dy0, B * d);
      momentum_cpu(structure, p);
    });
  }
}

template <typename Storage>
void rnn(int kind, int64_t B, int64_t d, int64_t k, std::initializer_list<int64_t> hidden_dims) {
  using C = compute_type<Storage>;
  RnnInputs<Storage> in{};
  in.B = B, in.d = d, in.k = k, in.trajectory = flip();
  for (const int64_t h : hidden_dims) in.hidden_dims[in.num_layers++] = h;
  const Array<C> weights(rnn_weights_size(in), -0.1, 0.15);
  in.weights = weights.data();
  const int64_t matrices = kind == 0 ? B : kind == 1 ? 1 : 0;
  const Array<Storage> matrix(matrices * d * d, 0, 0.5 / static_cast<double>(d));
  if (kind < 2) in.matrix = matrix.data(), in.matrix_stride = matrices == 1 ? 0 : d * d;
  in.transposed = matrices > 1 && flip();
  in.separate = kind == 1 && B > 1 && flip();
  const Array<Storage> q(B * d, 0.1, 0.9), b(B * d, 0.1, 0.9), y0(B * d, 0.1, 0.9);
  if (kind == 2) in.diagonal = q.data(), in.diagonal_stride = B == 1 ? 0 : d;
  in.b = b.data(), in.b_stride = flip() || B == 1 ? 0 : d;
  if (flip()) in.y0 = y0.data(), in.y0_stride = B == 1 ? 0 : d;

  const int64_t y_size = (in.trajectory ? k + 1 : 1) * B * d;
  check("rnn", B, d, k, [&](Outputs& outputs) {
    RnnForward<Storage> p{in, nullptr};
    outputs.add(p.y, y_size);
    rnn_cpu(p);
  });
  const Array<Storage> grad_y(y_size, -1, 1);
  check("rnn, backward", B, d, k, [&](Outputs& outputs) {
    RnnBackward<Storage> p{};
    static_cast<RnnInputs<Storage>&>(p) = in;
    p.grad_y = grad_y.data();
    if (kind < 2 && flip()) outputs.add(p.d_matrix, (in.separate ? B : matrices) * d * d);
    if (kind == 2 && flip()) outputs.add(p.d_diagonal, B * d);
    outputs.add(p.db, B * d);
    outputs.add(p.dy0, B * d);
    if (flip()) outputs.add(p.d_weights, weights.size());
    rnn_cpu(p);
  });
}

// What every training loop is given: two epochs from one start, each model on one of two sets of samples.
template <typename C>
struct TrainingArrays {
  int64_t M, P, n, batch_size, S = 2, E = 2;
  Array<C> start{M * P, -0.5, 0.5}, learning_rates{M, 1e-3, 1e-2};
  Array<int64_t> sets{M}, orders{E * S * n}, num_steps{M}, best_epoch{M};

  TrainingArrays(int64_t models, int64_t parameters, int64_t samples, int64_t batch)
      : M(models), P(parameters), n(samples), batch_size(batch) {
    for (int64_t m = 0; m < M; ++m) sets.data()[m] = m % S, num_steps.data()[m] = static_cast<int64_t>(draw(8));
    for (int64_t i = 0; i < E * S * n; ++i) orders.data()[i] = n - 1 - i % n;
  }

  void begin(Training<C>& p, Outputs& outputs) const {
    p.M = M, p.P = P, p.n = n, p.E = E, p.S = S, p.batch_size = batch_size;
    outputs.add(p.theta, M * P), outputs.add(p.first_moment, M * P), outputs.add(p.second_moment, M * P);
    outputs.add(p.best_theta, M * P), outputs.add(p.best_loss, M);
    p.best_epoch = best_epoch.data();
    memcpy(p.theta, start.data(), M * P * sizeof(C)), memcpy(p.best_theta, start.data(), M * P * sizeof(C));
    for (int64_t i = 0; i < M * P; ++i) p.first_moment[i] = p.second_moment[i] = 0;
    for (int64_t m = 0; m < M; ++m) p.best_loss[m] = static_cast<C>(1e30), p.best_epoch[m] = 0;
    p.set_of_model = sets.data(), p.orders = orders.data(), p.num_steps = num_steps.data();
    p.learning_rates = learning_rates.data(), p.weight_decay = 1e-4, p.adam = flip();
  }
};

template <typename Problem, typename Kernel>
void train(const Problem& p, const Kernel& kernel) {
  for_chunks(p.M, kernel.scratch_bytes(p), [&](int64_t model, void* scratch) { kernel.train(p, model, scratch); });
}

template <typename C>
void synthetic_training(int64_t M, int64_t n, int64_t h, int64_t batch_size) {
  const TrainingArrays<C> arrays(M, synthetic_parameters(h), n, batch_size);
  const Array<C> samples(arrays.S * (synthetic_inputs + 2 * synthetic_outputs) * n, -1, 1), fixed(M * n, 0, 1);
  constexpr int64_t K = 8;
  const Array<double> schedules(M * K * 3, 0, 1);
  for (int64_t m = 0; m < M; ++m) {
    // GD or NAG, or else any schedule, or the limit
    const double momentum = flip() ? 0.5 : 0;
    double* schedule = schedules.data() + m * K * 3;
    for (int64_t t = 0; t < K && flip(); ++t) {
      schedule[3 * t] = 1, schedule[3 * t + 1] = schedule[3 * t + 2] = momentum;
    }
    if (draw(4) == 0) arrays.num_steps.data()[m] = -1;
  }
  check("synthetic_training", M, n, h, [&](Outputs& outputs) {
    SyntheticTraining<C> p{};
    arrays.begin(p, outputs);
    p.h = h, p.K = K, p.samples = samples.data(), p.fixed = fixed.data(), p.schedules = schedules.data();
    p.mu = 0.1, p.L = 1;
    train(p, UNROLLED_KERNELS_AT_ACTIVE_ISA(synthetic_training_kernel<C>()));
  });
}

template <typename C>
void learn_to_optimize(int64_t M, int64_t n, int64_t d, std::vector<int64_t> hidden_dims, int64_t batch_size) {
  const TrainingArrays<C> step_sizes(M, 1, n, batch_size);
  const Array<C> samples(step_sizes.S * 3 * d * n, 0.1, 1), largest(M, 1, 2), mu(M);
  for (int64_t m = 0; m < M; ++m) mu.data()[m] = flip() ? static_cast<C>(0.1) : 0;
  check("step_size_training", M, n, d, [&](Outputs& outputs) {
    StepSizeTraining<C> p{};
    step_sizes.begin(p, outputs);
    p.d = d, p.samples = samples.data(), p.largest = largest.data(), p.mu = mu.data();
    train(p, UNROLLED_KERNELS_AT_ACTIVE_ISA(step_size_training_kernel<C>()));
  });
  RnnTraining<C> problem{};
  problem.d = d, problem.num_layers = static_cast<int>(hidden_dims.size());
  for (size_t l = 0; l < hidden_dims.size(); ++l) problem.hidden_dims[l] = hidden_dims[l];
  const TrainingArrays<C> weights(M, rnn_weights_size(problem), n, batch_size);
  const int64_t S = weights.S;
  const Array<C> matrices(S * n * d * d, -1, 1), b(S * n * d, -1, 1), y_star(S * n * d, -1, 1);
  check("rnn_training", M, n, d, [&](Outputs& outputs) {
    RnnTraining<C> p = problem;
    weights.begin(p, outputs);
    p.matrices = matrices.data(), p.b = b.data(), p.y_star = y_star.data();
    train(p, UNROLLED_KERNELS_AT_ACTIVE_ISA(rnn_training_kernel<C>()));
  });
}

// A layer of a DnCNN each way: the first, on an image as it is, or one that normalises what it reads.
template <typename T>
void convolution(int64_t B, int64_t H, int64_t W, int64_t inputs, int64_t outputs, bool normalised) {
  const Array<T> x(B * inputs * H * W, -1, 1), scale(inputs, 0.5, 1), shift(inputs, -0.5, 0.5), center(inputs, -1, 1);
  const Array<T> weight(outputs * inputs * 9, -1, 1), bias(outputs, -1, 1), grad(B * outputs * H * W, -1, 1);
  const Array<T> y(B * outputs * H * W, -1, 1), grad_factor(outputs, 0.5, 1), y_factor(outputs, -1, 1);
  const Array<T> constant(outputs, -1, 1);
  const auto kernels = UNROLLED_KERNELS_AT_ACTIVE_ISA(convolution_kernels<T>());
  const Convolution<T> layer{B,
                             H,
                             W,
                             inputs,
                             outputs,
                             x.data(),
                             normalised ? scale.data() : nullptr,
                             normalised ? shift.data() : nullptr,
                             weight.data()};
  const ConvolutionPlan plan = kernels.plan(layer);
  check("convolution", B, W, outputs, [&](Outputs& outputs_) {
    ConvolutionForward<T> p{layer, normalised ? nullptr : bias.data(), nullptr, nullptr};
    outputs_.add(p.y, B * outputs * H * W);
    if (normalised) outputs_.add(p.moments, plan.chunks * outputs * 3);
    for_chunks(plan.chunks, plan.scratch_bytes,
               [&](int64_t chunk, void* scratch) { kernels.forward(p, plan, chunk, scratch); });
  });
  check("convolution backward", B, W, outputs, [&](Outputs& outputs_) {
    ConvolutionBackward<T> p{};
    static_cast<Convolution<T>&>(p) = layer;
    p.grad = grad.data();
    if (normalised) {
      p.y = y.data(), p.grad_factor = grad_factor.data(), p.y_factor = y_factor.data(), p.constant = constant.data();
      p.center = center.data();
    }
    p.bias = !normalised;
    if (flip()) outputs_.add(p.grad_x, B * inputs * H * W);
    outputs_.add(p.partial, plan.chunks * convolution_gradients(inputs, outputs));
    for_chunks(plan.chunks, plan.scratch_bytes,
               [&](int64_t chunk, void* scratch) { kernels.backward(p, plan, chunk, scratch); });
  });
}

// Arrays that take room only where they are written, and are zero elsewhere.
class Virtual {
 public:
  Virtual() = default;
  Virtual(const Virtual&) = delete;
  ~Virtual() {
    for (const auto& m : mapped_) munmap(m.data, m.bytes);
  }

  template <typename T>
  T* take(int64_t elements) {
    const size_t bytes = elements * sizeof(T);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) {
      fprintf(stderr, "no %zu bytes of addresses\n", bytes);
      exit(3);
    }
    mapped_.push_back({p, bytes});
    return static_cast<T*>(p);
  }

 private:
  struct Mapped {
    void* data;
    size_t bytes;
  };
  std::vector<Mapped> mapped_;
};

constexpr int64_t filled = 101, compared = 2;

// One call on the last tiles of B samples, of which the last `filled` are the same whatever B is. In comes what points
// to [copies, B, row]; out go the bytes of the last `compared` samples of what was written.
class LastSamples {
 public:
  explicit LastSamples(int64_t B) : B_(B) { state = 7; }

  template <typename T>
  void input(const T*& pointer, int64_t row, double low, double high, int64_t copies = 1) {
    T* const array = memory_.take<T>(copies * B_ * row);
    for (int64_t c = 0; c < copies; ++c) {
      for (int64_t i = (B_ - filled) * row; i < B_ * row; ++i) convert(uniform(low, high), array + c * B_ * row + i);
    }
    pointer = array;
  }
  template <typename T>
  void output(T*& pointer, int64_t row, int64_t copies = 1) {
    pointer = memory_.take<T>(copies * B_ * row);
    for (int64_t c = 0; c < copies; ++c) {
      results_.push_back({reinterpret_cast<const char*>(pointer + (c * B_ + B_ - compared) * row),
                          compared * row * static_cast<int64_t>(sizeof(T))});
    }
  }
  template <typename Plan, typename F>
  void run(const Plan& plan, const F& f) const {
    const std::unique_ptr<void, FreeAligned> scratch(::operator new(plan.scratch_bytes, std::align_val_t(64)));
    f(plan.tiles - compared, plan.tiles, scratch.get());
  }
  std::vector<char> bytes() const {
    std::vector<char> all;
    for (const auto& r : results_) all.insert(all.end(), r.data, r.data + r.size);
    return all;
  }

 private:
  struct Result {
    const char* data;
    int64_t size;
  };
  int64_t B_;
  Virtual memory_;
  std::vector<Result> results_;
};

template <typename Storage>
std::vector<char> last_of_momentum(Structure structure, bool tikhonov, int64_t B, int64_t d) {
  LastSamples call(B);
  MomentumBackward<Storage> p{};
  p.B = B, p.d = d, p.k = 3, p.trajectory = true;
  if (structure != Structure::diagonal) {
    call.input(p.matrix, d * d, 0, 0.5 / static_cast<double>(d));
    call.output(p.d_matrix, d * d);
    p.matrix_stride = d * d;
  }
  if (structure != Structure::dense) {
    call.input(p.diagonal, d, 0.1, 0.9);
    call.output(p.d_diagonal, d);
    p.diagonal_stride = d;
  }
  if (tikhonov) call.input(p.observed, d, 0.1, 0.9), p.observed_stride = d;
  call.input(p.b, d, 0.1, 0.9), p.b_stride = d;
  call.input(p.y0, d, 0.1, 0.9), p.y0_stride = d;
  for (auto* c : {&p.phi, &p.beta, &p.gamma}) call.input(c->data, p.k, 0.2, 0.6), *c = {c->data, p.k, 1};
  call.input(p.grad_y, d, -1, 1, p.k + 1);
  call.output(p.db, d), call.output(p.dy0, d);
  call.output(p.dphi, p.k), call.output(p.dbeta, p.k), call.output(p.dgamma, p.k);
  MomentumForward<Storage> forward{};
  static_cast<MomentumInputs<Storage>&>(forward) = p;
  call.output(forward.y, d, p.k + 1);

  const auto kernels = momentum_kernels<Storage>(structure);
  const MomentumPlan plan = kernels.plan(p, nullptr), backward_plan = kernels.plan(p, &p);
  call.run(plan, [&](int64_t begin, int64_t end, void* scratch) {
    kernels.forward(forward, plan, {begin, end, scratch, nullptr, nullptr});
  });
  std::vector<double> schedule(4 * p.k);
  call.run(backward_plan, [&](int64_t begin, int64_t end, void* scratch) {
    kernels.backward(p, backward_plan, {begin, end, scratch, schedule.data(), nullptr});
  });
  return call.bytes();
}

template <typename Storage>
std::vector<char> last_of_rnn(bool dense, int64_t B, int64_t d) {
  LastSamples call(B);
  RnnBackward<Storage> p{};
  p.B = B, p.d = d, p.k = 3, p.trajectory = true, p.num_layers = 1, p.hidden_dims[0] = 6;
  const Array<compute_type<Storage>> weights(rnn_weights_size(p), -0.1, 0.15);
  p.weights = weights.data();
  if (dense) {
    call.input(p.matrix, d * d, 0, 0.5 / static_cast<double>(d)), p.matrix_stride = d * d;
    call.output(p.d_matrix, d * d);
  } else {
    call.input(p.diagonal, d, 0.1, 0.9), p.diagonal_stride = d;
    call.output(p.d_diagonal, d);
  }
  call.input(p.b, d, 0.1, 0.9), p.b_stride = d;
  call.input(p.y0, d, 0.1, 0.9), p.y0_stride = d;
  call.input(p.grad_y, d, -1, 1, p.k + 1);
  call.output(p.db, d), call.output(p.dy0, d);
  RnnForward<Storage> forward{p, nullptr};
  call.output(forward.y, d, p.k + 1);

  const auto kernels = rnn_kernels<Storage>();
  const RnnPlan plan = kernels.plan(p, nullptr), backward_plan = kernels.plan(p, &p);
  call.run(plan, [&](int64_t begin, int64_t end, void* scratch) {
    kernels.forward(forward, plan, {begin, end, scratch, nullptr, nullptr});
  });
  call.run(backward_plan, [&](int64_t begin, int64_t end, void* scratch) {
    kernels.backward(p, backward_plan, {begin, end, scratch, nullptr, nullptr});
  });
  return call.bytes();
}

// last(B): the last samples of B. The same of so many that every array has more than 2^31 elements, and of few: B is a
// multiple of every tile and a remainder.
template <typename F>
void check_huge(const char* what, int64_t multiple, const F& last) {
  ++problems;
  if (last(multiple + filled) == last(filled)) return;
  fprintf(stderr, "%s: samples beyond 2^31 elements differ\n", what);
  exit(1);
}

void huge() {
  const auto every = [](auto storage) {
    using Storage = decltype(storage);
    // samples in lanes, and rows in lanes
    for (const int64_t d : {5, 40}) {
      const int64_t multiple = d == 5 ? int64_t(1) << 29 : int64_t(1) << 26;
      for (const auto structure : {Structure::dense, Structure::diagonal, Structure::spectral}) {
        check_huge("momentum", multiple, [&](int64_t B) { return last_of_momentum<Storage>(structure, false, B, d); });
      }
      check_huge("tikhonov", multiple,
                 [&](int64_t B) { return last_of_momentum<Storage>(Structure::diagonal, true, B, d); });
      for (const bool dense : {false, true}) {
        check_huge("rnn", multiple, [&](int64_t B) { return last_of_rnn<Storage>(dense, B, d); });
      }
    }
  };
  every(float()), every(bfloat16());
}

// f(Storage()) for a storage type that is not float
template <typename F>
void with_other_storage(const F& f) {
  switch (draw(3)) {
    case 0: return f(double());
    case 1: return f(half());
    default: return f(bfloat16());
  }
}

void every_momentum() {
  // remainders of every vector width, in both layouts; beyond 2048 elements a diagonal sample is cut
  for (const int64_t d : {1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 65, 2051, 4096}) {
    for (const int64_t B : {0, 1, 3, 8, 19}) {
      for (const Kind kind : kinds) {
        const bool elementwise = kind == Kind::diagonal || kind == Kind::tikhonov;
        if (elementwise ? B * d > 6200 : B * d * d > 6200) continue;
        for (const int64_t k : {0, 1, 7}) {
          momentum<float>(kind, B, d, k);
          with_other_storage([&](auto storage) { momentum<decltype(storage)>(kind, B, d, k); });
        }
      }
    }
  }
}

void every_rnn() {
  for (const int64_t d : {1, 2, 3, 5, 8, 17, 64}) {
    for (const int64_t B : {0, 1, 3, 9, 17, 37}) {
      if (B * d * d > 15000) continue;
      for (const int64_t k : {0, 1, 7}) {
        const auto run = [&](auto storage) {
          using Storage = decltype(storage);
          const int kind = static_cast<int>(draw(3));
          switch (draw(5)) {
            case 0: return rnn<Storage>(kind, B, d, k, {1});
            case 1: return rnn<Storage>(kind, B, d, k, {5, 3});
            case 2: return rnn<Storage>(kind, B, d, k, {10, 20, 20});
            case 3: return rnn<Storage>(kind, B, d, k, {33, 2, 7});
            default: return rnn<Storage>(kind, B, d, k, {3, 4, 5, 6, 7, 8});
          }
        };
        run(float());
        with_other_storage(run);
      }
    }
  }
  rnn<float>(0, 3, 5, 2, {128});
  // so many weights that their gradients are kept as rows
  for (int kind = 0; kind < 3; ++kind) rnn<float>(kind, 21, 5, 3, {70, 95}), rnn<double>(kind, 9, 3, 2, {70, 95});
}

void every_synthetic_training() {
  for (const int64_t h : {0, 1, 5, 16, 32}) {
    for (const int64_t n : {1, 7, 30}) {
      for (const int64_t batch_size : {1, 5, 50}) {
        synthetic_training<float>(3, n, h, batch_size);
        synthetic_training<double>(3, n, h, batch_size);
      }
    }
  }
}

void every_learn_to_optimize() {
  for (const int64_t d : {1, 5, 7}) {
    for (const int64_t n : {1, 7, 40}) {
      for (const int64_t batch_size : {1, 5, 50}) {
        learn_to_optimize<float>(3, n, d, {4}, batch_size);
        learn_to_optimize<double>(3, n, d, {5, 20}, batch_size);
      }
    }
  }
}

void every_convolution() {
  for (const int64_t inputs : {1, 3, 5, 20}) {
    for (const int64_t outputs : {1, 2, 3, 7}) {
      for (const int64_t W : {1, 15, 16, 33, 70}) {
        for (const int64_t H : {1, 3, 50}) {
          convolution<float>(2, H, W, inputs, outputs, flip());
          convolution<double>(1, H, W, inputs, outputs, flip());
        }
      }
    }
  }
}

void large() {
  for (int repetition = 0; repetition < 4; ++repetition) {
    for (const Kind kind : kinds) {
      const bool elementwise = kind == Kind::diagonal || kind == Kind::tikhonov;
      momentum<float>(kind, 300, 5, 40);
      momentum<float>(kind, 40, 33, 9);
      momentum<bfloat16>(kind, 41, 17, 30);
      if (elementwise) momentum<double>(kind, 3, 20001, 5);
    }
    for (int kind = 0; kind < 3; ++kind) rnn<float>(kind, 70, 6, 12, {10, 20});
  }
  synthetic_training<float>(8, 30, 16, 10);
  learn_to_optimize<float>(8, 40, 5, {10, 20}, 20);
  convolution<float>(2, 100, 40, 3, 3, true);
}

}  // namespace

int main(int count, char** arguments) {
  print_sums = count > 2 && strcmp(arguments[2], "sums") == 0;
  const auto is = [&](const char* name) { return strcmp(arguments[1], name) == 0; };
  if (is("momentum")) every_momentum();
  if (is("rnn")) every_rnn();
  if (is("synthetic_training")) every_synthetic_training();
  if (is("learn_to_optimize")) every_learn_to_optimize();
  if (is("convolution")) every_convolution();
  if (is("large")) large();
  if (is("huge")) huge();
  if (!print_sums) printf("%ld\n", static_cast<long>(problems));
}
