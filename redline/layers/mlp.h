// LayerNormMLP: norm, up projection, activation, down projection.
#pragma once

#include "redline/layers/module.h"
#include "redline/layers/norm.h"
#include "redline/layers/weight_gradient.h"
#include "redline/ops/norm_mlp.h"

namespace redline::layers {

struct LayerNormMLPOptions {
  int64_t hidden_size = 0;
  int64_t ffn_hidden_size = 0;
  bool bias = true;
  std::string activation = "swiglu";  // swiglu geglu reglu quick_geglu clamped_swiglu, or
                                      // gelu gelu_erf quick_gelu silu relu squared_relu
  NormOptions norm = {};
  WeightGradientOptions weight_gradient = {};  // of both weights
  // Of what is kept for backward: ops::NormMlpOptions says.
  std::optional<at::ScalarType> pre_activation_dtype = {};
};

// y = act(norm(x) W1^T + b1) W2^T + b2; layer_norm_weight [hidden], fc1_weight [ffn, hidden] or,
// for a gated activation, [gate; linear] [2 ffn, hidden], fc2_weight [hidden, ffn], and their
// biases. Kept for backward: x (or the sum), a number or two per row and fc1's product.
class LayerNormMLPImpl : public torch::nn::Cloneable<LayerNormMLPImpl> {
 public:
  explicit LayerNormMLPImpl(const LayerNormMLPOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  // {y, residual + dropout(x)}: x is dropped with the probability given, where it is not 0.
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual,
                                              double dropout = 0);
  void backward_dw();

  LayerNormMLPOptions options;
  Gain gain;
  Tensor fc1_weight, fc1_bias, fc2_weight, fc2_bias;
  WeightGradient fc1_gradient, fc2_gradient;

 private:
  ops::NormMlpOutput run(const Tensor& x, const std::optional<Tensor>& residual, double dropout);
};
using LayerNormMLP = Holder<LayerNormMLPImpl, LayerNormMLPOptions>;

}  // namespace redline::layers
