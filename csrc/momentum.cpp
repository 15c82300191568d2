// The ops of the family `momentum`: schemas, internal checks and allocation. No autograd, and canonical arguments only:
//
//     matrix             dense: Q; spectral: R. [B or 1, d, d], 1 where one serves the batch: its gradient is then summed
//     diagonal           diagonal: q; spectral: lambda; tikhonov: f. [B, d]
//     observed           tikhonov: x. [B, d]
//     b, y0              [B, d]; no y0: zero
//     step_sizes, momentum, extrapolation
//                        [B or 1, k or 1], or [] for one number, in the compute dtype; the last two both or neither,
//                        which is gradient descent
//     mu                 instead of these two, for Nesterov's method: like them; on a CPU only
//     lower, upper       the bounds of a clamp that ends each step, [B, d] in the compute dtype, or
//     weight             the same of a soft threshold phi_t weight, or
//     threshold          a soft threshold of its own, like step_sizes
//     y, grad_y          [B, d], or [k+1, B, d] with trajectory
//
// Strides are free, and rows may be expanded. `needs`: bit i for the gradient of forward's argument i; what is not needed
// is neither computed nor allocated, and comes back undefined, None in Python.
#include "momentum.h"

#include <cstring>
#include <tuple>

#include "common/tensors.h"
#include "cpu/momentum_launch.h"
#include "momentum_ops.h"
#ifdef UNROLLED_KERNELS_WITH_CUDA
#include "cuda/call.h"
#include "cuda/torch_products.h"
#include "cuda/momentum_kernels.h"
#endif

namespace unrolled_kernels {
namespace {

// bits of `needs`
enum : int64_t {
  need_matrix = 1 << 0,
  need_diagonal = 1 << 1,
  need_observed = 1 << 2,
  need_b = 1 << 3,
  need_y0 = 1 << 4,
  need_step_sizes = 1 << 5,
  need_momentum = 1 << 6,
  need_extrapolation = 1 << 7,
  need_mu = 1 << 8,
  need_lower = 1 << 9,
  need_upper = 1 << 10,
  need_weight = 1 << 11,
  need_threshold = 1 << 12,
};

// The tensors of one call, copied where a kernel needs other strides.
struct Arguments {
  OptionalTensor matrix, diagonal, observed;
  Tensor b;
  OptionalTensor y0;
  Tensor phi;
  OptionalTensor beta, gamma, mu, lower, upper, weight, threshold;
  int64_t k;
  bool trajectory;
  bool needs_matrix = false;
  int64_t skipped = 0;  // steps that the kernel does not see
  // what check() finds
  Structure structure{};
  Prox prox{};
  MatrixLayout layout{};
  int64_t B = 0, d = 0;
  ScalarType storage{}, compute{};

  void check() {
    STD_TORCH_CHECK(b.dim() == 2, "b: expected [B, d]");
    STD_TORCH_CHECK(k >= 0, "num_steps: expected a non-negative number");
    STD_TORCH_CHECK(matrix || diagonal, "matrix, diagonal: expected one of them or both");
    STD_TORCH_CHECK(!(matrix && observed), "observed: expected no matrix beside it");
    STD_TORCH_CHECK(beta.has_value() == gamma.has_value(), "momentum and extrapolation: expected both or neither");
    structure = !diagonal ? Structure::dense : matrix ? Structure::spectral : Structure::diagonal;
    B = b.size(0);
    d = b.size(1);
    storage = b.scalar_type();
    compute = compute_scalar_type(storage);
    if (matrix) {
      STD_TORCH_CHECK(matrix->dim() == 3 && (matrix->size(0) == B || matrix->size(0) == 1) && matrix->size(1) == d &&
                          matrix->size(2) == d,
                      "matrix: expected [B or 1, d, d]");
      check_type("matrix", *matrix, storage);
      layout = prepare_matrix(*matrix, needs_matrix);
    }
    check_rows("b", b);
    if (diagonal) check_rows("diagonal", *diagonal);
    if (observed) check_rows("observed", *observed);
    if (y0) check_rows("y0", *y0);
    check_coefficient("step_sizes", phi);
    if (beta) check_coefficient("momentum", *beta);
    if (gamma) check_coefficient("extrapolation", *gamma);
    if (mu) {
      STD_TORCH_CHECK(!beta && b.is_cpu(), "mu: expected no momentum beside it, and tensors on a CPU");
      check_coefficient("mu", *mu);
    }
    prox = lower || upper ? Prox::box : weight ? Prox::l1 : threshold ? Prox::soft_threshold : Prox::none;
    STD_TORCH_CHECK((lower || upper) + weight.has_value() + threshold.has_value() <= 1,
                    "lower and upper, weight, threshold: expected one kind of proximal map at most");
    STD_TORCH_CHECK(prox == Prox::none || structure != Structure::spectral,
                    "lower, upper, weight, threshold: expected no spectral Q beside a proximal map");
    if (lower) check_bound("lower", *lower);
    if (upper) check_bound("upper", *upper);
    if (weight) check_bound("weight", *weight);
    if (threshold) check_coefficient("threshold", *threshold);
  }

