// The row of the table that each instruction set's copy of cross_entropy.cpp fills.
#pragma once

#include "redline/kernels/cross_entropy.h"

namespace redline::cpu {

struct CrossEntropyKernels {
  void (*statistics)(const CrossEntropyStatistics&, Range rows);
  void (*loss)(const CrossEntropyLoss&, Range rows);
  void (*gradient)(const CrossEntropyGradient&, Range rows);
};

namespace baseline {
extern const CrossEntropyKernels cross_entropy_kernels;
}
namespace avx2 {
extern const CrossEntropyKernels cross_entropy_kernels;
}
namespace avx512 {
extern const CrossEntropyKernels cross_entropy_kernels;
}

}  // namespace redline::cpu
