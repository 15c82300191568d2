// Host side of every launch: the device's limits, grid sizes, workspaces, error texts.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <type_traits>

#include "cuda/platform.cuh"
#include "cuda/schedule.cuh"

namespace unrolled_kernels::cuda {

struct Device {
  int multiprocessors = 0;
  int shared_memory = 0;  // bytes that a block can have
  int clusters = 0;       // whether it has them
  cudaError_t error;

  Device() {
    int index = 0;
    error = cudaGetDevice(&index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index);
    if (error == cudaSuccess) {
      error = cudaDeviceGetAttribute(&shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
    }
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, index);
  }
};

inline const char* describe(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

template <typename... Parameters>
cudaError_t allow_shared_memory(void (*kernel)(Parameters...), int64_t bytes) {
  // more than 48 KB is to be asked for
  if (bytes <= 48 * 1024) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(bytes));
}

// Blocks that work through `blocks` blocks' worth of items by themselves: as many as fit on the device at once.
template <typename... Parameters>
int64_t persistent_grid(const Device& device, void (*kernel)(Parameters...), int64_t blocks, int threads,
                        int64_t bytes) {
  if (blocks <= device.multiprocessors) return blocks;
  int resident = 0;
  if (allow_shared_memory(kernel, bytes) != cudaSuccess ||
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, reinterpret_cast<const void*>(kernel), threads,
                                                    static_cast<size_t>(bytes)) != cudaSuccess) {
    return device.multiprocessors;  // the launch that follows fails the same way, and reports it
  }
  const int64_t limit = static_cast<int64_t>(resident < 1 ? 1 : resident) * device.multiprocessors;
  return blocks < limit ? blocks : limit;
}

// The configuration of a launch of clusters of `blocks` blocks.
struct ClusterConfig {
  cudaLaunchAttribute attribute{};
  cudaLaunchConfig_t config{};

  ClusterConfig(int blocks, int64_t grid, int threads, int64_t bytes, void* stream) {
    config.gridDim = dim3(static_cast<unsigned>(grid));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = static_cast<size_t>(bytes);
    config.stream = static_cast<cudaStream_t>(stream);
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = static_cast<unsigned>(blocks);
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    config.attrs = &attribute;
    config.numAttrs = blocks > 1 ? 1 : 0;
  }
  ClusterConfig(const ClusterConfig&) = delete;
};

template <typename... Parameters>
cudaError_t allow_clusters(void (*kernel)(Parameters...), int blocks) {
  // more than 8 is not what every GPU with clusters has, and to be asked for
  if (blocks <= 8) return cudaSuccess;
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
}

// Clusters of `blocks` blocks that are on the device at once; 0: it has none of that size.
template <typename... Parameters>
int64_t resident_clusters(void (*kernel)(Parameters...), int blocks, int threads, int64_t bytes) {
  int clusters = 0;
  const ClusterConfig of(blocks, blocks, threads, bytes, nullptr);
  if (allow_shared_memory(kernel, bytes) == cudaSuccess && allow_clusters(kernel, blocks) == cudaSuccess &&
      cudaOccupancyMaxActiveClusters(&clusters, kernel, &of.config) == cudaSuccess) {
    return clusters;
  }
  cudaGetLastError();  // the next launch is not to report it
  return 0;
}

template <typename... Parameters, typename... Arguments>
const char* launch_clusters(void (*kernel)(Parameters...), int blocks, int64_t grid, int threads, int64_t bytes,
                            void* stream, Arguments&&... arguments) {
  if (const char* error = describe(allow_shared_memory(kernel, bytes))) return error;
  if (const char* error = describe(allow_clusters(kernel, blocks))) return error;
  const ClusterConfig of(blocks, grid, threads, bytes, stream);
  return describe(cudaLaunchKernelEx(&of.config, kernel, static_cast<Arguments&&>(arguments)...));
}

template <typename... Parameters, typename... Arguments>
const char* launch(void (*kernel)(Parameters...), int64_t grid, int threads, int64_t bytes, void* stream,
                   Arguments&&... arguments) {
  return launch_clusters(kernel, 1, grid, threads, bytes, stream, static_cast<Arguments&&>(arguments)...);
}

// f(std::bool_constant<whether there is momentum>)
template <typename Problem, typename F>
const char* with_momentum(const Problem& p, F f) {
  return p.beta.data ? f(std::true_type()) : f(std::false_type());
}

