#include "redline/layers/embedding.h"

#include "redline/ops/embedding.h"

namespace redline::layers {

EmbeddingImpl::EmbeddingImpl(const EmbeddingOptions& options) : options(options) { reset(); }

void EmbeddingImpl::reset() {
  weight =
      register_parameter("weight", torch::empty({options.num_embeddings, options.embedding_dim}));
  torch::nn::init::normal_(weight);
  const torch::NoGradGuard no_grad;
  if (options.padding_idx) weight[*options.padding_idx].zero_();
}

Tensor EmbeddingImpl::forward(const Tensor& tokens) {
  return ops::embedding(tokens, weight, options.padding_idx);
}

}  // namespace redline::layers
