// The contract of the op `dncnn`: a small DnCNN (Zhang et al. 2017, Sec. III) and its gradients, layer by layer. The
// kernels behind it know no framework, and one convolution serves every layer.
//
//     c_0     = w_0 * x + b_0
//     c_l     = w_l * a_{l-1}                 l = 1 ... n, the hidden layers
//     y       = w_{n+1} * a_n + b_{n+1}
//     a_l     = max(s_l c_l + t_l, 0)         s_0 = 1, t_0 = 0, and batch normalisation for l >= 1:
//     s_l     = gamma_l r_l,   t_l = beta_l - m_l s_l,   r_l = 1 / sqrt(v_l + eps)
//
// * is a 3x3 correlation with zeros around the image; m_l and v_l are mean and variance of c_l over batch and pixels in
// training, and given in evaluation. Only the c_l are kept: what lies between is computed again where it is used.
//
// Backward, with g_l the gradient of s_l c_l + t_l, N the values of a channel and chat = (c_l - m_l) r_l:
//
//     g_l     = [a_l > 0] (w_{l+1}' * d_{l+1})          d_{n+1} = grad_y,   d_0 = g_0
//     dw_l    = d_l correlated with a_{l-1}
//     dbeta_l = sum g_l        dgamma_l = sum g_l chat_l
//     d_l     = s_l (g_l - dbeta_l / N - chat_l dgamma_l / N)   in training,   d_l = s_l g_l   in evaluation
//
// d_l is affine in g_l and c_l, so that it too is computed where it is read.
//
// Parameters lie in one array: w_0 [C, 1, 3, 3], b_0 [C], then w_l [C, C, 3, 3], gamma_l [C], beta_l [C] of each hidden
// layer, then w_{n+1} [1, C, 3, 3], b_{n+1} [1].
#pragma once
#include <cstdint>

namespace unrolled_kernels {

// One layer: a = max(scale x + shift, 0) of `inputs` planes, convolved to `outputs` planes.
template <typename T>
struct Convolution {
  int64_t B, H, W, inputs, outputs;
  const T* x;              // [B, inputs, H, W]
  const T *scale, *shift;  // [inputs], or both null: a = x
  const T* weight;         // [outputs, inputs, 3, 3]
};

template <typename T>
struct ConvolutionForward : Convolution<T> {
  const T* bias;  // [outputs] or null
  T* y;           // [B, outputs, H, W], written in full
  // [chunks, outputs, 3] or null: a value K near the others, the sum of y - K and that of (y - K)^2 over each chunk
  double* moments;
};

template <typename T>
struct ConvolutionBackward : Convolution<T> {
  const T* grad;                               // [B, outputs, H, W], and d = grad, or with the next four given
  const T* y;                                  // [B, outputs, H, W]
  const T *grad_factor, *y_factor, *constant;  // [outputs]: d = grad_factor grad + y_factor y + constant
  const T* center;                             // [inputs] or null for zero
  bool bias;                                   // whether sum d is wanted
  T* grad_x;  // [B, inputs, H, W] or null: [a > 0] (weight' * d); all of it where a = x
  // [chunks, convolution_gradients(inputs, outputs)], each chunk's share of
  // dweight [outputs, inputs, 3, 3], sum grad_x [inputs], sum grad_x (x - center) [inputs], sum d [outputs]
  T* partial;
};

constexpr int64_t convolution_gradients(int64_t inputs, int64_t outputs) {
  return outputs * inputs * 9 + 2 * inputs + outputs;
}

}  // namespace unrolled_kernels
