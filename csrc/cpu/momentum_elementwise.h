// The recurrence where Q is diagonal, Q z = lambda z elementwise: k steps at a time on a few vectors in registers.
//
// m_t = y_t - y_{t-1} is carried along, and backward s_t, its adjoint by every way through it (momentum_dense.cpp).
// With one phi, beta, gamma for all steps
//
//     p = phi lambda    m <- (beta m - phi b) - p z    z <- y + (1 + gamma) m    y <- y + m
//                       ybar <- ybar - p s             s <- ybar + (beta - gamma p) s
//
// A proximal map (momentum_prox.h) ends the step where there is one: m is what y moved by, and s is what the adjoint of v
// takes from that of y_{t+1}; what it leaves does not reach y_t by m_{t+1} = y_{t+1} - y_t either.
//
// Gradient descent with one step size needs no trace for its last iterate. With c = 1 - phi lambda and u = dy/dc
//
//     u <- c u + y    y <- c y - phi b                             T <- T + P    P <- c P, from P = ybar
//     dlambda = -phi ybar u    db = -phi T    dy_0 = P    dphi = -(lambda ybar u + b T)
//
// Powers of c alone would serve all b and ybar, but they overflow where states that are zero or small do not.
#pragma once

#include "cpu/momentum_prox.h"

namespace unrolled_kernels {
namespace UNROLLED_KERNELS_NAMESPACE {

// gradient descent, one step size for all steps, final iterate only, at least one step
template <typename Inputs>
inline bool is_traceless(const Inputs& p) {
  return !p.beta.data && p.phi.step_stride == 0 && !p.trajectory && p.k > 0 && p.prox == Prox::none;
}

// A strip of vectors; a row of a trajectory is `row` elements behind the one before.
template <typename C>
struct Elementwise {
  ScheduleView<C> schedule;
  int64_t k;
  bool momentum, trajectory, traceless;
  bool per_step;  // whether a coefficient varies over steps
  Prox prox;
  ProxRows<C> map;
  const C *lambda = nullptr, *b = nullptr, *y0 = nullptr;  // y0 may stay nullptr: zeros
  bool squared = false;                                    // lambda is f, and Q = diag(1 + f^2)
  const C* observed = nullptr;                             // x, where b is g and what is minimized has g - x for it
  int64_t row = 0;                                         // of y or grad_y

  template <typename Inputs>
  Elementwise(const Inputs& p, const ScheduleView<C>& schedule)
      : schedule(schedule),
        k(p.k),
        momentum(p.beta.data),
        trajectory(p.trajectory),
        traceless(is_traceless(p) && !p.stopping),
        // samples that stop round as those do whose coefficients are zero from there on
        per_step(!constant_schedule(p) || p.stopping),
        prox(p.prox) {}

  Vector<C> lambda_at(int64_t i) const {
    const Vector<C> x = load(lambda + i);
    return squared ? broadcast(C(1)) + x * x : x;
  }
  Vector<C> b_at(int64_t i) const { return observed ? load(b + i) - load(observed + i) : load(b + i); }
};

template <typename C>
struct ElementwiseForward : Elementwise<C> {
  template <typename Inputs>
  ElementwiseForward(const Inputs& p, const ScheduleView<C>& schedule) : Elementwise<C>(p, schedule), last(p.k) {}
  C* y = nullptr;
  // The steps `first` ... `last` - 1, from y0 and, with momentum, from z and m, which are left at `last` (nullptr:
  // nothing comes before or after). The trajectory is that of these steps.
  int64_t first = 0, last;
  C *z = nullptr, *m = nullptr;

