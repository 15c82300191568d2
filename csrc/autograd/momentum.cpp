// Python module unrolled_kernels._C_autograd: the ops of momentum.cpp on a CPU as functions with a gradient.
//
// It does what MomentumFunction of ops/momentum/function.py does, and the Functions of gradients.py, without Python's
// part of autograd and without the dispatcher, which take several times as long as a small kernel. Unlike the ops it needs
// the very torch that it was built against. Whatever is more than plain tensors, and second derivatives of coefficients
// and of a Tikhonov Q, is left to the Functions in Python.
#include <algorithm>

#include <ATen/EmptyTensor.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/TracerMode.h>
#include <ATen/record_function.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/inductor/aoti_torch/utils.h>
#include <torch/csrc/utils/pybind.h>

#include "momentum_ops.h"

namespace unrolled_kernels {
namespace {

using at::Tensor;
using torch::autograd::variable_list;

constexpr int64_t num_tensors = MomentumOps::num_tensors;
// places among the tensors
enum { matrix = 0, diagonal = 1, observed = 2, b = 3, step_sizes = 5, lower = 9, upper = 10 };
constexpr int64_t coefficients = 0b1111 << step_sizes;

// What is differentiated, as an argument: these, or how many of the last steps.
enum : int64_t { all_steps = 0, minimizer = -1 };

const MomentumOps* ops = nullptr;
// compute gradients that may themselves be differentiated, vmapped or watched: of all steps, the last, the minimizer, and
// of those of all steps
enum Kind { of_all_steps, of_last_steps, of_minimizer, of_gradients, kinds };
PyObject* python_backward[kinds] = {};

// Nothing is at work that would see the ops by themselves: a mode, a transform, a tracer, a profiler.
bool is_plain_call() {
  return !c10::impl::dispatch_mode_enabled() && !at::impl::torch_function_mode_enabled() &&
         !at::tracer::impl::is_dispatch_enabled() && !at::hasCallbacks() &&
         !c10::impl::tls_is_dispatch_key_included(c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// A tensor of numbers on a CPU: no subclass, no tangent, nothing wrapped, lazily negated or without data.
bool is_plain(const Tensor& x) {
  constexpr c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                       c10::DispatchKey::ADInplaceOrView, c10::DispatchKey::AutocastCPU});
  return (x.key_set() | plain) == plain && !x._fw_grad(0).defined();
}

// What a call has, without what it has not: bit i of `present` for the argument i.
struct Call {
  variable_list tensors;
  int64_t present = 0, num_steps = 0;
  bool trajectory = false;
  int64_t differentiated = all_steps;

  bool has(int64_t i) const { return present >> i & 1; }

  // the steps before are constant
  int64_t first() const { return differentiated > 0 ? std::max<int64_t>(num_steps - differentiated, 0) : 0; }

  // Whether the ops have the gradients that are asked for; what they keep is not rounded.
  bool is_possible() const {
    if (differentiated == all_steps || (differentiated > 0 && first() == 0)) return true;
    if (differentiated > 0 && has(diagonal)) return true;
    if (trajectory || at(b).scalar_type() != at(step_sizes).scalar_type()) return false;
    const auto is_differentiated = [&](int64_t i) { return has(i) && at(i).requires_grad(); };
    return differentiated > 0 || !(is_differentiated(lower) || is_differentiated(upper));
  }
  // Whether the ops have the VJP of the gradients `needs`, and torch's products of matrices are not the faster ones.
  bool has_second_order(int64_t needs) const {
    if (differentiated < 0 || first() > 0 || num_steps == 0 || (needs & coefficients)) return false;
    if (has(observed) || (has(matrix) && has(diagonal)) || present >> lower != 0) return false;
    if (at(b).scalar_type() != at(step_sizes).scalar_type()) return false;
    return !has(matrix) || at(matrix).size(0) == at(b).size(0) || at(b).size(1) <= 40;
  }
  const Tensor& at(int64_t i) const { return tensors[__builtin_popcountll(present & ((int64_t{1} << i) - 1))]; }

