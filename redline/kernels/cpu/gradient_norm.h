// The row of the table that each instruction set's copy of gradient_norm.cpp fills.
#pragma once

#include "redline/kernels/gradient_norm.h"

namespace redline::cpu {

struct GradientNormKernels {
  double (*sum_squares)(const GradientTensor&, Range elements);
  void (*scale)(const GradientTensor&, float coefficient, Range elements);
};

namespace baseline {
extern const GradientNormKernels gradient_norm_kernels;
}
namespace avx2 {
extern const GradientNormKernels gradient_norm_kernels;
}
namespace avx512 {
extern const GradientNormKernels gradient_norm_kernels;
}

}  // namespace redline::cpu