  // the next `steps` of them, from the last y
  void go_on(int64_t steps) {
    this->y0 = y + (last - first) * this->row;
    first = last, last = min(last + steps, this->k);
  }
};

template <typename C>
struct ElementwiseBackward : Elementwise<C> {
  using Elementwise<C>::Elementwise;
  const C* grad_y = nullptr;
  C *dlambda = nullptr, *db = nullptr, *dy0 = nullptr;  // nullptr: not wanted
  int64_t first = 0;                                    // the steps before are constant, with a trace
  // Where `first` is the step of y0 itself: with momentum also z and m there, and the gradient of m.
  bool begun = false;
  const C *z = nullptr, *m = nullptr;
  C* dm = nullptr;
  ScheduleSums<C> sums{};
  ProxSums<C> map_sums{};  // filled with zeros
  C* trace = nullptr;      // [2, k, vectors_at_once] vectors, with a proximal map [3, k, vectors_at_once]

  // Runs `before` up to `step`: this goes on from its y, z and m. dm_at: where the gradient of that m goes.
  void begin_after(ElementwiseForward<C> before, int64_t step, C* z_at, C* m_at, C* dm_at, int64_t vectors);

  // df = 2 f dlambda
  void store_dlambda(int64_t i, Vector<C> x) const {
    store(dlambda + i, this->squared ? broadcast(C(2)) * load(this->lambda + i) * x : x);
  }
};

// ElementwiseBackward of the derivative of y along tangents, which are zero where they are nullptr.
template <typename C>
struct ElementwiseSecondOrder : ElementwiseBackward<C> {
  using ElementwiseBackward<C>::ElementwiseBackward;
  bool varied;               // whether the coefficients have tangents
  ScheduleView<C> tangents;  // these
  const C *lambda_tangent = nullptr, *b_tangent = nullptr, *y0_tangent = nullptr;
  C* y_tangent = nullptr;  // output, or nullptr
  // trace: [4, k, vectors_at_once] vectors
};

// vectors in registers at once; one has less to compile
constexpr int vectors_at_once = is_fallback ? 1 : 3;
// steps between two looks at which samples have stopped
constexpr int64_t steps_between_stops = 4;
// as Poll counts it
constexpr int64_t work_of_step = 4 * vectors_at_once;

// One step of one vector: y_t, z_t, m_t -> t + 1. `lambda` and `b` are phi lambda and phi b where the schedule is
// constant. The shortest way from z to the next z is two operations.
// `map(v)` is the proximal map of a step, if there is one.
template <bool momentum, bool per_step, bool proximal, typename C, typename Map>
UNROLLED_KERNELS_INLINE void elementwise_step(const StepCoefficients<C>& c, Vector<C> gamma_next, Vector<C> lambda,
                                              Vector<C> b, Vector<C>& y, Vector<C>& z, Vector<C>& m, Map map) {
  if constexpr (proximal) {
    const Vector<C> to = map(y + (momentum ? c.beta * m : Vector<C>{}) - c.phi * (lambda * z + b));
    m = to - y;
    y = to;
    z = momentum ? y + gamma_next * m : y;
  } else if constexpr (!momentum) {
    y -= per_step ? c.phi * (lambda * y + b) : lambda * y + b;
    z = y;
  } else {
    m = per_step ? c.beta * m - c.phi * (lambda * z + b) : (c.beta * m - b) - lambda * z;
    z = y + (broadcast(C(1)) + gamma_next) * m;
    y += m;
  }
}

template <bool momentum, bool per_step, Prox prox, int N, typename C>
UNROLLED_KERNELS_INLINE void elementwise_forward(const ElementwiseForward<C>& p, int64_t offset) {
  constexpr int64_t W = lanes<C>;
  constexpr bool proximal = prox != Prox::none;
  static_assert(per_step || !proximal);
  const ScheduleView<C> schedule = p.schedule;
  const bool trajectory = p.trajectory, goes_on = p.first > 0;
  const int64_t row = p.row;
  StepCoefficients<C> c = schedule.template at<momentum>(p.first);
  Vector<C> lambda[N], b[N], y[N], z[N], m[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    lambda[n] = p.lambda_at(offset + n * W);
    b[n] = p.b_at(offset + n * W);
    if constexpr (!per_step) {
      lambda[n] *= c.phi;
      b[n] *= c.phi;
    }
    y[n] = z[n] = p.y0 ? load(p.y0 + offset + n * W) : Vector<C>{};
    m[n] = Vector<C>{};
    if (momentum && goes_on) z[n] = load(p.z + offset + n * W), m[n] = load(p.m + offset + n * W);
  }
  C* out = p.y + offset;
  for (int64_t t = p.first, k = p.k; t < p.last; ++t) {
    const auto next = per_step ? schedule.template at<momentum>(min(t + 1, k - 1)) : c;
    const Vector<C> threshold = prox == Prox::soft_threshold ? schedule.threshold_at(t) : Vector<C>{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if (trajectory) store(out + n * W, y[n]);
      elementwise_step<momentum, per_step, proximal>(
          c, next.gamma, lambda[n], b[n], y[n], z[n], m[n],
          [&](Vector<C> v) { return proximal_map<prox>(p.map, c.phi, threshold, offset + n * W, v); });
    }
    c = next;
    if (trajectory) out += row;
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    store(out + n * W, y[n]);
    if (momentum && p.z) store(p.z + offset + n * W, z[n]), store(p.m + offset + n * W, m[n]);
  }
}

template <int N, typename C>
UNROLLED_KERNELS_INLINE void traceless_forward(const ElementwiseForward<C>& p, int64_t offset) {
  constexpr int64_t W = lanes<C>;
  const Vector<C> phi = p.schedule.template at<false>(0).phi, one = broadcast(C(1));
  Vector<C> c[N], b[N], y[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    c[n] = one - phi * p.lambda_at(offset + n * W);
    b[n] = phi * p.b_at(offset + n * W);
    y[n] = p.y0 ? load(p.y0 + offset + n * W) : Vector<C>{};
  }
  for (int64_t t = 0; t < p.k; ++t) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) y[n] = c[n] * y[n] - b[n];
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(p.y + offset + n * W, y[n]);
}

template <bool momentum, bool per_step, Prox prox, int N, typename C>
UNROLLED_KERNELS_INLINE void elementwise_backward(const ElementwiseBackward<C>& p, int64_t offset) {
  constexpr int64_t W = lanes<C>;
  constexpr bool proximal = prox != Prox::none;
  constexpr int64_t slots = proximal ? 3 : 2;
  static_assert(per_step || !proximal);
  const ScheduleView<C> schedule = p.schedule;
  const ScheduleSums<C> sums = p.sums;
  const bool trajectory = p.trajectory;
  const int64_t k = p.k, row = p.row, first = p.first;
  StepCoefficients<C> c = schedule.template at<momentum>(p.begun ? first : 0);
  Vector<C> lambda[N];  // phi lambda where phi is the same for all steps
  {
    Vector<C> b[N], y[N], z[N], m[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      lambda[n] = p.lambda_at(offset + n * W);
      b[n] = p.b_at(offset + n * W);
      if constexpr (!per_step) {
        lambda[n] *= c.phi;
        b[n] *= c.phi;
      }
      y[n] = z[n] = p.y0 ? load(p.y0 + offset + n * W) : Vector<C>{};
      m[n] = Vector<C>{};
      if (momentum && p.begun) z[n] = load(p.z + offset + n * W), m[n] = load(p.m + offset + n * W);
    }
    // the trace: z_t, with momentum m_t, with a proximal map v_t
    C* trace = p.trace;
    for (int64_t t = p.begun ? first : 0, end = first;; end = k) {
      // of constant steps each overwrites the one before
      const int64_t kept = end == first && first > 0 ? 0 : slots * N * W;
      for (; t < end; ++t, trace += kept) {
        const auto next = per_step ? schedule.template at<momentum>(min(t + 1, k - 1)) : c;
        const Vector<C> threshold = prox == Prox::soft_threshold ? schedule.threshold_at(t) : Vector<C>{};
#pragma GCC unroll 8
        for (int n = 0; n < N; ++n) {
          store(trace + n * W, z[n]);
          if constexpr (momentum) store(trace + (N + n) * W, m[n]);
          elementwise_step<momentum, per_step, proximal>(
              c, next.gamma, lambda[n], b[n], y[n], z[n], m[n], [&](Vector<C> v) {
                store(trace + (2 * N + n) * W, v);
                return proximal_map<prox>(p.map, c.phi, threshold, offset + n * W, v);
              });
        }
        c = next;
      }
      if (end == k) break;
    }
  }
  Vector<C> ybar[N], s[N], s_sum[N], sz_sum[N], sm_sum[N];
  const C* cotangent = p.grad_y + offset + (trajectory ? k * row : 0);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    ybar[n] = s[n] = load(cotangent + n * W);
    s_sum[n] = sz_sum[n] = sm_sum[n] = Vector<C>{};
  }
  const C* trace = p.trace + (k - first) * slots * N * W;
  for (int64_t t = k - 1; t >= first; --t) {
    trace -= slots * N * W;
    if constexpr (per_step) c = schedule.template at<momentum>(t);
    if (trajectory) cotangent -= row;
    const Vector<C> threshold = prox == Prox::soft_threshold ? schedule.threshold_at(t) : Vector<C>{};
    Vector<C> phi_sum{}, beta_sum{}, gamma_sum{};
    ProxTerms<C> terms;
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      if constexpr (proximal) {
        const Vector<C> v = load(trace + (2 * N + n) * W);
        const Vector<C> a = proximal_adjoint<prox>(p.map, p.map_sums, c.phi, threshold, offset + n * W, v, s[n], terms);
        ybar[n] -= s[n] - a;
        s[n] = a;
      }
      const Vector<C> z = load(trace + n * W), m = momentum ? load(trace + (N + n) * W) : Vector<C>{};
      const Vector<C> weighted = per_step ? c.phi * s[n] : s[n];
      Vector<C> v = lambda[n] * weighted;
      s_sum[n] += weighted;
      sz_sum[n] += weighted * z;
      if constexpr (per_step) phi_sum += s[n] * (lambda[n] * z + p.b_at(offset + n * W));
      ybar[n] -= v;
      if (trajectory) ybar[n] += load(cotangent + n * W);
      if constexpr (!momentum) {
        s[n] = ybar[n];
      } else if constexpr (per_step) {
        beta_sum += s[n] * m;
        gamma_sum += v * m;
        s[n] = ybar[n] + (c.beta * s[n] - c.gamma * v);
      } else {
        sm_sum[n] += s[n] * m;
        s[n] = ybar[n] + (c.beta - c.gamma * lambda[n]) * s[n];
      }
    }
    if (per_step && sums.phi) {
      if constexpr (proximal) phi_sum += terms.phi;
      sums.add_phi(t, -phi_sum);
      sums.template add_momentum<momentum>(t, beta_sum, -gamma_sum);
      if constexpr (prox == Prox::soft_threshold) sums.add_threshold(t, -terms.threshold);
    }
  }
  const Vector<C> scale = per_step || k == 0 ? broadcast(C(-1)) : -c.phi;
  Vector<C> phi_sum{}, beta_sum{}, gamma_sum{};
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    phi_sum += p.lambda_at(offset + n * W) * sz_sum[n] + p.b_at(offset + n * W) * s_sum[n];
    beta_sum += sm_sum[n];
    gamma_sum += lambda[n] * sm_sum[n];
    if (p.dlambda) p.store_dlambda(offset + n * W, scale * sz_sum[n]);
    if (p.db) store(p.db + offset + n * W, scale * s_sum[n]);
    if (p.dy0) store(p.dy0 + offset + n * W, ybar[n]);
    if (momentum && p.dm) store(p.dm + offset + n * W, s[n] - ybar[n]);
  }
  if (!per_step && k > 0 && sums.phi) {
    sums.add_phi(0, -phi_sum);
    sums.template add_momentum<momentum>(0, beta_sum, -gamma_sum);
  }
}

