// RMSNorm (Zhang and Sennrich, 2019) and LayerNorm (Ba, Kiros and Hinton, 2016) over the last axis:
//   rms:   y = x * r * w,             r = 1 / sqrt(mean(x^2) + epsilon)
//   layer: y = (x - m) * r * w + b,   m = mean(x), r = 1 / sqrt(mean((x - m)^2) + epsilon)
// with w = weight, or 1 + weight when zero_centered. With a residual, x is x + residual, rounded to
// the residual's dtype first; with dropout or an input bias it is what bias_dropout_add makes of
// the two, bit for bit. Arithmetic in float32 (float64 for float64), one rounding at the end.
// Backward keeps x (the sum, with a residual), r and, for layer, m: one or two float32 per row.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"
#include "redline/kernels/bias_dropout_add.h"
#include "redline/kernels/quantize.h"

namespace redline {

enum class Norm { rms, layer };

constexpr const char* name(Norm norm) { return norm == Norm::rms ? "rms_norm" : "layer_norm"; }

struct NormForward {
  Norm norm = Norm::rms;
  TensorView x;            // [rows, cols]
  TensorView residual;     // [rows, cols], optional; x's dtype or float32
  TensorView weight;       // [cols], optional; x's dtype or float32
  TensorView bias;         // [cols], optional, layer alone; the weight's dtype rule
  TensorView y;            // [rows, cols], out, x's dtype; statistics_given: or narrower than x
  TensorView sum;          // [rows, cols], out, residual's dtype; present with a residual
  TensorView mean;         // [rows] accumulation dtype, out, layer alone
  TensorView inverse_std;  // [rows] accumulation dtype, out; r above
  TensorView row_count;    // [] int64 on the device, optional: rows from it on get zeros
  // amax alone, [rows], 0 for rows from row_count on; without dropout, an input bias and given
  // statistics. NaN where y has one.
  QuantizedOutput quantized;
  double epsilon = 1e-5;
  bool zero_centered = false;
  // mean and inverse_std are read in place of written, and epsilon is not needed: y once more, with
  // the bits of the forward pass that made them, whatever it held x in. Without a residual.
  bool statistics_given = false;
  // With a residual, without a row_count: x is residual + dropout(x + input_bias).
  TensorView input_bias = {};  // [cols], optional; x's dtype or float32
  TensorView rng_state = {};   // [2] int64, out, as drawn; absent: nothing is dropped
  PhiloxState philox = {};
  double probability = 0;
};

// With xh = (x - m) * r and g = y_grad * w:
//   x_grad = r * (g - xh * mean(g * xh) [- mean(g), layer]) [+ sum_grad, with a residual]
//   weight_grad = sum over rows of y_grad * xh, bias_grad = sum over rows of y_grad
// The sums over rows go through `weight_partial` and `bias_partial`: the shape fixes which rows a
// chunk holds and in which order, and the chunks are added in index order.
struct NormBackward {
  Norm norm = Norm::rms;
  TensorView y_grad;          // [rows, cols], x's dtype
  TensorView x;               // [rows, cols]: the normalised tensor (the sum, with a residual)
  TensorView weight;          // [cols], optional
  TensorView mean;            // [rows], layer alone
  TensorView inverse_std;     // [rows]
  TensorView sum_grad;        // [rows, cols], optional, x's dtype
  TensorView row_count;       // [] int64, optional
  TensorView x_grad;          // [rows, cols], out
  TensorView bias;            // [cols], optional, layer alone: for y
  TensorView y;               // [rows, cols], out, optional: forward's once more, its bits, of
                              // y_grad's dtype; without a row_count
  TensorView weight_partial;  // [chunks, cols] accumulation dtype, workspace; with weight_grad,
                              // unless norm_chunks() is 0
  TensorView bias_partial;    // the same, with bias_grad
  TensorView weight_grad;     // [cols], out, optional
  TensorView bias_grad;       // [cols], out, optional, layer alone
  bool zero_centered = false;
  // Of forward's own x, from the rounded x_grad, which is the residual's:
  TensorView rng_state = {};        // [2] int64 as forward left it; absent: nothing was dropped
  TensorView input_grad = {};       // [rows, cols], out, y_grad's dtype or x's; with rng_state
  ColumnSums input_bias_grad = {};  // optional, of bias_dropout_add's chunks
  double probability = 0;
};

// bias_dropout_add's arguments for the sum, and for what becomes of the sum's gradient.
BiasDropoutAddForward input_sum(const NormForward&);
BiasDropoutAddBackward input_gradient(const NormBackward&);

// Throw Error where a shape or dtype does not fit.
void check(const NormForward&);
void check(const NormBackward&);

// CPU. Forward: the rows of the range; the call that begins at row 0 writes rng_state. Backward:
// the chunks of the range, x_grad of their rows and their rows of the partial sums; finish() then
// writes the sums over rows of the columns of its range.
void run(const NormForward&, Range rows);
void run(const NormBackward&, Range chunks);
void finish(const NormBackward&, Range cols);

// CUDA. Backward includes the sum over the chunks.
void run(const NormForward&, Stream);
void run(const NormBackward&, Stream);

// How many chunks the rows fall into: a function of shape and dtype, on the CPU
// cpu::column_chunks(); on CUDA of the GPU's generation too: from compute capability 9.0 on, long
// rows are shared by a cluster of blocks. 0: so few rows that there is no workspace.
namespace cuda {
int64_t norm_chunks(DType y_grad, int64_t rows, int64_t cols, int capability);
}

}  // namespace redline
