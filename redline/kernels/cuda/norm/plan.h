// How the threads of norm's backward share rows.
#pragma once

#include "redline/kernels/cuda/launch.h"

namespace redline::cuda {

constexpr int most_threads = 1024;  // of a block: 64 registers a thread

// Which tile a shape takes, of a kernel for `N` elements a vector: by the columns alone.
enum class Sharing { half_warp, warp, block, pair, eight, walk };

struct Plan {
  Sharing sharing;
  int threads;  // of a group, one vector each
  int groups;   // of a block
  int cluster;
};

inline Plan plan(int64_t vectors, int capability) {
  const auto whole = [](int64_t count) { return static_cast<int>(ceil_div(count, 32) * 32); };
  if (vectors <= 16) return {Sharing::half_warp, 16, most_threads / 16, 1};
  if (vectors <= 32) return {Sharing::warp, 32, most_threads / 32, 1};
  if (vectors <= most_threads) {
    const int threads = whole(vectors);
    return {Sharing::block, threads, most_threads / threads, 1};
  }
  if (capability >= 90 && vectors <= int64_t{2} * most_threads) {
    return {Sharing::pair, whole(ceil_div(vectors, 2)), 1, 2};
  }
  if (capability >= 90 && vectors <= int64_t{8} * most_threads) {
    return {Sharing::eight, whole(ceil_div(vectors, 8)), 1, 8};
  }
  return {Sharing::walk, 0, 1, 1};
}

}  // namespace redline::cuda
