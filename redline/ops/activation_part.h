// The activation within a fused node, of either family by its kind: activation, or
// gated_activation with packed halves. Called through the dispatcher, so that tracing sees it.
#pragma once

#include <string_view>

#include "redline/ops/torch.h"

namespace redline::ops {

// Whether the kind is gated_activation's; throws where it is neither's.
bool is_gated(const char* op, std::string_view kind);

// bias [rows of weight], of weight's dtype or float32, on its device.
void check_activation_bias(const char* op, const char* name, const std::optional<at::Tensor>& bias,
                           const at::Tensor& weight);

at::Tensor activate(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                    std::string_view kind);

// What backward is asked for beside x's gradient. y: activate()'s result once more, its bits.
struct ActivationNeeds {
  bool bias, y;
};

struct ActivationGradients {
  at::Tensor x, bias, y;
};

ActivationGradients activate_backward(const at::Tensor& y_grad, const at::Tensor& x,
                                      const std::optional<at::Tensor>& bias, std::string_view kind,
                                      ActivationNeeds needs);

}  // namespace redline::ops
