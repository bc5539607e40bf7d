// The walk of backward kernels that sum over rows, as a bias's gradient does: a block has 32
// vectors of columns and the rows of a chunk, which its warps take in turn, the loads of the next
// rows in flight through shared memory. An `Op` is one of elements.cuh, and says besides:
//   int sums                                  what it sums, per column
//   int blocks_per_sm                         that kernels/column_sums.h has made the chunks for
//   int pieces                                of 16 bytes, of a vector's inputs
//   bool fits_more                            more blocks than that would fit
//   int slots                                 rows of a warp on their way or in use, as they ran
//                                             fastest: about 70 KiB a multiprocessor
//   Op walk(row, col, step)                   itself, its matrices as Matrix::walk() has them
//   Shared shared(Place<A>)                   what the elements of a column have in common
//   float of_row(row)                         what those of a row have, read a row ahead
//   void request(ring, slot, Place<A>)        starts the copies of a row, and goes to the next
//   Input receive(ring, slot)                 what came
//   float run(Place<A>, Input, ColumnRow, float [sums][N])  computes, stores, adds what it sums
//                                             over rows, and goes to the next row; returns its
//                                             part of a sum over the row
// The places of request and run are the walk's: row 0 from column 0 on.
// Op::sums_rows: store_part(row, sum) takes the sum of those parts over the block's columns, where
// wants_parts().
#pragma once

#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/device/row_ring.cuh"
#include "redline/kernels/cuda/elements.cuh"
#include "redline/kernels/cuda/sum_chunks.h"

namespace redline::cuda {
namespace {

constexpr int column_warps = 8, column_threads = 32 * column_warps;

using ColumnRing = RowRing<column_threads, /*Kept=*/true>;

// The warps' sums, in their order, into the chunk's row of `partial`.
template <typename Op>
__device__ __forceinline__ void store_column_sums(float* partial,
                                                  const float (&sums)[Op::sums][Op::size],
                                                  int cols) {
  constexpr int N = Op::size, width = 32 * N;
  __shared__ __align__(16) float scratch[column_warps][width];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int s = 0; s < Op::sums; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[warp][lane * N + i] = sums[s][i];
    __syncthreads();
    const int col = static_cast<int>(blockIdx.x * width + threadIdx.x);
    if (threadIdx.x >= width || col >= cols) continue;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < column_warps; ++w) total += scratch[w][threadIdx.x];
    partial[(int64_t{blockIdx.y} * Op::sums + s) * cols + col] = total;
  }
}

// What a row's elements are computed with: the row and column of the place, of the whole matrix.
template <typename Op>
struct ColumnRow {
  int64_t row;
  int col;
  float of_row;
  const typename Op::Shared& shared;
};

template <typename Op, bool Aligned>
__global__ void __launch_bounds__(column_threads, Op::blocks_per_sm)
    column_kernel(const Op given, float* partial, int64_t rows_per_chunk) {
  extern __shared__ __align__(128) int4 ring_memory[];
  constexpr int slots = Op::slots;
  allow_next_launch();
  const ColumnRing ring(reinterpret_cast<char*>(ring_memory), Op::pieces, slots);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cols = given.extent.cols;
  const int col = static_cast<int>(blockIdx.x * 32 + lane) * Op::size;
  const int64_t end = min(given.extent.rows, (blockIdx.y + 1) * rows_per_chunk);
  int64_t row = blockIdx.y * rows_per_chunk + warp;
  const bool any = col < cols;
  Op op = local(given).walk(row, col, column_warps);
  const Place<Aligned> place = {0, 0, cols - col};
  const auto request = [&](int slot, int64_t wanted) {
    if (any && wanted < end) op.request(ring, slot, place);
    ring.commit();
  };
  float sums[Op::sums][Op::size] = {};
  int slot = 0;
#pragma unroll
  for (int s = 0; s < slots; ++s, slot = ring.after(slot)) request(slot, row + s * column_warps);
  typename Op::Shared shared = {};
  if (any) shared = given.shared(Place<Aligned>{0, col, cols});
  float of_row = row < end ? op.of_row(row) : 0.0f;
  for (; row < end; row += column_warps) {
    const int64_t next = row + column_warps;
    const float of_next = next < end ? op.of_row(next) : 0.0f;
    wait_for_copies(slots - 1);  // all rows that were asked for after this one may be on their way
    float part = 0.0f;
    if (any) {
      const typename Op::Input in = op.receive(ring, slot);
      request(slot, row + slots * column_warps);
      part = op.run(place, in, ColumnRow<Op>{row, col, of_row, shared}, sums);
    }
    if constexpr (Op::sums_rows) {
      if (op.wants_parts()) {
        part = warp_sum(part);
        if (lane == 0) op.store_part(row, part);
      }
    }
    slot = ring.after(slot);
    of_row = of_next;
  }
  store_column_sums<Op>(partial, sums, cols);
}

// So much that no more blocks than the chunks were made for share a multiprocessor: where five of
// six fitted, a sixth of the work ran alone (H100, dropout 16384 x 4096: 0.73 of a copy). Where
// registers see to that, memory is the first-level cache's (gated_activation: 0.02 of a copy).
template <typename Op>
int column_shared_bytes(Stream stream) {
  const int needed = Op::slots * ColumnRing::slot_bytes(Op::pieces);
  const int limit = shared_kib(stream.capability) * 1024;
  return Op::fits_more ? std::max(needed, limit / (Op::blocks_per_sm + 1) + 1024) : needed;
}

// Runs op over the matrix and sums its columns; `sums` hold Op::sums * cols columns.
template <typename Op>
void launch_columns(const Op& op, const ColumnSums& sums, bool aligned, Stream stream) {
  const int64_t chunks = sums.partial.sizes[0];
  note_choice("walk down the rows: column sums of ", chunks, " chunks of rows, fixed by the shape");
  visit_bool(aligned, [&]<bool Aligned>() {
    launch(column_kernel<Op, Aligned>,
           {.grid = dim3(ceil_div(op.extent.vectors, 32), chunks),
            .block = dim3(column_threads),
            .shared_bytes = column_shared_bytes<Op>(stream),
            .stream = stream},
           op, sums.partial.template as<float>(), ceil_div(op.extent.rows, chunks));
  });
  sum_chunks(sums, {}, stream);
}

}  // namespace
}  // namespace redline::cuda
