// norm's inner ops, for the nodes that have a norm in them: called through the dispatcher, so that
// tracing sees them.
#pragma once

#include "redline/kernels/norm.h"
#include "redline/ops/torch.h"

namespace redline::ops {

// rms_norm or layer_norm; `op` names the caller in the refusal of another.
Norm norm_from(const char* op, std::string_view kind);

struct NormInputs {
  Norm norm;
  std::optional<at::Tensor> residual, weight, bias, row_count;
  double epsilon;
  bool zero_centered;
  // With a residual: residual + dropout(x + input_bias) is normalised.
  std::optional<at::Tensor> input_bias = {};
  double dropout = 0;       // the probability; 0 where nothing is drawn
  bool wants_amax = false;  // without dropout and input bias
};

// mean: layer alone. rng_state: [2] int64, or [0] or undefined where nothing is dropped. amax: the
// largest magnitude of each row of y, where it is wanted.
struct NormOutputs {
  at::Tensor y = {}, sum = {}, mean = {}, inverse_std = {}, rng_state = {}, amax = {};
};

struct NormBackwardInputs {
  Norm norm;
  at::Tensor mean, inverse_std;
  std::optional<at::Tensor> weight, bias, sum_grad, row_count;
  bool zero_centered, needs_weight, needs_bias;
  bool needs_y = false;
  // As forward had them; rng_state undefined where nothing was dropped.
  at::Tensor rng_state = {};
  std::optional<at::Tensor> input_bias = {};
  double dropout = 0;
  at::ScalarType input_dtype = at::kFloat;
  bool needs_input_bias = false;
};

struct NormGradients {
  at::Tensor x = {}, weight = {}, bias = {};  // x: the normalised tensor's, and the residual's
  at::Tensor y = {};                          // forward's once more, its bits, of y_grad's dtype
  at::Tensor input = {};  // forward's x's, of input_dtype; with dropout: otherwise x is
  at::Tensor input_bias = {};
};

NormOutputs norm_forward(const at::Tensor& x, const NormInputs& in);

// forward's y once more, its bits, from x (the sum, with a residual) and the statistics; mean
// undefined: rms. y is of `dtype`, x of that or float32.
at::Tensor norm_rebuild(const at::Tensor& x, const std::optional<at::Tensor>& weight,
                        const std::optional<at::Tensor>& bias, const NormOutputs& statistics,
                        bool zero_centered, at::ScalarType dtype);

// A bias and needs_y: with the same kernel, one read of x for both.
NormGradients norm_backward(const at::Tensor& y_grad, const at::Tensor& x,
                            const NormBackwardInputs& in);

// The same where the sum alone has a gradient.
NormGradients sum_backward(const at::Tensor& sum_grad, const NormBackwardInputs& in);

}  // namespace redline::ops
