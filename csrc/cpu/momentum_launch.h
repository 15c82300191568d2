// Launchers of the CPU kernels of `momentum`: pick the instruction set, plan, run the chunks in parallel, sum them up.
#pragma once

#include "cpu/momentum_kernels.h"

namespace unrolled_kernels {

template <typename Storage>
MomentumKernels<Storage> momentum_kernels(Structure structure);
// the plan of a call; `backward` as in MomentumKernels
template <typename Storage>
MomentumPlan momentum_plan(Structure structure, const MomentumInputs<Storage>& p,
                           const MomentumBackward<Storage>* backward);

template <typename Storage>
void momentum_cpu(Structure structure, const MomentumForward<Storage>& p);
template <typename Storage>
void momentum_cpu(Structure structure, const MomentumBackward<Storage>& p);

}  // namespace unrolled_kernels
