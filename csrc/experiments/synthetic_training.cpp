// The op `synthetic_training`: schema, internal checks, and the models shared out among threads. CPU only.
#include "experiments/synthetic_training.h"

#include "cpu/launch.h"
#include "experiments/cpu/synthetic_training_kernel.h"
#include "experiments/training_launch.h"

namespace unrolled_kernels {
namespace {

void synthetic_training(Tensor theta, Tensor first_moment, Tensor second_moment, Tensor best_theta, Tensor best_loss,
                        Tensor best_epoch, const Tensor& set_of_model, const Tensor& orders, const Tensor& num_steps,
                        const Tensor& learning_rates, double weight_decay, bool adam, int64_t batch_size,
                        int64_t first_epoch, const Tensor& samples, const Tensor& fixed, const Tensor& schedules,
                        int64_t hidden, double mu, double L) {
  const TrainingTensors t{theta,      first_moment, second_moment, best_theta, best_loss,
                          best_epoch, set_of_model, orders,        num_steps,  learning_rates};
  STD_TORCH_CHECK(samples.dim() == 3 && hidden >= 0, "samples, hidden: expected three dimensions, and no less than 0");
  const int64_t S = samples.size(0), n = samples.size(2);
  t.check_all(synthetic_parameters(hidden), S, n);
  check("samples", samples, t.type(), {S, synthetic_inputs + 2 * synthetic_outputs, n});
  check("fixed", fixed, t.type(), {t.models(), n});
  STD_TORCH_CHECK(schedules.dim() == 3, "schedules: expected three dimensions");
  check("schedules", schedules, ScalarType::Double, {t.models(), schedules.size(1), 3});
  for (int64_t i = 0; i < t.models(); ++i) {
    STD_TORCH_CHECK(data<int64_t>(num_steps)[i] <= schedules.size(1), "num_steps: more than there are in schedules");
  }

  t.dispatch([&](auto zero) {
    using C = decltype(zero);
    const SyntheticTraining<C> p{t.training<C>(weight_decay, adam, batch_size, first_epoch),
                                 hidden,
                                 schedules.size(1),
                                 data<C>(samples),
                                 data<C>(fixed),
                                 data<double>(schedules),
                                 mu,
                                 L};
    const auto kernel = UNROLLED_KERNELS_AT_ACTIVE_ISA(synthetic_training_kernel<C>());
    // a model is a chunk of its own, so that the number of threads changes nothing
    for_chunks(t.models(), kernel.scratch_bytes(p),
               [&](int64_t model, void* scratch) { kernel.train(p, model, scratch); });
  });
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def("synthetic_training(" UNROLLED_KERNELS_TRAINING_SCHEMA
        "Tensor samples, Tensor fixed, Tensor schedules, int hidden, float mu, float L) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) {
  m.impl("synthetic_training", TORCH_BOX(&unrolled_kernels::synthetic_training));
}
