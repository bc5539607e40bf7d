// What both readers of the logits know of them, and how they walk over a row.
#pragma once

#include "redline/core/dispatch.h"
#include "redline/kernels/cross_entropy.h"
#include "redline/kernels/cuda/device/nonlinearity.cuh"
#include "redline/kernels/cuda/device/realign.cuh"
#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {
namespace {

// 16-bit logits take the hardware's exponential, float32 the library's.
template <typename T>
inline constexpr bool fast = sizeof(T) == 2;

// What a reader does about rows that no 16-byte access may start.
constexpr const char* realigned = "vectors are shifted into place from two loads";

constexpr int in_flight = 4;  // vectors that a thread loads before it uses the first

// What both readers of the logits know of them.
struct Logits {
  const void* data;
  const int64_t* targets;
  int64_t rows, stride, vocab_start, ignore_index;
  int cols;
  float softcap;
};

// Rows go over x and y: their number may pass 2^31.
constexpr int64_t grid_rows = int64_t{1} << 30;

__device__ __forceinline__ int64_t block_row() {
  return int64_t{blockIdx.y} * grid_rows + blockIdx.x;
}

inline dim3 row_grid(int64_t rows, int64_t depth = 1) {
  return dim3(std::min(rows, grid_rows), ceil_div(rows, grid_rows), depth);
}

__device__ __forceinline__ float capped(float x, float softcap) {
  return softcap == 0.0f ? x : softcap * tanhf(x / softcap);
}

__device__ __forceinline__ bool is_class(int64_t target, int64_t vocabulary) {
  return target >= 0 && target < vocabulary;
}

template <typename Args>
Logits logits_of(const Args& args) {
  // A column index may pass the row's end by all blocks' steps.
  REDLINE_CHECK(args.logits.sizes[1] < 1 << 30,
                "cross_entropy: logits: expected fewer than 2^30 columns");
  return {.data = args.logits.data,
          .targets = args.targets.template as<const int64_t>(),
          .rows = args.logits.sizes[0],
          .stride = args.logits.strides[0],
          .vocab_start = args.vocab_start,
          .ignore_index = args.ignore_index,
          .cols = static_cast<int>(args.logits.sizes[1]),
          .softcap = static_cast<float>(args.softcap)};
}

// Threads of a block, by the vectors of a row alone: four per thread where the row has them.
// Smaller blocks end at different times; rows above 65536 16-bit classes come in small numbers too.
template <typename Visit>
void visit_threads(int64_t vectors, Visit visit) {
  note_choice("a block has a row, of ", vectors, " vectors of 16 bytes");
  if (vectors <= 4 * 32) {
    visit.template operator()<32>();
  } else if (vectors <= 4 * 256) {
    visit.template operator()<128>();
  } else if (vectors <= 8192) {
    visit.template operator()<256>();
  } else {
    visit.template operator()<512>();
  }
}

}  // namespace
}  // namespace redline::cuda
