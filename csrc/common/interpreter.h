// The Python interpreter as the host of the ops (host.h).
#pragma once

#include <pybind11/pybind11.h>

#include "common/host.h"

namespace unrolled_kernels {

// torch hands an error_already_set on to Python as the exception that it is.
inline void answer_for_python() {
  // handlers of signals run on the main thread alone, and no other asks for the interpreter's lock
  static const unsigned long main_thread =
      pybind11::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
  host.check_signals = [] {
    if (PyThread_get_thread_ident() != main_thread || !Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire lock;
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
  };
  host.out_of_memory = [](const char* message) {
    if (!Py_IsInitialized()) return;
    const pybind11::gil_scoped_acquire lock;
    PyErr_SetString(pybind11::module_::import("torch").attr("OutOfMemoryError").ptr(), message);
    throw pybind11::error_already_set();
  };
}

}  // namespace unrolled_kernels
