// One forward and backward of float32 gradient descent, of Nesterov's method or of the RNN, so many times: for the count
// of their instructions.
//
//     instructions KIND METHOD B d k REPETITIONS      dense | shared | diagonal | spectral, gd | nag | box-gd |
//                                                 box-nag | rnn
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/launch.h"
#include "cpu/momentum_launch.h"
#include "cpu/rnn_launch.h"

using namespace unrolled_kernels;

namespace {

// widths 10-20-20, dense Q
void run_rnn(int64_t B, int64_t d, int64_t k, int repetitions) {
  RnnForward<float> forward{};
  forward.B = B, forward.d = d, forward.k = k;
  forward.num_layers = 3;
  for (int l = 0; l < 3; ++l) forward.hidden_dims[l] = l == 0 ? 10 : 20;
  std::vector<float> weights(rnn_weights_size(forward), 0.01f), d_weights(weights.size());
  std::vector<float> matrix(B * d * d, 0.1f), d_matrix(matrix.size()), b(B * d, 1.0f), db(B * d), y(B * d),
      ybar(B * d, 1);
  forward.weights = weights.data();
  forward.matrix = matrix.data(), forward.matrix_stride = d * d;
  forward.b = b.data(), forward.b_stride = d;
  forward.y = y.data();
  RnnBackward<float> backward{};
  static_cast<RnnInputs<float>&>(backward) = forward;
  backward.grad_y = ybar.data();
  backward.d_matrix = d_matrix.data(), backward.db = db.data(), backward.d_weights = d_weights.data();
  for (int i = 0; i < repetitions; ++i) {
    rnn_cpu(forward);
    rnn_cpu(backward);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 7) return 1;
  const std::string kind = arguments[1], method = arguments[2];
  const int64_t B = atoll(arguments[3]), d = atoll(arguments[4]), k = atoll(arguments[5]);
  const Structure structure = kind == "diagonal"   ? Structure::diagonal
                              : kind == "spectral" ? Structure::spectral
                                                   : Structure::dense;
  if (method == "rnn") return run_rnn(B, d, k, atoi(arguments[6])), 0;
  const int64_t matrices = kind == "diagonal" ? 0 : kind == "shared" ? 1 : B;
  std::vector<float> matrix(matrices * d * d, 0.5f / static_cast<float>(d)), d_matrix(matrix.size());
  std::vector<float> diagonal(B * d, 0.5f), d_diagonal(B * d), b(B * d, 1.0f), db(B * d), y(B * d), ybar(B * d, 1);
  float phi = 0.5f, beta = 0.4f, bound = -0.25f, gradients[3];

  MomentumForward<float> forward{};
  forward.B = B, forward.d = d, forward.k = k;
  if (matrices) forward.matrix = matrix.data(), forward.matrix_stride = matrices == 1 ? 0 : d * d;
  if (structure != Structure::dense) forward.diagonal = diagonal.data(), forward.diagonal_stride = d;
  forward.b = b.data(), forward.b_stride = d;
  forward.phi = {&phi, 0, 0};
  const bool box = method.rfind("box-", 0) == 0;
  if (box) forward.prox = Prox::box, forward.lower = {&bound, 0, true};
  if (method.substr(box ? 4 : 0) == "nag") forward.beta = forward.gamma = {&beta, 0, 0};
  forward.y = y.data();

  MomentumBackward<float> backward{};
  static_cast<MomentumInputs<float>&>(backward) = forward;
  backward.grad_y = ybar.data();
  if (matrices) backward.d_matrix = d_matrix.data();
  if (forward.diagonal) backward.d_diagonal = d_diagonal.data();
  backward.db = db.data();
  backward.dphi = gradients;
  if (forward.beta.data) backward.dbeta = gradients + 1, backward.dgamma = gradients + 2;

  for (int i = 0; i < atoi(arguments[6]); ++i) {
    momentum_cpu(structure, forward);
    momentum_cpu(structure, backward);
  }
}
