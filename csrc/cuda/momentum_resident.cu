// Own dense Q with 128 < d <= 1024 of float32, held on chip over all steps: by one block while that has room, to d = 256 on
// an H200, else by a cluster of blocks with some rows each, slab.cuh. What does not fit is momentum_dense.cu's to stream.
//
// Forward each block makes its entries of z_t, all blocks get them, and each multiplies its rows. Backward each block has
// its rows' share of every entry of Q'a; the shares go to the blocks whose entries they are. z_t and -phi_t a_t of all
// steps are kept in the workspace, and dQ is written at the end, once.
//
// Clusters are off until a GPU has run their tests, but for UNROLLED_KERNELS_CLUSTERS=1.
#include <cstdlib>
#include <cstring>

#include "cuda/launch.cuh"
#include "cuda/momentum_kernels.h"
#include "cuda/momentum_prox.cuh"
#include "cuda/momentum_stopping.cuh"
#include "cuda/slab.cuh"

namespace unrolled_kernels::cuda {
namespace {

constexpr int largest_cluster = 16;

// Problems are worked on by one block each, or by a cluster, one after another.
template <typename C>
struct ResidentPlan {
  int blocks = 0;  // of a problem; 0: Q does not fit
  int rows = 0;    // of a block
  int ahead = 0;   // of these, fetched ahead
  int64_t grid = 0, shared_bytes = 0;
  int64_t scratch_size = 0;  // elements for a problem
  C* scratch = nullptr;
};

// Shared memory of a block.
template <typename S>
struct ResidentMemory {
  using C = typename S::C;
  C* z;                                // [2, D], which take turns, zero from d on
  C* sizes;                            // [2, blocks, 2], of StepSize
  C* across_warps;                     // [2, warps, 4], of StepSize and ScheduleGradient
  C* a;                                // [most_rows]
  C* partials;                         // [warps, D]
  C* shares;                           // [2, blocks, most_rows], which take turns
  typename S::Storage *rest, *staged;  // of the slab

  __host__ __device__ ResidentMemory(Arena& arena, int blocks, int rows, int ahead, bool backward)
      : z(arena.take<C>(2 * S::D)),
        sizes(arena.take<C>(backward ? 0 : 4 * blocks)),
        across_warps(arena.take<C>(2 * S::warps * 4)),
        a(arena.take<C>(backward ? S::most_rows : 0)),
        partials(arena.take<C>(backward ? S::warps * S::D : 0)),
        shares(arena.take<C>(backward ? 2 * blocks * S::most_rows : 0)),
        rest(arena.take<typename S::Storage>(rows > S::pass_rows ? static_cast<int64_t>(rows - S::pass_rows) * S::stride
                                                                 : 0)),
        staged(arena.take<typename S::Storage>(static_cast<int64_t>(ahead) * S::stride)) {}

  // zero what is to be zero where nothing is written
  template <typename Plan>
  __device__ __forceinline__ void clear(const Plan& plan) const {
    for (int i = threadIdx.x; i < 2 * S::D; i += S::block) z[i] = 0;
    for (int i = threadIdx.x; i < (plan.rows - S::pass_rows) * S::stride; i += S::block) rest[i] = {};
    for (int i = threadIdx.x; i < plan.ahead * S::stride; i += S::block) staged[i] = {};
    __syncthreads();
  }
};

// The map that ends a step, for the entry that a thread owns.
template <typename C, typename Storage>
__device__ __forceinline__ C mapped(const MomentumInputs<Storage>& p, const StepCoefficients<C>& s, int64_t sample,
                                    int e, bool exists, C v) {
  return p.prox == Prox::none ? v : ProximalMap<C, 1>(p, sample, e, exists)(s, 0, v);
}

// What a thread knows of its block's place.
template <typename S>
struct Place {
  const int first, count;  // rows of the block

