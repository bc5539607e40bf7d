// Embedding: rows of a table, with a gradient summed in a fixed order.
#pragma once

#include "redline/layers/module.h"

namespace redline::layers {

struct EmbeddingOptions {
  int64_t num_embeddings = 0;
  int64_t embedding_dim = 0;
  std::optional<int64_t> padding_idx = {};  // this row starts at zero and gets no gradient
};

// y = weight[tokens]; weight [num_embeddings, embedding_dim].
class EmbeddingImpl : public torch::nn::Cloneable<EmbeddingImpl> {
 public:
  explicit EmbeddingImpl(const EmbeddingOptions& options);
  void reset() override;
  Tensor forward(const Tensor& tokens);

  EmbeddingOptions options;
  Tensor weight;
};
using Embedding = Holder<EmbeddingImpl, EmbeddingOptions>;

}  // namespace redline::layers
