// AdamW (Loshchilov and Hutter, 2019) over a list of tensors: one step of
//   t = step + 1, g = gradient * clip_coefficient / grad_scale
//   m = m + (1 - beta1) * (g - m),  v = v + (1 - beta2) * (g^2 - v)
//   p = p - (lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + epsilon) + lr * weight_decay * p)
// The list is elementwise: no bit depends on how it is cut. Each tensor has its own t; what depends
// on it is computed in float64 on the device, once per tensor; elements in float32 (float64 for
// float64), each output rounded once. With a master, p is the master, the parameter its rounding.
// Nothing is written, and t does not move, when found_inf is not zero.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

// One parameter and what belongs to it: the same number of elements, each adjacent in memory.
struct AdamWTensor {
  void* parameter = nullptr;
  const void* gradient = nullptr;
  void* exp_avg = nullptr;
  void* exp_avg_sq = nullptr;
  float* master = nullptr;  // optional, beside a 16-bit parameter
  float* step = nullptr;    // one element, advanced by one
  int64_t count = 0;
  DType parameter_dtype = DType::float32;
  DType gradient_dtype = DType::float32;
  DType average_dtype = DType::float32;  // of exp_avg and exp_avg_sq: float32 or bfloat16
};

// What the elements of a tensor share.
struct AdamWFactors {
  double gradient;      // clip_coefficient / grad_scale
  double step_size;     // lr / (1 - beta1^t)
  double decay;         // lr * weight_decay
  double inverse_root;  // 1 / sqrt(1 - beta2^t)
  double skip;          // not zero: nothing is written
};

struct AdamWStep {
  const AdamWTensor* tensors = nullptr;  // on the host
  int64_t tensor_count = 0;
  // Device scalars.
  TensorView learning_rate;     // float32 or float64
  TensorView clip_coefficient;  // float32, optional
  TensorView grad_scale;        // float32, optional
  TensorView found_inf;         // float32, optional
  TensorView factors;           // workspace: an AdamWFactors for each tensor
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.01;
};

// Throws Error where a dtype or option does not fit.
void check(const AdamWStep&);

// CPU. begin() advances the steps and writes the factors; run() updates the chunks of its range.
void begin(const AdamWStep&);
void run(const AdamWStep&, Range chunks);

// CUDA. Both.
void run(const AdamWStep&, Stream);

// The list is cut into chunks; a chunk lies within one tensor.
namespace cpu {
inline constexpr int64_t adamw_chunk = 16384;  // elements: the size of a task, 450 KB
int64_t adamw_chunks(const AdamWStep&);
}  // namespace cpu

}  // namespace redline