  template <typename Plan>
  __device__ __forceinline__ Place(const Plan& plan, const Cluster& cluster, int d)
      : first(cluster.rank() * plan.rows), count(d - first < plan.rows ? (d > first ? d - first : 0) : plan.rows) {}
};

// z of the entry e, to all blocks
template <typename C>
__device__ __forceinline__ void share(const Cluster& cluster, C* z, int e, C value) {
  for (int block = 0; block < cluster.blocks; ++block) cluster.of_block(z, block)[e] = value;
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Slab<Storage, D>::block, 1)
    momentum_resident_kernel(const __grid_constant__ MomentumForward<Storage> p,
                             const __grid_constant__ ResidentPlan<compute_type<Storage>> plan,
                             const __grid_constant__ Stopping<compute_type<Storage>> stopping) {
  using S = Slab<Storage, D>;
  using C = typename S::C;
  const Cluster cluster(plan.blocks);
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k);
  Arena shared(dynamic_shared_memory());
  const ResidentMemory<S> memory(shared, plan.blocks, plan.rows, plan.ahead, false);
  const Place<S> place(plan, cluster, d);
  const auto slab_of = [&] { return S{d, place.count, plan.ahead, memory.rest, memory.staged}; };
  memory.clear(plan);
  const Storage* const matrices = p.matrix + static_cast<int64_t>(place.first) * d;
  const int64_t first_sample = blockIdx.x / plan.blocks, samples = gridDim.x / plan.blocks;
  int turn = 0;  // 0 or 1, of what takes turns
  slab_of().fetch(matrices + first_sample * p.matrix_stride);
  for (int64_t sample = first_sample; sample < p.B; sample += samples) {
    const S slab = slab_of();
    const bool owns = slab.owns();
    const int e = place.first + slab.own;
    C q[S::rows][S::columns];
    // the last sample's rows are no longer read, nor is anything that is about to be written
    cluster.sync();
    slab.take(matrices + sample * p.matrix_stride, q);
    if (sample + samples < p.B) slab.fetch(matrices + (sample + samples) * p.matrix_stride);
    const SampleSchedule<C, true> schedule(p, sample);
    const bool momentum = schedule.has_momentum();
    C y = owns && p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0), previous = y;
    const C b = owns ? to_compute(p.b[sample * p.b_stride + e]) : C(0);
    Storage* const out = p.y + sample * p.d + e;
    if (owns && (p.trajectory || k == 0)) *out = to_storage<Storage>(y);
#pragma unroll 1
    for (int t = 0; t < k; ++t) {
      const StepCoefficients<C> s = schedule.at(t);
      C qz = 0;
      if (t > 0 || p.y0) {
        C* const z = memory.z + turn * D;
        if (owns) share(cluster, z, e, extrapolate(s, momentum, y, previous));
        cluster.sync();
        qz = slab.product(q, z);
        turn ^= 1;
      }
      const C next = mapped(p, s, sample, e, owns, advance(s, momentum, y, previous, qz + b));
      previous = y;
      y = owns ? next : C(0);
      if (owns && p.trajectory) out[(t + 1) * p.B * p.d] = to_storage<Storage>(y);
      if (owns && !p.trajectory && t + 1 == k) *out = to_storage<Storage>(y);
      if (!stopping.taken) continue;
      StepSize<C> size;
      size.add(y, previous);
      size.template over_threads<S::block>(memory.across_warps, t);
      size.over_blocks(cluster, memory.sizes, t);
      if (t + 1 < k && !size.is_small(stopping.tolerance)) continue;
      if (owns) *out = to_storage<Storage>(y);
      if (e == 0 && owns) store_stop(stopping, sample, t, size.change());
      break;
    }
  }
}

