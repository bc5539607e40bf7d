// y = f(x + bias), element by element:
//   gelu          x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3)))
//   gelu_erf      x * P(x), P the normal distribution
//   quick_gelu    x * sigmoid(1.702 x)
//   silu          x * sigmoid(x)
//   relu          max(x, 0); its derivative at 0 is 0
//   squared_relu  max(x, 0)^2
// Arithmetic in float32 (float64 for float64), one rounding at the end. Backward keeps x and bias.
#pragma once

#include <string_view>

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"
#include "redline/kernels/column_sums.h"
#include "redline/kernels/quantize.h"

namespace redline {

enum class Activation { gelu, gelu_erf, quick_gelu, silu, relu, squared_relu };

constexpr const char* activation_kinds = "gelu, gelu_erf, quick_gelu, silu, relu, squared_relu";

bool is_activation(std::string_view kind);

// Throws Error for a name that is none of the above.
Activation activation_from(std::string_view kind);

struct ActivationForward {
  Activation kind = Activation::gelu;
  TensorView x;     // [rows, cols]; without a bias ops may pass [1, elements]
  TensorView bias;  // [cols], optional; x's dtype or float32
  TensorView y;     // [rows, cols], out, x's dtype
  QuantizedOutput quantized;
};

// x_grad = y_grad * f'(x + bias); bias_grad = sum over rows of x_grad, before it is rounded.
struct ActivationBackward {
  Activation kind = Activation::gelu;
  TensorView y_grad;     // [rows, cols], x's dtype
  TensorView x;          // [rows, cols]
  TensorView bias;       // [cols], optional
  TensorView x_grad;     // [rows, cols], out, x's dtype
  ColumnSums bias_grad;  // optional
  TensorView y;          // [rows, cols], out, optional: forward's once more, its bits
};

// Throw Error where a shape or dtype does not fit.
void check(const ActivationForward&);
void check(const ActivationBackward&);

// CPU. The range counts elements, row after row. With a bias gradient, backward's range counts
// chunks (kernels/column_sums.h), and finish() then writes bias_grad of the columns of its range.
void run(const ActivationForward&, Range elements);
void run(const ActivationBackward&, Range elements_or_chunks);
void finish(const ActivationBackward&, Range cols);

// CUDA. Backward includes the bias gradient.
void run(const ActivationForward&, Stream);
void run(const ActivationBackward&, Stream);

}  // namespace redline