  void add(int64_t i, Tensor x) {
    tensors.push_back(std::move(x));
    present |= int64_t{1} << i;
  }

  // Calls f(i, edge) for each tensor: its place among the arguments and in `tensors`.
  template <typename F>
  void for_each(F f) const {
    for (int64_t i = 0, edge = 0; i < num_tensors; ++i) {
      if (present >> i & 1) f(i, edge++);
    }
  }

  void fill(MomentumOps::Tensors& stable) const {
    for_each([&](int64_t i, int64_t edge) { stable[i] = to_stable(tensors[edge]); });
  }

  static torch::stable::Tensor to_stable(const Tensor& x) {
    return torch::stable::Tensor(torch::aot_inductor::new_tensor_handle(Tensor(x)));
  }
  static Tensor from_stable(const torch::stable::Tensor& x) {
    return *torch::aot_inductor::tensor_handle_to_tensor_pointer(x.get());
  }

  Tensor forward() const {
    const at::AutoDispatchBelowAutograd guard;
    MomentumOps::Tensors stable;
    fill(stable);
    return from_stable(ops->forward(stable, num_steps, trajectory));
  }

  // y, and behind `kept` what backward needs beside the tensors
  Tensor forward(variable_list& kept) const {
    if (first() > 0 && !has(diagonal)) {
      const at::AutoDispatchBelowAutograd guard;
      MomentumOps::Tensors stable;
      fill(stable);
      torch::stable::Tensor y, y_begun, m_begun;
      ops->forward_begun(stable, num_steps, first(), y, y_begun, m_begun);
      kept.push_back(from_stable(y_begun));
      if (m_begun.defined()) kept.push_back(from_stable(m_begun));
      return from_stable(y);
    }
    Tensor y = forward();
    if (differentiated == minimizer) kept.push_back(y);
    return y;
  }

  // the gradient of each of `tensors`, or an undefined one
  variable_list backward(const Tensor& grad_y, int64_t needs, const variable_list& kept) const {
    const at::AutoDispatchBelowAutograd guard;
    MomentumOps::Tensors stable, grads;
    fill(stable);
    MomentumOps::Differentiated what;
    what.first = first();
    const auto kept_at = [&](size_t i) {
      return i < kept.size() ? std::optional(to_stable(kept[i])) : std::optional<torch::stable::Tensor>();
    };
    if (differentiated == minimizer) {
      what.minimizer = kept_at(0);
    } else {
      what.y_begun = kept_at(0), what.m_begun = kept_at(1);
    }
    ops->backward(to_stable(grad_y), stable, num_steps, trajectory, needs, what, grads);
    variable_list found(tensors.size());
    for_each([&](int64_t i, int64_t edge) {
      if (needs >> i & 1) found[edge] = from_stable(*grads[i]);
    });
    return found;
  }

  // Of `needs`, for cotangents [tensors.size()] of the gradients, where there are any; then, if that is wanted, of grad_y.
  variable_list second_order(const Tensor& grad_y, const variable_list& cotangents, int64_t needs,
                             bool needs_grad_y) const {
    const at::AutoDispatchBelowAutograd guard;
    MomentumOps::Tensors stable, given, grads;
    fill(stable);
    for_each([&](int64_t i, int64_t edge) {
      if (cotangents[edge].defined()) given[i] = to_stable(cotangents[edge]);
    });
    torch::stable::Tensor of_grad_y;
    ops->second_order(to_stable(grad_y), stable, given, num_steps, trajectory, needs_grad_y, needs, of_grad_y, grads);
    variable_list found(tensors.size());
    for_each([&](int64_t i, int64_t edge) {
      if (needs >> i & 1) found[edge] = from_stable(*grads[i]);
    });
    found.push_back(needs_grad_y ? from_stable(of_grad_y) : Tensor());
    return found;
  }