template <typename Storage, int D>
__global__ void __launch_bounds__(Slab<Storage, D>::block, 1)
    momentum_resident_backward_kernel(const __grid_constant__ MomentumBackward<Storage> p,
                                      const __grid_constant__ ResidentPlan<compute_type<Storage>> plan,
                                      const __grid_constant__ PartialSums<Storage> sums) {
  using S = Slab<Storage, D>;
  using C = typename S::C;
  const Cluster cluster(plan.blocks);
  const int d = static_cast<int>(p.d), k = static_cast<int>(p.k);
  const bool proximal = p.prox != Prox::none;
  Arena shared(dynamic_shared_memory());
  const ResidentMemory<S> memory(shared, plan.blocks, plan.rows, plan.ahead, true);
  const Place<S> place(plan, cluster, d);
  const auto slab_of = [&] { return S{d, place.count, plan.ahead, memory.rest, memory.staged}; };
  // y_t, replaced by z_t on the way back, -phi_t times the adjoint of y_{t+1}, and with a map v_t: [k, D] each
  C* const ys = plan.scratch + blockIdx.x / plan.blocks * plan.scratch_size;
  C* const as = ys + static_cast<int64_t>(k) * D;
  C* const vs = as + static_cast<int64_t>(k) * D;
  // one block completes the sums of a sample; the blocks of a cluster have a row each of them
  const bool completes = plan.blocks == 1;
  ScheduleGradient<C, 32, S::warps, true> gradient(p, completes ? coefficients_per_sample(p) : 0, memory.across_warps);
  const auto row = [&](int64_t i) {
    C* const partial = sums.row(i);
    gradient.begin_row(partial ? partial + sums.matrix_size : nullptr);
  };
  if (completes) row(blockIdx.x);
  memory.clear(plan);
  const Storage* const matrices = p.matrix + static_cast<int64_t>(place.first) * d;
  const int64_t first_sample = blockIdx.x / plan.blocks, samples = gridDim.x / plan.blocks;
  int turn = 0;
  slab_of().fetch(matrices + first_sample * p.matrix_stride);
  for (int64_t sample = first_sample; sample < p.B; sample += samples) {
    const S slab = slab_of();
    const bool owns = slab.owns();
    const int e = place.first + slab.own;
    if (!completes) row(sample * plan.blocks + cluster.rank());
    const auto step = [&](int t) { return SampleSchedule<C, true>(p, sample).at(t); };
    const bool momentum = p.beta.data != nullptr;
    const C b = owns ? to_compute(p.b[sample * p.b_stride + e]) : C(0);
    const auto cotangent = [&](int t) { return to_compute(p.grad_y[(t * p.B + sample) * p.d + e]); };
    if (proximal) ProximalMap<C, 1>(p, sample, e, owns).store(p, sample, e, owns);
    // the last sample's rows, z_t and a_t are no longer read
    cluster.sync();
    StepAdjoint<C> adjoint{owns ? cotangent(p.trajectory ? k : 0) : C(0)};
    {
      C q[S::rows][S::columns];
      slab.take(matrices + sample * p.matrix_stride, q);
      if (sample + samples < p.B) slab.fetch(matrices + (sample + samples) * p.matrix_stride);
      C y = owns && p.y0 ? to_compute(p.y0[sample * p.y0_stride + e]) : C(0), previous = y;
      // of the last step only a map asks for more than y_{k-1}: for v_{k-1}
#pragma unroll 1
      for (int t = 0; t < k; ++t) {
        if (owns) ys[static_cast<int64_t>(t) * D + e] = y;
        if (!proximal && t + 1 == k) break;
        const StepCoefficients<C> s = step(t);
        C qz = 0;
        if (t > 0 || p.y0) {
          C* const z = memory.z + turn * D;
          if (owns) share(cluster, z, e, extrapolate(s, momentum, y, previous));
          cluster.sync();
          qz = slab.product(q, z);
          turn ^= 1;
        }
        const C next = advance(s, momentum, y, previous, qz + b);
        if (proximal && owns) vs[static_cast<int64_t>(t) * D + e] = next;
        previous = y;
        y = owns ? mapped(p, s, sample, e, owns, next) : C(0);
      }
      C y_t = k > 0 && owns ? ys[static_cast<int64_t>(k - 1) * D + e] : C(0);
#pragma unroll 1
      for (int t = k - 1; t >= 0; --t) {
        const StepCoefficients<C> s = step(t);
        const int64_t at = static_cast<int64_t>(t) * D + e;
        C terms[4] = {};
        if (proximal && owns) {
          ProximalMap<C, 1> map(p, sample, e, true);
          adjoint.a = map.adjoint(s, 0, vs[at], adjoint.a, terms);
          map.store(p, sample, e, true, true);
        }
        if (owns) as[at] = -s.phi * adjoint.a;
        // Q'a_1, which may overflow, is in dy_0 alone
        const bool cold = t == 0 && !p.y0;
        if (!cold) {
          memory.a[slab.own] = owns ? adjoint.a : C(0);
          __syncwarp();
          slab.transposed_product(q, memory.a, memory.partials + slab.warp * D);
        }
        __syncthreads();
        if (t + 1 < k) gradient.collect(t + 1, sample);
        C w = 0;
        if (!cold) {
          C* const shares = memory.shares + turn * (plan.blocks * S::most_rows);
#pragma unroll 1
          for (int f = threadIdx.x; f < d; f += S::block) {
            C sum = memory.partials[f];
#pragma unroll
            for (int i = 1; i < S::warps; ++i) sum += memory.partials[i * D + f];
            const int block = plan.blocks == 1 ? 0 : f / plan.rows;
            cluster.of_block(shares, block)[cluster.rank() * S::most_rows + f - block * plan.rows] = sum;
          }
          cluster.sync();
          if (owns) {
            for (int block = 0; block < plan.blocks; ++block) w += shares[block * S::most_rows + slab.own];
          }
          turn ^= 1;
        }
        const C previous = t > 0 && owns ? ys[at - D] : y_t, z = extrapolate(s, momentum, y_t, previous);
        terms[0] = terms[0] - w * z - adjoint.a * b;
        adjoint.step(s, momentum, w, y_t, previous, terms);
        if (p.trajectory && owns) adjoint.a += cotangent(t);
        if (owns) ys[at] = z;
        y_t = previous;
        if (gradient.wanted()) gradient.add(t, sample, terms);
      }
    }
    // what the outer products read is there
    cluster.sync();
    if (k > 0) gradient.collect(0, sample);
    gradient.end_sample(sample);
    if (!completes) gradient.end_row();
    if (owns && p.db) p.db[sample * p.d + e] = to_storage<Storage>(adjoint.db);
    if (owns && p.dy0) p.dy0[sample * p.d + e] = to_storage<Storage>(adjoint.a + adjoint.carry);
    if (!p.d_matrix) continue;
    slab_of().outer_products(as + place.first, ys, k, D, p.d_matrix + (sample * p.d + place.first) * d);
  }
  if (completes) gradient.end_row();
}

