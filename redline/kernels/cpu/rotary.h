// The row of the table that each instruction set's copy of rotary.cpp fills.
#pragma once

#include "redline/kernels/rotary.h"

namespace redline::cpu {

inline constexpr int64_t no_position = -1;  // the token is copied

struct RotaryKernels {
  // Turns the heads of token (outer, inner) by the tables' row `position`.
  void (*rotate)(const Rotary&, int64_t outer, int64_t inner, int64_t position);
};

namespace baseline {
extern const RotaryKernels rotary_kernels;
}
namespace avx2 {
extern const RotaryKernels rotary_kernels;
}
namespace avx512 {
extern const RotaryKernels rotary_kernels;
}

}  // namespace redline::cpu