  variable_list backward_in_python(const Tensor& grad_y, int64_t needs, const variable_list& kept) const {
    const pybind11::gil_scoped_acquire lock;
    const Kind kind = differentiated == minimizer ? of_minimizer : first() > 0 ? of_last_steps : of_all_steps;
    pybind11::list arguments = python_arguments(grad_y, needs);
    if (kind == of_last_steps) arguments.append(first());
    for (const Tensor& x : kept) arguments.append(x);
    return gradients(call_python(kind, arguments), needs, 0);
  }

  variable_list second_order_in_python(const Tensor& grad_y, int64_t needed, const variable_list& cotangents,
                                       int64_t needs) const {
    const pybind11::gil_scoped_acquire lock;
    pybind11::list arguments = python_arguments(grad_y, needed), given;
    for (int64_t i = 0; i < num_tensors; ++i) given.append(pybind11::none());
    for_each([&](int64_t i, int64_t edge) {
      if (cotangents[edge].defined()) given[i] = cotangents[edge];
    });
    arguments.insert(0, given);
    const pybind11::sequence grads = call_python(of_gradients, arguments);
    variable_list found = gradients(grads, needs, 1);
    found.push_back(pybind11::cast<Tensor>(grads[0]));
    return found;
  }

 private:
  pybind11::list python_arguments(const Tensor& grad_y, int64_t needs) const {
    pybind11::list arguments;
    arguments.append(grad_y);
    for (int64_t i = 0; i < num_tensors; ++i) arguments.append(pybind11::none());
    for_each([&](int64_t i, int64_t edge) { arguments[1 + i] = tensors[edge]; });
    arguments.append(num_steps);
    arguments.append(trajectory);
    arguments.append(needs);
    return arguments;
  }
  static pybind11::sequence call_python(Kind kind, const pybind11::list& arguments) {
    const auto found = pybind11::reinterpret_steal<pybind11::sequence>(
        PyObject_Call(python_backward[kind], pybind11::tuple(arguments).ptr(), nullptr));
    if (!found) throw pybind11::error_already_set();
    return found;
  }
  // those of `needs`, of which the first is at `begin`
  variable_list gradients(const pybind11::sequence& grads, int64_t needs, int64_t begin) const {
    variable_list found(tensors.size());
    for_each([&](int64_t i, int64_t edge) {
      const pybind11::object grad = grads[begin + i];
      if ((needs >> i & 1) && !grad.is_none()) found[edge] = pybind11::cast<Tensor>(grad);
    });
    return found;
  }
};

}  // namespace

// not in the namespace without a name: autograd's messages name them

// The gradients that `needs` names, none of them of a coefficient, of all steps, which are then differentiated.
struct MomentumBackwardFunction : torch::autograd::Function<MomentumBackwardFunction> {
  // the list is what autograd sees of the call, and grad_y behind it
  static variable_list forward(torch::autograd::AutogradContext* ctx, at::TensorList list, const Call& call,
                               int64_t needs) {
    ctx->set_materialize_grads(false);
    ctx->saved_data["call"] = std::vector<int64_t>{call.present, call.num_steps, call.trajectory, needs};
    ctx->save_for_backward(list.vec());
    variable_list grads = call.backward(list.back(), needs, {});
    grads.erase(std::remove_if(grads.begin(), grads.end(), [](const Tensor& x) { return !x.defined(); }), grads.end());
    return grads;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& given) {
    const std::vector<int64_t> saved = ctx->saved_data["call"].toIntVector();
    Call call{ctx->get_saved_variables(), saved[0], saved[1], saved[2] != 0};
    const int64_t needed = saved[3];
    bool plain = !at::GradMode::is_enabled() && is_plain_call();
    for (const Tensor& x : call.tensors) plain = plain && is_plain(x);
    for (const Tensor& x : given) plain = plain && (!x.defined() || is_plain(x));
    const Tensor grad_y = call.tensors.back();
    call.tensors.pop_back();
    const int64_t count = static_cast<int64_t>(call.tensors.size());
    variable_list cotangents(count);
    int64_t needs = 0, next = 0;
    call.for_each([&](int64_t i, int64_t edge) {
      needs |= static_cast<int64_t>(ctx->needs_input_grad(edge)) << i;
      if (needed >> i & 1) cotangents[edge] = given[next++];
    });
    variable_list grads = plain ? call.second_order(grad_y, cotangents, needs, ctx->needs_input_grad(count))
                                : call.second_order_in_python(grad_y, needed, cotangents, needs);
    grads.resize(grads.size() + 2);  // the call and `needs` have none
    return grads;
  }
};

struct MomentumFunction : torch::autograd::Function<MomentumFunction> {
  // the list is what autograd sees of the call
  static Tensor forward(torch::autograd::AutogradContext* ctx, at::TensorList, const Call& call) {
    ctx->saved_data["call"] = std::vector<int64_t>{call.present, call.num_steps, call.trajectory, call.differentiated};
    variable_list saved = call.tensors;
    Tensor y = call.forward(saved);
    ctx->save_for_backward(std::move(saved));
    return y;
  }