template <int N, typename C>
UNROLLED_KERNELS_INLINE void traceless_backward(const ElementwiseBackward<C>& p, int64_t offset) {
  constexpr int64_t W = lanes<C>;
  const Vector<C> phi = p.schedule.template at<false>(0).phi, one = broadcast(C(1));
  Vector<C> c[N], u[N];
  {
    Vector<C> b[N], y[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      c[n] = one - phi * p.lambda_at(offset + n * W);
      b[n] = phi * p.b_at(offset + n * W);
      y[n] = p.y0 ? load(p.y0 + offset + n * W) : Vector<C>{};
      u[n] = Vector<C>{};
    }
    for (int64_t t = 0; t < p.k; ++t) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        u[n] = c[n] * u[n] + y[n];
        y[n] = c[n] * y[n] - b[n];
      }
    }
  }
  Vector<C> T[N], P[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    T[n] = Vector<C>{};
    P[n] = load(p.grad_y + offset + n * W);
    u[n] *= P[n];
  }
  for (int64_t t = 0; t < p.k; ++t) {
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      T[n] += P[n];
      P[n] *= c[n];
    }
  }
  Vector<C> phi_sum{};
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    phi_sum += p.lambda_at(offset + n * W) * u[n] + p.b_at(offset + n * W) * T[n];
    if (p.dlambda) p.store_dlambda(offset + n * W, -phi * u[n]);
    if (p.db) store(p.db + offset + n * W, -phi * T[n]);
    if (p.dy0) store(p.dy0 + offset + n * W, P[n]);
  }
  if (p.sums.phi) p.sums.add_phi(0, -phi_sum);
}

