// Over budget: template parameters: all but the first two are deduced.
// Over budget: parameters: a row's parts, each in registers; a struct of them would name nothing.
//
// Mean and standard deviation of the rows that norm's forward holds.
#pragma once

#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline::cuda {
namespace {

struct Statistics {
  float mean, inverse_std;
};

// total / cols: the product's error goes back into it, without a division's branches.
__device__ __forceinline__ float mean_of(float total, const Forward& args) {
  const float near = total * args.inverse_cols;
  const float error = fmaf(-near, static_cast<float>(args.cols), total);
  return isinf(near) ? near : fmaf(error, args.inverse_cols, near);
}

// The approximation, within two units, and one step of Newton's method; none where it gives no
// number, at 0 and infinity.
__device__ __forceinline__ float inverse_root(float squares, const Forward& args) {
  const float variance = mean_of(squares, args) + args.epsilon;
  const float near = rsqrtf(variance), error = fmaf(-variance * near, near, 1.0f);
  return fabsf(error) < 1.0f ? fmaf(0.5f * near, error, near) : near;
}

template <bool Layer>
__device__ __forceinline__ Statistics given_statistics(const Forward& args, int64_t row) {
  if (row >= args.rows) return {};
  return {Layer ? args.mean[row] : 0.0f, args.inverse_std[row]};
}

// Adds to sums[p] a thread's elements of the vectors p, p + Parts, ...
template <int Parts, typename In>
__device__ __forceinline__ void add_totals(In& in, float (&sums)[Parts]) {
#pragma unroll In::unroll
  for (int v = 0; v < In::vectors; ++v) {
    const auto held = in.vector(v);
#pragma unroll
    for (int i = 0; i < In::N; ++i) sums[v % Parts] += element(held, i);
  }
  in.forget();
}

// The same of the squares around each part's mean. Elements past the row's end, zeros, are left out
// where there is a mean. `whole`: this row has none.
template <bool Layer, int Parts, typename In, bool Aligned>
__device__ __forceinline__ void add_squares(In& in, const float (&means)[Parts], bool whole,
                                            Columns<Aligned> at, float (&sums)[Parts]) {
#pragma unroll In::unroll
  for (int v = 0; v < In::vectors; ++v) {
    const int col = at.col + v * at.step;
    if (Layer && !whole && col >= at.cols) break;
    const auto held = in.vector(v);
#pragma unroll
    for (int i = 0; i < In::N; ++i) {
      const float x = Layer ? element(held, i) - means[v % Parts] : element(held, i);
      if (!Layer || Aligned || whole || col + i < at.cols) sums[v % Parts] += x * x;
    }
  }
  in.forget();
}

// Within a warp: the mean first, then the squares around it.
template <bool Layer, int Lanes, typename In, int R, bool Aligned>
__device__ __forceinline__ void warp_statistics(const Forward& args, In (&in)[R],
                                                Columns<Aligned> at, Statistics (&found)[R]) {
  const bool whole = args.cols == In::vectors * Lanes * In::N;  // no thread is past the row's end
  float totals[R][1] = {}, squares[R][1] = {};
  if constexpr (Layer) {
#pragma unroll
    for (int r = 0; r < R; ++r) add_totals(in[r], totals[r]);
    warp_sums<Lanes>(totals);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const float mean[1] = {mean_of(totals[r][0], args)};
    add_squares<Layer>(in[r], mean, whole, at, squares[r]);
    found[r].mean = mean[0];
  }
  warp_sums<Lanes>(squares);
#pragma unroll
  for (int r = 0; r < R; ++r) found[r].inverse_std = inverse_root(squares[r][0], args);
}

// How many elements of a row each warp has in each of its parts.
template <typename Tile, int N>
struct PartSizes {
  static constexpr int vectors = Tile::vectors / Tile::parts, most = vectors * 32 * N;
  int cols, step, warps;  // of a block
  bool whole;             // every part is full

