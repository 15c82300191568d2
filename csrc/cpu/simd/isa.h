// The instruction sets that the CPU kernels are compiled for, one namespace each, and the choice among them at run
// time.
#pragma once

namespace unrolled_kernels {

enum class Isa { baseline, avx2, avx512 };

// The highest level that this processor has, capped by UNROLLED_KERNELS_CPU_ISA = baseline | avx2 | avx512.
Isa active_isa();
const char* isa_name(Isa isa);

}  // namespace unrolled_kernels

// 1 where the levels above the baseline exist: UNROLLED_KERNELS_ISA in {0, 1, 2} is then one of three compilations.
#if defined(__x86_64__) && defined(__GNUC__)
#define UNROLLED_KERNELS_ISA_LEVELS 1
#else
#define UNROLLED_KERNELS_ISA_LEVELS 0
#endif

// `call` in the namespace of the active level, as in UNROLLED_KERNELS_AT_ACTIVE_ISA(momentum_dense_kernels<float>()).
// A build for one processor alone has a single level, UNROLLED_KERNELS_ONLY_ISA.
#ifdef UNROLLED_KERNELS_ONLY_ISA
#if UNROLLED_KERNELS_ONLY_ISA == 2
#define UNROLLED_KERNELS_AT_ACTIVE_ISA(call) ::unrolled_kernels::isa_avx512::call
#elif UNROLLED_KERNELS_ONLY_ISA == 1
#define UNROLLED_KERNELS_AT_ACTIVE_ISA(call) ::unrolled_kernels::isa_avx2::call
#else
#define UNROLLED_KERNELS_AT_ACTIVE_ISA(call) ::unrolled_kernels::isa_baseline::call
#endif
#elif UNROLLED_KERNELS_ISA_LEVELS
#define UNROLLED_KERNELS_AT_ACTIVE_ISA(call)                                                                  \
  (::unrolled_kernels::active_isa() == ::unrolled_kernels::Isa::avx512 ? ::unrolled_kernels::isa_avx512::call \
   : ::unrolled_kernels::active_isa() == ::unrolled_kernels::Isa::avx2 ? ::unrolled_kernels::isa_avx2::call   \
                                                                       : ::unrolled_kernels::isa_baseline::call)
#else
#define UNROLLED_KERNELS_AT_ACTIVE_ISA(call) ::unrolled_kernels::isa_baseline::call
#endif
