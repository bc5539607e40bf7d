// What all kernels of norm's backward know of a row.
#pragma once

#include "redline/kernels/cuda/norm/row.cuh"

namespace redline::cuda {
namespace {

// How rows lie in a block's threads and shared memory.
struct Layout {
  int threads, groups;  // threads of a group, which shares a row
  int slots;            // rows of a group on their way or in use
  int pieces;           // of 16 bytes, per thread and row
  int ring_bytes;       // of all groups
  // From row to row, in bytes: one multiplication of 32 bits gives an address.
  uint32_t x, y_grad, sum_grad, x_grad, y;
};

// Where nothing stands behind x_grad.
struct Nothing {
  template <typename Form, int N>
  __device__ __forceinline__ void store(uint32_t, Columns<Form::aligned>,
                                        const float (&)[1][N]) const {}
};

struct Backward : Common {
  Matrix y_grad, sum_grad, x_grad, bias, y;  // bias: y's alone
  float* weight_partial;
  float* bias_partial;
  int64_t chunks;
  float inverse_cols;
  Layout layout;

  __device__ __forceinline__ Nothing behind() const { return {}; }
};

// The bias of one vector; `bias` is left as it is where there is none.
template <typename T, bool Aligned>
__device__ __forceinline__ void load_bias(const Backward& args, Columns<Aligned> at,
                                          float (&bias)[1][vector_size<T>]) {
  if (args.bias.data == nullptr) return;
  take_vectors<T>(row_of(args.bias, 0), at, bias,
                  [](float& value, float loaded) { value = loaded; });
}

template <typename T>
__device__ __forceinline__ float bias_at(const Backward& args, int col) {
  if (args.bias.data == nullptr) return 0.0f;
  return args.bias.is_float32 ? static_cast<const float*>(args.bias.data)[col]
                              : to_float(static_cast<const T*>(args.bias.data)[col]);
}

struct RowStatistics {
  float mean, inverse_std;
};

template <bool Layer>
__device__ __forceinline__ RowStatistics statistics_of(const Backward& args, int64_t row) {
  return {Layer ? args.mean[row] : 0.0f, args.inverse_std[row]};
}

// x_grad of a row: r * (g - mean(g) - (x - mean) * (r * mean(g * xh))), with g = y_grad * w and
// xh = (x - mean) * r: the factor of a row once a row.
struct RowGradient {
  RowStatistics of;
  float product, gradient;  // r * mean(g * xh), mean(g)

  __device__ __forceinline__ float value(float weight, float y_grad, float x) const {
    return fmaf(weight, y_grad, -fmaf(x - of.mean, product, gradient)) * of.inverse_std;
  }
};

// From the sums of g * xh and, for layer, g.
template <bool Layer>
__device__ __forceinline__ RowGradient row_gradient(RowStatistics of,
                                                    const float (&sums)[Layer ? 2 : 1],
                                                    float inverse_cols) {
  return {of, of.inverse_std * (sums[0] * inverse_cols),
          Layer ? sums[Layer ? 1 : 0] * inverse_cols : 0.0f};
}

// One vector of a row as it lies in memory, widened element by element: registers.
template <typename Form>
struct RowVector {
  using T = typename Form::T;
  using X = typename Form::X;
  static constexpr int N = vector_size<T>, sum_count = Form::layer ? 2 : 1;
  RowStatistics of;
  Packed<X, N> raw_x;
  Packed<T, N> raw_y_grad;

  __device__ __forceinline__ float y_grad(int i) const { return element(raw_y_grad, i); }
  __device__ __forceinline__ float x(int i) const { return element(raw_x, i); }
  __device__ __forceinline__ float normalized(int i) const {
    return (x(i) - of.mean) * of.inverse_std;
  }
  // Adds element i to the sums over the row, of g * xh and g.
  __device__ __forceinline__ void add(int i, float weight, float (&sums)[sum_count]) const {
    const float g = weight * y_grad(i);
    sums[0] = fmaf(g, normalized(i), sums[0]);
    if constexpr (Form::layer) sums[1] += g;
  }
  // y, with forward's bits: the same operations.
  __device__ __forceinline__ float y(int i, float weight, float bias) const {
    return Form::layer ? fmaf(normalized(i), weight, bias) : normalized(i) * weight;
  }
};

}  // namespace
}  // namespace redline::cuda
