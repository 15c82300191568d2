// A 3x3 convolution of few channels, planar, with pixels of a row in lanes.
//
// A chunk is a band of rows of one image. Its inputs are brought to scratch, normalised and rectified on the way, with
// a row above and below and zeros around the image; everything then reads that copy, at the nine offsets of the filter.
// The gradient of the input is the same convolution with the filter turned around.
#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#include "experiments/cpu/convolution_kernels.h"
// the headers above are compiled for the baseline, those below for the level of this file
#include "cpu/simd/simd.h"

#include "cpu/simd/arena.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {
namespace {

// A block of the convolution is `block_outputs` channels by `block_vectors` vectors of pixels, one of the gradient of
// the filter weight_outputs by weight_inputs channels by the three columns of the filter: what the registers hold.
#if UNROLLED_KERNELS_ISA == 2
constexpr int block_outputs = 4, block_vectors = 4, weight_outputs = 4, weight_inputs = 2;
#elif UNROLLED_KERNELS_ISA == 1
constexpr int block_outputs = 4, block_vectors = 2, weight_outputs = 3, weight_inputs = 1;
#else
constexpr int block_outputs = 3, block_vectors = 2, weight_outputs = 3, weight_inputs = 1;
#endif

// Planes of a band in scratch: rows -1 ... rows, each with a vector of zeros on either side.
template <typename T>
struct Planes {
  static constexpr int64_t W = lanes<T>;
  T* data;
  int64_t columns, rows;  // columns: those of the image, up to whole blocks

  static int64_t padded(int64_t width) { return ceil_div(width, block_vectors * W) * block_vectors * W; }
  int64_t row_size() const { return columns + 2 * W; }
  int64_t plane_size() const { return (rows + 2) * row_size(); }
  T* at(int64_t channel, int64_t row) const { return data + channel * plane_size() + (row + 1) * row_size() + W; }
};

struct Band {
  int64_t image, first, rows;
};

Band band_of(int64_t chunk, int64_t height, const ConvolutionPlan& plan) {
  const int64_t bands = ceil_div(height, plan.rows), first = chunk % bands * plan.rows;
  return {chunk / bands, first, min(plan.rows, height - first)};
}

// planes[c] = value(c, pixel, n) where the image is, zero around it; `pixel` counts within a plane of [B, channels, H, W]
// from its beginning in memory, and n lanes of the vector are pixels of the row.
template <typename T, typename F>
UNROLLED_KERNELS_INLINE void fill(const Planes<T>& planes, const Band& band, int64_t channels, int64_t height,
                                  int64_t width, const F& value) {
  constexpr int64_t W = lanes<T>;
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t r = -1; r <= band.rows; ++r) {
      T* out = planes.at(c, r);
      store(out - W, Vector<T>{});
      store(out + planes.columns, Vector<T>{});
      const int64_t y = band.first + r;
      int64_t e = 0;
      if (y >= 0 && y < height) {
        const int64_t pixel = ((band.image * channels + c) * height + y) * width;
        for (; e + W <= width; e += W) store(out + e, value(c, pixel + e, W));
        if (e < width) {
          store(out + e, keep_lanes<T>(value(c, pixel + e, width - e), width - e));
          e += W;
        }
      }
      for (; e < planes.columns; e += W) store(out + e, Vector<T>{});
    }
  }
}

// [a > 0], NaN included, as torch has it
template <typename T>
UNROLLED_KERNELS_INLINE Vector<T> where_positive(Vector<T> a, Vector<T> x) {
  return a <= T(0) ? Vector<T>{} : x;
}

template <typename T>
void fill_inputs(const Planes<T>& planes, const Band& band, const Convolution<T>& p) {
  const T* end = p.x + p.B * p.inputs * p.H * p.W;
  if (!p.scale) {
    fill<T>(planes, band, p.inputs, p.H, p.W,
            [&](int64_t, int64_t pixel, int64_t n) { return load_first(p.x + pixel, n, end); });
    return;
  }
  fill<T>(planes, band, p.inputs, p.H, p.W, [&](int64_t c, int64_t pixel, int64_t n) {
    const Vector<T> h = load_first(p.x + pixel, n, end) * p.scale[c] + p.shift[c];
    return where_positive<T>(h, h);
  });
}

template <typename T>
void fill_grads(const Planes<T>& planes, const Band& band, const ConvolutionBackward<T>& p) {
  const int64_t size = p.B * p.outputs * p.H * p.W;
  if (!p.grad_factor) {
    fill<T>(planes, band, p.outputs, p.H, p.W,
            [&](int64_t, int64_t pixel, int64_t n) { return load_first(p.grad + pixel, n, p.grad + size); });
    return;
  }
  fill<T>(planes, band, p.outputs, p.H, p.W, [&](int64_t c, int64_t pixel, int64_t n) {
    return load_first(p.grad + pixel, n, p.grad + size) * p.grad_factor[c] +
           (load_first(p.y + pixel, n, p.y + size) * p.y_factor[c] + p.constant[c]);
  });
}

