#include "redline/layers/mlp.h"

#include <algorithm>

#include "redline/layers/linear.h"
#include "redline/ops/activation_part.h"

namespace redline::layers {

LayerNormMLPImpl::LayerNormMLPImpl(const LayerNormMLPOptions& options) : options(options) {
  reset();
}

void LayerNormMLPImpl::reset() {
  const int64_t hidden = options.hidden_size, ffn = options.ffn_hidden_size;
  ops::check_pre_activation_dtype("LayerNormMLP", options.pre_activation_dtype);
  const bool gated = ops::is_gated("LayerNormMLP", options.activation);
  const int64_t fc1_rows = gated ? 2 * ffn : ffn;
  gain = register_gain(*this, hidden, options.norm);
  fc1_weight = register_parameter("fc1_weight", torch::empty({fc1_rows, hidden}));
  if (options.bias) fc1_bias = register_parameter("fc1_bias", torch::empty({fc1_rows}));
  fc2_weight = register_parameter("fc2_weight", torch::empty({hidden, ffn}));
  if (options.bias) fc2_bias = register_parameter("fc2_bias", torch::empty({hidden}));
  fc1_gradient = WeightGradient(options.weight_gradient);
  fc2_gradient = WeightGradient(options.weight_gradient);
  reset_linear(fc1_weight, fc1_bias);
  reset_linear(fc2_weight, fc2_bias);
}

ops::NormMlpOutput LayerNormMLPImpl::run(const Tensor& x, const std::optional<Tensor>& residual,
                                         double dropout) {
  return ops::norm_mlp(x, norm_parameters(gain),
                       {.fc1_weight = fc1_weight,
                        .fc1_bias = given(fc1_bias),
                        .fc2_weight = fc2_weight,
                        .fc2_bias = given(fc2_bias)},
                       {.residual = residual,
                        .norm = norm_part(options.norm, dropout),
                        .activation = options.activation,
                        .fc1_gradient = fc1_gradient.destination("LayerNormMLP: fc1", fc1_weight),
                        .fc2_gradient = fc2_gradient.destination("LayerNormMLP: fc2", fc2_weight)});
}

Tensor LayerNormMLPImpl::forward(const Tensor& x) { return run(x, {}, 0).y; }

std::tuple<Tensor, Tensor> LayerNormMLPImpl::forward_residual(const Tensor& x,
                                                              const Tensor& residual,
                                                              double dropout) {
  const ops::NormMlpOutput out = run(x, residual, dropout);
  return {out.y, out.sum};
}

void LayerNormMLPImpl::backward_dw() {
  // Both wait in pairs. Where one product of a pair failed, the other is not done again.
  const int64_t waiting = std::max(fc1_gradient.waiting(), fc2_gradient.waiting());
  if (fc2_gradient.waiting() == waiting) fc2_gradient.backward_dw(fc2_weight);
  if (fc1_gradient.waiting() == waiting) fc1_gradient.backward_dw(fc1_weight);
}

}  // namespace redline::layers
