#include "redline/layers/gpt.h"

#include <algorithm>
#include <cmath>

#include "redline/ops/fused_linear_cross_entropy.h"

namespace redline::layers {

GPTImpl::GPTImpl(const GPTOptions& options) : options(options) { reset(); }

void GPTImpl::reset() {
  const int64_t hidden = options.layer.attention.hidden_size;
  embedding = register_module(
      "embedding", Embedding({.num_embeddings = options.vocabulary, .embedding_dim = hidden}));
  layers = register_module("layers", torch::nn::ModuleList());
  for (int64_t i = 0; i < options.layers; ++i) layers->push_back(TransformerLayer(options.layer));
  final_norm = register_module("final_norm", Norm(hidden, options.layer.norm));
  if (!options.tied)
    head = register_module(
        "head", Linear({.in_features = hidden, .out_features = options.vocabulary, .bias = false}));
  reset_parameters();
}

void GPTImpl::reset_parameters() {
  const double writer_std = 0.02 / std::sqrt(2.0 * std::max<int64_t>(options.layers, 1));
  for (const auto& named : named_parameters()) {
    const std::string& name = named.key();
    if (named.value().dim() == 2) {
      const bool writes = name.ends_with("proj.weight") || name.ends_with("fc2_weight");
      torch::nn::init::normal_(named.value(), 0.0, writes ? writer_std : 0.02);
    } else if (name.ends_with("bias")) {
      torch::nn::init::zeros_(named.value());
    } else {  // a norm's gain
      torch::nn::init::constant_(named.value(), options.layer.norm.zero_centered ? 0.0 : 1.0);
    }
  }
}

Tensor GPTImpl::features(const Tensor& tokens, const Packing& packing) {
  Stream stream = {.x = embedding(tokens)};
  for (const auto& layer : *layers)
    stream = layer->as<TransformerLayerImpl>()->forward_residual(stream, packing);
  if (!stream.residual) return final_norm(stream.x);  // no layers
  return std::get<0>(final_norm->forward_residual(stream.x, *stream.residual, stream.dropout));
}

Tensor GPTImpl::logits(const Tensor& x) {
  return options.tied ? torch::linear(x, embedding->weight) : head(x);
}

Tensor GPTImpl::forward(const Tensor& tokens, const Packing& packing) {
  return logits(features(tokens, packing));
}

Tensor GPTImpl::fused_loss(const Tensor& x, const Tensor& targets) {
  ops::FusedLinearCrossEntropyOptions fused;
  if (options.fused_loss == FusedLoss::promise) {
    fused.loss.loss_scale = torch::ones({}, x.options().dtype(torch::kFloat));
  }
  if (options.tied)
    return ops::fused_linear_cross_entropy(x, embedding->weight, targets, {}, fused);
  fused.weight_gradient = head->gradient.destination("Linear", head->weight);
  return ops::fused_linear_cross_entropy(x, head->weight, targets, {}, fused);
}

ops::CrossEntropyOptions GPTImpl::loss_options(const Tensor& logits) const {
  return {.inplace_backward = options.inplace_backward && logits.requires_grad()};
}

Tensor GPTImpl::loss(const Tensor& tokens, const Tensor& targets, const Packing& packing) {
  const Tensor x = features(tokens, packing);
  if (options.fused_loss != FusedLoss::none) return fused_loss(x, targets);
  const Tensor all = logits(x);
  return ops::cross_entropy(all, targets, loss_options(all));
}

std::tuple<Tensor, Tensor> GPTImpl::loss_and_predictions(const Tensor& tokens,
                                                         const Tensor& targets,
                                                         const Packing& packing,
                                                         const std::string& reduction) {
  TORCH_CHECK(options.fused_loss == FusedLoss::none,
              "GPT: predictions: expected a fused_loss of none, for a fused one has no logits");
  const Tensor all = logits(features(tokens, packing));
  ops::CrossEntropyOptions given = loss_options(all);
  given.reduction = reduction;
  const auto out = ops::cross_entropy_with_predictions(all, targets, given);
  return {out.loss, out.predictions};
}

}  // namespace redline::layers
