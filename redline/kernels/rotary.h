// Rotary position embedding (Su et al., "RoFormer", 2021). With c = cos[p, i] and s = sin[p, i] of
// the token's position p, each pair (a, b) of a head's first rotary_dim elements turns into
//   (a c - b s, b c + a s);   backward: (a c + b s, b c - a s)
// The pair i is (x[i], x[i + rotary_dim / 2]), or (x[2 i], x[2 i + 1]) when interleaved. The other
// elements are copied. Arithmetic in float32 (float64 for float64), one rounding at the end.
// Backward needs the tables and the positions alone: nothing is kept per token.
#pragma once

#include "redline/core/stream.h"
#include "redline/core/tensor_view.h"

namespace redline {

// Heads come in groups: the first `rotated_heads` of each `group_heads` turn, the rest are copied.
// Packed q, k and v of one key head are a group: its q heads and k turn, v does not.
// The position of token (o, i) is positions[o, i] where positions are given; otherwise, where
// cu_seqlens are given, i less the last boundary at or before it; otherwise o or i. A token before
// the first boundary or from the last one on belongs to no sequence and is copied.
struct Rotary {
  TensorView x;         // [outer, inner, heads, head_dim], head_dim adjacent, any other strides
  TensorView cos = {};  // [positions, rotary_dim / 2] float32, contiguous
  TensorView sin = {};  // [positions, rotary_dim / 2] float32, contiguous
  TensorView positions = {};   // [outer, inner] int64 or int32, any strides, optional
  TensorView cu_seqlens = {};  // [sequences + 1] int64 or int32, contiguous, optional; outer is 1
  TensorView y;                // [outer, inner, heads, head_dim], out, x's dtype
  // Where they are given y (backward: x) has the q heads alone, and these have the last two heads
  // of each group: [outer, inner, groups, head_dim] as x is (backward: inputs, else out).
  TensorView k = {}, v = {};
  // Where they are given, a second tensor's heads turn by the same tables and positions: x's sizes
  // and dtype but for the heads. Heads are no groups then.
  TensorView second_x = {}, second_y = {};
  int sequence_axis = 1;  // the axis of x that counts positions: 0 or 1
  int64_t group_heads = 1;
  int64_t rotated_heads = 1;
  bool interleaved = false;
  bool backward = false;  // x holds the gradient of the output, y gets the input's
};

// The side that has every head.
inline const TensorView& whole(const Rotary& args) {
  return args.k && args.backward ? args.y : args.x;
}

inline bool is_empty(const Rotary& args) {
  return whole(args).numel() == 0 && (!args.second_x || args.second_x.numel() == 0);
}

// Heads of a token.
inline int64_t all_heads(const Rotary& args) {
  return whole(args).sizes[2] + (args.second_x ? args.second_x.sizes[2] : 0);
}

// Throws Error where a shape or dtype does not fit.
void check(const Rotary&);

// CPU. check_positions() throws Error where a token's position is outside the tables; run() turns
// the tokens outer * inner of the range.
void check_positions(const Rotary&);
void run(const Rotary&, Range tokens);

// CUDA. A token whose position is outside the tables gets NaN in place of what would turn.
void run(const Rotary&, Stream);

}  // namespace redline
