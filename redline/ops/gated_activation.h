// f(gate) * linear for swiglu, geglu, reglu, quick_geglu and clamped_swiglu (formulas:
// kernels/gated_activation.h). Kept for backward: the inputs. Refuses what does not fit with
// redline::Error or c10::Error before any memory is touched.
#pragma once

#include <string>

#include "redline/ops/torch.h"

namespace redline::ops {

struct GatedActivationOptions {
  std::string kind = "swiglu";
  std::optional<at::Tensor> bias = {};       // [2 * cols], of x's dtype or float32
  std::optional<at::Tensor> row_scale = {};  // one per row, of x's dtype or float32
  std::optional<double> limit = {};          // these three: clamped_swiglu alone
  std::optional<double> alpha = {};
  std::optional<double> linear_offset = {};
  std::optional<at::Tensor> row_count = {};  // one int64 on x's device
};

// x: [..., 2 * cols], first half gate, second half linear. Returns [..., cols].
at::Tensor gated_activation(const at::Tensor& x, const GatedActivationOptions& options = {});

// gate, linear: [..., cols], of one dtype; they may be strided views.
at::Tensor gated_activation_pair(const at::Tensor& gate, const at::Tensor& linear,
                                 const GatedActivationOptions& options = {});

}  // namespace redline::ops
