// Stands in for redline/kernels/cpu/isa.cpp: the widest set that is not above REDLINE_ISA, so that
// the copies of the kernels which this machine would not choose are tested too.
#include "redline/kernels/cpu/isa.h"

namespace redline::cpu {

Isa isa() {
#if defined(__x86_64__)
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  if (has_avx2) return Isa::REDLINE_ISA;
#endif
  return Isa::baseline;
}

const char* name(Isa isa) { return isa == Isa::avx2 ? "avx2" : "baseline"; }

}  // namespace redline::cpu
