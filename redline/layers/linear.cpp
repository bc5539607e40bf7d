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

Tensor LayerNormLinearImpl::forward(const Tensor& x) {
  return gradient.product(normalize(x, gain, options.norm), weight, bias);
}

std::tuple<Tensor, Tensor> LayerNormLinearImpl::forward_residual(const Tensor& x,
                                                                 const Tensor& residual) {
  auto [normed, sum] = normalize_residual(x, residual, gain, options.norm);
  return {gradient.product(normed, weight, bias), sum};
}

}  // namespace redline::layers
