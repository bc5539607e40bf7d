// norm(x) W^T + bias as one node. Kept for backward: x (the sum, with a residual) and the norm's
// one float32 per row (layer: two); the normalised input is rebuilt from them, bit for bit.
// Refuses what does not fit with redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/linear.h"
#include "redline/ops/norm_part.h"

namespace redline::ops {

struct NormLinearOptions {
  std::optional<at::Tensor> residual = {};  // added to x first; x's dtype or float32
  NormPartOptions norm = {};
  bool keep_normalized = false;  // keep the normalised input: one pass less, [..., in] more
  bool return_norm_output = false;
  WeightGradientOptions weight_gradient = {};
};

struct NormLinearOutput {
  at::Tensor y;           // [..., out]
  at::Tensor sum;         // x + residual; undefined without a residual
  at::Tensor normalized;  // undefined unless it was asked for
};

// x [..., in]; weight [out, in] and bias [out], of x's dtype, or of 16 bits beside a float32 x.
NormLinearOutput norm_linear(const at::Tensor& x, const NormParameters& norm,
                             const at::Tensor& weight, const std::optional<at::Tensor>& bias = {},
                             const NormLinearOptions& options = {});

}  // namespace redline::ops