// Second order: y and its tangent together, then the adjoints of both. In names, d is what belongs to the tangent; p and
// pbar are s and ybar of y, a and abar those of its tangent. `varied`: whether the coefficients have tangents.
template <bool momentum, bool varied, int N, typename C>
UNROLLED_KERNELS_INLINE void elementwise_second_order(const ElementwiseSecondOrder<C>& e, int64_t offset) {
  constexpr int64_t W = lanes<C>;
  constexpr int64_t slots = momentum ? 4 : 2;
  const ScheduleView<C> schedule = e.schedule, tangents = e.tangents;
  const ScheduleSums<C> sums = e.sums;
  const bool trajectory = e.trajectory;
  const int64_t k = e.k, row = e.row;
  const auto tangents_at = [&](int64_t t) {
    return varied ? tangents.template at<momentum>(t) : StepCoefficients<C>{};
  };
  // the terms of tangents are not there where these are zero
  const auto plus = [](Vector<C> x, Vector<C> term) { return varied ? x + term : x; };
  const auto from = [&](const C* x, int n) { return x ? load(x + offset + n * W) : Vector<C>{}; };
  Vector<C> lambda[N], d_lambda[N];
  {
    Vector<C> b[N], db[N], y[N], dy[N], z[N], dz[N], m[N], dm[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      lambda[n] = from(e.lambda, n), d_lambda[n] = from(e.lambda_tangent, n);
      b[n] = from(e.b, n), db[n] = from(e.b_tangent, n);
      y[n] = z[n] = from(e.y0, n), dy[n] = dz[n] = from(e.y0_tangent, n);
      m[n] = dm[n] = Vector<C>{};
    }
    C *trace = e.trace, *out = e.y_tangent ? e.y_tangent + offset : nullptr;
    for (int64_t t = 0; t < k; ++t, trace += slots * N * W) {
      const auto c = schedule.template at<momentum>(t), d = tangents_at(t);
      const int64_t after = min(t + 1, k - 1);
      const Vector<C> gamma = schedule.template at<momentum>(after).gamma;
      const Vector<C> d_gamma = tangents_at(after).gamma;
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) {
        if (trajectory && out) store(out + t * row + n * W, dy[n]);
        store(trace + n * W, z[n]);
        store(trace + (N + n) * W, dz[n]);
        const Vector<C> g = lambda[n] * z[n] + b[n], dg = lambda[n] * dz[n] + (d_lambda[n] * z[n] + db[n]);
        if constexpr (momentum) {
          store(trace + (2 * N + n) * W, m[n]);
          store(trace + (3 * N + n) * W, dm[n]);
          dm[n] = plus(c.beta * dm[n] - c.phi * dg, d.beta * m[n] - d.phi * g);
          m[n] = c.beta * m[n] - c.phi * g;
          y[n] += m[n], dy[n] += dm[n];
          z[n] = y[n] + gamma * m[n], dz[n] = plus(dy[n] + gamma * dm[n], d_gamma * m[n]);
        } else {
          dy[n] -= plus(c.phi * dg, d.phi * g);
          y[n] -= c.phi * g;
          z[n] = y[n], dz[n] = dy[n];
        }
      }
    }
    if (out) {
#pragma GCC unroll 8
      for (int n = 0; n < N; ++n) store(out + (trajectory ? k * row : 0) + n * W, dy[n]);
    }
  }
  Vector<C> p[N], pbar[N], a[N], abar[N], s_sum[N], sz_sum[N];
  const C* cotangent = e.grad_y + offset + (trajectory ? k * row : 0);
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    abar[n] = a[n] = load(cotangent + n * W);
    p[n] = pbar[n] = s_sum[n] = sz_sum[n] = Vector<C>{};
  }
  const C* trace = e.trace + k * slots * N * W;
  for (int64_t t = k - 1; t >= 0; --t) {
    trace -= slots * N * W;
    const auto c = schedule.template at<momentum>(t), d = tangents_at(t);
    if (trajectory) cotangent -= row;
    Vector<C> phi_sum{}, beta_sum{}, gamma_sum{};
#pragma GCC unroll 8
    for (int n = 0; n < N; ++n) {
      const Vector<C> z = load(trace + n * W), dz = load(trace + (N + n) * W);
      const Vector<C> wa = lambda[n] * a[n], w = lambda[n] * p[n] + d_lambda[n] * a[n];
      const Vector<C> weighted = plus(c.phi * p[n], d.phi * a[n]), va = c.phi * wa, v = plus(c.phi * w, d.phi * wa);
      s_sum[n] += weighted;
      sz_sum[n] += weighted * z + c.phi * a[n] * dz;
      phi_sum += w * z + wa * dz + p[n] * from(e.b, n) + a[n] * from(e.b_tangent, n);
      pbar[n] -= v, abar[n] -= va;
      if (trajectory) abar[n] += load(cotangent + n * W);
      if constexpr (momentum) {
        const Vector<C> m = load(trace + (2 * N + n) * W), dm = load(trace + (3 * N + n) * W);
        beta_sum += p[n] * m + a[n] * dm;
        gamma_sum += v * m + va * dm;
        p[n] = pbar[n] + plus(c.beta * p[n] - c.gamma * v, d.beta * a[n] - d.gamma * va);
        a[n] = abar[n] + (c.beta * a[n] - c.gamma * va);
      } else {
        p[n] = pbar[n], a[n] = abar[n];
      }
    }
    if (sums.phi) {
      sums.add_phi(t, -phi_sum);
      sums.template add_momentum<momentum>(t, beta_sum, -gamma_sum);
    }
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) {
    if (e.dlambda) store(e.dlambda + offset + n * W, -sz_sum[n]);
    if (e.db) store(e.db + offset + n * W, -s_sum[n]);
    if (e.dy0) store(e.dy0 + offset + n * W, pbar[n]);
  }
}

