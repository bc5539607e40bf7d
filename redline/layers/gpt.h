// GPT: embedding, layers, final norm, and a head or the loss.
#pragma once

#include "redline/layers/embedding.h"
#include "redline/layers/linear.h"
#include "redline/layers/module.h"
#include "redline/layers/norm.h"
#include "redline/layers/transformer_layer.h"
#include "redline/ops/cross_entropy.h"

namespace redline::layers {

// loss() by ops/fused_linear_cross_entropy.h, which never holds all logits: `promise` computes the
// gradients in forward, for an upstream gradient of 1, and rescales them for another; `recompute`
// computes the logits again in backward and keeps least. A head whose weight gradient is delayed is
// then an error.
enum class FusedLoss { none, promise, recompute };

struct GPTOptions {
  int64_t vocabulary = 0;
  int64_t layers = 0;
  TransformerLayerOptions layer = {};
  bool tied = false;  // embedding.weight is the head
  // Backward writes the gradient of loss()'s logits over them, which saves a buffer of their size.
  // A second backward through the same loss is then an error, and a hook that keeps what the head
  // returned keeps its gradient.
  bool inplace_backward = true;
  FusedLoss fused_loss = FusedLoss::none;
};

class GPTImpl : public torch::nn::Cloneable<GPTImpl> {
 public:
  explicit GPTImpl(const GPTOptions& options);
  void reset() override;
  // GPT-2's: matrices normal(0, 0.02), those that write the stream over sqrt(2 layers).
  void reset_parameters();
  // tokens [batch, sequence] -> logits [batch, sequence, vocabulary].
  Tensor forward(const Tensor& tokens, const Packing& packing = {});
  // The mean cross entropy, a float32 scalar; targets of the tokens' shape.
  Tensor loss(const Tensor& tokens, const Tensor& targets, const Packing& packing = {});
  // For evaluation: {loss, predictions}, the second the most likely class of each token, int64, of
  // the targets' shape, out of the read that the loss makes; reduction "none" gives each token's
  // loss, "sum" their sum. An error with a fused loss.
  std::tuple<Tensor, Tensor> loss_and_predictions(const Tensor& tokens, const Tensor& targets,
                                                  const Packing& packing = {},
                                                  const std::string& reduction = "mean");

  GPTOptions options;
  Embedding embedding = nullptr;
  torch::nn::ModuleList layers = nullptr;
  Norm final_norm = nullptr;
  Linear head = nullptr;

 private:
  // What the head reads: [batch, sequence, hidden].
  Tensor features(const Tensor& tokens, const Packing& packing);
  Tensor logits(const Tensor& x);
  ops::CrossEntropyOptions loss_options(const Tensor& logits) const;
  Tensor fused_loss(const Tensor& x, const Tensor& targets);
};
using GPT = Holder<GPTImpl, GPTOptions>;

}  // namespace redline::layers
