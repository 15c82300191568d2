// What the drivers share: a problem that comes on stdin as int64 numbers and raw arrays, outputs that go to stdout.
//
// Arrays and workspace have their exact size, for the address sanitizer to watch over.
#pragma once
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "common/types.h"

constexpr int dtype_of(float) { return 0; }
constexpr int dtype_of(double) { return 1; }
constexpr int dtype_of(unrolled_kernels::half) { return 2; }
constexpr int dtype_of(unrolled_kernels::bfloat16) { return 3; }

inline void read_all(void* to, size_t bytes) {
  if (fread(to, 1, bytes, stdin) != bytes) exit(4);
}

// The arrays of a problem, each behind its own allocation; bytes[i] of array i, -1: nullptr.
template <int n>
class Arrays {
 public:
  void* at[n] = {};

  // shift(i): bytes from a multiple of 16 to the array
  template <typename F>
  Arrays(const int64_t (&bytes)[n], F shift) : bytes_(bytes) {
    for (int i = 0; i < n; ++i) {
      if (bytes[i] < 0) continue;
      allocated_[i] = static_cast<char*>(malloc(bytes[i] + shift(i)));
      at[i] = allocated_[i] + shift(i);
      read_all(at[i], bytes[i]);
    }
  }
  ~Arrays() {
    for (char* p : allocated_) free(p);
  }
  void write(int first) const {
    for (int i = first; i < n; ++i) {
      if (bytes_[i] > 0) fwrite(at[i], 1, bytes_[i], stdout);
    }
  }

 private:
  const int64_t (&bytes_)[n];
  char* allocated_[n] = {};
};

// launcher(workspace, size): one of the functions of *_kernels.h. Returns its error.
template <typename F>
const char* run_with_workspace(F launcher) {
  size_t bytes = 0;
  if (const char* error = launcher(nullptr, &bytes)) return error;
  const std::unique_ptr<char[]> workspace(new char[bytes]);
  memset(workspace.get(), 0xff, bytes);
  return launcher(workspace.get(), nullptr);
}
