// The row of the table that each instruction set's copy of bias_dropout_add.cpp fills.
#pragma once

#include "redline/kernels/bias_dropout_add.h"

namespace redline::cpu {

struct BiasDropoutAddKernels {
  void (*forward)(const BiasDropoutAddForward&, Range elements);
  void (*backward)(const BiasDropoutAddBackward&, int64_t chunk, Range elements);
  void (*finish)(const BiasDropoutAddBackward&, Range cols);
};

namespace baseline {
extern const BiasDropoutAddKernels bias_dropout_add_kernels;
}
namespace avx2 {
extern const BiasDropoutAddKernels bias_dropout_add_kernels;
}
namespace avx512 {
extern const BiasDropoutAddKernels bias_dropout_add_kernels;
}

}  // namespace redline::cpu
