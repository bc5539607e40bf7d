// What the ops of ops/rotary.h run: the view of each layout, and the kernel over it.
#pragma once

#include "redline/ops/torch.h"

namespace redline::ops {

// How the heads of x lie: unpacked (heads is 0), or q, k and v in groups.
struct RotaryPacking {
  int64_t heads = 0;
  int64_t kv_heads = 0;

  explicit operator bool() const { return heads > 0; }
  int64_t group_heads() const { return heads > 0 ? heads / kv_heads + 2 : 1; }
};

struct RotaryInputs {
  at::Tensor cos, sin;
  std::optional<at::Tensor> positions, cu_seqlens;
  std::string_view layout;
  RotaryPacking packing;
  bool interleaved;
  bool split = false;  // q, k and v come out apart

  const char* op() const {
    if (split) return "qkv_rotary_split";
    return packing ? "qkv_rotary" : "rotary";
  }
  const char* tensor() const { return packing ? "qkv" : "x"; }
  bool packed_sequences() const { return layout == "thd"; }
};

// x, or the gradient of y when backward, turned.
at::Tensor rotate(const at::Tensor& x, const RotaryInputs& in, bool backward);

using QueryKeyValue = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// q, k and v of a packed qkv, apart.
QueryKeyValue rotate_apart(const at::Tensor& qkv, const RotaryInputs& in);

// From their gradients the packed one of qkv.
at::Tensor rotate_together(const QueryKeyValue& grads, const RotaryInputs& in);

}  // namespace redline::ops
