#include "cpu/rnn_launch.h"

#include <memory>

#include "cpu/launch.h"

namespace unrolled_kernels {

template <typename Storage>
RnnKernels<Storage> rnn_kernels() {
  return UNROLLED_KERNELS_AT_ACTIVE_ISA(rnn_kernels<Storage>());
}

template <typename Storage>
void rnn_cpu(const RnnForward<Storage>& p) {
  const auto kernels = rnn_kernels<Storage>();
  const RnnPlan plan = kernels.plan(p, nullptr);
  for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.forward(p, plan, {begin, end, scratch, nullptr, nullptr});
  });
}

template <typename Storage>
void rnn_cpu(const RnnBackward<Storage>& p) {
  using C = compute_type<Storage>;
  const auto kernels = rnn_kernels<Storage>();
  const RnnPlan plan = kernels.plan(p, &p);
  const int64_t weights_size = p.d_weights ? rnn_weights_size(p) : 0;
  const int64_t matrix_size = p.d_matrix && shares_matrix(p) ? p.d * p.d : 0;
  // what each chunk leaves, written in full by it
  const std::unique_ptr<C[]> weights(new C[plan.chunks * weights_size]), matrix(new C[plan.chunks * matrix_size]);
  for_chunks(plan, [&](int64_t chunk, int64_t begin, int64_t end, void* scratch) {
    kernels.backward(p, plan,
                     {begin, end, scratch, weights_size ? weights.get() + chunk * weights_size : nullptr,
                      matrix_size ? matrix.get() + chunk * matrix_size : nullptr});
  });
  sum_chunks(weights.get(), plan.chunks, weights_size, p.d_weights);
  sum_chunks(matrix.get(), plan.chunks, matrix_size, p.d_matrix);
}

#define UNROLLED_KERNELS_INSTANTIATE(Storage)        \
  template RnnKernels<Storage> rnn_kernels();        \
  template void rnn_cpu(const RnnForward<Storage>&); \
  template void rnn_cpu(const RnnBackward<Storage>&);
UNROLLED_KERNELS_INSTANTIATE(float)
UNROLLED_KERNELS_INSTANTIATE(double)
UNROLLED_KERNELS_INSTANTIATE(half)
UNROLLED_KERNELS_INSTANTIATE(bfloat16)

}  // namespace unrolled_kernels
