// The walk of backward kernels that sum over rows, as a bias's gradient does: a block has 32
// vectors of columns and the rows of a chunk, which its warps take in turn, the loads of the next
// rows in flight through shared memory. An `Op` is one of elements.cuh, and says besides:
//   int sums                                  what it sums, per column
//   int blocks_per_sm                         that kernels/column_sums.h has made the chunks for
//   int pieces                                of 16 bytes, of a vector's inputs
//   bool fits_more                            more blocks than that would fit
//   int slots                                 rows of a warp on their way or in use, as they ran
//                                             fastest: about 70 KiB a multiprocessor
//   void request(ring, slot, Place<A>)        starts their copies
//   Input receive(ring, slot)                 what came
//   float run(Place<A>, Input, float [sums][N])  computes, stores, and adds what it sums over rows;
//                                             returns its part of a sum over the row
// Op::sums_rows: store_part(row, sum) takes the sum of those parts over the block's columns.
#pragma once

#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/device/row_ring.cuh"
#include "redline/kernels/cuda/elements.cuh"
#include "redline/kernels/cuda/sum_chunks.cuh"

namespace redline::cuda {
namespace {

constexpr int column_warps = 8, column_threads = 32 * column_warps;

using ColumnRing = RowRing<column_threads>;

template <typename Op>
__device__ __forceinline__ void store_column_sums(const Op& op, float* partial,
                                                  float (&sums)[Op::sums][Op::size], int col) {
  constexpr int N = Op::size;
  __shared__ float scratch[column_warps][N][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, cols = op.extent.cols;
#pragma unroll
  for (int s = 0; s < Op::sums; ++s) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < N; ++i) scratch[warp][i][lane] = sums[s][i];
    __syncthreads();
    if (warp != 0) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float total = 0.0f;
#pragma unroll
      for (int w = 0; w < column_warps; ++w) total += scratch[w][i][lane];
      const int64_t offset = (int64_t{blockIdx.y} * Op::sums + s) * cols + col + i;
      if (col + i < cols) partial[offset] = total;
    }
  }
}

template <typename Op, bool Aligned>
__global__ void __launch_bounds__(column_threads, Op::blocks_per_sm)
    column_kernel(const Op given, float* partial, int64_t rows_per_chunk) {
  extern __shared__ __align__(128) int4 ring_memory[];
  constexpr int slots = Op::slots;
  allow_next_launch();
  const Op op = local(given);
  const ColumnRing ring(reinterpret_cast<char*>(ring_memory), Op::pieces, slots);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int col = static_cast<int>(blockIdx.x * 32 + lane) * Op::size;
  const int64_t begin = blockIdx.y * rows_per_chunk + warp;
  const int64_t end = min(op.extent.rows, (blockIdx.y + 1) * rows_per_chunk);
  const bool any = col < op.extent.cols;
  const auto place = [&](int64_t row) { return Place<Aligned>{row, col, op.extent.cols}; };
  const auto request = [&](int slot, int64_t row) {
    if (any && row < end) op.request(ring, slot, place(row));
    ring.commit();
  };
  float sums[Op::sums][Op::size] = {};
  int slot = 0;
#pragma unroll
  for (int s = 0; s < slots; ++s, slot = ring.after(slot)) request(slot, begin + s * column_warps);
  for (int64_t row = begin; row < end; row += column_warps) {
    ring.receive();
    float part = 0.0f;
    if (any) part = op.run(place(row), op.receive(ring, slot), sums);
    if constexpr (Op::sums_rows) {
      part = warp_sum(part);
      if (lane == 0) op.store_part(row, part);
    }
    request(slot, row + slots * column_warps);
    slot = ring.after(slot);
  }
  store_column_sums(op, partial, sums, col);
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
