// How a kernel that runs for long learns that its op is to end: the handler of a signal has thrown (Ctrl-C), or another
// thread of the op has.
#pragma once

#ifdef UNROLLED_KERNELS_NAMESPACE
#error "include this before cpu/simd/simd.h: its functions are compiled once, for the baseline"
#endif

#include <atomic>
#include <chrono>
#include <cstdint>

#include "common/host.h"

namespace unrolled_kernels {

// One thread's share of an op, while it is at work.
class Watch {
 public:
  struct Stopped {};

  // `stop`: set when a thread has failed. `asks_host`: of one of the threads, that on which the op was called.
  Watch(const std::atomic<bool>& stop, bool asks_host) : stop_(stop), asks_host_(asks_host), outer_(current()) {
    current() = this;
  }
  ~Watch() { current() = outer_; }
  Watch(const Watch&) = delete;

  static Watch*& current() {
    static thread_local Watch* watch = nullptr;
    return watch;
  }

  // Throws if the op is to end. Asks the host at most every 20 ms, and not at the first look.
  void look() {
    using namespace std::chrono_literals;
    if (stop_.load(std::memory_order_relaxed)) throw Stopped();
    if (!asks_host_ || !host.check_signals) return;
    const auto now = std::chrono::steady_clock::now();
    if (next_ == Time{}) next_ = now + 20ms;
    if (now < next_) return;
    next_ = now + 20ms;
    host.check_signals();
  }

 private:
  using Time = std::chrono::steady_clock::time_point;
  const std::atomic<bool>& stop_;
  const bool asks_host_;
  Watch* const outer_;
  Time next_{};
};

// Counts the work of a kernel, and looks up every millisecond or so.
class Poll {
 public:
  static constexpr int64_t work_between = 1 << 20;

  // `work`: operations on vectors, about, since it was called before
  void after(int64_t work) {
    if ((left_ -= work) >= 0) return;
    left_ = work_between;
    look();
  }
  __attribute__((noinline)) static void look() {
    if (Watch* watch = Watch::current()) watch->look();
  }

 private:
  int64_t left_ = work_between;
};

}  // namespace unrolled_kernels
