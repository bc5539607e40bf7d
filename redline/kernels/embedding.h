// Embedding: y[t] = weight[tokens[t]]. The gradient of a row of weight is the sum of y_grad over
// the tokens that named it, in the order in which they occur, in float32 (float64 for float64) and
// rounded once; zero for padding_index. On CUDA a row of more than 64 tokens is summed by chunks of
// 64, which are added in order. Backward keeps the tokens alone.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

struct EmbeddingForward {
  TensorView tokens;  // [tokens] int64 or int32
  TensorView weight;  // [vocabulary, hidden]
  TensorView y;       // [tokens, hidden], out, weight's dtype
};

struct EmbeddingBackward {
  TensorView y_grad;       // [tokens, hidden]
  TensorView tokens;       // [tokens] int64 or int32
  TensorView weight_grad;  // [vocabulary, hidden], out; y_grad's dtype or its accumulation dtype
  TensorView workspace;    // [embedding_workspace(...)] int32, at a multiple of 16 bytes
  int64_t padding_index = -1;  // a row without a gradient; -1: none
  bool accumulate = false;     // weight_grad += the gradient, in place of weight_grad = it
};

// Throw Error where a shape or dtype does not fit.
void check(const EmbeddingForward&);
void check(const EmbeddingBackward&);

// CPU. check_tokens() throws Error where a token is outside the vocabulary. Backward:
// sort_tokens(), then run() for the rows of weight_grad in the range.
void check_tokens(const TensorView& tokens, int64_t vocabulary);
void run(const EmbeddingForward&, Range tokens);
void sort_tokens(const EmbeddingBackward&);
void run(const EmbeddingBackward&, Range vocabulary);

// CUDA. A token outside the vocabulary gets a row of NaN; in backward it is nobody's. Backward
// includes the sort.
void run(const EmbeddingForward&, Stream);
void run(const EmbeddingBackward&, Stream);

// Elements of the workspace of backward.
namespace cpu {
int64_t embedding_workspace(int64_t tokens, int64_t vocabulary);
}
namespace cuda {
int64_t embedding_workspace(int64_t tokens, int64_t vocabulary, int64_t hidden);
}

}  // namespace redline
