// What csrc/cpu/launch.h takes from torch: parallel_for and its number of threads, here with threads of the standard library, which the thread
// sanitizer understands (OpenMP's barriers it does not).
#pragma once
#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace torch::stable {

inline int64_t num_threads = 1;
inline uint32_t get_num_threads() { return static_cast<uint32_t>(num_threads); }

// As torch divides it: a range of equal length for each thread, the first for the thread that calls.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t /*grain*/, const F& f) {
  if (begin >= end) return;
  const int64_t size = (end - begin + num_threads - 1) / num_threads;
  std::vector<std::thread> others;
  for (int64_t first = begin + size; first < end; first += size) {
    others.emplace_back([&f, first, last = std::min(first + size, end)] { f(first, last); });
  }
  f(begin, std::min(begin + size, end));
  for (auto& thread : others) thread.join();
}

}  // namespace torch::stable