  template <typename Storage>
  void fill(MomentumInputs<Storage>& p) const {
    p.B = B;
    p.d = d;
    p.k = k - skipped;
    p.matrix = matrix ? data<Storage>(*matrix) : nullptr;
    p.matrix_stride = matrix ? batch_stride(*matrix) : 0;
    p.diagonal = diagonal ? data<Storage>(*diagonal) : nullptr;
    p.diagonal_stride = diagonal ? batch_stride(*diagonal) : 0;
    p.observed = observed ? data<Storage>(*observed) : nullptr;
    p.observed_stride = observed ? batch_stride(*observed) : 0;
    p.b = data<Storage>(b);
    p.b_stride = batch_stride(b);
    p.y0 = y0 ? data<Storage>(*y0) : nullptr;
    p.y0_stride = y0 ? batch_stride(*y0) : 0;
    p.phi = coefficient<Storage>(phi);
    p.beta = coefficient<Storage>(beta);
    p.gamma = coefficient<Storage>(gamma);
    p.prox = prox;
    p.lower = rows<Storage>(lower);
    p.upper = rows<Storage>(upper);
    p.weight = rows<Storage>(weight);
    p.threshold = coefficient<Storage>(threshold);
    p.transposed = layout.transposed;
    p.separate = layout.separate;
    p.trajectory = trajectory;
  }

  template <typename Storage>
  Coefficient<compute_type<Storage>> coefficient(const OptionalTensor& optional) const {
    if (!optional) return {};
    const Tensor& x = *optional;
    if (x.dim() == 0) return {data<compute_type<Storage>>(x), 0, 0};
    const int64_t stride = x.size(1) == 1 ? 0 : x.stride(1);
    return {data<compute_type<Storage>>(x) + skipped * stride, batch_stride(x), stride};
  }

 private:
  void check_type(const char* name, const Tensor& x, ScalarType type) const {
    STD_TORCH_CHECK(x.scalar_type() == type, name, ": expected dtype ", torch::headeronly::toString(type), ", got ",
                    torch::headeronly::toString(x.scalar_type()));
  }
  void check_rows(const char* name, Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == d, name, ": expected [B, d]");
    check_type(name, x, storage);
    make_rows_contiguous(x);
  }
  void check_bound(const char* name, Tensor& x) const {
    STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == B && x.size(1) == d, name, ": expected [B, d]");
    check_type(name, x, compute);
    if (!is_single(x)) make_rows_contiguous(x);
  }
  static bool is_single(const Tensor& x) { return x.stride(0) == 0 && x.stride(1) == 0; }
  void check_coefficient(const char* name, Tensor& x) const {
    check_type(name, x, compute);
    if (x.dim() == 0) return;
    STD_TORCH_CHECK(x.dim() == 2 && (x.size(0) == B || x.size(0) == 1) && (x.size(1) == k || x.size(1) == 1), name,
                    ": expected [B or 1, num_steps or 1] or one number");
    // an expanded dimension has a gradient for each entry, so it must not pass for a shared one
    const bool expanded = (x.size(0) > 1 && x.stride(0) == 0) || (x.size(1) > 1 && x.stride(1) == 0);
    if (expanded) x = as_contiguous(x);
  }
  template <typename Storage>
  static Rows<compute_type<Storage>> rows(const OptionalTensor& x) {
    if (!x) return {nullptr, 0, false};
    return {data<compute_type<Storage>>(*x), batch_stride(*x), is_single(*x)};
  }
};

