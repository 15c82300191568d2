// Python module unrolled_kernels._C_experiments: kernels of the paper's tasks. The other files register their ops with
// torch as this library is loaded, and there is nothing else in it.
#include <Python.h>

PyMODINIT_FUNC PyInit__C_experiments() {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C_experiments",
                                   "Kernels of the paper's tasks.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
