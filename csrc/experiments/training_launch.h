// Internal checks of what the training ops are called with, and the part of their arguments that they share.
#pragma once

#include <initializer_list>

#include "common/tensors.h"
#include "experiments/training.h"

namespace unrolled_kernels {

inline void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == type, name,
                  ": expected a contiguous CPU tensor of dtype ", torch::headeronly::toString(type));
  bool same = x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(static_cast<int64_t>(i)) == sizes.begin()[i];
  STD_TORCH_CHECK(same, name, ": not of the shape in the op's header");
}

// what every training op begins with, in this order
#define UNROLLED_KERNELS_TRAINING_SCHEMA                                                                \
  "Tensor(a!) theta, Tensor(b!) first_moment, Tensor(c!) second_moment, Tensor(d!) best_theta, "        \
  "Tensor(e!) best_loss, Tensor(f!) best_epoch, Tensor set_of_model, Tensor orders, Tensor num_steps, " \
  "Tensor learning_rates, float weight_decay, bool adam, int batch_size, int first_epoch, "

// The tensors of `Training`.
struct TrainingTensors {
  Tensor &theta, &first_moment, &second_moment, &best_theta, &best_loss, &best_epoch;
  const Tensor &set_of_model, &orders, &num_steps, &learning_rates;

  ScalarType type() const { return theta.scalar_type(); }
  int64_t models() const { return theta.size(0); }

  void check_all(int64_t P, int64_t S, int64_t n) const {
    STD_TORCH_CHECK(type() == ScalarType::Float || type() == ScalarType::Double, "theta: expected float32 or float64");
    STD_TORCH_CHECK(theta.dim() == 2 && orders.dim() == 3, "theta, orders: expected two and three dimensions");
    const int64_t M = models(), E = orders.size(0);
    check("theta", theta, type(), {M, P});
    check("first_moment", first_moment, type(), {M, P});
    check("second_moment", second_moment, type(), {M, P});
    check("best_theta", best_theta, type(), {M, P});
    check("best_loss", best_loss, type(), {M});
    check("best_epoch", best_epoch, ScalarType::Long, {M});
    check("set_of_model", set_of_model, ScalarType::Long, {M});
    check("orders", orders, ScalarType::Long, {E, S, n});
    check("num_steps", num_steps, ScalarType::Long, {M});
    check("learning_rates", learning_rates, type(), {M});
    const int64_t* sets = data<int64_t>(set_of_model);
    for (int64_t i = 0; i < M; ++i) STD_TORCH_CHECK(sets[i] >= 0 && sets[i] < S, "set_of_model: out of range");
    const int64_t* indices = data<int64_t>(orders);
    for (int64_t i = 0; i < E * S * n; ++i) {
      STD_TORCH_CHECK(indices[i] >= 0 && indices[i] < n, "orders: out of range");
    }
  }

  // f(C()) for the dtype C
  template <typename F>
  void dispatch(const F& f) const {
    with_scratch([&] { type() == ScalarType::Float ? f(float()) : f(double()); });
  }

  template <typename C>
  Training<C> training(double weight_decay, bool adam, int64_t batch_size, int64_t first_epoch) const {
    STD_TORCH_CHECK(batch_size > 0 && first_epoch >= 0, "batch_size, first_epoch: out of range");
    return {models(),
            theta.size(1),
            orders.size(2),
            orders.size(1),
            orders.size(0),
            mutable_data<C>(theta),
            mutable_data<C>(first_moment),
            mutable_data<C>(second_moment),
            mutable_data<C>(best_theta),
            mutable_data<C>(best_loss),
            mutable_data<int64_t>(best_epoch),
            data<int64_t>(set_of_model),
            data<int64_t>(orders),
            data<int64_t>(num_steps),
            data<C>(learning_rates),
            weight_decay,
            adam,
            batch_size,
            first_epoch};
  }
};

}  // namespace unrolled_kernels
