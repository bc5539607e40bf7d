// The gradient of a row's vectors (kernels/cross_entropy.h).
// Over budget: parameters: scalars in registers; a struct of them would name nothing more.
#pragma once

#include "redline/kernels/cuda/cross_entropy/logits.cuh"

namespace redline::cuda {
namespace {

struct GradientArgs : Logits {
  const float* statistics;
  const float* loss_grad;
  const float* log_sum_exp_grad;
  const float* count;
  void* logits_grad;
  int64_t grad_stride, loss_grad_stride, vocabulary;
  int width;
  float label_smoothing, z_loss;
};

// What one row's gradient is made of: e^(x - maximum) * scale - shift, less `hot` at the target.
struct RowGradient {
  float maximum, scale, shift, hot;
};

// The row's upstream gradient.
__device__ __forceinline__ float upstream_of(const GradientArgs& args, int64_t row,
                                             int64_t target) {
  if (target == args.ignore_index) return 0.0f;
  float upstream = args.loss_grad[row * args.loss_grad_stride];
  if (args.count != nullptr) upstream /= *args.count;
  return is_class(target, args.vocabulary) ? upstream : __int_as_float(0x7fc00000);
}

// From the row's maximum and sum of exponentials.
__device__ __forceinline__ RowGradient row_gradient(const GradientArgs& args, int64_t row,
                                                    float upstream, float maximum,
                                                    float exponentials) {
  float through_lse = upstream;
  if (args.z_loss != 0.0f) {
    through_lse *= 1.0f + 2.0f * args.z_loss * (maximum + logf(exponentials));
  }
  if (args.log_sum_exp_grad != nullptr) through_lse += args.log_sum_exp_grad[row];
  return {maximum, through_lse / exponentials,
          upstream * args.label_smoothing / static_cast<float>(args.vocabulary),
          upstream * (1.0f - args.label_smoothing)};
}

// The gradient of the vector at `col`; `hot_col` is the target's column, or one outside the row.
template <typename T>
__device__ __forceinline__ Packed<T> gradient_vector(const Packed<T>& logits,
                                                     const RowGradient& row, int col, int hot_col,
                                                     float softcap) {
  constexpr int N = vector_size<T>;
  float grad[N];
  const auto one_hot = [&] {
    if (hot_col < col || hot_col >= col + N) return;
#pragma unroll
    for (int i = 0; i < N; ++i) grad[i] -= col + i == hot_col ? row.hot : 0.0f;
  };
  if (softcap == 0.0f) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float e = exponential<fast<T>>(element(logits, i) - row.maximum);
      grad[i] = e * row.scale - row.shift;
    }
    one_hot();
    return pack<T>(grad);
  }
  float slope[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = capped(element(logits, i), softcap);
    grad[i] = exponential<fast<T>>(x - row.maximum) * row.scale - row.shift;
    slope[i] = 1.0f - (x / softcap) * (x / softcap);
  }
  one_hot();
#pragma unroll
  for (int i = 0; i < N; ++i) grad[i] *= slope[i];
  return pack<T>(grad);
}

// Elements [col, col + N) of those within the row; row + col is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void store_inside(T* row, int col, int cols, const Packed<T>& packed) {
  constexpr int N = vector_size<T>;
  if (col >= 0 && col + N <= cols) {
    *reinterpret_cast<Packed<T>*>(row + col) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (col + i >= 0 && col + i < cols) row[col + i] = packed.values[i];
    }
  }
}

inline GradientArgs gradient_args(const CrossEntropyGradient& args) {
  return {logits_of(args),
          args.statistics.as<const float>(),
          args.loss_grad.as<const float>(),
          args.log_sum_exp_grad.as<const float>(),
          args.count.as<const float>(),
          args.logits_grad.data,
          args.logits_grad.strides[0],
          args.loss_grad.strides[0],
          args.vocabulary,
          static_cast<int>(args.statistics.sizes[1]),
          static_cast<float>(args.label_smoothing),
          static_cast<float>(args.z_loss)};
}

}  // namespace
}  // namespace redline::cuda
