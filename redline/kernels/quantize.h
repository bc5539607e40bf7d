// Optional quantised outputs of a kernel that computes in float32. Their place in the argument
// structs is fixed; no kernel fills them yet, and each check refuses them.
#pragma once

#include "redline/core/tensor_view.h"

namespace redline {

struct QuantizedOutput {
  TensorView values;      // y's shape, float8
  TensorView scale;       // float32
  TensorView amax;        // [] float32, largest magnitude of y
  TensorView transposed;  // values, transposed
};

inline void check_not_quantized(const char* op, const QuantizedOutput& out) {
  REDLINE_CHECK(!out.values && !out.scale && !out.amax && !out.transposed, op,
                ": quantized: expected none, these outputs are not built yet");
}

}  // namespace redline
