// What the processor can do at most: multiply-adds in registers, and bytes through the memory hierarchy. Compiled by
// roofs.py when it is first needed, for the processor it runs on.

#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif
typedef float Vector __attribute__((vector_size(vector_bytes), aligned(4), may_alias));
constexpr int64_t lanes = vector_bytes / 4;
// independent chains: latency times throughput is 8 or 10 today, and 12 with both constants stay in 16 registers
constexpr int chains = 12;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Runs `work`, which returns how much it did, again and again for `seconds` on each thread; the sum of the threads' best
// rates over half a millisecond, in which nothing else had the processor.
template <typename Work>
double rate(int threads, double seconds, Work work) {
  std::vector<double> rates(threads);
  std::barrier start(threads);
  auto body = [&](int thread) {
    work(thread);
    start.arrive_and_wait();
    const double first = now();
    for (double begin = first; begin - first < seconds;) {
      double done = 0, elapsed = 0;
      while (elapsed < 0.0005) {
        done += work(thread);
        elapsed = now() - begin;
      }
      rates[thread] = std::max(rates[thread], done / elapsed);
      begin += elapsed;
    }
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(body, thread);
  body(0);
  for (std::thread& other : others) other.join();
  double sum = 0;
  for (const double r : rates) sum += r;
  return sum;
}

volatile float sink;
volatile float factor = 0.999f, term = 0.001f;

double multiply_add() {
  constexpr int64_t steps = 4096;
  const float a = factor, c = term;
  Vector x[chains];
  for (int i = 0; i < chains; ++i) x[i] = Vector{} + static_cast<float>(i);
  for (int64_t t = 0; t < steps; ++t) {
#pragma GCC unroll 12
    for (int i = 0; i < chains; ++i) x[i] = x[i] * a + c;
  }
  Vector sum{};
  for (int i = 0; i < chains; ++i) sum += x[i];
  sink = sum[0];
  return 2.0 * steps * chains * lanes;
}

void read(const float* source, int64_t n) {
  Vector sums[8] = {};
  int64_t i = 0;
  for (; i + 8 * lanes <= n; i += 8 * lanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sums[j] += *reinterpret_cast<const Vector*>(source + i + j * lanes);
  }
  for (int j = 1; j < 8; ++j) sums[0] += sums[j];
  float rest = sums[0][0];
  for (; i < n; ++i) rest += source[i];
  sink = rest;
}

void copy(const float* source, float* target, int64_t n) {
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes) {
#pragma GCC unroll 4
    for (int64_t j = i; j < i + 4 * lanes; j += lanes) {
      *reinterpret_cast<Vector*>(target + j) = *reinterpret_cast<const Vector*>(source + j);
    }
  }
  for (; i < n; ++i) target[i] = source[i];
}

}  // namespace

extern "C" {

// Float32 operations a second, two for a multiply-add.
double fma_rate(int threads, double seconds) {
  return rate(threads, seconds, [](int) { return multiply_add(); });
}

// Bytes a second, read and written ones, of `reads` passes that read `source` [sets, n] and `copies` that copy it to
// `target` [n], set after set; each thread has its share of the n. With `library` the copies are memcpy's, which may
// write past the caches.
double stream_rate(int threads, double seconds, const float* source, int64_t sets, float* target, int64_t n, int reads,
                   int copies, int library) {
  std::vector<int64_t> set(threads);
  return rate(threads, seconds, [&](int thread) {
    const int64_t begin = n * thread / threads, count = n * (thread + 1) / threads - begin;
    double bytes = 0;
    // at least 64 KB between two looks at the clock
    do {
      const float* from = source + set[thread] * n + begin;
      set[thread] = (set[thread] + 1) % sets;
      for (int i = 0; i < reads; ++i) read(from, count);
      for (int i = 0; i < copies; ++i) {
        library ? static_cast<void>(std::memcpy(target + begin, from, count * sizeof(float)))
                : copy(from, target + begin, count);
      }
      bytes += static_cast<double>(reads + 2 * copies) * count * sizeof(float);
    } while (bytes < 65536 && count > 0);
    return bytes;
  });
}
}
