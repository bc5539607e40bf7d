// Megatron-Core's Transformer Engine names over Redline's layers, for LibTorch. One rank: what is
// not built is refused in one sentence.
#pragma once

#include "redline/layers/linear.h"
#include "redline/layers/module.h"
#include "redline/layers/norm.h"

namespace redline::extensions {
inline namespace transformer_engine {  // redline::extensions::TENorm is the same type

using torch::Tensor;

// Megatron's TransformerConfig, as far as these layers read it.
struct TransformerConfig {
  std::string normalization = "LayerNorm";  // or RMSNorm
  double layernorm_epsilon = 1e-5;
  bool layernorm_zero_centered_gamma = false;
  double attention_dropout = 0.0;
  std::optional<std::array<int64_t, 2>> window_size = {};
  bool gradient_accumulation_fusion = false;  // into the layer's gradient.main_grad
  bool delay_wgrad_compute = false;           // left to backward_dw()
  int64_t tensor_model_parallel_size = 1;
  int64_t context_parallel_size = 1;
};

// The product of a linear layer, and its bias where the caller is to add it (skip_bias_add).
using OutputAndBias = std::tuple<Tensor, std::optional<Tensor>>;

struct TELinearOptions {
  int64_t input_size = 0;
  int64_t output_size = 0;
  bool bias = true;
  bool skip_bias_add = false;
  TransformerConfig config = {};
};

struct TEDotProductAttentionOptions {
  std::string attn_mask_type = "causal";  // causal_bottom_right no_mask
  std::optional<double> softmax_scale = {};
  TransformerConfig config = {};
};

// y = norm(x) in the weight's dtype, of the kind that config.normalization names.
class TENormImpl : public torch::nn::Cloneable<TENormImpl> {
 public:
  TENormImpl(const TransformerConfig& config, int64_t hidden_size, double epsilon = 1e-5);
  void reset() override;
  Tensor forward(const Tensor& x);

  int64_t hidden_size;
  layers::NormOptions options;
  layers::Gain gain;
};
TORCH_MODULE(TENorm);

// y = x W^T + bias, (y, none), or (y without bias, bias) with skip_bias_add.
class TELinearImpl : public torch::nn::Cloneable<TELinearImpl> {
 public:
  explicit TELinearImpl(const TELinearOptions& options);
  void reset() override;
  OutputAndBias forward(const Tensor& x);
  void backward_dw() { gradient.backward_dw(weight); }

  TELinearOptions options;
  Tensor weight, bias;
  layers::WeightGradient gradient;
};
using TELinear = layers::Holder<TELinearImpl, TELinearOptions>;
// Of one rank, which holds the whole weight.
using TEColumnParallelLinear = TELinear;
using TERowParallelLinear = TELinear;

// y = norm(x) W^T + bias, for the packed QKV and the first product of an MLP.
class TELayerNormColumnParallelLinearImpl
    : public torch::nn::Cloneable<TELayerNormColumnParallelLinearImpl> {
 public:
  explicit TELayerNormColumnParallelLinearImpl(const TELinearOptions& options);
  void reset() override;
  OutputAndBias forward(const Tensor& x);
  void backward_dw() { gradient.backward_dw(weight); }

  TELinearOptions options;
  layers::NormOptions norm;
  layers::Gain gain;
  Tensor weight, bias;
  layers::WeightGradient gradient;
};
using TELayerNormColumnParallelLinear =
    layers::Holder<TELayerNormColumnParallelLinearImpl, TELinearOptions>;

// q [s, b, heads, d], k and v [s, b, groups, d] -> [s, b, heads d].
class TEDotProductAttentionImpl : public torch::nn::Cloneable<TEDotProductAttentionImpl> {
 public:
  explicit TEDotProductAttentionImpl(const TEDotProductAttentionOptions& options);
  void reset() override {}
  Tensor forward(const Tensor& q, const Tensor& k, const Tensor& v);

  TEDotProductAttentionOptions options;
};
using TEDotProductAttention =
    layers::Holder<TEDotProductAttentionImpl, TEDotProductAttentionOptions>;

}  // namespace transformer_engine
}  // namespace redline::extensions