// f(momentum, std::bool_constant<whether a proximal map ends the steps>). Steps with a map take beta and gamma for there,
// if only as zeros: that is a third kernel and not a fourth.
template <typename Problem, typename F>
const char* with_method(const Problem& p, F f) {
  if (p.prox != Prox::none) return f(std::true_type(), std::true_type());
  return with_momentum(p, [&](auto momentum) { return f(momentum, std::false_type()); });
}

// f(momentum, proximal, std::bool_constant<whether samples stop by themselves>). Those of every method do in one kernel,
// which takes a map for there, too: without one it is a threshold of zero.
template <typename Problem, typename F>
const char* with_forward_method(const Problem& p, F f) {
  if (p.stopping) return f(std::true_type(), std::true_type(), std::true_type());
  return with_method(p, [&](auto momentum, auto proximal) { return f(momentum, proximal, std::false_type()); });
}

template <typename Storage>
PartialSums<Storage> partial_sums(const MomentumBackward<Storage>& p) {
  PartialSums<Storage> sums{};
  const bool matrix = p.d_matrix && shares_matrix(p);
  const int own = coefficients_per_sample(p);
  sums.groups = 1;
  sums.steps = schedule_steps(p);
  sums.matrix_size = matrix ? p.d * p.d : 0;
  sums.d_matrix = matrix ? p.d_matrix : nullptr;
  compute_type<Storage>* const outputs[] = {p.dphi, p.dbeta, p.dgamma, p.d_threshold};
  for (int i = 0; i < coefficients; ++i) {
    sums.schedule[i] = own >> i & 1 ? nullptr : outputs[i];
    sums.schedule_size[i] = coefficients_per_step(p) >> i & 1 ? p.k : 1;
  }
  return sums;
}

template <typename Storage>
const char* sum_partials(const PartialSums<Storage>& sums, void* stream) {
  if (!sums.any() || sums.row_size() == 0) return nullptr;
  const ColumnSums columns(sums.rows, sums.row_size());
  return launch(sum_partials_kernel<Storage>, sums.groups * columns.blocks(sums.row_size()), columns.threads(),
                columns.shared_bytes(), stream, sums, columns);
}

// The tangents of second order in the form of the problem that they belong to; y: of that of tangents.
template <typename Storage>
MomentumForward<Storage> direction_of(const MomentumBackward<Storage>& p) {
  const MomentumTangents<Storage>& tangents = *p.tangents;
  MomentumForward<Storage> direction{};
  direction.B = p.B, direction.d = p.d, direction.k = p.k;
  direction.matrix = tangents.matrix, direction.matrix_stride = tangents.matrix_stride;
  direction.diagonal = tangents.diagonal, direction.b = tangents.b, direction.y0 = tangents.y0;
  direction.diagonal_stride = direction.b_stride = direction.y0_stride = p.d;
  direction.phi = tangents.phi, direction.beta = tangents.beta, direction.gamma = tangents.gamma;
  direction.y = tangents.y;
  return direction;
}

// Teams at work on one item after another, tile.cuh.
template <typename C>
struct TilePlan {
  int64_t grid = 0;
  int64_t team_bytes = 0, schedule_bytes = 0;  // of shared memory
  int64_t trajectory_size = 0;                 // elements for a team
  int teams = 1;                               // of a block
  bool trajectory_on_chip = true;
  C* trajectories = nullptr;  // [grid * teams, trajectory_size] in the workspace

  int64_t shared_bytes() const { return schedule_bytes + teams * team_bytes; }
  int64_t workspace_size() const { return trajectory_on_chip ? 0 : grid * teams * trajectory_size; }
};