bool clusters_are_on(const Device& device) {
  const char* const on = std::getenv("UNROLLED_KERNELS_CLUSTERS");
  return device.clusters && on && std::strcmp(on, "1") == 0;
}

// As few blocks a problem as hold its Q; more, to the one pass that is in registers, where multiprocessors would be idle.
template <typename S, typename Problem, typename... Parameters>
ResidentPlan<typename S::C> plan_resident(const Device& device, void (*kernel)(Parameters...), const Problem& p,
                                          bool backward) {
  ResidentPlan<typename S::C> found;
  for (int blocks = 1; blocks <= (clusters_are_on(device) ? largest_cluster : 1); blocks *= 2) {
    const int rows = static_cast<int>(round_up(ceil_div(p.d, blocks), S::warp_rows));
    const bool idle = p.B * blocks <= device.multiprocessors;
    if (found.blocks && (!idle || found.rows <= S::pass_rows)) break;
    const auto bytes = [&](int ahead) {
      Arena shared(nullptr);
      ResidentMemory<S>(shared, blocks, rows, ahead, backward);
      return shared.used();
    };
    if (rows > S::most_rows || bytes(0) > device.shared_memory) continue;
    int ahead = 0;
    while (ahead < S::pass_rows && ahead < rows && bytes(ahead + S::warp_rows) <= device.shared_memory) {
      ahead += S::warp_rows;
    }
    int64_t resident = device.multiprocessors;
    if (blocks > 1) resident = resident_clusters(kernel, blocks, S::block, bytes(ahead));
    if (resident == 0) continue;
    found.blocks = blocks;
    found.rows = rows;
    found.ahead = ahead;
    found.shared_bytes = bytes(ahead);
    found.grid = (p.B < resident ? p.B : resident) * blocks;
  }
  return found;
}

