// The row of the table that each instruction set's copy of norm.cpp fills.
#pragma once

#include "redline/kernels/norm.h"

namespace redline::cpu {

struct NormKernels {
  void (*forward)(const NormForward&, Range rows);
  void (*backward)(const NormBackward&, int64_t chunk, Range rows);
  void (*finish)(const NormBackward&, Range cols);
};

namespace baseline {
extern const NormKernels norm_kernels;
}
namespace avx2 {
extern const NormKernels norm_kernels;
}
namespace avx512 {
extern const NormKernels norm_kernels;
}

}  // namespace redline::cpu