  struct Size {
    float elements, inverse;
  };
  // Of part p of warp w: e = p * warps + w, from block to block of the cluster.
  __device__ __forceinline__ Size operator()(int e) const {
    if (whole) return {static_cast<float>(most), 1.0f / static_cast<float>(most)};
    const int width = Tile::parts * warps, rank = Tile::cluster == 1 ? 0 : e / width;
    int elements = 0;
#pragma unroll
    for (int v = 0; v < vectors; ++v) {
      const int first =
          (rank * Tile::vectors + v * Tile::parts) * step + (e - rank * width) * 32 * N;
      elements += min(max(cols - first, 0), 32 * N);
    }
    // A part of nothing has no mean and no weight.
    return {static_cast<float>(elements), __fdividef(1.0f, static_cast<float>(max(elements, 1)))};
  }
};

// Calls body(e) for the entries of a lane, of `count` in all.
template <int Most, typename Body>
__device__ __forceinline__ void for_entries(int count, Body body) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  if constexpr (Most <= 32) {
    if (lane < count) body(lane);
  } else {
    for (int e = lane; e < count; e += 32) body(e);
  }
}

// Over warps. Layer: the squares of each part of a warp are around its own mean, and one exchange
// joins them (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing
// sample variances", 1979).
template <bool Layer, typename Tile, typename Group, typename In, int R, bool Aligned>
__device__ __forceinline__ void shared_statistics(const Forward& args, const Group& group,
                                                  In (&in)[R], Columns<Aligned> at,
                                                  Statistics (&found)[R]) {
  constexpr int P = Tile::parts, most = Tile::cluster * P * Tile::most_threads / 32;
  const int width = P * group.warps, entries = Tile::cluster * width;
  const int rank = Tile::cluster == 1 ? 0 : static_cast<int>(cluster_rank());
  const int own = rank * width + group.warp;
  const bool whole = args.cols == Tile::cluster * Tile::vectors * at.step;
  const PartSizes<Tile, In::N> sizes = {args.cols, at.step, group.warps, whole};
  float totals[R][P] = {}, squares[R][P] = {};
  if constexpr (Layer) {
#pragma unroll
    for (int r = 0; r < R; ++r) add_totals(in[r], totals[r]);
    warp_sums(totals);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    float means[P] = {};
    if constexpr (Layer) {
#pragma unroll
      for (int p = 0; p < P; ++p) {
        means[p] = totals[r][p] * sizes(own + p * group.warps).inverse;
      }
    }
    add_squares<Layer>(in[r], means, whole, at, squares[r]);
  }
  warp_sums(squares);
  const auto slot = [&](int r, int value) { return group.slots + (2 * r + value) * entries; };
#pragma unroll
  for (int k = 0; k < R * P; ++k) {
    const int r = k / P, p = k % P;
    if constexpr (Layer) group.post(totals[r][p], slot(r, 0) + own + p * group.warps);
    group.post(squares[r][p], slot(r, 1) + own + p * group.warps);
  }
  group.sync();
  float joined[R][1] = {};
  if constexpr (Layer) {
    for_entries<most>(entries, [&](int e) {
#pragma unroll
      for (int r = 0; r < R; ++r) joined[r][0] += slot(r, 0)[e];
    });
    warp_sums(joined);
  }
#pragma unroll
  for (int r = 0; r < R; ++r) {
    found[r].mean = mean_of(joined[r][0], args);
    joined[r][0] = 0.0f;
  }
  for_entries<most>(entries, [&](int e) {
    [[maybe_unused]] const auto size = sizes(e);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      joined[r][0] += slot(r, 1)[e];
      if constexpr (Layer) {
        const float off = slot(r, 0)[e] * size.inverse - found[r].mean;
        joined[r][0] += size.elements * off * off;
      }
    }
  });
  warp_sums(joined);
#pragma unroll
  for (int r = 0; r < R; ++r) found[r].inverse_std = inverse_root(joined[r][0], args);
}

// Of the rows first_row, first_row + Tile::groups, ...
template <typename Form, typename Tile, typename Group, typename In, int R, bool Aligned>
__device__ __forceinline__ void find_statistics(const Forward& args, const Group& group,
                                                int64_t first_row, In (&in)[R], Columns<Aligned> at,
                                                Statistics (&found)[R]) {
  if (args.statistics_given) {
#pragma unroll
    for (int r = 0; r < R; ++r) {
      found[r] = given_statistics<Form::layer>(args, first_row + r * Tile::groups);
    }
  } else if constexpr (Tile::lanes != 0) {
    warp_statistics<Form::layer, Tile::lanes>(args, in, at, found);
  } else {
    shared_statistics<Form::layer, Tile>(args, group, in, at, found);
  }
}

}  // namespace
}  // namespace redline::cuda