// Whether tile.cuh has no tile for it, and slab.cuh a slab.
template <typename Storage>
bool takes_slabs(const MomentumInputs<Storage>& p) {
  return sizeof(compute_type<Storage>) == sizeof(float) && p.B > 0 && p.d > 128 && p.d <= 1024;
}

}  // namespace

template <typename Storage>
const char* momentum_resident(const MomentumForward<Storage>& p, void*, void* stream, size_t* size, bool& runs) {
  if constexpr (sizeof(compute_type<Storage>) == sizeof(float)) {
    if (!takes_slabs(p)) return nullptr;
    const Device device;
    if (device.error != cudaSuccess) return describe(device.error);
    return with_slab(p.d, [&](auto D) -> const char* {
      using S = Slab<Storage, D>;
      const auto kernel = momentum_resident_kernel<Storage, D>;
      const auto plan = plan_resident<S>(device, kernel, p, false);
      runs = plan.blocks > 0;
      if (!runs || size) return nullptr;
      return launch_clusters(kernel, plan.blocks, plan.grid, S::block, plan.shared_bytes, stream, p, plan,
                             stopping_of(p));
    });
  }
  return nullptr;
}

template <typename Storage>
const char* momentum_resident(const MomentumBackward<Storage>& p, void* workspace, void* stream, size_t* size,
                              bool& runs) {
  using C = compute_type<Storage>;
  if constexpr (sizeof(C) == sizeof(float)) {
    if (!takes_slabs(p)) return nullptr;
    const Device device;
    if (device.error != cudaSuccess) return describe(device.error);
    return with_slab(p.d, [&](auto D) -> const char* {
      using S = Slab<Storage, D>;
      const auto kernel = momentum_resident_backward_kernel<Storage, D>;
      auto plan = plan_resident<S>(device, kernel, p, true);
      runs = plan.blocks > 0;
      if (!runs) return nullptr;
      PartialSums<Storage> over_batch = partial_sums(p), over_blocks = over_batch;
      if (plan.blocks > 1 && p.dphi) {
        // a row for each block of each sample: added up by sample, or all of them
        const int own = coefficients_per_sample(p);
        C* const outputs[] = {p.dphi, p.dbeta, p.dgamma, p.d_threshold};
        for (int i = 0; i < coefficients; ++i) over_blocks.schedule[i] = own >> i & 1 ? outputs[i] : nullptr;
        over_blocks.groups = p.B;
        over_blocks.rows = plan.blocks;
        over_batch.rows = p.B * plan.blocks;
      } else if (over_batch.any()) {
        over_batch.rows = plan.grid;
      }
      Arena arena(workspace);
      over_batch.partials = over_blocks.partials = arena.take<C>(over_batch.size());
      plan.scratch_size = (p.prox == Prox::none ? 2 : 3) * p.k * D;
      plan.scratch = arena.take<C>(plan.grid / plan.blocks * plan.scratch_size);
      if (size) {
        *size = static_cast<size_t>(arena.used());
        return nullptr;
      }
      const char* error =
          launch_clusters(kernel, plan.blocks, plan.grid, S::block, plan.shared_bytes, stream, p, plan, over_batch);
      if (!error && plan.blocks > 1) error = sum_partials(over_blocks, stream);
      return error ? error : sum_partials(over_batch, stream);
    });
  }
  return nullptr;
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                            \
  template const char* momentum_resident(const MomentumForward<Storage>&, void*, void*, size_t*, bool&); \
  template const char* momentum_resident(const MomentumBackward<Storage>&, void*, void*, size_t*, bool&);
UNROLLED_KERNELS_CUDA_TYPES(UNROLLED_KERNELS_INSTANTIATE)

}  // namespace unrolled_kernels::cuda