template <template <typename> class Problem, typename Storage>
void launch(const Tensor& like, Structure structure, const Problem<Storage>& p) {
#ifdef UNROLLED_KERNELS_WITH_CUDA
  if (like.is_cuda()) {
    cuda::TorchProducts<Storage> products(like, p.matrix, p.d);
    return cuda::call(like.get_device_index(), [&](void* workspace, void* stream, size_t* size) {
      return cuda::momentum_kernels(structure, p, products, workspace, stream, size);
    });
  }
#endif
  STD_TORCH_CHECK(like.is_cpu(), "unrolled_kernels: no kernels for this device");
  momentum_cpu(structure, p);
}

// Where a forward pass leaves the state after `step` steps.
struct Begun {
  int64_t step;
  Tensor y, m;  // m: undefined where gradient descent has none
};

// Where a forward pass leaves what Stopping says, [B].
struct Stops {
  double tolerance;
  Tensor taken, residual;
};

Tensor forward(Arguments& args, const Begun& begun, const Stops& stops) {
  args.check();
  const Tensor& b = args.b;
  Tensor y = args.trajectory ? allocate(b, args.storage, {args.k + 1, args.B, args.d})
                             : allocate(b, args.storage, {args.B, args.d});
  if (args.k == 0) {
    args.y0 ? torch::stable::copy_(y, *args.y0) : torch::stable::zero_(y);
    return y;
  }
  dispatch_storage(args.storage, [&](auto type) {
    using Storage = decltype(type);
    MomentumForward<Storage> p{};
    args.fill(p);
    p.y = mutable_data<Storage>(y);
    p.begun = begun.step;
    p.y_begun = mutable_data<Storage>(begun.y);
    p.m_begun = mutable_data<Storage>(begun.m);
    using Compute = compute_type<Storage>;
    const Stopping<Compute> stopping{static_cast<Compute>(stops.tolerance), mutable_data<int64_t>(stops.taken),
                                     mutable_data<Compute>(stops.residual)};
    if (stopping.taken) p.stopping = &stopping;
    if (!args.mu) return launch(b, args.structure, p);
    const NesterovMomentum<compute_type<Storage>> nesterov(p, args.coefficient<Storage>(*args.mu));
    p.beta = p.gamma = nesterov.beta();
    launch(b, args.structure, p);
  });
  return y;
}

Tensor momentum(OptionalTensor matrix, OptionalTensor diagonal, OptionalTensor observed, Tensor b, OptionalTensor y0,
                Tensor step_sizes, OptionalTensor momentum, OptionalTensor extrapolation, OptionalTensor mu,
                OptionalTensor lower, OptionalTensor upper, OptionalTensor weight, OptionalTensor threshold,
                int64_t num_steps, bool trajectory) {
  Arguments args{matrix, diagonal, observed, b,      y0,        step_sizes, momentum,  extrapolation,
                 mu,     lower,    upper,    weight, threshold, num_steps,  trajectory};
  return forward(args, {}, {});
}

// y_k, and y_t and m_t at t = begun, where a backward pass of the steps after it begins; of a dense Q, on a CPU
std::tuple<Tensor, Tensor, Tensor> momentum_begun(Tensor matrix, Tensor b, OptionalTensor y0, Tensor step_sizes,
                                                  OptionalTensor momentum, OptionalTensor extrapolation,
                                                  OptionalTensor mu, OptionalTensor lower, OptionalTensor upper,
                                                  OptionalTensor weight, OptionalTensor threshold, int64_t num_steps,
                                                  int64_t begun) {
  Arguments args{matrix, {},    {},    b,      y0,        step_sizes, momentum, extrapolation,
                 mu,     lower, upper, weight, threshold, num_steps,  false};
  STD_TORCH_CHECK(begun >= 0 && begun < num_steps, "begun: expected 0 ... num_steps - 1");
  STD_TORCH_CHECK(b.is_cpu() && b.dim() == 2, "b: expected [B, d], on a CPU");
  const auto rows = [&](bool present) {
    return present ? allocate(b, b.scalar_type(), {b.size(0), b.size(1)}) : Tensor();
  };
  const Begun state{begun, rows(true), rows(momentum || mu)};
  Tensor y = forward(args, state, {});
  return {y, state.y, state.m};
}

