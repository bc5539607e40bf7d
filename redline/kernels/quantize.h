// Optional outputs of a kernel that computes in float32, for a quantisation of y. Their place in
// the argument structs is fixed. Norm's forward fills amax; each check refuses the others.
#pragma once

#include "redline/core/tensor_view.h"

namespace redline {

struct QuantizedOutput {
  TensorView values;      // y's shape, float8
  TensorView scale;       // float32
  TensorView amax;        // [rows] accumulation dtype, the largest magnitude of each row of y
  TensorView transposed;  // values, transposed
};

inline void check_no_values(const char* op, const QuantizedOutput& out) {
  REDLINE_CHECK(!out.values && !out.scale && !out.transposed, op,
                ": quantized: expected none, these outputs are not built yet");
}

inline void check_not_quantized(const char* op, const QuantizedOutput& out) {
  check_no_values(op, out);
  REDLINE_CHECK(!out.amax, op, ": amax: expected none, only norms have one");
}

}  // namespace redline
