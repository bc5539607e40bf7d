// Which instruction set's copy of the CPU kernels runs.
#pragma once

namespace redline::cpu {

enum class Isa { baseline, avx2, avx512 };

// The widest set that this processor has, found once.
Isa isa();
const char* name(Isa isa);

// The table row of the chosen instruction set. Kernels are compiled once per set, from one source,
// into namespaces redline::cpu::{baseline, avx2, avx512}.
template <typename Kernels>
const Kernels& choose(const Kernels& baseline, const Kernels& avx2, const Kernels& avx512) {
  switch (isa()) {
    case Isa::avx512:
      return avx512;
    case Isa::avx2:
      return avx2;
    default:
      return baseline;
  }
}

}  // namespace redline::cpu
