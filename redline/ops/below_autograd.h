// Backward passes that nobody differentiates.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// While it lives, the calls of a backward skip autograd's kernels, which have nothing to do where
// no second derivative is asked for: 0.5 us for each of our inner ops. It begins behind
// get_saved_variables(), whose hooks may record. A tangent that such a hook puts on a saved tensor,
// and on no gradient, is not looked for.
class BelowAutograd {
 public:
  explicit BelowAutograd(const torch::autograd::variable_list& grads) {
    if (at::GradMode::is_enabled()) return;
    for (const at::Tensor& grad : grads) {
      if (grad.defined() && grad._fw_grad(/*level=*/0).defined()) return;  // forward mode
    }
    guard_.emplace();
  }

 private:
  std::optional<at::AutoDispatchBelowADInplaceOrView> guard_;
};

}  // namespace redline::ops
