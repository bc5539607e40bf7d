// RMSNorm and LayerNorm, alone, with the residual added first, and with bias and dropout before
// that (formulas: kernels/norm.h). x is [..., cols]; weight and bias are [cols], of x's dtype or
// float32. Kept for backward: x (the sum, with a residual) and one float32 per row (layer: two).
// Refuses what does not fit with redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// y, of x's dtype.
at::Tensor rms_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                    double epsilon = 1e-5, bool zero_centered = false,
                    const std::optional<at::Tensor>& row_count = {});

at::Tensor layer_norm(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                      const std::optional<at::Tensor>& bias, double epsilon = 1e-5,
                      bool zero_centered = false, const std::optional<at::Tensor>& row_count = {});

// {norm(x + residual), x + residual}: y of x's dtype, the sum of residual's.
std::tuple<at::Tensor, at::Tensor> residual_rms_norm(
    const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight,
    double epsilon = 1e-5, bool zero_centered = false,
    const std::optional<at::Tensor>& row_count = {});

std::tuple<at::Tensor, at::Tensor> residual_layer_norm(
    const at::Tensor& x, const at::Tensor& residual, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double epsilon = 1e-5, bool zero_centered = false,
    const std::optional<at::Tensor>& row_count = {});

struct NormWithAmax {
  at::Tensor y;
  at::Tensor sum;   // undefined without a residual
  at::Tensor amax;  // the largest magnitude of each row of y, [...] float32 (float64 for float64)
};

// The same with amax out of the same pass: as y.abs().amax(-1), NaN where y has one, 0 for rows
// from row_count on. It has no gradient. A tensor's own is amax.max().
NormWithAmax rms_norm_with_amax(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                const std::optional<at::Tensor>& weight, double epsilon = 1e-5,
                                bool zero_centered = false,
                                const std::optional<at::Tensor>& row_count = {});

NormWithAmax layer_norm_with_amax(const at::Tensor& x, const std::optional<at::Tensor>& residual,
                                  const std::optional<at::Tensor>& weight,
                                  const std::optional<at::Tensor>& bias, double epsilon = 1e-5,
                                  bool zero_centered = false,
                                  const std::optional<at::Tensor>& row_count = {});

// {norm(sum), sum = residual + dropout(x + input_bias)}: the sum as bias_dropout_add draws and
// makes it, bit for bit. input_bias: [cols], x's dtype or float32. Kept besides: two int64.
std::tuple<at::Tensor, at::Tensor> bias_dropout_residual_rms_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& input_bias, const at::Tensor& residual,
    double probability, const std::optional<at::Tensor>& weight, double epsilon = 1e-5,
    bool zero_centered = false, bool training = true);

std::tuple<at::Tensor, at::Tensor> bias_dropout_residual_layer_norm(
    const at::Tensor& x, const std::optional<at::Tensor>& input_bias, const at::Tensor& residual,
    double probability, const std::optional<at::Tensor>& weight,
    const std::optional<at::Tensor>& bias, double epsilon = 1e-5, bool zero_centered = false,
    bool training = true);

}  // namespace redline::ops
