// The op `dncnn` and its backward: schemas, internal checks, and the layers one after another. CPU only.
#include "experiments/dncnn.h"

#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "common/tensors.h"
#include "cpu/launch.h"
#include "experiments/cpu/convolution_kernels.h"

namespace unrolled_kernels {
namespace {

void check(const char* name, const Tensor& x, ScalarType type, std::initializer_list<int64_t> sizes) {
  bool same =
      x.is_cpu() && x.is_contiguous() && x.scalar_type() == type && x.dim() == static_cast<int64_t>(sizes.size());
  for (size_t i = 0; same && i < sizes.size(); ++i) same = x.size(static_cast<int64_t>(i)) == sizes.begin()[i];
  STD_TORCH_CHECK(same, name, ": expected a contiguous CPU tensor of dtype ", torch::headeronly::toString(type),
                  " and the shape in dncnn.h");
}

template <typename T>
std::vector<T> cast(const std::vector<double>& x) {
  return {x.begin(), x.end()};
}

// The network behind one call.
template <typename T>
struct Network {
  int64_t B, H, W, C, n;  // channels, hidden layers
  double eps;
  const T* x;
  const T* parameters;
  const double* statistics;  // [n, 2, C]: mean and variance

  int64_t pixels() const { return B * H * W; }
  int64_t layer(int64_t l) const {  // where w_l begins
    return l == 0 ? 0 : 10 * C + (l - 1) * (9 * C * C + 2 * C);
  }
  int64_t gamma(int64_t l) const { return layer(l) + 9 * C * C; }
  int64_t beta(int64_t l) const { return gamma(l) + C; }
  double mean(int64_t l, int64_t c) const { return statistics[(2 * (l - 1)) * C + c]; }
  double inverse_deviation(int64_t l, int64_t c) const {
    return 1 / std::sqrt(statistics[(2 * (l - 1) + 1) * C + c] + eps);
  }

  // s_l and t_l
  std::pair<std::vector<T>, std::vector<T>> affine(int64_t l) const {
    std::vector<double> scale(C, 1.0), shift(C, 0.0);
    for (int64_t c = 0; l > 0 && c < C; ++c) {
      scale[c] = parameters[gamma(l) + c] * inverse_deviation(l, c);
      shift[c] = parameters[beta(l) + c] - mean(l, c) * scale[c];
    }
    return {cast<T>(scale), cast<T>(shift)};
  }

