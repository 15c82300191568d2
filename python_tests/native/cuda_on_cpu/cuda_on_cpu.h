// Test only: runs ordinary CUDA C++ on the CPU. A thread is a fiber, the blocks of a grid run one after another.
//
//     g++ -x c++ -DUNROLLED_KERNELS_CUDA_ON_CPU -I <this folder> -I <CUDA toolkit>/include      (x86-64, GCC or clang)
//
// Executed: block and warp barriers, shuffles, shared memory (filled with NaN before each block), asynchronous copies,
// the conversions of half types, the runtime calls of a launcher. Not executed: inline PTX, matrix instructions, the
// weakness of the memory model, speed. Reported as a launch error instead of a hang or a wrong result: barriers that only
// some threads reach, shuffles whose lanes disagree or have returned, deadlock. Addresses are for ASan and UBSan to check,
// races within a block for TSan. From the environment:
//
//     CUDA_ON_CPU_ORDER           up (default) | down | a number: a random order of the threads of each block
//     CUDA_ON_CPU_COPIES          early (default) | late: at the wait. An asynchronous copy may happen anywhere between
//     CUDA_ON_CPU_SHARED_MEMORY   bytes a block can have, 232448 by default
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline
#define __shared__      static __attribute__((section("cuda_on_cpu_shared")))
extern "C" char __start_cuda_on_cpu_shared[] __attribute__((weak)), __stop_cuda_on_cpu_shared[] __attribute__((weak));
// the scheduler itself: fibers change stacks in the middle of it
#define CUDA_ON_CPU_SCHEDULER __attribute__((no_sanitize("thread", "address", "undefined"), noinline)) inline

namespace cuda_on_cpu {

constexpr size_t stack_bytes = 128 * 1024;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};
struct Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  uint3 index{};
  unsigned lane = 0, warp = 0;
  bool done = true;
  int line = 0;
  void *asan = nullptr, *tsan = nullptr;
  std::vector<Copy> copies;
};
// Where lanes meet: each deposits 8 bytes, in one of two sets in turn.
struct Meeting {
  unsigned expected = 0, arrived = 0;
  unsigned long round = 0;
  int line = 0;
  uint64_t deposit[2][32];
};
struct Warp {
  unsigned lanes = 0, returned = 0;
  Meeting meetings[32];
};  // by the lowest lane that meets
struct Machine {
  std::vector<Thread> threads;
  std::vector<int> order;
  Warp warps[32];
  int size = 0, position = 0, alive = 0, at_barrier = 0, barrier_line = 0;
  unsigned long barrier_round = 0, progress = 0, seen = 0, idle = 0;
  void *main_stack_pointer = nullptr, *main_asan = nullptr, *main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  char* dynamic_shared = nullptr;
  bool late_copies = false;
  std::string error;
  uint3 block{};
  dim3 grid_size, block_size;
  char begin_tag = 0, barrier_tag = 0, end_tag = 0;
};
inline Machine& machine() {
  static Machine m;
  return m;
}
inline Thread* current = nullptr;

inline void release(void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_release(tag);
#endif
  (void)tag;
}
inline void acquire(void* tag) {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(tag);
#endif
  (void)tag;
}

extern "C" void cuda_on_cpu_switch(void** save, void* to);
__asm__(
    ".text\n.weak cuda_on_cpu_switch\n.type cuda_on_cpu_switch,@function\ncuda_on_cpu_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp,(%rdi)\nmovq %rsi,%rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n"
    ".size cuda_on_cpu_switch,.-cuda_on_cpu_switch\n");

// what ASan has to hear after a stack was entered; the first time it also tells the scheduler's own stack
CUDA_ON_CPU_SCHEDULER void entered([[maybe_unused]] void* asan, [[maybe_unused]] bool from_scheduler) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(asan, &stack, &bytes);
  if (from_scheduler && !machine().main_stack) machine().main_stack = stack, machine().main_stack_bytes = bytes;
