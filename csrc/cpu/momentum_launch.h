// Launchers of the CPU kernels of `momentum`: pick the instruction set, plan, run the chunks in parallel, sum them up.
#pragma once

#include <cmath>
#include <vector>

#include "cpu/momentum_kernels.h"

namespace unrolled_kernels {

template <typename Storage>
MomentumKernels<Storage> momentum_kernels(Structure structure);
// the plan of a call; `backward` as in MomentumKernels
template <typename Storage>
MomentumPlan momentum_plan(Structure structure, const MomentumInputs<Storage>& p,
                           const MomentumBackward<Storage>* backward);

template <typename Storage>
void momentum_cpu(Structure structure, const MomentumForward<Storage>& p);
template <typename Storage>
void momentum_cpu(Structure structure, const MomentumBackward<Storage>& p);

// The momentum of Nesterov's method and what it hands on to phi and mu:
//     beta = gamma = (1 - r) / (1 + r),  r = sqrt(mu phi),     dbeta/dphi = -(1 - beta^2) / (4 phi), and so for mu
template <typename C>
class NesterovMomentum {
 public:
  template <typename Storage>
  NesterovMomentum(const MomentumInputs<Storage>& p, const Coefficient<C>& mu) : phi_(p.phi), mu_(mu) {
    // without samples there may be no entry to read
    rows_ = p.B == 0 || phi_.batch_stride || mu_.batch_stride ? p.B : 1;
    columns_ = phi_.step_stride || mu_.step_stride ? p.k : 1;
    beta_.reserve(rows_ * columns_);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t t = 0; t < columns_; ++t) {
        const C root = std::sqrt(at(phi_, row, t) * at(mu_, row, t));
        beta_.push_back((1 - root) / (1 + root));
      }
    }
  }

  Coefficient<C> beta() const { return {beta_.data(), rows_ == 1 ? 0 : columns_, columns_ == 1 ? 0 : 1}; }

  // room for the gradients of beta and gamma, which are written before backward() reads them
  void allocate_gradients(C*& dbeta, C*& dgamma) {
    gradients_.resize(2 * beta_.size());
    dbeta = gradients_.data(), dgamma = dbeta + beta_.size();
  }

  // dphi [rows or 1, columns or 1] += , dmu likewise =
  void backward(C* dphi, C* dmu) const {
    if (rows_ == 0) return;
    std::vector<double> sums_phi(size(phi_), 0.0), sums_mu(size(mu_), 0.0);
    for (int64_t row = 0; row < rows_; ++row) {
      for (int64_t t = 0; t < columns_; ++t) {
        const int64_t i = row * columns_ + t;
        const C gradient = gradients_[i] + gradients_[beta_.size() + i];
        const C quarter = gradient * (1 - beta_[i] * beta_[i]) / -4;
        sums_phi[index(phi_, row, t)] += quarter / at(phi_, row, t);
        sums_mu[index(mu_, row, t)] += quarter / at(mu_, row, t);
      }
    }
    for (size_t i = 0; i < sums_phi.size(); ++i) dphi[i] = static_cast<C>(dphi[i] + sums_phi[i]);
    for (size_t i = 0; i < sums_mu.size(); ++i) dmu[i] = static_cast<C>(sums_mu[i]);
  }

 private:
  static C at(const Coefficient<C>& c, int64_t row, int64_t t) {
    return c.data[row * c.batch_stride + t * c.step_stride];
  }
  int64_t size(const Coefficient<C>& c) const { return (c.batch_stride ? rows_ : 1) * (c.step_stride ? columns_ : 1); }
  // where the gradient of an entry is
  int64_t index(const Coefficient<C>& c, int64_t row, int64_t t) const {
    return (c.batch_stride ? row * (c.step_stride ? columns_ : 1) : 0) + (c.step_stride ? t : 0);
  }

  Coefficient<C> phi_, mu_;
  int64_t rows_, columns_;
  std::vector<C> beta_, gradients_;  // [rows, columns]
};

}  // namespace unrolled_kernels
