#include "redline/layers/linear.h"

#include <cmath>

namespace redline::layers {

void reset_linear(const Tensor& weight, const Tensor& bias) {
  torch::nn::init::kaiming_uniform_(weight, std::sqrt(5.0));
  if (!bias.defined()) return;
  const double bound = weight.size(1) ? 1 / std::sqrt(static_cast<double>(weight.size(1))) : 0;
  torch::nn::init::uniform_(bias, -bound, bound);
}

LinearImpl::LinearImpl(const LinearOptions& options) : options(options) { reset(); }

void LinearImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.out_features, options.in_features}));
  if (options.bias) bias = register_parameter("bias", torch::empty({options.out_features}));
  gradient = WeightGradient(options.weight_gradient);
  reset_linear(weight, bias);
}

Tensor LinearImpl::forward(const Tensor& x) { return gradient.product(x, weight, bias); }

LayerNormLinearImpl::LayerNormLinearImpl(const LayerNormLinearOptions& options) : options(options) {
  reset();
}

void LayerNormLinearImpl::reset() {
  gain = register_gain(*this, options.in_features, options.norm);
  weight = register_parameter("weight", torch::empty({options.out_features, options.in_features}));
  if (options.bias) bias = register_parameter("bias", torch::empty({options.out_features}));
  gradient = WeightGradient(options.weight_gradient);
  reset_linear(weight, bias);
}

ops::NormLinearOptions LayerNormLinearImpl::call_options(double dropout) {
  return {.norm = norm_part(options.norm, dropout),
          .keep_normalized = options.keep_normalized,
          .weight_gradient = gradient.destination("LayerNormLinear", weight)};
}

Tensor LayerNormLinearImpl::forward(const Tensor& x) {
  return ops::norm_linear(x, norm_parameters(gain), weight, given(bias), call_options()).y;
}

std::tuple<Tensor, Tensor> LayerNormLinearImpl::forward_residual(const Tensor& x,
                                                                 const Tensor& residual,
                                                                 double dropout) {
  ops::NormLinearOptions call = call_options(dropout);
  call.residual = residual;
  const auto out = ops::norm_linear(x, norm_parameters(gain), weight, given(bias), call);
  return {out.y, out.sum};
}

std::tuple<Tensor, Tensor> LayerNormLinearImpl::forward_normalized(const Tensor& x) {
  ops::NormLinearOptions call = call_options();
  call.return_norm_output = true;
  const auto out = ops::norm_linear(x, norm_parameters(gain), weight, given(bias), call);
  return {out.y, out.normalized};
}

}  // namespace redline::layers