  // layer l on `input`, which is x or c_{l-1}
  Convolution<T> convolution(int64_t l, const T* input, const std::pair<std::vector<T>, std::vector<T>>& a) const {
    return {B,
            H,
            W,
            l == 0 ? 1 : C,
            l == n + 1 ? 1 : C,
            input,
            l == 0 ? nullptr : a.first.data(),
            l == 0 ? nullptr : a.second.data(),
            parameters + layer(l)};
  }
};

// mean and variance of each channel, from the moments of the chunks in their order
void combine(const std::vector<double>& moments, const std::vector<int64_t>& sizes, int64_t C, double* mean,
             double* variance) {
  for (int64_t c = 0; c < C; ++c) {
    double count = 0, m = 0, squares = 0;
    for (size_t chunk = 0; chunk < sizes.size(); ++chunk) {
      const double* part = &moments[(chunk * C + c) * 3];
      const double size = static_cast<double>(sizes[chunk]), total = count + size;
      const double difference = part[0] + part[1] / size - m;
      squares += part[2] - part[1] * part[1] / size + difference * difference * count * size / total;
      m += difference * size / total;
      count = total;
    }
    mean[c] = m;
    variance[c] = squares / count;
  }
}

// y, c_0 ... c_n (two that take turns without `keep`) and the statistics [n, 2, C]
std::tuple<Tensor, Tensor, Tensor> dncnn(const Tensor& x, const Tensor& parameters, const std::optional<Tensor>& given,
                                         int64_t channels, int64_t hidden_layers, double eps, bool keep) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "x: expected float32 or float64");
  STD_TORCH_CHECK(x.dim() == 4 && x.numel() > 0, "x: expected [B, 1, H, W], none of them 0");
  STD_TORCH_CHECK(channels > 0 && hidden_layers >= 0, "channels, hidden_layers: out of range");
  const int64_t B = x.size(0), H = x.size(2), W = x.size(3), C = channels, n = hidden_layers;
  check("x", x, type, {B, 1, H, W});
  Tensor y = allocate(x, type, {B, 1, H, W});
  const int64_t slots = keep ? n + 1 : n > 0 ? 2 : 1;
  Tensor c = allocate(x, type, {slots, B, C, H * W}), statistics = allocate(x, ScalarType::Double, {n, 2, C});
  if (given) {
    check("statistics", *given, ScalarType::Double, {n, 2, C});
    torch::stable::copy_(statistics, *given);
  }
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    Network<T> net{B, H, W, C, n, eps, data<T>(x), data<T>(parameters), data<double>(statistics)};
    check("parameters", parameters, type, {net.layer(n + 1) + 9 * C + 1});
    const auto kernels = UNROLLED_KERNELS_AT_ACTIVE_ISA(convolution_kernels<T>());
    const auto plane = [&](int64_t l) { return mutable_data<T>(c) + l % slots * B * C * H * W; };
    for (int64_t l = 0; l <= n + 1; ++l) {
      const auto a = net.affine(l == 0 ? 0 : l - 1);
      const T* biases = l == 0 ? net.parameters + 9 * C : l == n + 1 ? net.parameters + net.layer(l) + 9 * C : nullptr;
      ConvolutionForward<T> p{net.convolution(l, l == 0 ? net.x : plane(l - 1), a), biases,
                              l == n + 1 ? mutable_data<T>(y) : plane(l), nullptr};
      const ConvolutionPlan plan = kernels.plan(p);
      std::vector<double> moments;
      if (!given && l > 0 && l <= n) {
        moments.resize(plan.chunks * C * 3);
        p.moments = moments.data();
      }
      for_chunks(plan.chunks, plan.scratch_bytes,
                 [&](int64_t chunk, void* scratch) { kernels.forward(p, plan, chunk, scratch); });
      if (!p.moments) continue;
      std::vector<int64_t> sizes(plan.chunks);
      const int64_t bands = plan.chunks / B;
      for (int64_t i = 0; i < plan.chunks; ++i) {
        sizes[i] = std::min(plan.rows, H - i % bands * plan.rows) * W;
      }
      double* mean = mutable_data<double>(statistics) + 2 * (l - 1) * C;
      combine(moments, sizes, C, mean, mean + C);
    }
  };
  type == ScalarType::Float ? run(float()) : run(double());
  return {y, c, statistics};
}

