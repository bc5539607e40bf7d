// The cosine and sine tables that rotary position embedding reads.
#pragma once

#include "redline/layers/module.h"

namespace redline::layers {

struct RotaryOptions {
  std::optional<int64_t> dim = {};  // of each head; absent: the whole head; 0: no rotation
  double base = 10000.0;
  int64_t max_positions = 4096;
};

// cos and sin, float32 [positions, dim / 2] whatever the module's dtype: bfloat16 cannot tell
// neighbouring positions apart. Rounded once from float64; they follow their reader's device.
struct RotaryTables {
  RotaryTables() = default;
  RotaryTables(const RotaryOptions& options, int64_t dim);
  void place(torch::Device device);

  Tensor cos, sin;
};

}  // namespace redline::layers
