// The row of the table that each instruction set's copy of gated_activation.cpp fills.
#pragma once

#include "redline/kernels/gated_activation.h"

namespace redline::cpu {

struct GatedActivationKernels {
  void (*forward)(const GatedActivationForward&, Range rows);
  void (*backward)(const GatedActivationBackward&, int64_t chunk, Range rows);
  void (*finish)(const GatedActivationBackward&, Range cols);
};

namespace baseline {
extern const GatedActivationKernels gated_activation_kernels;
}
namespace avx2 {
extern const GatedActivationKernels gated_activation_kernels;
}
namespace avx512 {
extern const GatedActivationKernels gated_activation_kernels;
}

}  // namespace redline::cpu
