// The ops `step_size_training` and `rnn_training`: schemas, internal checks, and the models shared out among threads.
// CPU only.
#include "experiments/learn_to_optimize.h"

#include <vector>

#include "cpu/launch.h"
#include "experiments/cpu/learn_to_optimize_kernel.h"
#include "experiments/training_launch.h"

namespace unrolled_kernels {
namespace {

// a model is a chunk of its own, so that the number of threads changes nothing
template <typename Problem>
void train(const Problem& p, const TrainingKernel<Problem>& kernel) {
  for_chunks(p.M, kernel.scratch_bytes(p), [&](int64_t model, void* scratch) { kernel.train(p, model, scratch); });
}

void step_size_training(Tensor theta, Tensor first_moment, Tensor second_moment, Tensor best_theta, Tensor best_loss,
                        Tensor best_epoch, const Tensor& set_of_model, const Tensor& orders, const Tensor& num_steps,
                        const Tensor& learning_rates, double weight_decay, bool adam, int64_t batch_size,
                        int64_t first_epoch, const Tensor& samples, const Tensor& largest, const Tensor& mu) {
  const TrainingTensors t{theta,      first_moment, second_moment, best_theta, best_loss,
                          best_epoch, set_of_model, orders,        num_steps,  learning_rates};
  STD_TORCH_CHECK(samples.dim() == 4, "samples: expected four dimensions");
  const int64_t S = samples.size(0), d = samples.size(2), n = samples.size(3);
  t.check_all(1, S, n);
  check("samples", samples, t.type(), {S, 3, d, n});
  check("largest", largest, t.type(), {t.models()});
  check("mu", mu, t.type(), {t.models()});
  t.dispatch([&](auto zero) {
    using C = decltype(zero);
    train(StepSizeTraining<C>{t.training<C>(weight_decay, adam, batch_size, first_epoch), d, data<C>(samples),
                              data<C>(largest), data<C>(mu)},
          UNROLLED_KERNELS_AT_ACTIVE_ISA(step_size_training_kernel<C>()));
  });
}

void rnn_training(Tensor theta, Tensor first_moment, Tensor second_moment, Tensor best_theta, Tensor best_loss,
                  Tensor best_epoch, const Tensor& set_of_model, const Tensor& orders, const Tensor& num_steps,
                  const Tensor& learning_rates, double weight_decay, bool adam, int64_t batch_size, int64_t first_epoch,
                  const Tensor& matrices, const Tensor& b, const Tensor& y_star, std::vector<int64_t> hidden_dims) {
  const TrainingTensors t{theta,      first_moment, second_moment, best_theta, best_loss,
                          best_epoch, set_of_model, orders,        num_steps,  learning_rates};
  STD_TORCH_CHECK(b.dim() == 3, "b: expected three dimensions");
  const int64_t S = b.size(0), n = b.size(1), d = b.size(2), layers = static_cast<int64_t>(hidden_dims.size());
  STD_TORCH_CHECK(1 <= layers && layers <= max_rnn_layers && d <= max_rnn_dim, "hidden_dims, d: out of range");
  int64_t P = d * (2 * hidden_dims.front() + hidden_dims.back());
  for (int64_t l = 0; l < layers; ++l) {
    STD_TORCH_CHECK(1 <= hidden_dims[l] && hidden_dims[l] <= max_rnn_width, "hidden_dims: out of range");
    if (l > 0) P += hidden_dims[l] * hidden_dims[l - 1];
  }
  t.check_all(P, S, n);
  check("matrices", matrices, t.type(), {S, n, d, d});
  check("b", b, t.type(), {S, n, d});
  check("y_star", y_star, t.type(), {S, n, d});
  t.dispatch([&](auto zero) {
    using C = decltype(zero);
    RnnTraining<C> p{t.training<C>(weight_decay, adam, batch_size, first_epoch),
                     d,
                     static_cast<int>(layers),
                     {},
                     data<C>(matrices),
                     data<C>(b),
                     data<C>(y_star)};
    for (int64_t l = 0; l < layers; ++l) p.hidden_dims[l] = hidden_dims[l];
    train(p, UNROLLED_KERNELS_AT_ACTIVE_ISA(rnn_training_kernel<C>()));
  });
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def("step_size_training(" UNROLLED_KERNELS_TRAINING_SCHEMA "Tensor samples, Tensor largest, Tensor mu) -> ()");
  m.def("rnn_training(" UNROLLED_KERNELS_TRAINING_SCHEMA
        "Tensor matrices, Tensor b, Tensor y_star, int[] hidden_dims) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) {
  m.impl("step_size_training", TORCH_BOX(&unrolled_kernels::step_size_training));
  m.impl("rnn_training", TORCH_BOX(&unrolled_kernels::rnn_training));
}
