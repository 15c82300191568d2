// Launchers of the CPU kernels of `rnn`: pick the instruction set, plan, run the chunks in parallel, sum them up.
#pragma once

#include "cpu/rnn_kernels.h"

namespace unrolled_kernels {

template <typename Storage>
RnnKernels<Storage> rnn_kernels();

template <typename Storage>
void rnn_cpu(const RnnForward<Storage>& p);
template <typename Storage>
void rnn_cpu(const RnnBackward<Storage>& p);

}  // namespace unrolled_kernels
