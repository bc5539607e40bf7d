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
};

struct Backward : Common {
  Matrix y_grad, sum_grad, x_grad;
  float* weight_partial;
  float* bias_partial;
  int64_t chunks;
  Layout layout;
};

// r, mean(g) and mean(g * xh) of a row, with g = y_grad * w and xh = (x - mean) * r.
struct RowMeans {
  float inverse_std, gradient, product;
};

struct RowStatistics {
  float mean, inverse_std;
};

template <bool Layer>
__device__ __forceinline__ RowStatistics statistics_of(const Backward& args, int64_t row) {
  return {Layer ? args.mean[row] : 0.0f, args.inverse_std[row]};
}

// From the sums of g * xh and, for layer, g.
template <bool Layer>
__device__ __forceinline__ RowMeans means_of(const float (&sums)[Layer ? 2 : 1], int cols,
                                             float inverse_std) {
  const float count = static_cast<float>(cols);
  return {inverse_std, Layer ? sums[Layer ? 1 : 0] / count : 0.0f, sums[0] / count};
}

}  // namespace
}  // namespace redline::cuda
