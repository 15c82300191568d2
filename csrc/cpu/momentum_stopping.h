// Samples that stop by themselves (Stopping of momentum.h), and how far a tile of them goes.
#pragma once

#include <limits>

#include "cpu/momentum_prox.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// The samples of a tile, E lanes each, that have not stopped. A row is `size` vectors, `step` elements from one to the
// next; lanes without an element are zero.
template <int E, typename C>
class MovingSamples {
  static constexpr int64_t W = lanes<C>;

 public:
  void begin(int64_t first, int64_t count) {
    first_ = first, count_ = moves_ = count;
    for (int64_t l = 0; l < W; ++l) moving_[l] = l < count * E ? C(1) : C(0);
  }
  // how many
  int64_t count() const { return moves_; }

  // After step t of k, which leads from one row to another: writes what it says of the samples that stop, and their part
  // of `to` to `stopped`.
  UNROLLED_KERNELS_NOINLINE void after(const Stopping<C>& stopping, int64_t t, int64_t k, const C* from, const C* to,
                                       int64_t size, int64_t step, C* stopped) {
    Vector<C> change{}, large{};
    auto unordered = change != change;
    for (int64_t n = 0; n < size * step; n += step) {
      const Vector<C> y = load(to + n), moved = y - load(from + n);
      const Vector<C> by = moved < 0 ? -moved : moved, magnitude = y < 0 ? -y : y;
      change = by > change ? by : change;
      large = magnitude > large ? magnitude : large;
      unordered |= moved != moved;
    }
    // a NaN is no small change
    change = unordered ? broadcast(std::numeric_limits<C>::quiet_NaN()) : change;
    const bool last = t + 1 == k;
    if constexpr (E == 1) {
      const Vector<C> limit = stopping.tolerance * (large > 1 ? large : broadcast(C(1)));
      const auto stops = (change <= limit) & (load(moving_) > 0);
      if (!last && sum_lanes<C>(where<C>(stops, broadcast(C(1)))) == 0) return;
    }
    C changes[W], magnitudes[W];
    store(changes, change), store(magnitudes, large);
    for (int64_t s = 0; s < count_; ++s) {
      if (moving_[s * E] == 0) continue;
      C by = changes[s * E], limit = 1;
      for (int64_t l = s * E; l < (s + 1) * E; ++l) {
        if (!(changes[l] <= by)) by = changes[l];
        if (magnitudes[l] > limit) limit = magnitudes[l];
        if (by != by) break;
      }
      if (!last && !(by <= stopping.tolerance * limit)) continue;
      stopping.taken[first_ + s] = t + 1;
      stopping.residual[first_ + s] = by;
      moving_[s * E] = 0, --moves_;
      for (int64_t n = 0; n < size * step; n += step) {
        for (int64_t l = n + s * E; l < n + (s + 1) * E; ++l) stopped[l] = to[l];
      }
    }
  }

 private:
  int64_t first_, count_, moves_;
  C moving_[W];  // 1 in the lanes of those that move
};

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