// calls f(integral_constant N, offset) over a strip, N = at_once and then 1
template <typename C, int at_once = vectors_at_once, typename F>
UNROLLED_KERNELS_INLINE void for_vectors(int64_t vectors, int64_t k, F f) {
  Poll poll;
  int64_t n = 0;
  for (; n + at_once <= vectors; n += at_once) {
    f(std::integral_constant<int, at_once>(), n * lanes<C>);
    poll.after(k * work_of_step);
  }
  for (; n < vectors; ++n) f(std::integral_constant<int, 1>(), n * lanes<C>);
}

// vectors `first` ... `first + vectors - 1` of the strip
template <bool may_end_with_prox = false, typename C>
UNROLLED_KERNELS_NOINLINE void run_elementwise(const ElementwiseForward<C>& p, int64_t vectors, int64_t first = 0) {
  for_vectors<C>(vectors, p.k, [&](auto N, int64_t offset) {
    constexpr int n = decltype(N)::value;
    offset += first * lanes<C>;
    if (p.traceless) return traceless_forward<n>(p, offset);
    if constexpr (may_end_with_prox) {
      if (p.prox != Prox::none) {
        // one form serves all schedules
        return with_prox(p.prox, [&](auto prox) {
          constexpr Prox map = decltype(prox)::value;
          p.momentum ? elementwise_forward<true, true, map, n>(p, offset)
                     : elementwise_forward<false, true, map, n>(p, offset);
        });
      }
    }
    constexpr Prox none = Prox::none;
    if (p.momentum) {
      p.per_step ? elementwise_forward<true, true, none, n>(p, offset)
                 : elementwise_forward<true, false, none, n>(p, offset);
    } else {
      p.per_step ? elementwise_forward<false, true, none, n>(p, offset)
                 : elementwise_forward<false, false, none, n>(p, offset);
    }
  });
}

