// f(x + bias) for gelu, gelu_erf, quick_gelu, silu, relu and squared_relu (formulas:
// kernels/activation.h). x is [..., cols]; bias is [cols], of x's dtype or float32. Kept for
// backward: x and bias. Refuses what does not fit with redline::Error or c10::Error before any
// memory is touched.
#pragma once

#include <string_view>

#include "redline/ops/torch.h"

namespace redline::ops {

// y, of x's shape and dtype.
at::Tensor activation(const at::Tensor& x, const std::optional<at::Tensor>& bias = {},
                      std::string_view kind = "gelu");

}  // namespace redline::ops
