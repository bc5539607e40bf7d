// The row of the table that each instruction set's copy of softmax.cpp fills.
#pragma once

#include "redline/kernels/softmax.h"

namespace redline::cpu {

struct SoftmaxKernels {
  void (*forward)(const SoftmaxForward&, Range rows);
  void (*backward)(const SoftmaxBackward&, Range rows);
};

namespace baseline {
extern const SoftmaxKernels softmax_kernels;
}
namespace avx2 {
extern const SoftmaxKernels softmax_kernels;
}
namespace avx512 {
extern const SoftmaxKernels softmax_kernels;
}

}  // namespace redline::cpu