  static variable_list backward(torch::autograd::AutogradContext* ctx, const variable_list& grad_y) {
    const std::vector<int64_t> saved = ctx->saved_data["call"].toIntVector();
    Call call{ctx->get_saved_variables(), saved[0], saved[1], saved[2] != 0, saved[3]};
    bool plain = is_plain_call() && is_plain(grad_y[0]);
    for (const Tensor& x : call.tensors) plain = plain && is_plain(x);
    int64_t needs = 0, count = 0;
    call.for_each([&](int64_t i, int64_t edge) {
      needs |= static_cast<int64_t>(ctx->needs_input_grad(edge)) << i;
      count = edge + 1;
    });
    const variable_list kept(call.tensors.begin() + count, call.tensors.end());
    call.tensors.resize(count);
    variable_list grads;
    if (plain && !at::GradMode::is_enabled()) {
      grads = call.backward(grad_y[0], needs, kept);
    } else if (plain && call.has_second_order(needs)) {
      variable_list list = call.tensors;
      list.push_back(grad_y[0]);
      const variable_list found = MomentumBackwardFunction::apply(at::TensorList(list), call, needs);
      grads.resize(count);
      int64_t next = 0;
      call.for_each([&](int64_t i, int64_t edge) {
        if (needs >> i & 1) grads[edge] = found[next++];
      });
    } else {
      grads = call.backward_in_python(grad_y[0], needs, kept);
    }
    grads.emplace_back();  // the call itself has none
    return grads;
  }
};

namespace {

PyObject* run(const Call& call) {
  Tensor y;
  {
    const pybind11::gil_scoped_release no_lock;
    y = at::GradMode::is_enabled() && torch::autograd::any_variable_requires_grad(call.tensors)
            ? MomentumFunction::apply(at::TensorList(call.tensors), call)
            : call.forward();
  }
  return THPVariable_Wrap(std::move(y));
}

int64_t read_integer(PyObject* x) {
  const int64_t value = PyLong_AsLongLong(x);
  if (value == -1 && PyErr_Occurred()) throw python_error();
  return value;
}

// The last three arguments; false where the number of steps is not of this size.
bool read_steps(Call& call, PyObject* const* arguments) {
  if (!PyLong_CheckExact(arguments[0]) || !PyBool_Check(arguments[1])) return false;
  call.num_steps = read_integer(arguments[0]);
  call.trajectory = arguments[1] == Py_True;
  call.differentiated = read_integer(arguments[2]);
  return true;
}

// canonical(*tensors, num_steps, trajectory, differentiated): y, or None where the Functions in Python are to be asked
PyObject* canonical(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == num_tensors + 3, "canonical: expected ", num_tensors + 3, " arguments, got ", count);
  Call call;
  if (!is_plain_call() || !read_steps(call, arguments + num_tensors)) Py_RETURN_NONE;
  for (int64_t i = 0; i < num_tensors; ++i) {
    if (arguments[i] == Py_None) continue;
    if (!THPVariable_CheckExact(arguments[i])) Py_RETURN_NONE;
    const Tensor& x = THPVariable_Unpack(arguments[i]);
    if (!is_plain(x)) Py_RETURN_NONE;
    call.add(i, x);
  }
  if (!call.is_possible()) Py_RETURN_NONE;
  return run(call);
  END_HANDLE_TH_ERRORS
}

// A number as a tensor like b.
Tensor as_tensor(double x, const Tensor& b) {
  Tensor y = at::detail::empty_cpu({}, b.scalar_type());
  if (b.scalar_type() == at::kDouble) {
    *y.mutable_data_ptr<double>() = x;
  } else {
    *y.mutable_data_ptr<float>() = static_cast<float>(x);
  }
  return y;
}

// dense(Q, b, step_sizes, momentum, extrapolation, mu, num_steps, trajectory, differentiated): y of one Q [d, d] for each
// b [d], the others being numbers; None where that is not what the arguments are, or where others are to be asked
PyObject* dense(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == 9, "dense: expected 9 arguments, got ", count);
  if (!THPVariable_CheckExact(arguments[0]) || !THPVariable_CheckExact(arguments[1])) Py_RETURN_NONE;
  const Tensor &Q = THPVariable_Unpack(arguments[0]), &linear = THPVariable_Unpack(arguments[1]);
  const auto dtype = linear.scalar_type();
  if (!is_plain_call() || !is_plain(Q) || !is_plain(linear)) Py_RETURN_NONE;
  if (Q.scalar_type() != dtype || (dtype != at::kFloat && dtype != at::kDouble)) Py_RETURN_NONE;
  if (Q.dim() != 3 || linear.dim() != 2 || Q.size(0) != linear.size(0) || Q.size(1) != linear.size(1) ||
      Q.size(2) != linear.size(1)) {
    Py_RETURN_NONE;
  }
  if (arguments[2] == Py_None) Py_RETURN_NONE;
  Call call;
  if (!read_steps(call, arguments + 6)) Py_RETURN_NONE;
  call.tensors.reserve(6);
  call.add(matrix, Q);
  call.add(b, linear);
  for (int64_t i = 0; i < 4; ++i) {
    PyObject* const argument = arguments[2 + i];
    if (argument == Py_None) continue;
    if (PyFloat_CheckExact(argument)) {
      call.add(step_sizes + i, as_tensor(PyFloat_AS_DOUBLE(argument), linear));
      continue;
    }
    if (!THPVariable_CheckExact(argument)) Py_RETURN_NONE;
    const Tensor& x = THPVariable_Unpack(argument);
    if (x.dim() != 0 || x.scalar_type() != dtype || !is_plain(x)) Py_RETURN_NONE;
    call.add(step_sizes + i, x);
  }
  if (!call.is_possible()) Py_RETURN_NONE;
  return run(call);
  END_HANDLE_TH_ERRORS
}

