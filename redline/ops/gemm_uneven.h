// Products of padded matrices whose sizes are no whole vectors: a vocabulary of 50257 in rows of
// 50304. The library's kernels for them read element by element (H200, bfloat16, 2816 x 2048 by
// 50257: 5.9 ms, by 50256 0.74), so what is over becomes a product of its own.
#pragma once

#include "redline/ops/gemm.h"

namespace redline::ops {

// The same product in two, in the order in which they run.
struct UnevenSplit {
  GemmOperands first, second;
  // float32 [M, N], or undefined: the sum over K that both wrote in place of a 16-bit out, which
  // would be rounded twice. It is the caller's to copy, or to add.
  at::Tensor sum = {};
};

// Nothing where that gains nothing: rows that are unaligned, sizes of whole vectors, small
// products, an epilogue other than a bias.
std::optional<UnevenSplit> split_uneven(const GemmOperands& operands);

}  // namespace redline::ops
