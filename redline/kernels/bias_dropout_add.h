// y = residual + dropout(x + bias): an element is dropped with `probability`, kept ones are
// multiplied by 1 / (1 - probability). Element row * cols + col draws its own number of Philox
// 4x32-10 (core/philox.h), so no mask is stored: backward draws the same numbers again.
// Arithmetic in float32 (float64 for float64), one rounding at the end.
#pragma once

#include "redline/core/philox.h"
#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"
#include "redline/kernels/column_sums.h"

namespace redline {

struct BiasDropoutAddForward {
  TensorView x;          // [rows, cols]; without a bias ops may pass [1, elements]
  TensorView bias;       // [cols], optional; x's dtype or float32
  TensorView residual;   // [rows, cols], x's dtype or float32
  TensorView y;          // [rows, cols], out, residual's dtype
  TensorView rng_state;  // [2] int64, out: seed and offset as drawn; absent: nothing is dropped
  PhiloxState philox;
  double probability = 0;
};

// x_grad = y_grad * mask / (1 - probability), bias_grad = sum over rows of x_grad, before it is
// rounded. The residual's gradient is y_grad.
struct BiasDropoutAddBackward {
  TensorView y_grad;     // [rows, cols], x's dtype or float32
  TensorView rng_state;  // [2] int64 as forward left it; absent: nothing was dropped
  TensorView x_grad;     // [rows, cols], out; the CPU: absent for bias_grad alone
  ColumnSums bias_grad;  // optional
  double probability = 0;
};

// Throw Error where a shape, dtype or the probability does not fit.
void check(const BiasDropoutAddForward&);
void check(const BiasDropoutAddBackward&);

// CPU. The range counts elements, row after row; the call that holds element 0 writes rng_state.
// With a bias gradient, backward's range counts chunks (kernels/column_sums.h), and finish() then
// writes bias_grad of the columns of its range.
void run(const BiasDropoutAddForward&, Range elements);
void run(const BiasDropoutAddBackward&, Range elements_or_chunks);
void finish(const BiasDropoutAddBackward&, Range cols);

// CUDA. Backward includes the bias gradient.
void run(const BiasDropoutAddForward&, Stream);
void run(const BiasDropoutAddBackward&, Stream);

}  // namespace redline