// y where each sample stops, and what Stopping says of it
std::tuple<Tensor, Tensor, Tensor> momentum_stopping(OptionalTensor matrix, OptionalTensor diagonal,
                                                     OptionalTensor observed, Tensor b, OptionalTensor y0,
                                                     Tensor step_sizes, OptionalTensor momentum,
                                                     OptionalTensor extrapolation, OptionalTensor mu,
                                                     OptionalTensor lower, OptionalTensor upper, OptionalTensor weight,
                                                     OptionalTensor threshold, int64_t num_steps, double tolerance) {
  Arguments args{matrix, diagonal, observed, b,      y0,        step_sizes, momentum, extrapolation,
                 mu,     lower,    upper,    weight, threshold, num_steps,  false};
  // where there is nothing to move no kernel would write what Stopping says
  STD_TORCH_CHECK(b.dim() == 2 && b.size(1) > 0 && num_steps > 0, "b: expected [B, d ≥ 1]; num_steps: one or more");
  const Stops stops{tolerance, allocate(b, ScalarType::Long, {b.size(0)}),
                    allocate(b, compute_scalar_type(b.scalar_type()), {b.size(0)})};
  Tensor y = forward(args, {}, stops);
  return {y, stops.taken, stops.residual};
}

// `dmu`: written where dphi is wanted and there is a mu
template <typename Storage>
void launch_with_mu(const Arguments& args, MomentumBackward<Storage>& p, compute_type<Storage>* dmu) {
  if (!args.mu) return launch(args.b, args.structure, p);
  NesterovMomentum<compute_type<Storage>> nesterov(p, args.coefficient<Storage>(*args.mu));
  p.beta = p.gamma = nesterov.beta();
  if (p.dphi) nesterov.allocate_gradients(p.dbeta, p.dgamma);
  launch(args.b, args.structure, p);
  if (p.dphi) nesterov.backward(p.dphi, dmu);
}

