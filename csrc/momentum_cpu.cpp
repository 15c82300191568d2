#include "cpu/momentum_launch.h"

#include <vector>

#include "cpu/launch.h"

namespace unrolled_kernels {
namespace {

template <typename C>
void sum_schedule(const MomentumPlan& plan, const Coefficient<C>& coefficient, int64_t B, int64_t k,
                  const double* partial, C* out) {
  const bool per_sample = coefficient.batch_stride != 0;
  if (!out || (per_sample && plan.tiles_per_sample == 1)) return;
  const int64_t rows = per_sample ? B : 1, columns = coefficient.step_stride != 0 ? k : 1;
  const int64_t chunks_per_row = per_sample ? plan.tiles_per_sample : plan.chunks;
  for (int64_t row = 0; row < rows; ++row) {
    std::vector<double> sums(columns, 0.0);
    for (int64_t c = row * chunks_per_row; c < (row + 1) * chunks_per_row; ++c) {
      for (int64_t t = 0; t < plan.schedule_steps; ++t) {
        sums[columns == 1 ? 0 : t] += partial[c * 4 * plan.schedule_steps + t];
      }
    }
    for (int64_t t = 0; t < columns; ++t) out[row * columns + t] = static_cast<C>(sums[t]);
  }
}

// Cache lines of a type, not initialized.
template <typename C>
std::unique_ptr<C, FreeAligned> allocate_aligned(int64_t elements) {
  void* p = ::operator new(elements * sizeof(C), std::align_val_t(64));
  return std::unique_ptr<C, FreeAligned>(static_cast<C*>(p));
}

template <typename Storage>
class SharedMomentum {
  using C = compute_type<Storage>;

 public:
  SharedMomentum(Structure structure, const MomentumInputs<Storage>& p, const MomentumBackward<Storage>* backward)
      : kernels_(UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_shared<Storage>(structure))),
        plan_(kernels_.plan(p, backward)),
        packed_size_(plan_.panels * p.d * plan_.lanes),
        packed_(allocate_aligned<C>(plan_.packs * packed_size_)) {
    const int64_t panel_size = p.d * plan_.lanes;
    for_chunks(plan_.packs * plan_.panels, 0, [&](int64_t i, void*) {
      kernels_.pack(p, i < plan_.panels, i % plan_.panels, packed_.get() + i * panel_size);
    });
  }

  void run(const MomentumForward<Storage>& p) const {
    for_chunks(plan_.tiles, plan_.scratch_bytes, [&](int64_t i, void* scratch) {
      SharedMomentumTile<C> tile = this->tile(p, i);
      tile.scratch = scratch;
      kernels_.forward(p, plan_, tile);
    });
  }

  // `schedule`: as in MomentumChunk, `size` numbers for each tile
  void run(const MomentumBackward<Storage>& p, double* schedule, int64_t size) const {
    // without steps there are no terms, but still a row of z
    const int64_t sample_size = std::max<int64_t>(plan_.terms, 1) * plan_.row;
    if (plan_.sums > 0) return run_in_sums(p, schedule, size, plan_.tile_rows * sample_size);
    const int64_t slab_tiles = std::max<int64_t>(plan_.slab_tiles, torch::stable::get_num_threads());
    const int64_t slab = std::min(slab_tiles * plan_.tile_rows, p.B) * sample_size;
    const auto a = allocate_aligned<C>(slab), z = allocate_aligned<C>(slab);
    const auto sum = allocate_aligned<C>(p.d_matrix ? p.d * plan_.row : 0);
    for (int64_t first = 0; first < plan_.tiles; first += slab_tiles) {
      std::vector<SharedMomentumTile<C>> tiles(std::min(slab_tiles, plan_.tiles - first));
      for (size_t i = 0; i < tiles.size(); ++i) {
        auto& tile = tiles[i] = this->tile(p, first + i);
        const int64_t offset = (tile.begin - tiles[0].begin) * sample_size;
        tile.a = a.get() + offset, tile.z = z.get() + offset;
        if (size) tile.schedule = schedule + (first + i) * size;
      }
      for_chunks(tiles.size(), plan_.scratch_bytes, [&](int64_t i, void* scratch) {
        SharedMomentumTile<C> tile = tiles[i];
        tile.scratch = scratch;
        kernels_.backward(p, plan_, tile);
      });
      if (!p.d_matrix) continue;
      // rows of dQ: many where its factors come from far away
      const int64_t panels = std::max<int64_t>(1, (p.d < 512 ? 32 : 128) / plan_.lanes);
      const bool last = first + slab_tiles >= plan_.tiles;
      for_chunks((plan_.panels + panels - 1) / panels, 0, [&](int64_t i, void*) {
        kernels_.outer(p, plan_, tiles.data(), tiles.size(), i * panels, std::min((i + 1) * panels, plan_.panels),
                       first > 0, last, sum.get());
      });
    }
  }

  const SharedMomentumPlan& plan() const { return plan_; }

