#include "cpu/simd/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace unrolled_kernels {
namespace {

Isa detect() {
#ifdef UNROLLED_KERNELS_ONLY_ISA
  return static_cast<Isa>(UNROLLED_KERNELS_ONLY_ISA);
#elif UNROLLED_KERNELS_ISA_LEVELS
  Isa isa = Isa::baseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    isa = Isa::avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq")) {
      isa = Isa::avx512;
    }
  }
  if (const char* cap = std::getenv("UNROLLED_KERNELS_CPU_ISA")) {
    for (const Isa level : {Isa::baseline, Isa::avx2, Isa::avx512}) {
      if (std::strcmp(cap, isa_name(level)) == 0 && level < isa) isa = level;
    }
  }
  return isa;
#else
  return Isa::baseline;
#endif
}

}  // namespace

Isa active_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) { return isa == Isa::avx512 ? "avx512" : isa == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace unrolled_kernels
