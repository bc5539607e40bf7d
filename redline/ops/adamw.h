// One AdamW step over lists of tensors (formula: kernels/adamw.h), in place and without a
// derivative: call it under NoGradGuard. What changes from step to step is a device scalar, so that
// a CUDA graph of a step is right on every replay.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// As long as each other; but for steps, tensor by tensor of one shape. masters may be empty.
struct AdamWLists {
  at::TensorList parameters;
  at::TensorList gradients;    // of any dtype; float64 with float64 alone
  at::TensorList exp_avgs;     // float32 or bfloat16 (float64 for float64)
  at::TensorList exp_avg_sqs;  // likewise
  at::TensorList masters;      // float32, beside 16-bit parameters
  at::TensorList steps;        // one float32 each; advanced by one, unless found_inf
};

// One element each, on the parameters' device.
struct AdamWScalars {
  at::Tensor learning_rate;                         // float32 or float64
  std::optional<at::Tensor> clip_coefficient = {};  // float32; gradients are multiplied by it
  std::optional<at::Tensor> grad_scale = {};        // float32; gradients are divided by it
  std::optional<at::Tensor> found_inf = {};         // float32; not zero: nothing is written
};

struct AdamWOptions {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.01;
};

void adamw_step(const AdamWLists& lists, const AdamWScalars& scalars, const AdamWOptions& options);

}  // namespace redline::ops