template <typename C>
UNROLLED_KERNELS_NOINLINE void run_elementwise(const ElementwiseSecondOrder<C>& p, int64_t vectors) {
  // twice the state: more vectors would not stay in registers
  for_vectors<C, min(2, vectors_at_once)>(vectors, p.k, [&](auto N, int64_t offset) {
    constexpr int n = decltype(N)::value;
    if (p.momentum) {
      p.varied ? elementwise_second_order<true, true, n>(p, offset)
               : elementwise_second_order<true, false, n>(p, offset);
    } else {
      p.varied ? elementwise_second_order<false, true, n>(p, offset)
               : elementwise_second_order<false, false, n>(p, offset);
    }
  });
}

template <bool may_end_with_prox = false, typename C>
UNROLLED_KERNELS_NOINLINE void run_elementwise(const ElementwiseBackward<C>& p, int64_t vectors) {
  for_vectors<C>(vectors, p.k, [&](auto N, int64_t offset) {
    constexpr int n = decltype(N)::value;
    if (p.traceless) return traceless_backward<n>(p, offset);
    if constexpr (may_end_with_prox) {
      if (p.prox != Prox::none) {
        // one form serves all schedules
        return with_prox(p.prox, [&](auto prox) {
          constexpr Prox map = decltype(prox)::value;
          p.momentum ? elementwise_backward<true, true, map, n>(p, offset)
                     : elementwise_backward<false, true, map, n>(p, offset);
        });
      }
    }
    constexpr Prox none = Prox::none;
    if (p.momentum) {
      p.per_step ? elementwise_backward<true, true, none, n>(p, offset)
                 : elementwise_backward<true, false, none, n>(p, offset);
    } else {
      p.per_step ? elementwise_backward<false, true, none, n>(p, offset)
                 : elementwise_backward<false, false, none, n>(p, offset);
    }
  });
}

template <typename C>
void ElementwiseBackward<C>::begin_after(ElementwiseForward<C> before, int64_t step, C* z_at, C* m_at, C* dm_at,
                                         int64_t vectors) {
  before.trajectory = before.traceless = this->traceless = false;
  before.last = first = step;
  this->y0 = before.y;
  begun = true;
  if (this->momentum) z = before.z = z_at, m = before.m = m_at, dm = dm_at;
  run_elementwise(before, vectors);
}

}  // namespace UNROLLED_KERNELS_NAMESPACE
}  // namespace unrolled_kernels
