// Runs one call of the launcher of `rnn` on the CPU, see driver.h:
//
//     backward, dtype (0 float, 1 double, 2 half, 3 bfloat16), shift
//     B, d, k, trajectory, strides of matrix, diagonal, b, y0, num_layers, hidden_dims (6)
//     bytes of matrix, diagonal, b, y0, weights, then of y, or of grad_y and the gradients in the order of RnnBackward
//
// shift: bytes from a multiple of 16 to the arrays of the storage type.
#include "driver.h"

#include "cuda/rnn_kernels.h"

using namespace unrolled_kernels;

namespace {

constexpr int arrays = 11, weights = 4, first_output = 5, weights_output = 10;
struct Header {
  int64_t backward, dtype, shift, sizes[9 + max_rnn_layers], bytes[arrays];
};

template <typename Storage>
const char* run(const Header& h, void* const* pointers) {
  using C = compute_type<Storage>;
  const auto storage = [&](int i) { return static_cast<Storage*>(pointers[i]); };
  RnnInputs<Storage> in{};
  in.B = h.sizes[0], in.d = h.sizes[1], in.k = h.sizes[2], in.trajectory = h.sizes[3] != 0;
  in.matrix_stride = h.sizes[4], in.diagonal_stride = h.sizes[5], in.b_stride = h.sizes[6], in.y0_stride = h.sizes[7];
  in.num_layers = static_cast<int>(h.sizes[8]);
  for (int l = 0; l < in.num_layers; ++l) in.hidden_dims[l] = h.sizes[9 + l];
  in.matrix = storage(0), in.diagonal = storage(1), in.b = storage(2), in.y0 = storage(3);
  in.weights = static_cast<C*>(pointers[weights]);
  const auto run = [](const auto& p) {
    return run_with_workspace(
        [&](void* workspace, size_t* size) { return cuda::rnn_kernels(p, workspace, nullptr, size); });
  };
  if (!h.backward) return run(RnnForward<Storage>{in, storage(5)});
  return run(RnnBackward<Storage>{in, storage(5), storage(6), storage(7), storage(8), storage(9),
                                  static_cast<C*>(pointers[weights_output])});
}

}  // namespace

int main() {
  return drive<Header>(
      first_output, [](int i) { return i != weights && i != weights_output; },
      [](auto storage, const Header& h, void* const* arrays) { return run<decltype(storage)>(h, arrays); });
}
