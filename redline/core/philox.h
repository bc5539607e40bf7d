// The state of the counter-based random numbers of one call.
#pragma once

#include <cstdint>

namespace redline {

// Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). `state`
// points at {seed, offset} on the device that runs the kernel: graphs replay with a new pair.
struct PhiloxState {
  const int64_t* state = nullptr;
};

}  // namespace redline