// x in a register of its own, where the compiler would read it from memory for each of its uses
template <typename V>
UNROLLED_KERNELS_INLINE V in_register(V x) {
#if defined(__x86_64__)
  // a test builds vectors that take several registers
  if constexpr (sizeof(V) <= 16 << UNROLLED_KERNELS_ISA) asm("" : "+v"(x));
#endif
  return x;
}

// f(first, n) with n = std::integral_constant <= largest, over blocks of `count`
template <int largest, typename F>
UNROLLED_KERNELS_INLINE void for_blocks(int64_t count, const F& f) {
  int64_t first = 0;
  for (; first + largest <= count; first += largest) f(first, std::integral_constant<int, largest>());
  if constexpr (largest > 1) {
    if (first < count) {
      for_blocks<largest - 1>(count - first, [&](int64_t more, auto n) { f(first + more, n); });
    }
  }
}

// The filter as convolve() walks through it: for each block of outputs [inputs, 3, 3, outputs of the block].
template <typename T>
void pack_weight(const Convolution<T>& p, T* out) {
  for_blocks<block_outputs>(p.outputs, [&](int64_t first, auto block) {
    for (int64_t i = 0; i < p.inputs; ++i) {
      for (int t = 0; t < 9; ++t) {
        for (int o = 0; o < block; ++o) *out++ = p.weight[((first + o) * p.inputs + i) * 9 + t];
      }
    }
  });
}

// The same of the filter that takes gradients of outputs to those of inputs.
template <typename T>
void pack_turned_weight(const Convolution<T>& p, T* out) {
  for_blocks<block_outputs>(p.inputs, [&](int64_t first, auto block) {
    for (int64_t o = 0; o < p.outputs; ++o) {
      for (int t = 8; t >= 0; --t) {
        for (int i = 0; i < block; ++i) *out++ = p.weight[(o * p.inputs + first + i) * 9 + t];
      }
    }
  });
}

// block_vectors vectors of a row of `outputs` channels: out [outputs, columns] = filter * in, plus bias.
template <typename T, int outputs>
UNROLLED_KERNELS_NOINLINE void convolve_block(const Planes<T>& in, int64_t inputs, int64_t row, int64_t column,
                                              const T* weight, const T* bias, T* out) {
  constexpr int64_t W = lanes<T>;
  const int64_t row_size = in.row_size(), plane_size = in.plane_size();
  const T* plane = in.at(0, row - 1) + column;
  Vector<T> sums[outputs][block_vectors];
#pragma GCC unroll 4
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) sums[o][j] = bias ? broadcast(bias[o]) : Vector<T>{};
  }
  for (int64_t i = 0; i < inputs; ++i, plane += plane_size) {
    const T* pixels = plane;
#pragma GCC unroll 1
    for (int dy = 0; dy < 3; ++dy, pixels += row_size) {
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx, weight += outputs) {
        Vector<T> x[block_vectors];
#pragma GCC unroll 4
        for (int j = 0; j < block_vectors; ++j) x[j] = in_register(load(pixels + dx - 1 + j * W));
#pragma GCC unroll 4
        for (int o = 0; o < outputs; ++o) {
          const Vector<T> w = broadcast(weight[o]);
#pragma GCC unroll 4
          for (int j = 0; j < block_vectors; ++j) sums[o][j] += w * x[j];
        }
      }
    }
  }
#pragma GCC unroll 4
  for (int o = 0; o < outputs; ++o) {
#pragma GCC unroll 4
    for (int j = 0; j < block_vectors; ++j) store(out + o * in.columns + column + j * W, sums[o][j]);
  }
}

// done(o, row, v) with v [columns], for every row of every output; buffer [outputs, columns]
template <typename T, typename F>
UNROLLED_KERNELS_INLINE void convolve(const Planes<T>& in, const Band& band, int64_t inputs, int64_t outputs,
                                      const T* packed, const T* bias, T* buffer, const F& done) {
  for (int64_t r = 0; r < band.rows; ++r) {
    for (int64_t e = 0; e < in.columns; e += block_vectors * lanes<T>) {
      for_blocks<block_outputs>(outputs, [&](int64_t first, auto block) {
        convolve_block<T, decltype(block)::value>(in, inputs, r, e, packed + first * inputs * 9,
                                                  bias ? bias + first : nullptr, buffer + first * in.columns);
      });
    }
    for (int64_t o = 0; o < outputs; ++o) done(o, r, buffer + o * in.columns);
  }
}

