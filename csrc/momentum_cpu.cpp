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
        sums[columns == 1 ? 0 : t] += partial[c * 3 * plan.schedule_steps + t];
      }
    }
    for (int64_t t = 0; t < columns; ++t) out[row * columns + t] = static_cast<C>(sums[t]);
  }
}

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
  const auto kernels = momentum_kernels<Storage>(structure);
  const MomentumPlan plan = kernels.plan(p, nullptr);
  for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.forward(p, plan, {begin, end, scratch, nullptr, nullptr});
  });
}

template <typename Storage>
void momentum_cpu(Structure structure, const MomentumBackward<Storage>& p) {
  using C = compute_type<Storage>;
  const auto kernels = momentum_kernels<Storage>(structure);
  const MomentumPlan plan = kernels.plan(p, &p);
  const int64_t schedule_size = p.dphi ? 3 * plan.schedule_steps : 0;
  const int64_t matrix_size = p.d_matrix && shares_matrix(p) ? p.d * p.d : 0;
  std::vector<double> schedule(plan.chunks * schedule_size, 0.0);
  std::vector<C> matrix(plan.chunks * matrix_size, C(0));
  for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.backward(p, plan,
                     {begin, end, scratch, schedule_size ? schedule.data() + chunk * schedule_size : nullptr,
                      matrix_size ? matrix.data() + chunk * matrix_size : nullptr});
  });
  const double* partial = schedule.data();
  sum_schedule(plan, p.phi, p.B, p.k, partial, p.dphi);
  sum_schedule(plan, p.beta, p.B, p.k, partial + plan.schedule_steps, p.dbeta);
  sum_schedule(plan, p.gamma, p.B, p.k, partial + 2 * plan.schedule_steps, p.dgamma);
  sum_chunks(matrix.data(), plan.chunks, matrix_size, p.d_matrix);
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)                             \
  template MomentumKernels<Storage> momentum_kernels(Structure);          \
  template void momentum_cpu(Structure, const MomentumForward<Storage>&); \
  template void momentum_cpu(Structure, const MomentumBackward<Storage>&);
UNROLLED_KERNELS_INSTANTIATE(float)
UNROLLED_KERNELS_INSTANTIATE(double)
UNROLLED_KERNELS_INSTANTIATE(half)
UNROLLED_KERNELS_INSTANTIATE(bfloat16)

}  // namespace unrolled_kernels
