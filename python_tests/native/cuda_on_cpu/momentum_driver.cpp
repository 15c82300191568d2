// Runs one call of the launcher of `momentum` on the CPU, see driver.h:
//
//     structure, backward (2: second order), dtype (0 float, 1 double, 2 half, 3 bfloat16), shift
//     B, d, k, trajectory, strides of matrix, diagonal, b, y0, observed, then (batch, step) of phi, beta, gamma,
//     threshold, and (batch, entry) of lower, upper, weight, the bits of a tolerance
//     bytes of matrix, diagonal, b, y0, observed, phi, beta, gamma, threshold, lower, upper, weight, iterates, of the
//     tangents of matrix, diagonal, b, y0, phi, beta, gamma, then of y and what Stopping writes, or of grad_y, the
//     gradients in the order of MomentumBackward and the tangents of y; -1: nullptr. Then their contents, in that order.
//
// CUDA_ON_CPU_KEPT_BYTES: that the iterates of a shared Q may take in backward.
//
// shift: bytes from a multiple of 16 to the arrays of the storage type.
#include "driver.h"

#include "cuda/momentum_kernels.h"
#include "cuda/platform.cuh"

using namespace unrolled_kernels;

namespace {

constexpr int arrays = 33, schedule = 5, bounds = 9, kept = 12, directions = 13, first_output = 20,
              schedule_output = 25;
struct Header {
  int64_t structure, backward, dtype, shift, sizes[23];
  double tolerance;
  int64_t bytes[arrays];
};

// what a library does on a GPU
template <typename Storage>
class Products : public cuda::SharedProducts<compute_type<Storage>> {
  using C = compute_type<Storage>;

 public:
  explicit Products(const MomentumInputs<Storage>& p) : p_(p) {
    if (const char* bytes = getenv("CUDA_ON_CPU_KEPT_BYTES")) this->kept_bytes = atoll(bytes);
  }
  void multiply(const C* x, C* out, int64_t rows, bool transposed) override {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t i = 0; i < p_.d; ++i) {
        double sum = 0;
        for (int64_t j = 0; j < p_.d; ++j) {
          sum += double(cuda::to_compute(p_.matrix[transposed ? j * p_.d + i : i * p_.d + j])) * x[row * p_.d + j];
        }
        out[row * p_.d + i] = static_cast<C>(sum);
      }
    }
  }
  void outer(const C* a, const C* z, int64_t rows, C* out) override {
    for (int64_t i = 0; i < p_.d; ++i) {
      for (int64_t j = 0; j < p_.d; ++j) {
        double sum = 0;
        for (int64_t row = 0; row < rows; ++row) sum += double(a[row * p_.d + i]) * z[row * p_.d + j];
        out[i * p_.d + j] = static_cast<C>(sum);
      }
    }
  }

 private:
  const MomentumInputs<Storage>& p_;
};

template <template <typename> class Problem, typename Storage>
const char* run(int64_t structure, const Problem<Storage>& p) {
  const auto which = static_cast<Structure>(structure);
  Products<Storage> products(p);
  return run_with_workspace([&](void* workspace, size_t* size) {
    return cuda::momentum_kernels(which, p, products, workspace, nullptr, size);
  });
}

template <typename Storage>
const char* run(const Header& h, void* const* pointers) {
  using C = compute_type<Storage>;
  const auto storage = [&](int i) { return static_cast<Storage*>(pointers[i]); };
  const auto compute = [&](int i) { return static_cast<C*>(pointers[i]); };
  const auto coefficient = [&](int i) {
    return Coefficient<C>{compute(schedule + i), h.sizes[9 + 2 * i], h.sizes[10 + 2 * i]};
  };
  const auto rows = [&](int i) {
    const int64_t batch = h.sizes[17 + 2 * i];
    return Rows<C>{compute(bounds + i), batch, batch == 0 && h.sizes[18 + 2 * i] == 0};
  };
  MomentumInputs<Storage> in{};
  in.B = h.sizes[0], in.d = h.sizes[1], in.k = h.sizes[2], in.trajectory = h.sizes[3] != 0;
  in.matrix_stride = h.sizes[4], in.diagonal_stride = h.sizes[5], in.b_stride = h.sizes[6], in.y0_stride = h.sizes[7];
  in.observed_stride = h.sizes[8];
  in.matrix = storage(0), in.diagonal = storage(1), in.b = storage(2), in.y0 = storage(3), in.observed = storage(4);
  in.phi = coefficient(0), in.beta = coefficient(1), in.gamma = coefficient(2), in.threshold = coefficient(3);
  in.lower = rows(0), in.upper = rows(1), in.weight = rows(2);
  in.prox = in.lower.data || in.upper.data ? Prox::box
            : in.weight.data               ? Prox::l1
            : in.threshold.data            ? Prox::soft_threshold
                                           : Prox::none;
  if (!h.backward) {
    MomentumForward<Storage> p{};
    static_cast<MomentumInputs<Storage>&>(p) = in;
    p.y = storage(first_output);
    const Stopping<C> stopping{static_cast<C>(h.tolerance), static_cast<int64_t*>(pointers[first_output + 1]),
                               compute(first_output + 2)};
    if (stopping.taken) p.stopping = &stopping;
    return run(h.structure, p);
  }
  MomentumBackward<Storage> p{};
  static_cast<MomentumInputs<Storage>&>(p) = in;
  p.iterates = storage(kept);
  p.grad_y = storage(20), p.d_matrix = storage(21), p.d_diagonal = storage(22), p.db = storage(23);
  p.dy0 = storage(24), p.dphi = compute(25), p.dbeta = compute(26), p.dgamma = compute(27);
  p.d_threshold = compute(28), p.d_lower = compute(29), p.d_upper = compute(30), p.d_weight = compute(31);
  MomentumTangents<Storage> tangents{};
  tangents.matrix = storage(directions), tangents.matrix_stride = in.matrix_stride ? in.d * in.d : 0;
  tangents.diagonal = storage(directions + 1), tangents.b = storage(directions + 2);
  tangents.y0 = storage(directions + 3);
  // laid out like the coefficients
  Coefficient<C>* const of[] = {&tangents.phi, &tangents.beta, &tangents.gamma};
  for (int i = 0; i < 3; ++i) *of[i] = {compute(directions + 4 + i), h.sizes[9 + 2 * i], h.sizes[10 + 2 * i]};
  tangents.y = storage(32);
  if (h.backward == 2) p.tangents = &tangents;
  return run(h.structure, p);
}

}  // namespace

int main() {
  return drive<Header>(
      first_output, [](int i) { return i < schedule || (i >= first_output && i < schedule_output); },
      [](auto storage, const Header& h, void* const* arrays) { return run<decltype(storage)>(h, arrays); });
}
