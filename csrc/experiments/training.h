// What the training loops of the paper's tasks share: models trained for some epochs, each from its own state, on its
// own samples and for itself.
//
// An epoch visits the samples in its order, a minibatch at a time, each followed by a step of Adam or SGD on the mean
// gradient plus weight_decay times the parameter. Then comes the mean loss over all samples in their own order, and
// where it is lower than best_loss the parameters are kept.
//
// Dimensions: M models of P parameters, S sets of n samples, E epochs.
#pragma once
#include <cstdint>

namespace unrolled_kernels {

template <typename C>
struct Training {
  int64_t M, P, n, S, E;
  // the state, read and written in place; nothing else is written
  C *theta, *first_moment, *second_moment, *best_theta;  // [M, P]; SGD leaves the moments alone
  C* best_loss;                                          // [M]
  int64_t* best_epoch;                                   // [M], counted from 1
  const int64_t* set_of_model;                           // [M], < S
  const int64_t* orders;                                 // [E, S, n], each row a permutation
  const int64_t* num_steps;                              // [M], k
  const C* learning_rates;                               // [M]
  double weight_decay;
  bool adam;
  int64_t batch_size, first_epoch;  // epochs done before, from which Adam counts its steps
};

}  // namespace unrolled_kernels
