// Linear, and LayerNormLinear: a norm and the product that reads it.
#pragma once

#include "redline/layers/module.h"
#include "redline/layers/norm.h"
#include "redline/layers/weight_gradient.h"
#include "redline/ops/norm_linear.h"

namespace redline::layers {

struct LinearOptions {
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool bias = true;
  WeightGradientOptions weight_gradient = {};
};

struct LayerNormLinearOptions {
  int64_t in_features = 0;
  int64_t out_features = 0;
  bool bias = true;
  NormOptions norm = {};
  WeightGradientOptions weight_gradient = {};
  bool keep_normalized = false;  // for backward, which otherwise rebuilds norm(x)
};

// y = x W^T + bias; weight [out, in], bias [out].
class LinearImpl : public torch::nn::Cloneable<LinearImpl> {
 public:
  explicit LinearImpl(const LinearOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  void backward_dw() { gradient.backward_dw(weight); }

  LinearOptions options;
  Tensor weight, bias;
  WeightGradient gradient;
};
using Linear = Holder<LinearImpl, LinearOptions>;

// y = norm(x) W^T + bias; layer_norm_weight [in], weight [out, in], bias [out].
class LayerNormLinearImpl : public torch::nn::Cloneable<LayerNormLinearImpl> {
 public:
  explicit LayerNormLinearImpl(const LayerNormLinearOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  // {y, residual + dropout(x)}: x is dropped with the probability given, where it is not 0.
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual,
                                              double dropout = 0);
  // {y, norm(x)}.
  std::tuple<Tensor, Tensor> forward_normalized(const Tensor& x);
  void backward_dw() { gradient.backward_dw(weight); }

  LayerNormLinearOptions options;
  Gain gain;
  Tensor weight, bias;
  WeightGradient gradient;

 private:
  ops::NormLinearOptions call_options(double dropout = 0);
};
using LayerNormLinear = Holder<LayerNormLinearImpl, LayerNormLinearOptions>;

// Fills weight [out, in] and bias [out] as torch::nn::Linear does, from the same random numbers.
void reset_linear(const Tensor& weight, const Tensor& bias);

}  // namespace redline::layers
