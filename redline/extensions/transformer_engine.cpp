#include "redline/extensions/transformer_engine.h"

#include "redline/layers/attention.h"

namespace redline::extensions::transformer_engine {
namespace {

layers::NormOptions norm_options(const char* layer, const TransformerConfig& config,
                                 double epsilon) {
  const bool rms = config.normalization == "RMSNorm";
  TORCH_CHECK_VALUE(rms || config.normalization == "LayerNorm", layer,
                    ": normalization: expected LayerNorm or RMSNorm, not ", config.normalization);
  return {.kind = rms ? layers::Normalization::rms_norm : layers::Normalization::layer_norm,
          .epsilon = epsilon,
          .zero_centered = config.layernorm_zero_centered_gamma};
}

void check_one_rank(const char* layer, const TransformerConfig& config) {
  TORCH_CHECK_VALUE(config.tensor_model_parallel_size == 1, layer,
                    ": tensor_model_parallel_size: expected 1, not ",
                    config.tensor_model_parallel_size);
  TORCH_CHECK_VALUE(config.context_parallel_size == 1, layer,
                    ": context_parallel_size: expected 1, not ", config.context_parallel_size);
}

layers::WeightGradient weight_gradient(const TransformerConfig& config) {
  return layers::WeightGradient({.accumulate_main_grad = config.gradient_accumulation_fusion,
                                 .delay_weight_grad = config.delay_wgrad_compute});
}

}  // namespace

TENormImpl::TENormImpl(const TransformerConfig& config, int64_t hidden_size, double epsilon)
    : hidden_size(hidden_size), options(norm_options("TENorm", config, epsilon)) {
  check_one_rank("TENorm", config);
  reset();
}

void TENormImpl::reset() { gain = layers::register_gain(*this, hidden_size, options, ""); }

Tensor TENormImpl::forward(const Tensor& x) {
  return layers::normalize(x.to(gain.weight.scalar_type()), gain, options);
}

TELinearImpl::TELinearImpl(const TELinearOptions& options) : options(options) {
  check_one_rank("TELinear", options.config);
  reset();
}

void TELinearImpl::reset() {
  weight = register_parameter("weight", torch::empty({options.output_size, options.input_size}));
  if (options.bias) bias = register_parameter("bias", torch::zeros({options.output_size}));
  gradient = weight_gradient(options.config);
  torch::nn::init::normal_(weight, 0.0, 0.023);
}

OutputAndBias TELinearImpl::forward(const Tensor& x) {
  if (options.skip_bias_add && bias.defined()) return {gradient.product(x, weight, {}), bias};
  return {gradient.product(x, weight, bias), std::nullopt};
}

TELayerNormColumnParallelLinearImpl::TELayerNormColumnParallelLinearImpl(
    const TELinearOptions& options)
    : options(options),
      norm(norm_options("TELayerNormColumnParallelLinear", options.config,
                        options.config.layernorm_epsilon)) {
  check_one_rank("TELayerNormColumnParallelLinear", options.config);
  reset();
}

void TELayerNormColumnParallelLinearImpl::reset() {
  gain = layers::register_gain(*this, options.input_size, norm);
  weight = register_parameter("weight", torch::empty({options.output_size, options.input_size}));
  if (options.bias) bias = register_parameter("bias", torch::zeros({options.output_size}));
  gradient = weight_gradient(options.config);
  torch::nn::init::normal_(weight, 0.0, 0.023);
}

OutputAndBias TELayerNormColumnParallelLinearImpl::forward(const Tensor& x) {
  const bool returns_bias = options.skip_bias_add && bias.defined();
  const Tensor y =
      ops::norm_linear(
          x.to(gain.weight.scalar_type()), layers::norm_parameters(gain), weight,
          returns_bias ? std::nullopt : layers::given(bias),
          {.norm = layers::norm_part(norm),
           .weight_gradient = gradient.destination("TELayerNormColumnParallelLinear", weight)})
          .y;
  return {y, returns_bias ? layers::given(bias) : std::nullopt};
}

TEDotProductAttentionImpl::TEDotProductAttentionImpl(const TEDotProductAttentionOptions& options)
    : options(options) {
  check_one_rank("TEDotProductAttention", options.config);
  const std::string& mask = options.attn_mask_type;
  TORCH_CHECK_VALUE(mask == "causal" || mask == "causal_bottom_right" || mask == "no_mask",
                    "TEDotProductAttention: attn_mask_type: expected causal, causal_bottom_right "
                    "or no_mask, not ",
                    mask);
}

Tensor TEDotProductAttentionImpl::forward(const Tensor& q, const Tensor& k, const Tensor& v) {
  TORCH_CHECK_VALUE(options.attn_mask_type != "causal" || q.size(0) == k.size(0),
                    "TEDotProductAttention: attn_mask_type: expected causal_bottom_right for ",
                    q.size(0), " queries and ", k.size(0), " keys, not causal");
  return layers::attend_sequence_first(
      q, k, v,
      {.causal = options.attn_mask_type != "no_mask",
       .scale = options.softmax_scale,
       .window = options.config.window_size,
       .dropout = is_training() ? options.config.attention_dropout : 0.0});
}

}  // namespace redline::extensions::transformer_engine