PyObject* set_python_backward(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK(count == kinds, "set_python_backward: expected ", int{kinds}, " arguments, got ", count);
  for (int i = 0; i < kinds; ++i) {
    Py_INCREF(arguments[i]);
    Py_XSETREF(python_backward[i], arguments[i]);
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

template <typename F>
constexpr PyMethodDef method(const char* name, F* function, int flags, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)), flags, doc};
}

}  // namespace
}  // namespace unrolled_kernels

PyMODINIT_FUNC PyInit__C_autograd() {
  using namespace unrolled_kernels;
  static PyMethodDef methods[] = {
      method("canonical", &canonical, METH_FASTCALL, "y of canonical arguments; None where Python is to be asked."),
      method("dense", &dense, METH_FASTCALL, "y of dense Q and numbers; None where Python is to be asked."),
      method("set_python_backward", &set_python_backward, METH_FASTCALL,
             "What computes gradients that are differentiated: of all steps, the last ones, the minimizer, gradients."),
      {nullptr, nullptr, 0, nullptr}};
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C_autograd",
                                   "The ops with their gradients in C++, for the torch that it was built against.",
                                   -1,
                                   methods,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  ops = static_cast<const MomentumOps*>(PyCapsule_Import(momentum_ops_name, 0));
  return ops ? PyModule_Create(&definition) : nullptr;
}
