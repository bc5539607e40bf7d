// Scaled masked softmax over keys, for attention that is not fused:
//   p_j = e^(scale s_j) / (sum_k e^(scale s_k) + e^sink)   over the keys that are not excluded
// Excluded keys, and every key of a row that has no other, get 0. causal excludes j > i + keys -
// queries (aligned at the bottom right); a window w excludes j <= i + keys - queries - w: the last
// w keys stay; both come from indices. Arithmetic in float32 (float64 for float64), one rounding.
// Backward keeps the probabilities and, with a sink, one float32 per row.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

// Rows are (batch, head, query), the last running fastest.
struct SoftmaxRows {
  int64_t heads = 1;
  int64_t queries = 1;
  double scale = 1;
};

struct SoftmaxForward {
  SoftmaxRows shape;
  TensorView scores;            // [rows, keys]
  TensorView mask;              // [batch, heads, queries, keys] bool, optional; true: excluded
  TensorView sink;              // [heads] accumulation dtype, optional
  TensorView probabilities;     // [rows, keys], out, scores' dtype
  TensorView sink_probability;  // [rows] accumulation dtype, out; with a sink
  int64_t window = 0;           // 0: none
  bool causal = false;
};

//   d = sum_j g_j p_j,   scores_grad_j = scale p_j (g_j - d)
// over the keys that causal and window leave; the others are not read and get 0.
//   sink_grad_h = -sum over the rows of head h of sink_probability d, in index order
struct SoftmaxBackward {
  SoftmaxRows shape;
  TensorView probabilities_grad;  // [rows, keys], g
  TensorView probabilities;       // [rows, keys]
  TensorView sink_probability;    // [rows], optional
  TensorView scores_grad;         // [rows, keys], out
  TensorView sink_rows;           // [rows] accumulation dtype, workspace; with a sink
  TensorView sink_grad;           // [heads] accumulation dtype, out; with a sink
  int64_t window = 0;             // 0: none
  bool causal = false;
};

void check(const SoftmaxForward&);
void check(const SoftmaxBackward&);

// CPU. finish() adds the sink's gradient of the heads of its range.
void run(const SoftmaxForward&, Range rows);
void run(const SoftmaxBackward&, Range rows);
void finish(const SoftmaxBackward&, Range heads);

// CUDA. Backward includes the sink's sum.
void run(const SoftmaxForward&, Stream);
void run(const SoftmaxBackward&, Stream);

// The keys [begin, end) that causal and window leave to query i: a shape's business alone.
static constexpr Range allowed_keys(int64_t query, int64_t queries, int64_t keys, bool causal,
                                    int64_t window) {
  const int64_t diagonal = query + keys - queries;
  int64_t begin = window > 0 ? diagonal - window + 1 : 0;
  int64_t end = causal ? diagonal + 1 : keys;
  begin = begin < 0 ? 0 : begin > keys ? keys : begin;
  end = end < begin ? begin : end > keys ? keys : end;
  return {begin, end};
}

}  // namespace redline