// Gradients of the arguments of forward, in their order: of the steps from `first` on, y_t at t = first being a constant,
// for which a dense Q needs what momentum_begun leaves; or of `minimizer`, which is y_k, as that of the energy.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients momentum_backward(Tensor grad_y, OptionalTensor matrix, OptionalTensor diagonal, OptionalTensor observed,
                            Tensor b, OptionalTensor y0, Tensor step_sizes, OptionalTensor momentum,
                            OptionalTensor extrapolation, OptionalTensor mu, OptionalTensor lower, OptionalTensor upper,
                            OptionalTensor weight, OptionalTensor threshold, int64_t num_steps, bool trajectory,
                            int64_t needs, OptionalTensor iterates, int64_t first, OptionalTensor y_begun,
                            OptionalTensor m_begun, OptionalTensor minimizer) {
  Arguments args{matrix, diagonal, observed, b,      y0,        step_sizes, momentum,   extrapolation,
                 mu,     lower,    upper,    weight, threshold, num_steps,  trajectory, (needs & need_matrix) != 0};
  args.check();
  STD_TORCH_CHECK(
      grad_y.numel() == args.B * args.d * (trajectory ? args.k + 1 : 1) && grad_y.scalar_type() == args.storage,
      "grad_y: expected the shape and dtype of y");
  if (!grad_y.is_contiguous()) grad_y = as_contiguous(grad_y);
  STD_TORCH_CHECK(!iterates || (iterates->numel() == args.B * args.d * (args.k + 1) && iterates->is_contiguous() &&
                                iterates->scalar_type() == args.storage),
                  "iterates: expected [num_steps + 1, B, d], contiguous, in the dtype of b");
  const bool dense = args.structure == Structure::dense;
  for (const OptionalTensor& x : {y_begun, m_begun, minimizer}) {
    STD_TORCH_CHECK(!x || (x->numel() == args.B * args.d && x->is_contiguous() && x->scalar_type() == args.storage),
                    "y_begun, m_begun, minimizer: expected [B, d], contiguous, in the dtype of b");
  }
  STD_TORCH_CHECK(first >= 0 && (first == 0 || (first < args.k && b.is_cpu())),
                  "first: expected 0 ... num_steps - 1, and 0 on a GPU");
  STD_TORCH_CHECK(y_begun.has_value() == (dense && first > 0) && !(dense && first > 0 && trajectory) &&
                      m_begun.has_value() == (y_begun && (momentum || mu)),
                  "y_begun, m_begun: expected for a dense Q with first > 0, the second where there is momentum");
  STD_TORCH_CHECK(!minimizer || (b.is_cpu() && !(needs & (need_lower | need_upper)) && first == 0 && !trajectory),
                  "minimizer: expected no gradient of a bound, no trajectory and no GPU beside it");
  // where a diagonal or spectral Q begins is computed again
  if (y_begun) args.y0 = y_begun, args.skipped = first;

  const auto rows = [&](bool needed) { return needed ? allocate(b, args.storage, {args.B, args.d}) : Tensor(); };
  const auto bounds = [&](bool needed) { return needed ? allocate(b, args.compute, {args.B, args.d}) : Tensor(); };
  // the kernels have all coefficients' gradients or none
  const bool schedule =
      !minimizer && needs & (need_step_sizes | need_momentum | need_extrapolation | need_mu | need_threshold);
  const auto columns = [&](const OptionalTensor& x) {
    if (!schedule || !x) return Tensor();
    Tensor grad = x->dim() == 0 ? allocate(b, args.compute, {})
                                : allocate(b, args.compute, {x->size(0), x->size(1) - (x->size(1) > 1) * args.skipped});
    // without samples there is nothing to sum
    if (args.B == 0) torch::stable::zero_(grad);
    return grad;
  };
  const bool needs_matrix = matrix && needs & need_matrix, needs_observed = observed && needs & need_observed;
  Tensor d_matrix = needs_matrix ? allocate(b, args.storage, {matrix->size(0), args.d, args.d}) : Tensor();
  Tensor d_diagonal = rows(diagonal && needs & need_diagonal);
  Tensor db = rows(needs_observed || needs & need_b);
  Tensor dy0 = rows(y0 && needs & need_y0 && first == 0 && !minimizer);
  Tensor dphi = columns(step_sizes), dbeta = columns(momentum), dgamma = columns(extrapolation), dmu = columns(mu);
  Tensor d_lower = bounds(lower && needs & need_lower), d_upper = bounds(upper && needs & need_upper);
  Tensor d_weight = bounds(weight && needs & need_weight), d_threshold = columns(threshold);
  const auto run = [&](auto type) {
    using Storage = decltype(type);
    using Compute = compute_type<Storage>;
    MomentumBackward<Storage> p{};
    args.fill(p);
    p.grad_y = data<Storage>(grad_y);
    p.iterates = iterates ? data<Storage>(*iterates) : nullptr;
    p.m0 = m_begun ? data<Storage>(*m_begun) : nullptr;
    p.first = first - args.skipped;
    p.minimizer = minimizer ? data<Storage>(*minimizer) : nullptr;
    p.d_matrix = mutable_data<Storage>(d_matrix);
    p.d_diagonal = mutable_data<Storage>(d_diagonal);
    p.db = mutable_data<Storage>(db);
    p.dy0 = mutable_data<Storage>(dy0);
    p.d_lower = mutable_data<Compute>(d_lower);
    p.d_upper = mutable_data<Compute>(d_upper);
    p.d_weight = mutable_data<Compute>(d_weight);
    p.dphi = mutable_data<Compute>(dphi);
    p.dbeta = mutable_data<Compute>(dbeta);
    p.dgamma = mutable_data<Compute>(dgamma);
    p.d_threshold = mutable_data<Compute>(d_threshold);
    launch_with_mu(args, p, mutable_data<Compute>(dmu));
  };
  if (args.k > 0) {
    dispatch_storage(args.storage, run);
  } else {
    // y_0 came back and nothing else counts, whatever it is: its product with zero may be NaN
    for (Tensor* grad :
         {&d_matrix, &d_diagonal, &db, &dphi, &dbeta, &dgamma, &dmu, &d_lower, &d_upper, &d_weight, &d_threshold}) {
      if (grad->defined()) torch::stable::zero_(*grad);
    }
    if (dy0.defined()) torch::stable::copy_(dy0, trajectory ? torch::stable::select(grad_y, 0, 0) : grad_y);
  }
  // x counts against g
  Tensor d_observed = needs_observed ? negative(db) : Tensor();
  const auto wanted = [&](int64_t bit, Tensor& grad) {
    if (!(needs & bit)) grad = Tensor();
  };
  wanted(need_b, db);
  wanted(need_step_sizes, dphi);
  wanted(need_momentum, dbeta);
  wanted(need_extrapolation, dgamma);
  wanted(need_mu, dmu);
  wanted(need_threshold, d_threshold);
  // zeros for the steps that are not differentiated
  const auto complete = [&](Tensor& grad, const OptionalTensor& x, int64_t bit) {
    if (!x || !(needs & bit) || (grad.defined() && (x->dim() == 0 || grad.size(1) == x->size(1)))) return;
    Tensor whole =
        x->dim() == 0 ? allocate(b, x->scalar_type(), {}) : allocate(b, x->scalar_type(), {x->size(0), x->size(1)});
    std::memset(whole.mutable_data_ptr(), 0, whole.numel() * element_size(x->scalar_type()));
    if (grad.defined()) {
      Tensor last = torch::stable::narrow(whole, 1, x->size(1) - grad.size(1), grad.size(1));
      torch::stable::copy_(last, grad);
    }
    grad = whole;
  };
  if (minimizer || first > 0) {
    complete(dy0, y0, need_y0);
    complete(dphi, step_sizes, need_step_sizes);
    complete(dbeta, momentum, need_momentum);
    complete(dgamma, extrapolation, need_extrapolation);
    complete(dmu, mu, need_mu);
    complete(d_threshold, threshold, need_threshold);
  }
  return {d_matrix, d_diagonal, d_observed, db, dy0, dphi, dbeta, dgamma, dmu, d_lower, d_upper, d_weight, d_threshold};
}

