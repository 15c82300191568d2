// The op `synthetic_training`: schema, internal checks, and the models shared out among threads. CPU only.
#include "experiments/synthetic_training.h"

#include "common/tensors.h"
#include "cpu/launch.h"
#include "experiments/cpu/synthetic_training_kernel.h"

namespace unrolled_kernels {
namespace {

void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type, name,
                  ": expected a contiguous CPU tensor of dtype ", torch::headeronly::toString(type));
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(static_cast<int64_t>(i)) == sizes.begin()[i];
  STD_TORCH_CHECK(same, name, ": not of the shape in synthetic_training.h");
}

void synthetic_training(Tensor theta, Tensor first_moment, Tensor second_moment, Tensor best_theta, Tensor best_loss,
                        Tensor best_epoch, const Tensor& samples, const Tensor& fixed, const Tensor& set_of_model,
                        const Tensor& orders, const Tensor& num_steps, const Tensor& accelerated,
                        const Tensor& learning_rates, int64_t hidden, double step_size, double momentum, double mu,
                        double L, double weight_decay, bool adam, int64_t batch_size, int64_t first_epoch) {
  const ScalarType type = theta.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "theta: expected float32 or float64");
  STD_TORCH_CHECK(samples.dim() == 3 && orders.dim() == 3, "samples, orders: expected three dimensions");
  STD_TORCH_CHECK(hidden >= 0 && batch_size > 0 && first_epoch >= 0, "hidden, batch_size, first_epoch: out of range");
  const int64_t M = theta.size(0), P = synthetic_parameters(hidden), S = samples.size(0), n = samples.size(2);
  const int64_t E = orders.size(0);
  check("theta", theta, type, {M, P});
  check("first_moment", first_moment, type, {M, P});
  check("second_moment", second_moment, type, {M, P});
  check("best_theta", best_theta, type, {M, P});
  check("best_loss", best_loss, type, {M});
  check("best_epoch", best_epoch, ScalarType::Long, {M});
  check("samples", samples, type, {S, synthetic_inputs + 2 * synthetic_outputs, n});
  check("fixed", fixed, type, {M, n});
  check("set_of_model", set_of_model, ScalarType::Long, {M});
  check("orders", orders, ScalarType::Long, {E, S, n});
  check("num_steps", num_steps, ScalarType::Long, {M});
  check("accelerated", accelerated, ScalarType::Bool, {M});
  check("learning_rates", learning_rates, type, {M});
  const int64_t* sets = data<int64_t>(set_of_model);
  for (int64_t i = 0; i < M; ++i) STD_TORCH_CHECK(sets[i] >= 0 && sets[i] < S, "set_of_model: out of range");
  const int64_t* indices = data<int64_t>(orders);
  for (int64_t i = 0; i < E * S * n; ++i) {
    STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < n, "orders: out of range");
  }

  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const SyntheticTraining<C> p{M,
                                 n,
                                 hidden,
                                 E,
                                 mutable_data<C>(theta),
                                 mutable_data<C>(first_moment),
                                 mutable_data<C>(second_moment),
                                 mutable_data<C>(best_theta),
                                 mutable_data<C>(best_loss),
                                 mutable_data<int64_t>(best_epoch),
                                 data<C>(samples),
                                 data<C>(fixed),
                                 sets,
                                 indices,
                                 S,
                                 data<int64_t>(num_steps),
                                 data<bool>(accelerated),
                                 data<C>(learning_rates),
                                 step_size,
                                 momentum,
                                 mu,
                                 L,
                                 weight_decay,
                                 adam,
                                 batch_size,
                                 first_epoch};
    const auto kernel = UNROLLED_KERNELS_AT_ACTIVE_ISA(synthetic_training_kernel<C>());
    // a model is a chunk of its own, so that the number of threads changes nothing
    for_chunks(M, kernel.scratch_bytes(p), [&](int64_t model, void* scratch) { kernel.train(p, model, scratch); });
  };
  type == ScalarType::Float ? run(float()) : run(double());
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def(
      "synthetic_training(Tensor(a!) theta, Tensor(b!) first_moment, Tensor(c!) second_moment, Tensor(d!) best_theta, "
      "Tensor(e!) best_loss, Tensor(f!) best_epoch, Tensor samples, Tensor fixed, Tensor set_of_model, Tensor orders, "
      "Tensor num_steps, Tensor accelerated, Tensor learning_rates, int hidden, float step_size, float momentum, "
      "float mu, float L, float weight_decay, bool adam, int batch_size, int first_epoch) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) {
  m.impl("synthetic_training", TORCH_BOX(&unrolled_kernels::synthetic_training));
}
