// Rows in blocks of the accumulation type: a kernel reads and writes float or double whatever the
// tensors hold, so that any mixture of dtypes is one instantiation. Memory that is already of the
// accumulation type is used in place; the rest passes through a buffer that stays in L1.
#pragma once

#include "redline/core/tensor_view.h"
#include "redline/kernels/cpu/vector.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// 4 KB of float: five streams stay within an L1 of 32 KB.
constexpr int block_size = 1024;

template <typename Acc>
struct Block {
  alignas(64) Acc values[block_size];
};

template <typename Half>
void widen_block(const Half* from, float* to, int count) {
  for_vectors<float>(count, [&](int i, int n) {
    prefetch(from + i);
    store(to + i, load_half(from + i, n), n);
  });
}

template <typename Half>
void narrow_block(const float* from, Half* to, int count) {
  for_vectors<float>(count, [&](int i, int n) {
    prefetch(to + i);
    store_half(to + i, load(from + i, n), n);
  });
}

// Elements [offset, offset + count) of `data`, count <= block_size, as Acc: in place or in `block`.
template <typename Acc>
const Acc* read(const void* data, DType dtype, int64_t offset, int count, Block<Acc>& block) {
  if constexpr (sizeof(Acc) == 8) {
    return static_cast<const double*>(data) + offset;  // float64 goes with float64 alone
  } else {
    if (dtype == DType::float32) return static_cast<const float*>(data) + offset;
    if (dtype == DType::bfloat16) {
      widen_block(static_cast<const bfloat16*>(data) + offset, block.values, count);
    } else {
      widen_block(static_cast<const float16*>(data) + offset, block.values, count);
    }
    return block.values;
  }
}

// Where to write what finish_write() then leaves in `data`: the memory itself, or `block`.
template <typename Acc>
Acc* begin_write(void* data, DType dtype, int64_t offset, Block<Acc>& block) {
  const bool direct = sizeof(Acc) == 8 || dtype == DType::float32;
  return direct ? static_cast<Acc*>(data) + offset : block.values;
}

template <typename Acc>
void finish_write(void* data, DType dtype, int64_t offset, int count, const Block<Acc>& block) {
  if constexpr (sizeof(Acc) == 4) {
    if (dtype == DType::bfloat16) {
      narrow_block(block.values, static_cast<bfloat16*>(data) + offset, count);
    } else if (dtype == DType::float16) {
      narrow_block(block.values, static_cast<float16*>(data) + offset, count);
    }
  }
}

// Row `row` of a [rows, cols] view, in blocks. Asked for the same block again, as every pass over a
// row of one block does, it does not convert twice.
template <typename Acc>
struct RowReader {
  const TensorView& view;
  int64_t row;
  Block<Acc>& block;
  int64_t held_col = -1;
  const Acc* held = nullptr;

  RowReader(const TensorView& view, int64_t row, Block<Acc>& block)
      : view(view), row(row), block(block) {}

  const Acc* operator()(int64_t col, int count) {
    if (col != held_col) {
      held = read<Acc>(view.data, view.dtype, row * view.strides[0] + col, count, block);
      held_col = col;
    }
    return held;
  }
};

// Calls body(col, count) for each block of [0, cols).
template <typename Body>
REDLINE_INLINE void for_blocks(int64_t cols, Body body) {
  for (int64_t col = 0; col < cols; col += block_size) {
    body(col, static_cast<int>(cols - col < block_size ? cols - col : block_size));
  }
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