// The VJP of momentum_backward, of a dense or diagonal Q without a proximal map. The cotangents are shaped like
// the inputs; none: zero, as those of the coefficients beside mu. Bit i of `needs`: gradient i of grad_y, matrix, diagonal,
// b, y0, step_sizes, momentum, extrapolation, mu.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> momentum_second_order(
    Tensor grad_y, OptionalTensor matrix, OptionalTensor diagonal, Tensor b, OptionalTensor y0, Tensor step_sizes,
    OptionalTensor momentum, OptionalTensor extrapolation, OptionalTensor mu, OptionalTensor d_matrix,
    OptionalTensor d_diagonal, OptionalTensor d_b, OptionalTensor d_y0, OptionalTensor d_step_sizes,
    OptionalTensor d_momentum, OptionalTensor d_extrapolation, int64_t num_steps, bool trajectory, int64_t needs) {
  Arguments args{matrix, diagonal, {}, b,  y0, step_sizes, momentum,   extrapolation,
                 mu,     {},       {}, {}, {}, num_steps,  trajectory, (needs & 2) != 0};
  args.check();
  const int64_t B = args.B, d = args.d;
  STD_TORCH_CHECK(args.structure != Structure::spectral, "matrix, diagonal: expected one of them");
  STD_TORCH_CHECK(args.storage == args.compute && num_steps > 0,
                  "b: expected float32 or float64; num_steps: one or more");
  STD_TORCH_CHECK(grad_y.numel() == B * d * (trajectory ? args.k + 1 : 1) && grad_y.scalar_type() == args.storage,
                  "grad_y: expected the shape and dtype of y");
  // of what it is the cotangent, and how many entries that has
  const auto prepare = [&](OptionalTensor& x, int64_t size) {
    STD_TORCH_CHECK(!x || (x->numel() == size && x->scalar_type() == args.storage),
                    "cotangents: expected the shapes and the dtype of the gradients");
    if (x && !x->is_contiguous()) x = as_contiguous(*x);
  };
  prepare(d_matrix, matrix ? matrix->numel() : 0);
  prepare(d_diagonal, diagonal ? B * d : 0);
  prepare(d_b, B * d);
  prepare(d_y0, B * d);
  prepare(d_step_sizes, step_sizes.numel());
  prepare(d_momentum, momentum ? momentum->numel() : 0);
  prepare(d_extrapolation, extrapolation ? extrapolation->numel() : 0);
  STD_TORCH_CHECK(!d_step_sizes || (d_momentum.has_value() == momentum.has_value() &&
                                    d_extrapolation.has_value() == extrapolation.has_value()),
                  "cotangents: expected those of all coefficients or of none");
  STD_TORCH_CHECK(!mu || !d_step_sizes, "mu: expected no cotangents of coefficients beside it");
  if (!grad_y.is_contiguous()) grad_y = as_contiguous(grad_y);

  const auto wanted = [&](int64_t bit) { return (needs >> bit & 1) != 0; };
  const auto like = [&](bool needed, const OptionalTensor& x) {
    if (!needed || !x) return Tensor();
    Tensor grad = x->dim() == 0 ? allocate(b, args.compute, {}) : allocate(b, args.compute, {x->size(0), x->size(1)});
    if (B == 0) torch::stable::zero_(grad);
    return grad;
  };
  const bool schedule = wanted(5) || wanted(6) || wanted(7) || wanted(8);
  Tensor y_tangent = !wanted(0)   ? Tensor()
                     : trajectory ? allocate(b, args.storage, {args.k + 1, B, d})
                                  : allocate(b, args.storage, {B, d});
  Tensor matrix_grad = matrix && wanted(1) ? allocate(b, args.storage, {matrix->size(0), d, d}) : Tensor();
  Tensor b_grad = like(wanted(3), b), y0_grad = like(wanted(4), y0), diagonal_grad = like(wanted(2), diagonal);
  Tensor phi_grad = like(schedule, step_sizes), beta_grad = like(schedule, momentum),
         gamma_grad = like(schedule, extrapolation), mu_grad = like(schedule, mu);
  const auto run = [&](auto type) {
    using Storage = decltype(type);
    const auto of = [](const OptionalTensor& x) { return x ? data<Storage>(*x) : nullptr; };
    MomentumTangents<Storage> tangents{};
    tangents.matrix = of(d_matrix);
    tangents.matrix_stride = matrix && matrix->size(0) > 1 ? d * d : 0;
    tangents.diagonal = of(d_diagonal);
    tangents.b = of(d_b);
    tangents.y0 = of(d_y0);
    const auto shaped = [](const OptionalTensor& x, const OptionalTensor& like) {
      if (!x) return Coefficient<compute_type<Storage>>{};
      const int64_t rows = like->dim() ? like->size(0) : 1, columns = like->dim() ? like->size(1) : 1;
      return Coefficient<compute_type<Storage>>{data<compute_type<Storage>>(*x), rows == 1 ? 0 : columns,
                                                columns == 1 ? 0 : 1};
    };
    if (d_step_sizes) {
      tangents.phi = shaped(d_step_sizes, step_sizes);
      tangents.beta = shaped(d_momentum, momentum);
      tangents.gamma = shaped(d_extrapolation, extrapolation);
    }
    tangents.y = mutable_data<Storage>(y_tangent);
    MomentumBackward<Storage> p{};
    args.fill(p);
    p.grad_y = data<Storage>(grad_y);
    p.tangents = &tangents;
    p.d_matrix = mutable_data<Storage>(matrix_grad);
    p.d_diagonal = mutable_data<Storage>(diagonal_grad);
    p.db = mutable_data<Storage>(b_grad);
    p.dy0 = mutable_data<Storage>(y0_grad);
    using Compute = compute_type<Storage>;
    p.dphi = mutable_data<Compute>(phi_grad);
    p.dbeta = mutable_data<Compute>(beta_grad);
    p.dgamma = mutable_data<Compute>(gamma_grad);
    launch_with_mu(args, p, mutable_data<Compute>(mu_grad));
  };
  with_scratch([&] { args.storage == ScalarType::Double ? run(double()) : run(float()); });
  return {y_tangent, matrix_grad, diagonal_grad, b_grad, y0_grad, phi_grad, beta_grad, gamma_grad, mu_grad};
}

