// RMSNorm and LayerNorm over the last axis; weight [dim], bias [dim] (LayerNorm's).
#pragma once

#include "redline/layers/module.h"
#include "redline/ops/norm_part.h"

namespace redline::layers {

enum class Normalization { rms_norm, layer_norm };

// The norm that opens LayerNormLinear and LayerNormMLP: layer_norm_weight and, of LayerNorm,
// layer_norm_bias. zero_centered stores weight - 1.
struct NormOptions {
  Normalization kind = Normalization::rms_norm;
  double epsilon = 1e-5;
  bool zero_centered = false;
};

struct RMSNormOptions {
  int64_t dim = 0;
  double epsilon = 1e-5;
  bool zero_centered = false;
  bool affine = true;
};

struct LayerNormOptions {
  int64_t dim = 0;
  double epsilon = 1e-5;
  bool zero_centered = false;
  bool affine = true;
  bool bias = true;
};

class RMSNormImpl : public torch::nn::Cloneable<RMSNormImpl> {
 public:
  explicit RMSNormImpl(const RMSNormOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  // {norm(x + residual), x + residual} in one pass.
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual);

  RMSNormOptions options;
  Tensor weight;
};
using RMSNorm = Holder<RMSNormImpl, RMSNormOptions>;

class LayerNormImpl : public torch::nn::Cloneable<LayerNormImpl> {
 public:
  explicit LayerNormImpl(const LayerNormOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual);

  LayerNormOptions options;
  Tensor weight, bias;
};
using LayerNorm = Holder<LayerNormImpl, LayerNormOptions>;

// The parameters of a norm: what an undefined tensor is to the ops.
struct Gain {
  Tensor weight = {}, bias = {};
};

// What ops::norm_linear and ops::norm_mlp take of a norm.
inline ops::NormParameters norm_parameters(const Gain& gain) {
  return {.weight = given(gain.weight), .bias = given(gain.bias)};
}
inline ops::NormPartOptions norm_part(const NormOptions& options, double dropout = 0) {
  return {.kind = options.kind == Normalization::rms_norm ? "rms_norm" : "layer_norm",
          .epsilon = options.epsilon,
          .zero_centered = options.zero_centered,
          .dropout = dropout};
}

// norm(x), of the kind that the options name.
Tensor normalize(const Tensor& x, const Gain& gain, const NormOptions& options);

// {norm(sum), sum = residual + dropout(x)}: x is dropped with the probability given, where it is
// not 0.
std::tuple<Tensor, Tensor> normalize_residual(const Tensor& x, const Tensor& residual,
                                              const Gain& gain, const NormOptions& options,
                                              double dropout);

// A norm whose kind is an option: q_norm, k_norm and final_norm.
class NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  NormImpl(int64_t dim, const NormOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x);
  std::tuple<Tensor, Tensor> forward_residual(const Tensor& x, const Tensor& residual,
                                              double dropout = 0);

  int64_t dim;
  NormOptions options;
  Gain gain;
};
TORCH_MODULE(Norm);

// Ones and zeros, or zeros for a zero-centred weight.
void reset_gain(const Gain& gain, bool zero_centered);

// The gain of a norm, filled, as the parameters <prefix>weight and <prefix>bias of `module`.
Gain register_gain(torch::nn::Module& module, int64_t dim, const NormOptions& options,
                   const std::string& prefix = "layer_norm_");

}  // namespace redline::layers
