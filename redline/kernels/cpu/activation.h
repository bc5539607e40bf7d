// The row of the table that each instruction set's copy of activation.cpp fills.
#pragma once

#include "redline/kernels/activation.h"

namespace redline::cpu {

struct ActivationKernels {
  void (*forward)(const ActivationForward&, Range elements);
  void (*backward)(const ActivationBackward&, int64_t chunk, Range elements);
  void (*finish)(const ActivationBackward&, Range cols);
};

namespace baseline {
extern const ActivationKernels activation_kernels;
}
namespace avx2 {
extern const ActivationKernels activation_kernels;
}
namespace avx512 {
extern const ActivationKernels activation_kernels;
}

}  // namespace redline::cpu