Tensor call_forward(const MomentumOps::Tensors& x, int64_t num_steps, bool trajectory) {
  return momentum(x[0], x[1], x[2], *x[3], x[4], *x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], num_steps,
                  trajectory);
}

void call_forward_begun(const MomentumOps::Tensors& x, int64_t num_steps, int64_t first, Tensor& y, Tensor& y_begun,
                        Tensor& m_begun) {
  std::tie(y, y_begun, m_begun) =
      momentum_begun(*x[0], *x[3], x[4], *x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12], num_steps, first);
}

void call_backward(const Tensor& grad_y, const MomentumOps::Tensors& x, int64_t num_steps, bool trajectory,
                   int64_t needs, const MomentumOps::Differentiated& what, MomentumOps::Tensors& grads) {
  auto found =
      momentum_backward(grad_y, x[0], x[1], x[2], *x[3], x[4], *x[5], x[6], x[7], x[8], x[9], x[10], x[11], x[12],
                        num_steps, trajectory, needs, {}, what.first, what.y_begun, what.m_begun, what.minimizer);
  int64_t i = 0;
  std::apply([&](auto&... grad) { ((grads[i++] = std::move(grad)), ...); }, found);
}

void call_second_order(const Tensor& grad_y, const MomentumOps::Tensors& x, const MomentumOps::Tensors& cotangents,
                       int64_t num_steps, bool trajectory, bool needs_grad_y, int64_t needs, Tensor& grad_of_grad_y,
                       MomentumOps::Tensors& grads) {
  // grad_y has the first bit, and there is no `observed`
  const int64_t shifted = needs_grad_y | (needs & (need_matrix | need_diagonal)) << 1 | (needs & ~int64_t{7});
  std::tie(grad_of_grad_y, grads[0], grads[1], grads[3], grads[4], grads[5], grads[6], grads[7], grads[8]) =
      momentum_second_order(grad_y, x[0], x[1], *x[3], x[4], *x[5], x[6], x[7], x[8], cotangents[0], cotangents[1],
                            cotangents[3], cotangents[4], {}, {}, {}, num_steps, trajectory, shifted);
}

