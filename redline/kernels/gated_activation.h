// y = f(a) * b * row_scale with a = gate + bias[:cols], b = linear + bias[cols:]:
//   swiglu          f(a) = a * sigmoid(a)
//   geglu           f(a) = a / 2 * (1 + tanh(sqrt(2 / pi) * (a + 0.044715 a^3)))
//   reglu           f(a) = max(a, 0); its derivative at 0 is 0
//   quick_geglu     f(a) = a * sigmoid(1.702 a)
//   clamped_swiglu  f(a) = g * sigmoid(alpha g), g = min(a, limit), and b is
//                   min(max(b, -limit), limit) + linear_offset; no gradient where a clamp acts
// Arithmetic in float32 (float64 for float64), one rounding at the end. Backward keeps the inputs.
#pragma once

#include <string_view>

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"
#include "redline/kernels/column_sums.h"
#include "redline/kernels/quantize.h"

namespace redline {

enum class GatedActivation { swiglu, geglu, reglu, quick_geglu, clamped_swiglu };

constexpr const char* gated_activation_kinds = "swiglu, geglu, reglu, quick_geglu, clamped_swiglu";

bool is_gated_activation(std::string_view kind);

// Throws Error for a name that is none of the above.
GatedActivation gated_activation_from(std::string_view kind);

struct GatedActivationKind {
  GatedActivation kind = GatedActivation::swiglu;
  double limit = 7.0;  // these three: clamped_swiglu alone
  double alpha = 1.702;
  double linear_offset = 1.0;
};

// gate and linear may be two halves of one tensor: each has its own address and row stride.
struct GatedActivationForward {
  GatedActivationKind activation;
  TensorView gate;       // [rows, cols]
  TensorView linear;     // [rows, cols], gate's dtype
  TensorView bias;       // [2 * cols], optional; gate's dtype or float32
  TensorView row_scale;  // [rows], optional; gate's dtype or float32
  TensorView row_count;  // [] int64 on the device, optional: rows from it on get zeros
  TensorView y;          // [rows, cols], out, gate's dtype
  QuantizedOutput quantized;
};

// With g = y_grad * row_scale: gate_grad = g * b * f'(a), linear_grad = g * f(a);
// row_scale_grad = sum over the row of y_grad * f(a) * b; bias_grad = sums over rows of the two.
struct GatedActivationBackward {
  GatedActivationKind activation;
  TensorView y_grad;          // [rows, cols], gate's dtype
  TensorView gate;            // [rows, cols]
  TensorView linear;          // [rows, cols]
  TensorView bias;            // [2 * cols], optional
  TensorView row_scale;       // [rows], optional
  TensorView row_count;       // [] int64, optional
  TensorView gate_grad;       // [rows, cols], out
  TensorView linear_grad;     // [rows, cols], out
  TensorView row_scale_grad;  // [rows], out, optional; row_scale's dtype
  TensorView row_parts;       // [cuda::row_parts(...), rows] float32, workspace: CUDA's, where both
                              // row_scale_grad and bias_grad are wanted
  ColumnSums bias_grad;       // [2 * cols], optional
  TensorView y;               // [rows, cols], out, optional: forward's once more, its bits
};

// Throw Error where a shape or dtype does not fit.
void check(const GatedActivationForward&);
void check(const GatedActivationBackward&);

// CPU. The range counts rows. With a bias gradient, backward's range counts chunks
// (kernels/column_sums.h), and finish() then writes bias_grad of the columns of its range.
void run(const GatedActivationForward&, Range rows);
void run(const GatedActivationBackward&, Range rows_or_chunks);
void finish(const GatedActivationBackward&, Range cols);

// CUDA. Backward includes the bias gradient.
void run(const GatedActivationForward&, Stream);
void run(const GatedActivationBackward&, Stream);
namespace cuda {
int64_t row_parts(DType dtype, int64_t cols);
}

}  // namespace redline
