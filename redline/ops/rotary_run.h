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

// What turns: x; the q and k of a packed qkv, which stays packed, or comes apart; q and k.
enum class RotaryForm { one, packed, apart, pair };

struct RotaryInputs {
  at::Tensor cos, sin;
  std::optional<at::Tensor> positions, cu_seqlens;
  std::string_view layout;
  RotaryPacking packing;
  bool interleaved;
  RotaryForm form = RotaryForm::one;

  const char* op() const {
    constexpr const char* names[] = {"rotary", "qkv_rotary", "qkv_rotary_split", "rotary_pair"};
    return names[static_cast<int>(form)];
  }
  // The name of x, or of the first of a pair.
  const char* tensor() const {
    if (form == RotaryForm::pair) return "q";
    return packing ? "qkv" : "x";
  }
  bool packed_sequences() const { return layout == "thd"; }
};

// x, or the gradient of y when backward, turned.
at::Tensor rotate(const at::Tensor& x, const RotaryInputs& in, bool backward);

using QueryAndKey = std::tuple<at::Tensor, at::Tensor>;

// Both of q and k, or their gradients when backward, turned.
QueryAndKey rotate_pair(const at::Tensor& q, const at::Tensor& k, const RotaryInputs& in,
                        bool backward);

using QueryKeyValue = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// q, k and v of a packed qkv, apart.
QueryKeyValue rotate_apart(const at::Tensor& qkv, const RotaryInputs& in);

// From their gradients the packed one of qkv.
at::Tensor rotate_together(const QueryKeyValue& grads, const RotaryInputs& in);

}  // namespace redline::ops
