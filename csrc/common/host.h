// What the ops ask of the program that loaded them. module.cpp answers for the Python interpreter; without an answer, as
// in a program of its own that loads a compiled graph, errors are std::runtime_error and nothing interrupts a kernel.
#pragma once

namespace unrolled_kernels {

struct Host {
  // Throws if a signal that arrived in the meantime says so (Ctrl-C). Called between chunks, on the thread of the op.
  void (*check_signals)() = nullptr;
  // Throws torch.OutOfMemoryError, which is what torch throws where a GPU's memory is exhausted.
  void (*out_of_memory)(const char* message) = nullptr;
};
inline Host host;

}  // namespace unrolled_kernels