 private:
  // Each sum of the matrix' gradient is of tiles that follow each other, whose terms stay with the core that has them.
  void run_in_sums(const MomentumBackward<Storage>& p, double* schedule, int64_t size, int64_t tile_size) const {
    const int64_t sum_size = p.d * plan_.row;
    const auto sums = allocate_aligned<C>(plan_.sums * sum_size);
    for_chunks(plan_.sums, plan_.scratch_bytes + 2 * tile_size * sizeof(C), [&](int64_t i, void* scratch) {
      const int64_t first = i * plan_.tiles / plan_.sums, end = (i + 1) * plan_.tiles / plan_.sums;
      for (int64_t t = first; t < end; ++t) {
        SharedMomentumTile<C> tile = this->tile(p, t);
        tile.a = static_cast<C*>(scratch), tile.z = tile.a + tile_size, tile.scratch = tile.z + tile_size;
        if (size) tile.schedule = schedule + t * size;
        kernels_.backward(p, plan_, tile);
        kernels_.outer(p, plan_, &tile, 1, 0, plan_.panels, t > first, false, sums.get() + i * sum_size);
      }
    });
    sum_chunks(sums.get(), plan_.sums, sum_size, plan_.row, p.d, p.d_matrix);
  }

  SharedMomentumTile<C> tile(const MomentumInputs<Storage>& p, int64_t i) const {
    SharedMomentumTile<C> tile{};
    tile.begin = i * p.B / plan_.tiles, tile.end = (i + 1) * p.B / plan_.tiles;
    tile.packed = packed_.get();
    if (plan_.packs == 2) tile.packed_transposed = packed_.get() + packed_size_;
    return tile;
  }

  SharedMomentumKernels<Storage> kernels_;
  SharedMomentumPlan plan_;
  int64_t packed_size_;  // elements
  std::unique_ptr<C, FreeAligned> packed_;
};

}  // namespace

template <typename Storage>
MomentumKernels<Storage> momentum_kernels(Structure structure) {
  switch (structure) {
    case Structure::dense: return UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_dense<Storage>());
    case Structure::diagonal: return UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_diagonal<Storage>());
    default: return UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_spectral<Storage>());
  }
}

template <typename Storage>
void momentum_cpu(Structure structure, const MomentumForward<Storage>& p) {
  if (is_shared(structure, p)) return SharedMomentum<Storage>(structure, p, nullptr).run(p);
  const auto kernels = momentum_kernels<Storage>(structure);
  const MomentumPlan plan = kernels.plan(p, nullptr);
  for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.forward(p, plan, {begin, end, scratch, nullptr, nullptr});
  });
}

// Runs `run(schedule, size)`, which leaves the sums of the schedule's gradients, `size` for each chunk, and adds them up.
template <typename Storage, typename F>
void with_schedule_sums(const MomentumBackward<Storage>& p, const MomentumPlan& plan, const F& run) {
  const int64_t size = p.dphi ? 4 * plan.schedule_steps : 0;
  std::vector<double> schedule(plan.chunks * size, 0.0);
  run(schedule.data(), size);
  const double* partial = schedule.data();
  sum_schedule(plan, p.phi, p.B, p.k, partial, p.dphi);
  sum_schedule(plan, p.beta, p.B, p.k, partial + plan.schedule_steps, p.dbeta);
  sum_schedule(plan, p.gamma, p.B, p.k, partial + 2 * plan.schedule_steps, p.dgamma);
  sum_schedule(plan, p.threshold, p.B, p.k, partial + 3 * plan.schedule_steps, p.d_threshold);
}

template <typename Storage>
void momentum_cpu(Structure structure, const MomentumBackward<Storage>& p) {
  using C = compute_type<Storage>;
  if (is_shared(structure, p) && !p.tangents) {
    const SharedMomentum<Storage> shared(structure, p, &p);
    return with_schedule_sums(p, shared.plan(), [&](double* schedule, int64_t size) { shared.run(p, schedule, size); });
  }
  const auto kernels = momentum_kernels<Storage>(structure);
  const MomentumPlan plan = kernels.plan(p, &p);
  const int64_t matrix_size = p.d_matrix && shares_matrix(p) ? p.d * p.d : 0;
  std::vector<C> matrix(plan.chunks * matrix_size, C(0));
  with_schedule_sums(p, plan, [&](double* schedule, int64_t size) {
    for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
      kernels.backward(p, plan,
                       {begin, end, scratch, size ? schedule + chunk * size : nullptr,
                        matrix_size ? matrix.data() + chunk * matrix_size : nullptr});
    });
  });
  sum_chunks(matrix.data(), plan.chunks, matrix_size, p.d_matrix);
}

template <typename Storage>
MomentumPlan momentum_plan(Structure structure, const MomentumInputs<Storage>& p,
                           const MomentumBackward<Storage>* backward) {
  if (is_shared(structure, p)) {
    return UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_shared<Storage>(structure)).plan(p, backward);
  }
  return momentum_kernels<Storage>(structure).plan(p, backward);
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                                                                       \
  template MomentumKernels<Storage> momentum_kernels(Structure);                                                    \
  template MomentumPlan momentum_plan(Structure, const MomentumInputs<Storage>&, const MomentumBackward<Storage>*); \
  template void momentum_cpu(Structure, const MomentumForward<Storage>&);                                           \
  template void momentum_cpu(Structure, const MomentumBackward<Storage>&);
UNROLLED_KERNELS_INSTANTIATE(float)
UNROLLED_KERNELS_INSTANTIATE(double)
UNROLLED_KERNELS_INSTANTIATE(half)
UNROLLED_KERNELS_INSTANTIATE(bfloat16)

}  // namespace unrolled_kernels
