// The norm of a list of gradients, as of one long vector, and what clipping by it needs:
//   norm = sqrt(sum of g^2),  coefficient = min(1, max_norm / (norm + 1e-6)),  g = g * coefficient
// Squares are summed in float64: chunk by chunk within each tensor, then the chunks in one fixed
// order. Infinities and NaN come through. AdamW takes the coefficient (kernels/adamw.h), so that
// gradients are read once for the norm and never rewritten; the third form stands alone.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

// Elements that are adjacent in memory. Of any floating dtype, float64 on the CPU alone.
struct GradientTensor {
  void* data = nullptr;
  int64_t count = 0;
  DType dtype = DType::float32;
};

struct GradientList {
  const GradientTensor* tensors = nullptr;  // on the host
  int64_t tensor_count = 0;
};

// The list is cut into chunks; a chunk lies within one tensor.
inline constexpr int64_t gradient_chunk = 32768;  // elements
int64_t gradient_chunks(const GradientList&);

struct GradientNorm {
  GradientList gradients;
  TensorView partial;  // [gradient_chunks] float64, workspace
  TensorView norm;     // [] float32 or float64, out
};

struct ClipCoefficient {
  TensorView norm;         // [] float32 or float64
  TensorView coefficient;  // [] float32, out
  double max_norm = 1.0;
};

struct ScaleGradients {
  GradientList gradients;
  TensorView coefficient;  // [] float32; 1 leaves memory alone
};

// Throw Error where a dtype or option does not fit.
void check(const GradientNorm&);
void check(const ClipCoefficient&);
void check(const ScaleGradients&);

// CPU. GradientNorm: the partial sums of the chunks of the range; finish() then writes the norm.
void run(const GradientNorm&, Range chunks);
void finish(const GradientNorm&);
void run(const ClipCoefficient&);
void run(const ScaleGradients&, Range chunks);

// CUDA. GradientNorm includes the sum over the chunks.
void run(const GradientNorm&, Stream);
void run(const ClipCoefficient&, Stream);
void run(const ScaleGradients&, Stream);

}  // namespace redline
