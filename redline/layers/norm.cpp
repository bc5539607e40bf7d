#include "redline/layers/norm.h"

#include "redline/ops/norm.h"

namespace redline::layers {

void reset_gain(const Gain& gain, bool zero_centered) {
  if (gain.weight.defined()) torch::nn::init::constant_(gain.weight, zero_centered ? 0.0 : 1.0);
  if (gain.bias.defined()) torch::nn::init::zeros_(gain.bias);
}

Gain register_gain(torch::nn::Module& module, int64_t dim, const NormOptions& options,
                   const std::string& prefix) {
  Gain gain;
  gain.weight = module.register_parameter(prefix + "weight", torch::empty({dim}));
  if (options.kind == Normalization::layer_norm)
    gain.bias = module.register_parameter(prefix + "bias", torch::empty({dim}));
  reset_gain(gain, options.zero_centered);
  return gain;
}

Tensor normalize(const Tensor& x, const Gain& gain, const NormOptions& options) {
  if (options.kind == Normalization::rms_norm)
    return ops::rms_norm(x, given(gain.weight), options.epsilon, options.zero_centered);
  return ops::layer_norm(x, given(gain.weight), given(gain.bias), options.epsilon,
                         options.zero_centered);
}

std::tuple<Tensor, Tensor> normalize_residual(const Tensor& x, const Tensor& residual,
                                              const Gain& gain, const NormOptions& options,
                                              double dropout) {
  if (options.kind == Normalization::rms_norm)
    return ops::bias_dropout_residual_rms_norm(x, {}, residual, dropout, given(gain.weight),
                                               options.epsilon, options.zero_centered);
  return ops::bias_dropout_residual_layer_norm(x, {}, residual, dropout, given(gain.weight),
                                               given(gain.bias), options.epsilon,
                                               options.zero_centered);
}

RMSNormImpl::RMSNormImpl(const RMSNormOptions& options) : options(options) { reset(); }

void RMSNormImpl::reset() {
  if (options.affine) weight = register_parameter("weight", torch::empty({options.dim}));
  reset_gain({.weight = weight}, options.zero_centered);
}

Tensor RMSNormImpl::forward(const Tensor& x) {
  return ops::rms_norm(x, given(weight), options.epsilon, options.zero_centered);
}

std::tuple<Tensor, Tensor> RMSNormImpl::forward_residual(const Tensor& x, const Tensor& residual) {
  return ops::residual_rms_norm(x, residual, given(weight), options.epsilon, options.zero_centered);
}

LayerNormImpl::LayerNormImpl(const LayerNormOptions& options) : options(options) { reset(); }

void LayerNormImpl::reset() {
  if (options.affine) weight = register_parameter("weight", torch::empty({options.dim}));
  if (options.affine && options.bias)
    bias = register_parameter("bias", torch::empty({options.dim}));
  reset_gain({.weight = weight, .bias = bias}, options.zero_centered);
}

Tensor LayerNormImpl::forward(const Tensor& x) {
  return ops::layer_norm(x, given(weight), given(bias), options.epsilon, options.zero_centered);
}

std::tuple<Tensor, Tensor> LayerNormImpl::forward_residual(const Tensor& x,
                                                           const Tensor& residual) {
  return ops::residual_layer_norm(x, residual, given(weight), given(bias), options.epsilon,
                                  options.zero_centered);
}

NormImpl::NormImpl(int64_t dim, const NormOptions& options) : dim(dim), options(options) {
  reset();
}

void NormImpl::reset() { gain = register_gain(*this, dim, options, ""); }

Tensor NormImpl::forward(const Tensor& x) { return normalize(x, gain, options); }

std::tuple<Tensor, Tensor> NormImpl::forward_residual(const Tensor& x, const Tensor& residual,
                                                      double dropout) {
  return normalize_residual(x, residual, gain, options, dropout);
}

}  // namespace redline::layers