// Gradients of the parameters, and of x, [0] where it is not needed.
std::tuple<Tensor, Tensor> dncnn_backward(const Tensor& grad_y, const Tensor& x, const Tensor& parameters,
                                          const Tensor& c, const Tensor& statistics, double eps, bool training,
                                          bool needs_x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(x.dim() == 4 && c.dim() == 4, "x, c: expected four dimensions");
  const int64_t B = x.size(0), H = x.size(2), W = x.size(3), C = c.size(2), n = c.size(0) - 1;
  check("grad_y", grad_y, type, {B, 1, H, W});
  check("x", x, type, {B, 1, H, W});
  check("c", c, type, {n + 1, B, C, H * W});
  check("statistics", statistics, ScalarType::Double, {n, 2, C});
  Tensor d_parameters = allocate(x, type, {parameters.numel()});
  Tensor dx = needs_x ? allocate(x, type, {B, 1, H, W}) : allocate(x, type, {0});
  Tensor g = allocate(x, type, {2, B, C, H * W});
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    const Network<T> net{B, H, W, C, n, eps, data<T>(x), data<T>(parameters), data<double>(statistics)};
    check("parameters", parameters, type, {net.layer(n + 1) + 9 * C + 1});
    const auto kernels = UNROLLED_KERNELS_AT_ACTIVE_ISA(convolution_kernels<T>());
    const int64_t plane = B * C * H * W;
    const double N = static_cast<double>(net.pixels());
    T* d = mutable_data<T>(d_parameters);
    std::vector<T> partial;
    std::vector<double> sums, dbeta(C), product(C);  // of g_l, and of g_l (c_l - m_l)
    for (int64_t l = n + 1; l >= 0; --l) {
      const auto a = net.affine(l == 0 ? 0 : l - 1);
      const T* input = l == 0 ? net.x : data<T>(c) + (l - 1) * plane;
      T* grad_x = l > 0 ? mutable_data<T>(g) + (l - 1) % 2 * plane : needs_x ? mutable_data<T>(dx) : nullptr;
      ConvolutionBackward<T> p{};
      static_cast<Convolution<T>&>(p) = net.convolution(l, input, a);
      p.grad = l == n + 1 ? data<T>(grad_y) : mutable_data<T>(g) + l % 2 * plane;
      p.grad_x = grad_x;
      p.bias = l == n + 1;
      std::vector<T> factors[3], center;
      if (l > 0 && l <= n) {
        std::vector<double> exact[3] = {std::vector<double>(C), std::vector<double>(C), std::vector<double>(C)};
        for (int64_t i = 0; i < C; ++i) {
          const double r = net.inverse_deviation(l, i), s = net.parameters[net.gamma(l) + i] * r;
          exact[0][i] = s;
          exact[1][i] = training ? -s * r * r * product[i] / N : 0;
          exact[2][i] = training ? -s * dbeta[i] / N - exact[1][i] * net.mean(l, i) : 0;
        }
        for (int i = 0; i < 3; ++i) factors[i] = cast<T>(exact[i]);
        p.y = data<T>(c) + l * plane;
        p.grad_factor = factors[0].data(), p.y_factor = factors[1].data(), p.constant = factors[2].data();
      }
      if (l > 1) {
        for (int64_t i = 0; i < C; ++i) center.push_back(static_cast<T>(net.mean(l - 1, i)));
        p.center = center.data();
      }
      const ConvolutionPlan plan = kernels.plan(p);
      const int64_t size = convolution_gradients(p.inputs, p.outputs), weights = p.outputs * p.inputs * 9;
      partial.resize(plan.chunks * size);
      p.partial = partial.data();
      for_chunks(plan.chunks, plan.scratch_bytes,
                 [&](int64_t chunk, void* scratch) { kernels.backward(p, plan, chunk, scratch); });
      sums.resize(size);
      sum_chunks(partial.data(), plan.chunks, size, sums.data());
      for (int64_t i = 0; i < weights; ++i) d[net.layer(l) + i] = static_cast<T>(sums[i]);
      if (l == n + 1) d[net.layer(l) + weights] = static_cast<T>(sums[weights + 2 * p.inputs]);
      if (l == 0) continue;
      for (int64_t i = 0; i < C; ++i) {
        dbeta[i] = sums[weights + i];
        product[i] = sums[weights + C + i];
        if (l == 1) {
          d[9 * C + i] = static_cast<T>(dbeta[i]);  // b_0
        } else {
          d[net.gamma(l - 1) + i] = static_cast<T>(product[i] * net.inverse_deviation(l - 1, i));
          d[net.beta(l - 1) + i] = static_cast<T>(dbeta[i]);
        }
      }
    }
  };
  type == ScalarType::Float ? run(float()) : run(double());
  return {d_parameters, dx};
}

}  // namespace
}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def(
      "dncnn(Tensor x, Tensor parameters, Tensor? statistics, int channels, int hidden_layers, float eps, bool keep) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "dncnn_backward(Tensor grad_y, Tensor x, Tensor parameters, Tensor c, Tensor statistics, float eps, "
      "bool training, bool needs_x) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) {
  m.impl("dncnn", TORCH_BOX(&unrolled_kernels::dncnn));
  m.impl("dncnn_backward", TORCH_BOX(&unrolled_kernels::dncnn_backward));
}
