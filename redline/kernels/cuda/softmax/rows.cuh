// What both directions of softmax know of rows, and how threads share them.
#pragma once

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/divisor.cuh"
#include "redline/kernels/cuda/device/row_group.cuh"
#include "redline/kernels/cuda/device/vector.cuh"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/softmax.h"

namespace redline::cuda {
namespace {

struct Shape {
  int64_t rows, heads, queries;
  Divisor per_head, per_batch;  // by queries and by heads
  int cols;
  float scale;
  int64_t window;
  bool causal;

  // The row's query, head and batch. A division by a variable costs as much as the row's
  // arithmetic.
  struct Place {
    int64_t query, head, batch;
  };
  __device__ __forceinline__ Place place(int64_t row) const {
    if (rows <= INT32_MAX) {
      const uint32_t index = static_cast<uint32_t>(row), all = per_head.quotient(index);
      return {per_head.remainder(index), per_batch.remainder(all), per_batch.quotient(all)};
    }
    const int64_t all = row / queries;
    return {row % queries, all % heads, all / heads};
  }
};

// The keys that causal and window leave to a row.
struct Keys {
  int begin, end;

  __device__ __forceinline__ bool touch(int col, int count) const {
    return col < end && col + count > begin;
  }
  __device__ __forceinline__ bool hold(int col) const { return col >= begin && col < end; }
};

__device__ __forceinline__ Keys keys_of(const Shape& shape, int64_t query) {
  const Range keys = allowed_keys(query, shape.queries, shape.cols, shape.causal, shape.window);
  return {static_cast<int>(keys.begin), static_cast<int>(keys.end)};
}

constexpr int64_t grid_rows = int64_t{1} << 30;

__device__ __forceinline__ int64_t block_row() {
  return int64_t{blockIdx.y} * grid_rows + blockIdx.x;
}

// The threads of a row: a warp's, or whole warps of a block.
template <int Lanes>
struct RowThreads {
  static_assert(Lanes == 0 || Lanes == 32);
  static constexpr int most_threads = Lanes == 0 ? 384 : 128;  // of a block
  static constexpr int rows = Lanes == 0 ? 1 : most_threads / Lanes;
  int thread, threads;
  int64_t row;
  RowGroup<Lanes, 1> group;

  __device__ __forceinline__ explicit RowThreads(float* slots) {
    const int index = Lanes == 0 ? 0 : static_cast<int>(threadIdx.x / 32);  // of the block's rows
    threads = Lanes == 0 ? static_cast<int>(blockDim.x) : Lanes;
    thread = static_cast<int>(threadIdx.x) - index * threads;
    row = block_row() * rows + index;
    group = {slots, static_cast<int>(threadIdx.x / 32), threads / 32};
  }
};

template <typename Args>
Shape shape_of(const Args& args, const TensorView& matrix) {
  const SoftmaxRows& rows = args.shape;
  // A column index may pass the row's end by one block's step.
  REDLINE_CHECK(matrix.sizes[1] < INT32_MAX - 65536,
                "softmax: scores: expected rows below 2^31 - 65536 keys");
  const auto divisor = [](int64_t by) {
    return Divisor(static_cast<uint32_t>(std::clamp<int64_t>(by, 1, INT32_MAX)));
  };
  return {.rows = matrix.sizes[0],
          .heads = rows.heads,
          .queries = rows.queries,
          .per_head = divisor(rows.queries),
          .per_batch = divisor(rows.heads),
          .cols = static_cast<int>(matrix.sizes[1]),
          .scale = static_cast<float>(rows.scale),
          .window = args.window,
          .causal = args.causal};
}

LaunchConfig config_of(int64_t blocks, int threads, Stream stream) {
  return {.grid = dim3(std::min(blocks, grid_rows), ceil_div(blocks, grid_rows)),
          .block = dim3(threads),
          .stream = stream};
}

// Calls visit.operator()<Lanes, V>(blocks, threads) for the narrowest sharing that holds a row of
// `vectors`, or returns false.
template <typename Visit>
bool visit_sharing(int64_t vectors, int64_t rows, Visit visit) {
  const int64_t warps = ceil_div(rows, RowThreads<32>::rows);
  const bool held = vectors <= 4 * RowThreads<0>::most_threads;
  note_choice("a row of ", vectors, " vectors of 16 bytes ",
              vectors <= 4 * 32 ? "fits a warp"
              : held            ? "fits a block"
                                : "outgrows a block's registers: read again from L2");
  if (vectors <= 32) {
    visit.template operator()<32, 1>(warps, RowThreads<32>::most_threads);
  } else if (vectors <= 4 * 32) {
    visit.template operator()<32, 4>(warps, RowThreads<32>::most_threads);
  } else if (held) {
    visit.template operator()<0, 4>(rows, static_cast<int>(ceil_div(vectors, 4 * 32) * 32));
  }
  return held;
}

}  // namespace
}  // namespace redline::cuda
