// TransformerLayer: pre-norm attention and MLP around a residual stream.
#pragma once

#include "redline/layers/attention.h"
#include "redline/layers/mlp.h"
#include "redline/layers/module.h"

namespace redline::layers {

// What backward computes again instead of keeping it: `selective`, what attention itself keeps
// between q, k, v and its output, no product; `full`, all but the layer's inputs.
enum class Recompute { none, selective, full };

// norm and bias hold for both parts; mlp.hidden_size is attention's.
struct TransformerLayerOptions {
  AttentionOptions attention = {};
  LayerNormMLPOptions mlp = {};
  NormOptions norm = {};
  bool bias = false;
  double dropout = 0.0;
  Recompute recompute = Recompute::none;
};

// The residual stream: residual + dropout(x), with the probability that is yet to be drawn with; x
// alone where there is no residual.
struct Stream {
  Tensor x;
  std::optional<Tensor> residual = {};
  double dropout = 0;
};

// h = x + dropout(attention(norm(x))); y = h + dropout(mlp(norm(h))).
class TransformerLayerImpl : public torch::nn::Cloneable<TransformerLayerImpl> {
 public:
  explicit TransformerLayerImpl(const TransformerLayerOptions& options);
  void reset() override;
  Tensor forward(const Tensor& x, const Packing& packing = {});
  // Leaves the last dropout and sum to the next norm, which makes them in the same pass.
  Stream forward_residual(const Stream& stream, const Packing& packing = {});

  TransformerLayerOptions options;
  Attention self_attention = nullptr;
  LayerNormMLP layernorm_mlp = nullptr;

 private:
  double drawn() const { return is_training() ? options.dropout : 0; }
  Stream run(const Stream& stream, const Packing& packing, double drops);
};
using TransformerLayer = Holder<TransformerLayerImpl, TransformerLayerOptions>;

}  // namespace redline::layers
