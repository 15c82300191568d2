// Running the chunks of a plan in parallel, and adding up what they return.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/types.h"
#include "cpu/poll.h"

namespace unrolled_kernels {

struct FreeAligned {
  void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
};

// How many threads are at work beside the one that waits for them.
class OtherThreads {
 public:
  void begin() { ++working_; }
  void end() {
    if (--working_ > 0) return;
    const std::lock_guard<std::mutex> lock(mutex_);
    ended_.notify_one();
  }
  // Here, and not in the barrier behind the parallel region, signals are still looked for.
  void wait(Watch& watch) {
    // as long as a wake-up takes
    for (int i = 0; i < 10000; ++i) {
      if (working_ == 0) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    while (!ended_.wait_for(lock, std::chrono::milliseconds(20), [&] { return working_ == 0; })) watch.look();
  }

 private:
  std::atomic<int64_t> working_{0};
  std::mutex mutex_;
  std::condition_variable ended_;
};

// Calls f(chunk, scratch) for every chunk, with one scratch a thread. A thread takes the next chunk when it is done with
// one, so that one that is held up takes fewer; results do not depend on who took which. What one throws ends it for all.
template <typename F>
void for_chunks(int64_t chunks, size_t scratch_bytes, const F& f) {
  const int64_t threads = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  const std::thread::id caller = std::this_thread::get_id();
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;
  OtherThreads others;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const bool is_caller = std::this_thread::get_id() == caller;
    Watch watch(failed, is_caller);
    if (!is_caller) others.begin();
    try {
      const std::unique_ptr<void, FreeAligned> scratch(::operator new(scratch_bytes, std::align_val_t(64)));
      while (true) {
        const int64_t chunk = next.fetch_add(1, std::memory_order_relaxed);
        if (chunk >= chunks) break;
        if (chunk > 0) watch.look();
        f(chunk, scratch.get());
      }
      if (is_caller) others.wait(watch);
    } catch (...) {
      next = chunks;
      if (!failed.exchange(true)) error = std::current_exception();
    }
    if (!is_caller) others.end();
  });
  if (error) std::rethrow_exception(error);
}

// Calls f(chunk, begin, end, scratch) for every chunk of a plan, which takes the tiles from `begin` to `end`.
template <typename Plan, typename F>
void for_chunks(const Plan& plan, const F& f) {
  for_chunks(plan.chunks, plan.scratch_bytes, [&](int64_t chunk, void* scratch) {
    f(chunk, chunk * plan.tiles / plan.chunks, (chunk + 1) * plan.tiles / plan.chunks, scratch);
  });
}

inline void convert(double x, double* out) { *out = x; }
inline void convert(double x, float* out) { *out = static_cast<float>(x); }
inline void convert(double x, half* out) { out->bits = c10::Half(static_cast<float>(x)).x; }
inline void convert(double x, bfloat16* out) { out->bits = c10::BFloat16(static_cast<float>(x)).x; }

// out [size / row, columns] = the first `columns` of each `row` of the sum of partial [chunks, size] over the chunks, in
// their order and in double
template <typename C, typename Storage>
void sum_chunks(const C* partial, int64_t chunks, int64_t size, int64_t row, int64_t columns, Storage* out) {
  constexpr int64_t block = 16;  // sums that do not wait for each other
  const int64_t rows = row > 0 ? size / row : 0, blocks = (columns + block - 1) / block;
  // a thread gets 2^18 additions or more, some hundred microseconds
  const int64_t grain = (1 << 18) / (block * (chunks + 1)) + 1;
  torch::stable::parallel_for(0, rows * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * block, n = std::min(block, columns - begin);
      const C* from = partial + i / blocks * row + begin;
      double sums[block] = {};
      for (int64_t c = 0; c < chunks; ++c) {
        for (int64_t j = 0; j < n; ++j) sums[j] += from[c * size + j];
      }
      for (int64_t j = 0; j < n; ++j) convert(sums[j], out + i / blocks * columns + begin + j);
    }
  });
}

template <typename C, typename Storage>
void sum_chunks(const C* partial, int64_t chunks, int64_t size, Storage* out) {
  sum_chunks(partial, chunks, size, size, size, out);
}

}  // namespace unrolled_kernels