#endif
}
CUDA_ON_CPU_SCHEDULER void switch_to(Thread* to, void** save, [[maybe_unused]] void** asan) {  // nullptr: the scheduler
  Machine& m = machine();
#ifdef __SANITIZE_ADDRESS__
  const void* stack = to ? to->stack : m.main_stack;
  __sanitizer_start_switch_fiber(asan, stack, to ? stack_bytes : m.main_stack_bytes);
#endif
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(to ? to->tsan : m.main_tsan, 1 /* which orders nothing */);
#endif
  Thread* self = current;
  current = to;
  cuda_on_cpu_switch(save, to ? to->stack_pointer : m.main_stack_pointer);
  current = self;
  entered(asan ? *asan : nullptr, false);
}
CUDA_ON_CPU_SCHEDULER Thread* next_alive() {
  Machine& m = machine();
  do m.position = m.position + 1 == m.size ? 0 : m.position + 1;
  while (m.threads[m.order[m.position]].done);
  return &m.threads[m.order[m.position]];
}
[[noreturn]] CUDA_ON_CPU_SCHEDULER void fail(const std::string& what) {
  Machine& m = machine();
  char where[160];
  snprintf(where, sizeof where, " [block %u thread %u, line %d]", m.block.x, current->index.x, current->line);
  m.error = what + where;
  release(&m.end_tag);
  switch_to(nullptr, &current->stack_pointer, &current->asan);
  abort();
}
CUDA_ON_CPU_SCHEDULER void wait_a_turn() {
  Machine& m = machine();
  if (m.progress != m.seen) {
    m.seen = m.progress;
    m.idle = 0;
  } else if (++m.idle > 4ul * m.size + 8) {
    fail("deadlock: every thread waits");
  }
  Thread *self = current, *next = next_alive();
  if (next != self) switch_to(next, &self->stack_pointer, &self->asan);
}

CUDA_ON_CPU_SCHEDULER void block_barrier(int line) {
  Machine& m = machine();
  current->line = line;
  if (m.at_barrier && m.barrier_line != line) fail("__syncthreads: another thread waits at a different one");
  const unsigned long round = m.barrier_round;
  m.barrier_line = line;
  release(&m.barrier_tag);
  if (++m.at_barrier == m.size) {
    m.at_barrier = 0;
    ++m.barrier_round;
    ++m.progress;
  }
  while (m.barrier_round == round) {
    if (m.alive < m.size) fail("__syncthreads: a thread of the block has returned");
    wait_a_turn();
  }
  acquire(&m.barrier_tag);
}
// all lanes of the mask meet; what they deposited stays until the next meeting of the calling lane
CUDA_ON_CPU_SCHEDULER const uint64_t* meet(unsigned mask, uint64_t deposit, bool orders_memory, int line) {
  Machine& m = machine();
  Warp& warp = m.warps[current->warp];
  current->line = line;
  mask &= warp.lanes;
  if (!(mask >> current->lane & 1)) fail("warp operation: the calling lane is not in its mask");
  if (mask & warp.returned) fail("warp operation: a lane of the mask has returned");
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (meeting.arrived && (meeting.expected != mask || meeting.line != line)) fail("warp operation: lanes disagree");
  const unsigned long round = meeting.round;
  meeting.expected = mask;
  meeting.line = line;
  meeting.arrived |= 1u << current->lane;
  meeting.deposit[round & 1][current->lane] = deposit;
  if (orders_memory) release(&meeting);
  if (meeting.arrived == mask) {
    meeting.arrived = 0;
    ++meeting.round;
    ++m.progress;
  }
  while (meeting.round == round) {
    if (mask & warp.returned) fail("warp operation: a lane of the mask returned while others wait");
    wait_a_turn();
  }
  if (orders_memory) acquire(&meeting);
  return meeting.deposit[round & 1];
}
template <typename T>
CUDA_ON_CPU_SCHEDULER T shuffle_xor(unsigned mask, T value, int lanes, int line) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  const unsigned source = current->lane ^ static_cast<unsigned>(lanes);
  const uint64_t* deposits = meet(mask, bits, false, line);
  if (!(mask & machine().warps[current->warp].lanes & 1u << source)) fail("shuffle: reads a lane outside the mask");
  memcpy(&value, &deposits[source], sizeof value);
  return value;
}

inline void copy_async(void* to, const void* from, size_t bytes) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes)
    fail("asynchronous copy: not aligned");
  current->copies.push_back({to, from, bytes});
  if (machine().late_copies) return;
  memcpy(to, from, bytes);
  current->copies.pop_back();
}
inline void wait_for_copies() {
  for (const Copy& c : current->copies) memcpy(c.to, c.from, c.bytes);
  current->copies.clear();
}
inline unsigned char* dynamic_shared_memory() { return reinterpret_cast<unsigned char*>(machine().dynamic_shared); }

CUDA_ON_CPU_SCHEDULER void finish_thread() {
  Machine& m = machine();
  Thread* self = current;
  m.warps[self->warp].returned |= 1u << self->lane;
  self->done = true;
  ++m.progress;
  release(&m.end_tag);
  switch_to(--m.alive ? next_alive() : nullptr, &self->stack_pointer, nullptr);
  abort();
}
__attribute__((noinline, no_sanitize("thread"))) inline void enter_thread() {
  entered(nullptr, true);
  acquire(&machine().begin_tag);
  machine().body(machine().argument);
  finish_thread();
}