void register_kernels(torch::stable::detail::StableLibrary& m) {
  m.impl("momentum", TORCH_BOX(&momentum));
  m.impl("momentum_begun", TORCH_BOX(&momentum_begun));
  m.impl("momentum_stopping", TORCH_BOX(&momentum_stopping));
  m.impl("momentum_backward", TORCH_BOX(&momentum_backward));
  m.impl("momentum_second_order", TORCH_BOX(&momentum_second_order));
}

}  // namespace

const MomentumOps momentum_ops{&call_forward, &call_forward_begun, &call_backward, &call_second_order};

}  // namespace unrolled_kernels

STABLE_TORCH_LIBRARY_FRAGMENT(unrolled_kernels, m) {
  m.def(
      "momentum(Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, Tensor step_sizes, "
      "Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, Tensor? weight, "
      "Tensor? threshold, SymInt num_steps, bool trajectory) -> Tensor");
  m.def(
      "momentum_begun(Tensor matrix, Tensor b, Tensor? y0, Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, "
      "Tensor? mu, Tensor? lower, Tensor? upper, Tensor? weight, Tensor? threshold, SymInt num_steps, SymInt begun) -> "
      "(Tensor, Tensor, Tensor)");
  m.def(
      "momentum_stopping(Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, Tensor step_sizes, "
      "Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, Tensor? weight, "
      "Tensor? threshold, SymInt num_steps, float tolerance) -> (Tensor, Tensor, Tensor)");
  m.def(
      "momentum_backward(Tensor grad_y, Tensor? matrix, Tensor? diagonal, Tensor? observed, Tensor b, Tensor? y0, "
      "Tensor step_sizes, Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? lower, Tensor? upper, "
      "Tensor? weight, Tensor? threshold, SymInt num_steps, bool trajectory, int needs, Tensor? iterates=None, "
      "SymInt first=0, Tensor? y_begun=None, Tensor? m_begun=None, Tensor? minimizer=None) -> "
      "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "momentum_second_order(Tensor grad_y, Tensor? matrix, Tensor? diagonal, Tensor b, Tensor? y0, Tensor step_sizes, "
      "Tensor? momentum, Tensor? extrapolation, Tensor? mu, Tensor? d_matrix, Tensor? d_diagonal, Tensor? d_b, "
      "Tensor? d_y0, Tensor? d_step_sizes, Tensor? d_momentum, Tensor? d_extrapolation, SymInt num_steps, "
      "bool trajectory, int needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CPU, m) { unrolled_kernels::register_kernels(m); }
#ifdef UNROLLED_KERNELS_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unrolled_kernels, CUDA, m) { unrolled_kernels::register_kernels(m); }
#endif
