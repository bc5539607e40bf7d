// The row of the table that each instruction set's copy of adamw.cpp fills.
#pragma once

#include "redline/kernels/adamw.h"

namespace redline::cpu {

struct AdamWKernels {
  void (*update)(const AdamWStep&, int64_t tensor, Range elements);
};

namespace baseline {
extern const AdamWKernels adamw_kernels;
}
namespace avx2 {
extern const AdamWKernels adamw_kernels;
}
namespace avx512 {
extern const AdamWKernels adamw_kernels;
}

}  // namespace redline::cpu
