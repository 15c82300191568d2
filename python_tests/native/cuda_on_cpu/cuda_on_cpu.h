// Test only: runs ordinary CUDA C++ on the CPU. A thread is a fiber; the blocks of a grid run one after another, those of a
// cluster side by side.
//
//     g++ -x c++ -DUNROLLED_KERNELS_CUDA_ON_CPU -I <this folder> -I <CUDA toolkit>/include      (x86-64, GCC or clang)
//
// Executed: barriers of clusters, blocks and warps, shuffles, shared memory (filled with NaN before each block) and that of
// other blocks of a cluster (dynamic only), asynchronous copies, the conversions of half types, the runtime calls of a
// launcher. Not executed: inline PTX, matrix instructions, the
// weakness of the memory model, speed. Reported as a launch error instead of a hang or a wrong result: barriers that only
// some threads reach, shuffles whose lanes disagree or have returned, deadlock. Addresses are for ASan and UBSan to check,
// races within a block for TSan. From the environment:
//
//     CUDA_ON_CPU_ORDER           up (default) | down | a number: a random order of the threads of each block
//     CUDA_ON_CPU_COPIES          early (default) | late: at the wait. An asynchronous copy may happen anywhere between
//     CUDA_ON_CPU_SHARED_MEMORY   bytes a block can have, 232448 by default
//     CUDA_ON_CPU_CLUSTERS        blocks of the largest cluster that can be launched, 16 by default
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
struct Block;
struct Thread {
  Block* block = nullptr;
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
struct Barrier {
  int arrived = 0, line = 0;
  unsigned long round = 0;
  char tag = 0;
};
struct Block {
  uint3 index{};
  int alive = 0;
  Warp warps[32];
  Barrier barrier;
  std::unique_ptr<char[]> dynamic_shared;  // of the exact size, for ASan
};
struct Machine {
  std::vector<Thread> threads;
  std::vector<int> order;
  std::vector<Block> blocks;  // of the cluster at work
  Barrier barrier;            // of the cluster
  int size = 0, position = 0, alive = 0;
  unsigned long progress = 0, seen = 0, idle = 0;
  void *main_stack_pointer = nullptr, *main_asan = nullptr, *main_tsan = nullptr;
  const void* main_stack = nullptr;
  size_t main_stack_bytes = 0;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  size_t dynamic_bytes = 0;
  bool late_copies = false;
  std::string error;
  dim3 grid_size, block_size;
  char begin_tag = 0, end_tag = 0;
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
  snprintf(where, sizeof where, " [block %u thread %u, line %d]", current->block->index.x, current->index.x,
           current->line);
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

CUDA_ON_CPU_SCHEDULER void wait_at(Barrier& barrier, const char* name, int size, const int& alive, int line) {
  Machine& m = machine();
  current->line = line;
  if (barrier.arrived && barrier.line != line) fail(std::string(name) + ": another thread waits at a different one");
  const unsigned long round = barrier.round;
  barrier.line = line;
  release(&barrier.tag);
  if (++barrier.arrived == size) {
    barrier.arrived = 0;
    ++barrier.round;
    ++m.progress;
  }
  while (barrier.round == round) {
    if (alive < size) fail(std::string(name) + ": a thread that it waits for has returned");
    wait_a_turn();
  }
  acquire(&barrier.tag);
}
CUDA_ON_CPU_SCHEDULER void block_barrier(int line) {
  Block& block = *current->block;
  wait_at(block.barrier, "__syncthreads", static_cast<int>(machine().block_size.x), block.alive, line);
}
CUDA_ON_CPU_SCHEDULER void cluster_barrier(int line = __builtin_LINE()) {
  wait_at(machine().barrier, "barrier of a cluster", machine().size, machine().alive, line);
}
inline int cluster_rank() { return static_cast<int>(current->block - machine().blocks.data()); }
// where `mine`, in the calling block's shared memory, is in that of another block of the cluster
inline void* shared_of_block(void* mine, int rank) {
  Machine& m = machine();
  const ptrdiff_t offset = static_cast<char*>(mine) - current->block->dynamic_shared.get();
  if (rank < 0 || rank >= static_cast<int>(m.blocks.size()))
    fail("shared memory of a block that is not in the cluster");
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(m.dynamic_bytes)) fail("an address that is not in shared memory");
  if (m.blocks[rank].alive == 0) fail("shared memory of a block that has returned");
  return m.blocks[rank].dynamic_shared.get() + offset;
}
// all lanes of the mask meet; what they deposited stays until the next meeting of the calling lane
CUDA_ON_CPU_SCHEDULER const uint64_t* meet(unsigned mask, uint64_t deposit, bool orders_memory, int line) {
  Machine& m = machine();
  Warp& warp = current->block->warps[current->warp];
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
  if (!(mask & current->block->warps[current->warp].lanes & 1u << source))
    fail("shuffle: reads a lane outside the mask");
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
inline unsigned char* dynamic_shared_memory() {
  return reinterpret_cast<unsigned char*>(current->block->dynamic_shared.get());
}

CUDA_ON_CPU_SCHEDULER void finish_thread() {
  Machine& m = machine();
  Thread* self = current;
  self->block->warps[self->warp].returned |= 1u << self->lane;
  --self->block->alive;
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

CUDA_ON_CPU_SCHEDULER void run_cluster(int first, int blocks, const char* order, std::mt19937& random) {
  Machine& m = machine();
  const int threads = static_cast<int>(m.block_size.x);
  m.size = m.alive = blocks * threads;
  m.barrier = Barrier();
  m.idle = 0;
  m.blocks.clear();
  m.blocks.resize(blocks);
  for (Block& block : m.blocks) {
    block.index = make_uint3(first++, 0, 0);
    block.alive = threads;
    block.dynamic_shared.reset(new char[m.dynamic_bytes]);
    memset(block.dynamic_shared.get(), 0xff, m.dynamic_bytes);
  }
  m.threads.resize(std::max<size_t>(m.threads.size(), m.size));
  m.order.resize(m.size);
  std::iota(m.order.begin(), m.order.end(), 0);
  if (!strcmp(order, "down")) std::reverse(m.order.begin(), m.order.end());
  if (*order >= '0' && *order <= '9') std::shuffle(m.order.begin(), m.order.end(), random);
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
    t.block = &m.blocks[i / threads];
    t.index = make_uint3(i % threads, 0, 0);
    t.lane = i % threads % 32;
    t.warp = i % threads / 32;
    t.done = false;
    t.asan = nullptr;
    t.copies.clear();
    t.block->warps[t.warp].lanes |= 1u << t.lane;
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
inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  }
  return 1;
}
inline unsigned cluster_limit() { return strtoul(environment("CUDA_ON_CPU_CLUSTERS", "16"), nullptr, 10); }
inline size_t shared_memory_limit() { return strtoul(environment("CUDA_ON_CPU_SHARED_MEMORY", "232448"), nullptr, 10); }

template <typename F>
CUDA_ON_CPU_SCHEDULER cudaError_t launch(const cudaLaunchConfig_t& config, F&& f) {
  Machine& m = machine();
  const unsigned cluster = cluster_of(config);
  m.dynamic_bytes = config.dynamicSmemBytes;
  m.error.clear();
  if (!config.gridDim.x || !config.blockDim.x || config.blockDim.x > 1024 || m.dynamic_bytes > shared_memory_limit() ||
      !cluster || (cluster > 1 && cluster > cluster_limit()) || config.gridDim.x % cluster) {
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
  for (unsigned x = 0; x < config.gridDim.x && m.error.empty(); x += cluster) {
    run_cluster(static_cast<int>(x), static_cast<int>(cluster), order, random);
    acquire(&m.end_tag);
  }
  return m.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->index)
#define blockIdx  (cuda_on_cpu::current->block->index)
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
  *value = attribute == cudaDevAttrMultiProcessorCount ? 2
           : attribute == cudaDevAttrClusterLaunch     ? cuda_on_cpu::cluster_limit() > 1
                                                       : static_cast<int>(cuda_on_cpu::shared_memory_limit());
  return cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  return *blocks = 1, cudaSuccess;
}
template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*)(Parameters...), const cudaLaunchConfig_t* config) {
  return *clusters = cuda_on_cpu::cluster_of(*config) <= cuda_on_cpu::cluster_limit(), cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return memset(to, value, bytes), cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return cuda_on_cpu::machine().error.c_str(); }
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return cuda_on_cpu::launch(*config, [&] { kernel(arguments...); });
}