// out[i] = the sum of the lanes of v[i]
template <typename T>
UNROLLED_KERNELS_INLINE void sum_each(const Vector<T>* v, int64_t count, T* out) {
  constexpr int64_t W = lanes<T>;
  for (int64_t first = 0; first < count; first += W) {
    Vector<T> block[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) block[i] = first + i < count ? v[first + i] : Vector<T>{};
    transpose<T>(block);
    Vector<T> sum = block[0];
#pragma GCC unroll 16
    for (int i = 1; i < W; ++i) sum += block[i];
    store_first(out + first, sum, min(count - first, W), out + count);
  }
}

// sums[o][i][dx] over the band of d [o] times a [i], a row dy and a column dx away
template <typename T, int outputs, int inputs>
UNROLLED_KERNELS_NOINLINE void correlate(const Planes<T>& d, int64_t first_output, const Planes<T>& a,
                                         int64_t first_input, int64_t rows, int dy, T* out) {
  constexpr int64_t W = lanes<T>;
  Vector<T> sums[outputs][inputs][3] = {};
  for (int64_t r = 0; r < rows; ++r) {
    const T *grads = d.at(first_output, r), *pixels = a.at(first_input, r + dy);
    for (int64_t e = 0; e < d.columns; e += W) {
      Vector<T> g[outputs];
#pragma GCC unroll 4
      for (int o = 0; o < outputs; ++o) g[o] = load(grads + o * d.plane_size() + e);
#pragma GCC unroll 4
      for (int i = 0; i < inputs; ++i) {
#pragma GCC unroll 3
        for (int dx = 0; dx < 3; ++dx) {
          const Vector<T> x = in_register(load(pixels + i * a.plane_size() + e + dx - 1));
#pragma GCC unroll 4
          for (int o = 0; o < outputs; ++o) sums[o][i][dx] += g[o] * x;
        }
      }
    }
  }
  sum_each<T>(&sums[0][0][0], outputs * inputs * 3, out);
}

template <typename T>
void weight_gradient(const ConvolutionBackward<T>& p, const Planes<T>& d, const Planes<T>& a, int64_t rows, T* out) {
  for_blocks<weight_outputs>(p.outputs, [&](int64_t output, auto outputs) {
    for_blocks<weight_inputs>(p.inputs, [&](int64_t input, auto inputs) {
      for (int dy = -1; dy <= 1; ++dy) {
        T sums[outputs * inputs * 3];
        correlate<T, outputs, inputs>(d, output, a, input, rows, dy, sums);
        for (int o = 0; o < outputs; ++o) {
          for (int i = 0; i < inputs; ++i) {
            T* row = out + ((output + o) * p.inputs + input + i) * 9 + (dy + 1) * 3;
            for (int dx = 0; dx < 3; ++dx) row[dx] = sums[(o * inputs + i) * 3 + dx];
          }
        }
      }
    });
  });
}

// What a vector stores behind its row is stored again by the next one, and lies before the end of the band.
template <typename T>
UNROLLED_KERNELS_INLINE void store_row_of(const T* row, int64_t n, T* out, const T* end) {
  for (int64_t e = 0; e < n; e += lanes<T>) store_first(out + e, load(row + e), n - e, end);
}

template <typename T>
struct Scratch {
  Scratch(const Convolution<T>& p, int64_t rows, void* memory) : arena(memory) {
    x = {nullptr, Planes<T>::padded(p.W), rows};
    grads = x;
    // two vectors a channel, and a number
    sums = arena.take<T>(2 * max(p.inputs, p.outputs) * lanes<T> + p.outputs);
    weight = arena.take<T>(p.inputs * p.outputs * 9);
    row = arena.take<T>(max(p.inputs, p.outputs) * x.columns);
    x.data = arena.take<T>(p.inputs * x.plane_size());
    grads.data = arena.take<T>(p.outputs * x.plane_size());
  }
  Arena arena;
  Planes<T> x, grads;
  T *sums, *weight, *row;
};

template <typename T>
ConvolutionPlan plan(const Convolution<T>& p) {
  // two bands of planes that fit the second-level cache; 48 rows leave an image to several threads
  const int64_t row_bytes = max(p.inputs, p.outputs) * (Planes<T>::padded(p.W) + 2 * lanes<T>)*sizeof(T);
  const int64_t most = max(4, min(48, 262144 / row_bytes - 2)), bands = max(1, ceil_div(p.H, most));
  const int64_t rows = max(1, ceil_div(p.H, bands));
  return {p.H == 0 ? 0 : p.B * ceil_div(p.H, rows), rows, Scratch<T>(p, rows, nullptr).arena.used()};
}

