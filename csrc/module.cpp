// Python module unrolled_kernels._C: how it was built and how a problem would run. The ops are registered with torch by
// the other files as this library is loaded.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/interpreter.h"
#include "cpu/simd/isa.h"
#include "cpu/momentum_launch.h"
#include "cpu/rnn_launch.h"
#include "momentum_ops.h"

namespace py = pybind11;
using namespace pybind11::literals;

namespace unrolled_kernels {
namespace {

py::dict build_info() {
  py::list levels;
#ifdef UNROLLED_KERNELS_ONLY_ISA
  levels.append(isa_name(active_isa()));
#else
  for (const Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa == Isa::baseline || UNROLLED_KERNELS_ISA_LEVELS) levels.append(isa_name(isa));
  }
#endif
#ifdef UNROLLED_KERNELS_WITH_CUDA
  const py::object cuda =
      py::dict("architectures"_a = UNROLLED_KERNELS_CUDA_ARCHITECTURES, "version"_a = UNROLLED_KERNELS_CUDA_VERSION);
#else
  const py::object cuda = py::none();
#endif
  return py::dict(
#if defined(__clang__)
      "compiler"_a = "clang " __clang_version__,
#else
      "compiler"_a = "gcc " __VERSION__,
#endif
      "cpp_standard"_a = static_cast<long>(__cplusplus), "isa_levels"_a = levels, "isa"_a = isa_name(active_isa()),
      "cuda"_a = cuda, "torch_target_version"_a = UNROLLED_KERNELS_TORCH_TARGET,
      "csrc_sha256"_a = UNROLLED_KERNELS_SOURCES_SHA256);
}

struct Floors {
  double bytes, flops;
};

// Fewest bytes and flops of one call: every operand read once and every result written once.
Floors floors(Structure structure, double B, double d, double k, double element, bool backward, bool shared) {
  const double matrix = d * d * (shared ? 1 : B), vectors = d * B;
  switch (structure) {
    case Structure::dense:
      return backward ? Floors{(2 * matrix + 3 * vectors) * element, 6 * k * d * d * B}
                      : Floors{(matrix + 2 * vectors) * element, 2 * k * d * d * B};
    case Structure::diagonal: return {(backward ? 5 : 3) * vectors * element, (backward ? 10 : 4) * k * vectors};
    default:
      return {(matrix + (backward ? 5 : 3) * vectors) * element, 4 * d * d * B + (backward ? 10 : 4) * k * vectors};
  }
}

template <typename Storage>
py::dict plan_of(Structure structure, int64_t B, int64_t d, int64_t k, bool backward, bool shared) {
  using Compute = compute_type<Storage>;
  // gradient descent with one step size; plans look at which pointers are null and never behind them
  static const Compute one = 1;
  static Storage storage{};
  static Compute compute{};
  MomentumBackward<Storage> p{};
  p.B = B;
  p.d = d;
  p.k = k;
  p.matrix = p.diagonal = p.b = p.grad_y = &storage;
  p.matrix_stride = shared ? 0 : d * d;
  p.diagonal_stride = p.b_stride = d;
  p.phi.data = &one;
  p.d_matrix = structure == Structure::dense ? &storage : nullptr;
  p.d_diagonal = p.db = p.dy0 = &storage;
  p.dphi = &compute;
  const MomentumPlan plan = momentum_plan<Storage>(structure, p, backward ? &p : nullptr);
  const Floors f = floors(structure, static_cast<double>(B), static_cast<double>(d), static_cast<double>(k),
                          sizeof(Storage), backward, shared);
  return py::dict("variant"_a = plan.variant, "isa"_a = isa_name(active_isa()), "lanes"_a = plan.lanes,
                  "chunks"_a = plan.chunks, "scratch_bytes"_a = plan.scratch_bytes, "bytes"_a = f.bytes,
                  "flops"_a = f.flops);
}

template <typename Storage>
py::dict rnn_plan_of(bool diagonal, int64_t B, int64_t d, int64_t k, const std::vector<int64_t>& hidden_dims,
                     bool backward, bool shared) {
  static Storage storage{};
  static compute_type<Storage> compute{};
  const int64_t widest = *std::max_element(hidden_dims.begin(), hidden_dims.end());
  if (d > max_rnn_dim || widest > max_rnn_width || hidden_dims.size() > max_rnn_layers) {
    return py::dict("variant"_a = "eager torch, backward by hand");
  }
  RnnBackward<Storage> p{};
  p.B = B;
  p.d = d;
  p.k = k;
  p.num_layers = static_cast<int>(hidden_dims.size());
  std::copy(hidden_dims.begin(), hidden_dims.end(), p.hidden_dims);
  (diagonal ? p.diagonal : p.matrix) = &storage;
  (diagonal ? p.d_diagonal : p.d_matrix) = &storage;
  p.matrix_stride = shared ? 0 : d * d;
  p.db = p.dy0 = &storage;
  p.d_weights = &compute;
  const RnnPlan plan = rnn_kernels<Storage>().plan(p, backward ? &p : nullptr);
  const int64_t samples = shared && !diagonal ? 1 : B, matrix = diagonal ? d : d * d;
  const int64_t weights = rnn_weights_size(p);
  const double elements = (backward ? 2.0 : 1.0) * samples * matrix + (backward ? 3.0 : 2.0) * B * d;
  const double bytes = elements * sizeof(Storage) + (backward ? 2.0 : 1.0) * weights * sizeof(compute);
  return py::dict("variant"_a = plan.variant, "isa"_a = isa_name(active_isa()), "lanes"_a = plan.lanes,
                  "groups"_a = plan.groups, "chunks"_a = plan.chunks, "segment"_a = plan.segment,
                  "scratch_bytes"_a = plan.scratch_bytes, "bytes"_a = bytes,
                  "flops"_a = (backward ? 6.0 : 2.0) * B * k * (weights + matrix));
}

// Calls f(Storage()) for the storage type named `dtype`.
template <typename F>
py::dict with_storage(const std::string& dtype, F f) {
  if (dtype == "float32") return f(float());
  if (dtype == "float64") return f(double());
  if (dtype == "float16") return f(half());
  if (dtype == "bfloat16") return f(bfloat16());
  throw py::value_error("dtype: expected 'float32', 'float64', 'float16' or 'bfloat16', got '" + dtype + "'");
}

py::dict kernel_plan(const std::string& structure, int64_t B, int64_t d, int64_t num_steps, const std::string& dtype,
                     bool backward, bool shared, const std::string& backend, const std::vector<int64_t>& hidden_dims) {
  if (backend != "cpu") throw py::value_error("backend: expected 'cpu', got '" + backend + "'");
  if (std::min({B, d, num_steps}) < 0) throw py::value_error("B, d, num_steps: expected non-negative numbers");
  Structure which = Structure::dense;
  if (structure == "diagonal") {
    which = Structure::diagonal;
  } else if (structure == "spectral") {
    which = Structure::spectral;
  } else if (structure != "dense") {
    throw py::value_error("structure: expected 'dense', 'diagonal' or 'spectral', got '" + structure + "'");
  }
  if (!hidden_dims.empty()) {
    if (which == Structure::spectral) throw py::value_error("structure: an RNN expects 'dense' or 'diagonal'");
    if (*std::min_element(hidden_dims.begin(), hidden_dims.end()) < 1) {
      throw py::value_error("hidden_dims: expected positive numbers");
    }
    return with_storage(dtype, [&](auto type) {
      return rnn_plan_of<decltype(type)>(which == Structure::diagonal, B, d, num_steps, hidden_dims, backward, shared);
    });
  }
  return with_storage(dtype,
                      [&](auto type) { return plan_of<decltype(type)>(which, B, d, num_steps, backward, shared); });
}

}  // namespace
}  // namespace unrolled_kernels

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of unrolled_kernels.";
  unrolled_kernels::answer_for_python();
  m.attr("momentum_ops") =
      py::capsule(&unrolled_kernels::momentum_ops, unrolled_kernels::momentum_ops_name);  // for _C_autograd
  m.def("build_info", &unrolled_kernels::build_info,
        "Compiler, instruction sets built and in use, CUDA (None if not built), torch target, hash of the sources.");
  m.def("kernel_plan", &unrolled_kernels::kernel_plan, py::arg("structure"), py::arg("B"), py::arg("d"),
        py::arg("num_steps"), py::arg("dtype"), py::arg("backward") = false, py::arg("shared") = false,
        py::arg("backend") = "cpu", py::arg("hidden_dims") = std::vector<int64_t>(),
        "How gradient descent with one step size, or an RNN of widths hidden_dims, would run, and the fewest bytes and "
        "flops it could take.");
}
