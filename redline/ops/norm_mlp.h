// act(norm(x) W1^T + b1) W2^T + b2 as one node. Kept for backward: x (the sum, with a residual),
// the norm's one float32 per row (layer: two), and the pre-activation norm(x) W1^T, nothing else;
// the normalised input and the activation's output are rebuilt, bit for bit.
// Refuses what does not fit with redline::Error or c10::Error before any memory is touched.
#pragma once

#include "redline/ops/linear.h"
#include "redline/ops/norm_part.h"

namespace redline::ops {

struct MlpParameters {
  at::Tensor fc1_weight;                    // [ffn, in], or gated: [gate; linear] [2 ffn, in]
  std::optional<at::Tensor> fc1_bias = {};  // fc1_weight's dtype or float32
  at::Tensor fc2_weight;                    // [out, ffn]
  std::optional<at::Tensor> fc2_bias = {};
};

struct NormMlpOptions {
  std::optional<at::Tensor> residual = {};  // added to x first; x's dtype or float32
  NormPartOptions norm = {};
  std::string activation = "swiglu";  // a kind of activation or gated_activation
  WeightGradientOptions fc1_gradient = {}, fc2_gradient = {};
  // What the pre-activation is kept in for backward. Absent: as fc1 gives it; others are not built.
  std::optional<at::ScalarType> pre_activation_dtype = {};
};

struct NormMlpOutput {
  at::Tensor y;    // [..., out]
  at::Tensor sum;  // x + residual; undefined without a residual
};

// Refuses another dtype than the one that is built.
void check_pre_activation_dtype(const char* op, std::optional<at::ScalarType> dtype);

// x [..., in]; the weights of x's dtype, or of 16 bits beside a float32 x.
NormMlpOutput norm_mlp(const at::Tensor& x, const NormParameters& norm, const MlpParameters& mlp,
                       const NormMlpOptions& options = {});

}  // namespace redline::ops