template <typename T>
void forward(const ConvolutionForward<T>& p, const ConvolutionPlan& plan, int64_t chunk, void* memory) {
  constexpr int64_t W = lanes<T>;
  const Scratch<T> scratch(p, plan.rows, memory);
  const Band band = band_of(chunk, p.H, plan);
  fill_inputs(scratch.x, band, p);
  pack_weight(p, scratch.weight);
  T *sums = scratch.sums, *origin = scratch.sums + 2 * p.outputs * W;
  fill_zero(sums, 2 * p.outputs * W);
  const int64_t plane = p.H * p.W;
  T* out = p.y + band.image * p.outputs * plane + band.first * p.W;
  convolve<T>(scratch.x, band, p.inputs, p.outputs, scratch.weight, p.bias, scratch.row,
              [&](int64_t o, int64_t r, const T* row) {
                store_row_of(row, p.W, out + o * plane + r * p.W, out + o * plane + band.rows * p.W);
                if (!p.moments) return;
                if (r == 0) origin[o] = row[0];
                Vector<T> sum = load(sums + 2 * o * W), squares = load(sums + 2 * o * W + W);
                for (int64_t e = 0; e < p.W; e += W) {
                  Vector<T> difference = load(row + e) - origin[o];
                  if (e + W > p.W) difference = keep_lanes<T>(difference, p.W - e);
                  sum += difference;
                  squares += difference * difference;
                }
                store(sums + 2 * o * W, sum);
                store(sums + 2 * o * W + W, squares);
              });
  if (!p.moments) return;
  for (int64_t o = 0; o < p.outputs; ++o) {
    double* moments = p.moments + (chunk * p.outputs + o) * 3;
    moments[0] = origin[o];
    moments[1] = sum_lanes<T>(load(sums + 2 * o * W));
    moments[2] = sum_lanes<T>(load(sums + 2 * o * W + W));
  }
}

template <typename T>
void backward(const ConvolutionBackward<T>& p, const ConvolutionPlan& plan, int64_t chunk, void* memory) {
  constexpr int64_t W = lanes<T>;
  const Scratch<T> scratch(p, plan.rows, memory);
  const Band band = band_of(chunk, p.H, plan);
  fill_inputs(scratch.x, band, p);
  fill_grads(scratch.grads, band, p);
  T* d_weight = p.partial + chunk * convolution_gradients(p.inputs, p.outputs);
  T *sum_grad = d_weight + p.outputs * p.inputs * 9, *sum_product = sum_grad + p.inputs;
  T* sum_d = sum_product + p.inputs;
  weight_gradient(p, scratch.grads, scratch.x, band.rows, d_weight);
  for (int64_t o = 0; o < p.outputs; ++o) {
    Vector<T> sum{};
    for (int64_t r = 0; p.bias && r < band.rows; ++r) {
      const T* row = scratch.grads.at(o, r);
      for (int64_t e = 0; e < p.W; e += W) sum += load(row + e);
    }
    sum_d[o] = sum_lanes<T>(sum);
  }
  if (!p.grad_x) {
    fill_zero(sum_grad, 2 * p.inputs);
    return;
  }
  pack_turned_weight(p, scratch.weight);
  T* sums = scratch.sums;
  fill_zero(sums, 2 * p.inputs * W);
  const int64_t plane = p.H * p.W, offset = band.image * p.inputs * plane + band.first * p.W;
  const T* end = p.x + p.B * p.inputs * plane;
  convolve<T>(scratch.grads, band, p.outputs, p.inputs, scratch.weight, static_cast<const T*>(nullptr), scratch.row,
              [&](int64_t i, int64_t r, T* row) {
                const int64_t first = offset + i * plane + r * p.W;
                if (p.scale) {
                  const T *a = scratch.x.at(i, r), center = p.center ? p.center[i] : T(0);
                  Vector<T> sum = load(sums + 2 * i * W), products = load(sums + 2 * i * W + W);
                  for (int64_t e = 0; e < p.W; e += W) {
                    const Vector<T> g = where_positive<T>(load(a + e), load(row + e));
                    store(row + e, g);
                    sum += g;
                    products += g * (load_first(p.x + first + e, p.W - e, end) - center);
                  }
                  store(sums + 2 * i * W, sum);
                  store(sums + 2 * i * W + W, products);
                }
                store_row_of(row, p.W, p.grad_x + first, p.grad_x + offset + i * plane + band.rows * p.W);
              });
  for (int64_t i = 0; i < p.inputs; ++i) {
    sum_grad[i] = sum_lanes<T>(load(sums + 2 * i * W));
    sum_product[i] = sum_lanes<T>(load(sums + 2 * i * W + W));
  }
}

}  // namespace

template <typename T>
ConvolutionKernels<T> convolution_kernels() {
  return {plan<T>, forward<T>, backward<T>};
}
template ConvolutionKernels<float> convolution_kernels();
template ConvolutionKernels<double> convolution_kernels();

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