CUDA_ON_CPU_SCHEDULER void run_block(const char* order, std::mt19937& random) {
  Machine& m = machine();
  m.size = m.alive = static_cast<int>(m.block_size.x);
  m.at_barrier = 0;
  m.idle = 0;
  m.threads.resize(std::max<size_t>(m.threads.size(), m.size));
  m.order.resize(m.size);
  std::iota(m.order.begin(), m.order.end(), 0);
  if (!strcmp(order, "down")) std::reverse(m.order.begin(), m.order.end());
  if (*order >= '0' && *order <= '9') std::shuffle(m.order.begin(), m.order.end(), random);
  for (Warp& warp : m.warps) warp = Warp();
  if (__start_cuda_on_cpu_shared) {
    memset(__start_cuda_on_cpu_shared, 0xff, __stop_cuda_on_cpu_shared - __start_cuda_on_cpu_shared);
  }
  for (int i = 0; i < m.size; ++i) {
    Thread& t = m.threads[i];
#ifdef __SANITIZE_THREAD__
    if (t.stack) munmap(t.stack, stack_bytes);  // or TSan would remember the last block's accesses
    t.stack = nullptr;
    t.tsan = __tsan_create_fiber(0);
#endif
    if (!t.stack) {
      t.stack = static_cast<char*>(
          mmap(nullptr, stack_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    }
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(t.stack, stack_bytes);
#endif
    t.index = make_uint3(i, 0, 0);
    t.lane = i % 32;
    t.warp = i / 32;
    t.done = false;
    t.asan = nullptr;
    t.copies.clear();
    m.warps[t.warp].lanes |= 1u << t.lane;
    void** top = reinterpret_cast<void**>(t.stack + stack_bytes - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter_thread);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    t.stack_pointer = top;
  }
#ifdef __SANITIZE_THREAD__
  m.main_tsan = __tsan_get_current_fiber();
#endif
  m.position = 0;
  release(&m.begin_tag);
  switch_to(&m.threads[m.order[0]], &m.main_stack_pointer, &m.main_asan);
#ifdef __SANITIZE_THREAD__
  for (int i = 0; i < m.size; ++i) __tsan_destroy_fiber(m.threads[i].tsan);
#endif
}

inline const char* environment(const char* name, const char* otherwise) {
  const char* value = getenv(name);
  return value && *value ? value : otherwise;
}
inline size_t shared_memory_limit() { return strtoul(environment("CUDA_ON_CPU_SHARED_MEMORY", "232448"), nullptr, 10); }

template <typename F>
CUDA_ON_CPU_SCHEDULER cudaError_t launch(const cudaLaunchConfig_t& config, F&& f) {
  Machine& m = machine();
  const size_t bytes = config.dynamicSmemBytes;
  m.error.clear();
  if (!config.gridDim.x || !config.blockDim.x || config.blockDim.x > 1024 || bytes > shared_memory_limit()) {
    m.error = "invalid configuration";
    return cudaErrorInvalidConfiguration;
  }
  const char* order = environment("CUDA_ON_CPU_ORDER", "up");
  std::mt19937 random(strtoul(order, nullptr, 10));
  m.late_copies = !strcmp(environment("CUDA_ON_CPU_COPIES", "early"), "late");
  m.grid_size = config.gridDim;
  m.block_size = config.blockDim;
  m.argument = &f;
  m.body = [](void* argument) { (*static_cast<std::remove_reference_t<F>*>(argument))(); };
  for (unsigned x = 0; x < config.gridDim.x && m.error.empty(); ++x) {
    m.block = make_uint3(x, 0, 0);
    const std::unique_ptr<char[]> dynamic(new char[bytes]);  // of the exact size, for ASan
    memset(dynamic.get(), 0xff, bytes);
    m.dynamic_shared = dynamic.get();
    run_block(order, random);
    acquire(&m.end_tag);
  }
  return m.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->index)
inline const uint3& blockIdx = cuda_on_cpu::machine().block;
inline const dim3 &blockDim = cuda_on_cpu::machine().block_size, &gridDim = cuda_on_cpu::machine().grid_size;
#define __syncthreads() cuda_on_cpu::block_barrier(__LINE__)
inline void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  cuda_on_cpu::meet(mask, 0, true, line);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int line = __builtin_LINE()) {
  return cuda_on_cpu::shuffle_xor(mask, value, lanes, line);
}
inline int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  for (int lanes = 1; lanes < 32; lanes *= 2) predicate |= cuda_on_cpu::shuffle_xor(mask, predicate, lanes, line);
  return predicate;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}

// the runtime, as far as launchers call it: a device of two multiprocessors that hold one block each
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2 : static_cast<int>(cuda_on_cpu::shared_memory_limit());
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::machine().error.c_str(); }
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_cpu::launch(*config, [&] { kernel(arguments...); });
}