// Memory(arena, d, trajectory_size) takes a team's shared memory.
template <typename T, typename Memory, bool momentum, typename Problem, typename... Parameters>
TilePlan<typename T::C> plan_tiles(const Device& device, void (*kernel)(Parameters...), const Problem& p,
                                   int64_t trajectory_size) {
  TilePlan<typename T::C> plan;
  plan.trajectory_size = trajectory_size;
  plan.schedule_bytes = BlockSchedule<typename T::C, momentum>::bytes(p);
  const auto bytes = [&](int64_t size) {
    Arena arena(nullptr);
    Memory(arena, p.d, size);
    return arena.used();
  };
  // a warp for each scheduler is worth more than trajectories on chip
  const int64_t limit = device.shared_memory / (T::warps == 1 ? 4 : 1);
  plan.trajectory_on_chip = plan.schedule_bytes + bytes(trajectory_size) <= limit;
  plan.team_bytes = bytes(plan.trajectory_on_chip ? trajectory_size : 0);
  if (plan.schedule_bytes + plan.team_bytes > device.shared_memory) plan.schedule_bytes = 0;
  // as many warps on a multiprocessor as fit, in blocks as large as that allows; few items: on all multiprocessors
  const int64_t items = ceil_div(p.B, T::problems);
  int64_t most = 0;
  for (int teams = T::block / T::team; teams >= 1; teams /= 2) {
    const int64_t shared_bytes = plan.schedule_bytes + teams * plan.team_bytes, blocks = ceil_div(items, teams);
    if (teams > 1 && (shared_bytes > device.shared_memory || blocks < device.multiprocessors)) continue;
    const int64_t grid = persistent_grid(device, kernel, blocks, teams * T::team, shared_bytes);
    if (grid * teams <= most) continue;
    most = grid * teams;
    plan.grid = grid;
    plan.teams = teams;
  }
  return plan;
}

// A block at work on one sample after another, streamed.cuh. Each part of its memory is in shared memory if it fits, in
// this order, else in its slot of the workspace; a matrix that does not fit is left where it is.
struct StreamedPlan {
  int64_t grid = 0, shared_bytes = 0, slot_bytes = 0;
  bool vectors_on_chip = false, matrix_on_chip = false, trajectory_on_chip = false;
  unsigned char* slots = nullptr;
};

// Memory(arena, d) takes a block's vectors. trajectory_size: in elements.
template <typename Memory, typename Problem, typename... Parameters>
StreamedPlan plan_streamed(const Device& device, void (*kernel)(Parameters...), const Problem& p, int threads,
                           int64_t matrix_bytes, int64_t trajectory_bytes, int64_t max_grid) {
  StreamedPlan plan;
  Arena vectors(nullptr);
  Memory(vectors, p.d);
  const auto fits = [&](int64_t bytes) {
    const bool on_chip = bytes > 0 && plan.shared_bytes + bytes <= device.shared_memory;
    plan.shared_bytes += on_chip ? bytes : 0;
    return on_chip;
  };
  plan.vectors_on_chip = fits(vectors.used());
  plan.matrix_on_chip = fits(matrix_bytes);
  plan.trajectory_on_chip = fits(trajectory_bytes);
  plan.slot_bytes = (plan.vectors_on_chip ? 0 : vectors.used()) + (plan.trajectory_on_chip ? 0 : trajectory_bytes);
  plan.grid = persistent_grid(device, kernel, p.B, threads, plan.shared_bytes);
  if (plan.grid > max_grid) plan.grid = max_grid;
  return plan;
}

// Blocks that may each have a partial sum of a [d, d] gradient, in 64 MB at most.
template <typename Storage>
int64_t streamed_grid_limit(const PartialSums<Storage>& sums) {
  if (!sums.d_matrix) return INT64_MAX;
  const int64_t limit = (64 << 20) / (sums.row_size() * static_cast<int64_t>(sizeof(compute_type<Storage>)));
  return limit < 1 ? 1 : limit;
}

// What is left to do where there are no samples or no elements: sums of nothing.
template <typename Storage>
const char* clear_sums(const MomentumBackward<Storage>& p, void* stream) {
  using C = compute_type<Storage>;
  const auto clear = [&](void* to, int64_t bytes) {
    if (!to || bytes == 0) return cudaSuccess;
    return cudaMemsetAsync(to, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
  };
  const auto size = [&](const Coefficient<C>& c) {
    return (c.batch_stride != 0 ? p.B : 1) * (c.step_stride != 0 ? p.k : 1) * static_cast<int64_t>(sizeof(C));
  };
  cudaError_t error = clear(p.d_matrix, p.matrix_stride == 0 ? p.d * p.d * static_cast<int64_t>(sizeof(Storage)) : 0);
  if (error == cudaSuccess) error = clear(p.dphi, size(p.phi));
  if (error == cudaSuccess) error = clear(p.dbeta, size(p.beta));
  if (error == cudaSuccess) error = clear(p.dgamma, size(p.gamma));
  if (error == cudaSuccess) error = clear(p.d_threshold, size(p.threshold));
  return describe(error);
}

}  // namespace unrolled_kernels::cuda
