// The inner ops of fused_linear_cross_entropy, through the dispatcher: what runs over chunks.
#pragma once

#include <array>

#include "redline/ops/cross_entropy_inner.h"
#include "redline/ops/cross_entropy_promise.h"

namespace redline::ops {

struct LossHead {
  at::Tensor x, weight;  // [..., hidden], [vocabulary, hidden]
  std::optional<at::Tensor> bias;
  at::Tensor targets;  // [...]
  CrossEntropyOptions options;
};

// Which of the gradients of x, the weight and the bias are wanted.
using WantedGradients = std::array<bool, 3>;

// A gradient that is not wanted has no elements.
struct HeadGradients {
  at::Tensor x, weight, bias;
};

// Where the weight's gradient goes in place of HeadGradients::weight.
struct MainGrad {
  std::optional<at::Tensor> buffer;
  bool accumulate = true;
};

struct HeadLoss {
  at::Tensor loss;
  at::Tensor statistics;  // [tokens, 3 or 4]
  at::Tensor count;       // what a mean was divided by
};
HeadLoss head_loss(const LossHead& head);

// From the logits, computed again in slices of the vocabulary.
HeadGradients head_gradients(const LossHead& head, const HeadLoss& forward,
                             const at::Tensor& loss_grad, WantedGradients wanted,
                             const MainGrad& main_grad);

// The loss and the gradients under the upstream gradient options.loss_scale; the bias's in the
// dtype of sums, the weight's too unless it has few chunks to sum and goes to no main_grad.
std::pair<at::Tensor, HeadGradients> promised_gradients(const LossHead& head,
                                                        WantedGradients wanted,
                                                        bool with_main_grad);

// What `kept` of promised_gradients becomes under the upstream gradient `loss_grad`: a tensor of
// `dtype`, `kept` itself where it has that and no other backward comes; or nothing where it went
// into main_grad.
at::Tensor fulfilled_gradient(at::Tensor kept, const at::Tensor& loss_grad,
                              const at::Tensor& loss_scale, at::ScalarType dtype,
                              const MainGrad& main_grad);

}  // namespace redline::ops
