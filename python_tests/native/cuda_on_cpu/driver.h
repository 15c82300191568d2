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

// Reads a Header and its arrays, calls run(Storage(), header, arrays) for its dtype, and writes the outputs, of which
// the first is array first_output. in_storage_type(i): whether the shift of the header is for array i.
template <typename Header, typename InStorageType, typename Run>
int drive(int first_output, InStorageType in_storage_type, Run run) {
  using namespace unrolled_kernels;
  Header h;
  read_all(&h, sizeof h);
  const Arrays<sizeof h.bytes / sizeof h.bytes[0]> arrays(h.bytes,
                                                          [&](int i) { return in_storage_type(i) ? h.shift : 0; });
  const char* error = "the kernels were not compiled for this dtype";
#define UNROLLED_KERNELS_RUN(Storage) \
  if (h.dtype == dtype_of(Storage())) error = run(Storage(), h, arrays.at);
  UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_RUN)
#undef UNROLLED_KERNELS_RUN
  if (error) {
    fprintf(stderr, "%s\n", error);
    return 2;
  }
  arrays.write(first_output + (h.backward ? 1 : 0));
  return 0;
}
