// Over budget: template parameters: all but the first are deduced.
// Over budget: parameters: a row's parts, each in registers; a struct of them would name nothing.
//
// y = (x - m) * r * w + b (kernels/norm.h). The threads of a row hold it in registers, or a cluster
// of blocks in shared memory: memory is read once and written once, by 16-byte accesses, up to four
// of them in flight per thread, eight to shared memory. Rows that outgrow both are read again from
// L2. Bound by bytes; of the floor: bench/results.
#pragma once

#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/norm/forward_statistics.cuh"
#include "redline/kernels/cuda/norm/row_amax.cuh"
#include "redline/kernels/cuda/norm/scaling.cuh"
#include "redline/kernels/cuda/norm/shared_row_input.cuh"

namespace redline::cuda {
namespace {

// How rows are shared. Lanes: threads of a row within a warp, or 0: all threads of a block.
// Vectors: of 16 bytes, that a thread holds of a row. Rows: that it holds at once. Parts: sums that
// it makes of a row, of vector v in part v % Parts, so that they are added in the order of Parts
// times as many threads.
template <int Lanes, int Vectors, int Rows = 1, int Parts = 1>
struct Tile {
  static constexpr int lanes = Lanes, vectors = Vectors, rows = Rows, parts = Parts, cluster = 1;
  static constexpr int most_threads = Lanes == 0 ? 512 : 128;  // of a block
  static constexpr int groups = Lanes == 0 ? 1 : most_threads / Lanes;
};

// A row of the blocks of a cluster, in their shared memory.
struct ClusterTile : Tile<0, 8> {
  static constexpr int cluster = 4;
};

template <typename T, typename X, bool Layer, bool Aligned>
struct AmaxForm : Form<T, X, Layer, Aligned> {
  static constexpr bool amax = true;
};

template <typename Form, typename Tile>
using InputOf =
    std::conditional_t<Tile::cluster == 1,
                       RowInput<typename Form::T, typename Form::X, Tile::vectors>,
                       SharedRowInput<typename Form::T, typename Form::X, Tile::vectors>>;

// 64 registers a thread, 128 where it holds float32 besides 16-bit data or single elements. Code
// for sm_80 needs a few more.
#if __CUDA_ARCH__ >= 900
inline constexpr int threads_per_sm = 1024;
#else
inline constexpr int threads_per_sm = 768;
#endif

template <typename Form, typename Tile>
inline constexpr int blocks_per_sm =
    (Form::aligned && sizeof(typename Form::T) == sizeof(typename Form::X) ? threads_per_sm : 512) /
    Tile::most_threads;

__device__ __forceinline__ void store_statistics(const Forward& args, int64_t row,
                                                 Statistics found) {
  if (args.statistics_given) return;
  args.inverse_std[row] = found.inverse_std;
  if (args.mean != nullptr) args.mean[row] = found.mean;
}

// Vector v of the row.
template <typename Form, typename T, typename In, bool Aligned>
__device__ __forceinline__ void store_output(const Forward& args, int64_t row, Columns<Aligned> at,
                                             const In& in, int v, const Scaling<T>& by,
                                             Statistics found, RowAmax<Form::amax>& amax) {
  constexpr bool Layer = Form::layer;
  constexpr int N = vector_size<T>;
  const auto held = in.vector(v);
  float y[1][N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = Layer ? element(held, i) - found.mean : element(held, i);
    const float normalized = x * found.inverse_std, weight = by.weight[0][i];
    y[0][i] = Layer ? fmaf(normalized, weight, by.bias[0][i]) : normalized * weight;
  }
  store_vectors(row_at<T>(args.y, row), at.from(v), y);
  amax.add(y[0], at.from(v));
}

template <typename Form, typename Tile>
__global__ void __launch_bounds__(Tile::most_threads, blocks_per_sm<Form, Tile>)
    forward_kernel(const typename Form::ForwardArgs args) {
  using T = typename Form::T;
  using Group = RowGroup<Tile::lanes, Tile::cluster>;
  constexpr int N = vector_size<T>, V = Tile::vectors, R = Tile::rows, L = Tile::lanes;
  constexpr int most_warps = L == 0 ? Tile::cluster * Tile::most_threads / 32 : 0;
  __shared__ float slots[L == 0 ? 2 * R * Tile::parts * most_warps : 1];
  extern __shared__ __align__(128) int4 row_memory[];  // of a cluster's
  __shared__ uint32_t block_amax[Form::amax && L == 0 ? R : 1];
  wait_for_previous_launch();
  allow_next_launch_of_many();
  if constexpr (Form::amax && L == 0) {
    if (threadIdx.x < R) block_amax[threadIdx.x] = 0;
  }
  if constexpr (Tile::cluster > 1) cluster_arrive();  // the others' shared memory is there
  const int threads = L == 0 ? static_cast<int>(blockDim.x) : L;
  const int group_index = L == 0 ? 0 : static_cast<int>(threadIdx.x / L);
  const int thread = static_cast<int>(threadIdx.x) - group_index * threads;
  const int rank = Tile::cluster == 1 ? 0 : static_cast<int>(cluster_rank());
  const int first = rank * V * threads + thread;  // of its vectors
  const Columns<Form::aligned> at = {first * N, threads * N, args.cols};
  const int64_t first_row = int64_t{blockIdx.x / Tile::cluster} * (Tile::groups * R) + group_index;
  const int64_t counted = counted_rows(args);
  const Group group = {slots, static_cast<int>(threadIdx.x / 32), threads / 32};

  InputOf<Form, Tile> in[R] = {};
  if constexpr (Tile::cluster > 1) in[0].place(row_memory);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first_row + r * Tile::groups;
    if (row < counted) args.source().fill(in[r], args, row, at);
  }
  constexpr int early = L == 0 && V <= 2 && Form::aligned ? V : 0;  // as registers allow
  ScalingSource<Form::layer, T, early> scaling;
  scaling.load(args, at);
  if constexpr (Tile::cluster > 1) {
    if (first_row < counted) in[0].receive(args, first_row, at);
    cluster_wait();
  }
  Statistics found[R];
  find_statistics<Form, Tile>(args, group, first_row, in, at, found);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first_row + r * Tile::groups;
    if (at.col == 0 && row < counted) store_statistics(args, row, found[r]);
  }
  RowAmax<Form::amax> amax[R];
  constexpr int unroll = InputOf<Form, Tile>::unroll;
#pragma unroll unroll
  for (int v = 0; v < V; ++v) {
    if (at.col + v * at.step >= args.cols) break;
    const Scaling<T> by = scaling.take(args, at.from(v), v);
#pragma unroll
    for (int r = 0; r < R; ++r) {
      const int64_t row = first_row + r * Tile::groups;
      if (row < counted) store_output<Form>(args, row, at, in[r], v, by, found[r], amax[r]);
    }
  }
  if constexpr (Form::amax) store_amaxes<Form, Tile>(args, group, first_row, at, amax, block_amax);
}

// Of a row that a block reads once more for every sum, through `in`. `at` gives the columns of a
// thread from its column `first` on.
template <typename Form, int Threads, typename In, typename At>
__device__ __forceinline__ Statistics long_statistics(const Forward& args, int64_t row, In& in,
                                                      int first, int stride, At at) {
  __shared__ float scratch[2][32];
  float sum[1] = {}, mean[1] = {};
  const auto add_up =
      [&](auto add) {  // in two levels: a long row is thousands of elements a thread
        sum[0] = 0.0f;
        for (int col = first; col < args.cols; col += stride) {
          float part[1] = {};
          add(at(col), part);
          sum[0] += part[0];
        }
      };
  if constexpr (Form::layer) {
    add_up([&](auto at, float(&part)[1]) {
      in.load(args, row, at);
      add_totals(in, part);
    });
    block_sum<Threads>(sum, scratch[0]);
    mean[0] = mean_of(sum[0], args);
  }
  add_up([&](auto at, float(&part)[1]) {
    Form::layer ? in.reload(args, row, at) : in.load(args, row, at);
    add_squares<Form::layer>(in, mean, false, at, part);
  });
  block_sum<Threads>(sum, scratch[1]);
  return {mean[0], inverse_root(sum[0], args)};
}

// Rows that outgrow a cluster's shared memory, or a block's registers where there are no clusters.
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_forward_kernel(const Forward args) {
  using T = typename Form::T;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>, V = 2, step = Threads * N, stride = V * step;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N;
  const auto at = [&](int col) { return Columns<Aligned>{col, step, args.cols}; };
  if (row >= counted_rows(args)) return;
  __shared__ uint32_t block_amax[1];
  if constexpr (Form::amax) {
    if (threadIdx.x == 0) block_amax[0] = 0;
  }
  RowInput<T, typename Form::X, V> in;
  const Statistics found = args.statistics_given
                               ? given_statistics<Layer>(args, row)
                               : long_statistics<Form, Threads>(args, row, in, first, stride, at);
  if (threadIdx.x == 0) store_statistics(args, row, found);
  constexpr int W = Aligned && !Form::amax ? V : 1;  // registers
  RowInput<T, typename Form::X, W> again;
  ScalingSource<Layer, T, 0> scaling;
  scaling.load(args, at(first));
  RowAmax<Form::amax> amax[1];
#pragma unroll 1
  for (int col = first; col < args.cols; col += W * step) {
    again.reload(args, row, at(col));
#pragma unroll
    for (int v = 0; v < W; ++v) {
      if (col + v * step >= args.cols) break;
      const Scaling<T> by = scaling.take(args, at(col).from(v), v);
      store_output<Form>(args, row, at(col), again, v, by, found, amax[0]);
    }
  }
  if constexpr (Form::amax) {
    const RowGroup<0, 1> group = {};
    store_amaxes<Form, Tile<0, V>>(args, group, row, at(first), amax, block_amax);
  }
}

template <typename Form, typename Tile>
void launch_tile(const typename Form::ForwardArgs& args, int threads, Stream stream) {
  int shared_bytes = 0;
  if constexpr (Tile::cluster > 1) {
    shared_bytes = InputOf<Form, Tile>::bytes(threads);
  }
  note_sharing(args.cols, Tile::lanes, Tile::cluster);
  launch(forward_kernel<Form, Tile>,
         {.grid = dim3(ceil_div(args.rows, Tile::groups * Tile::rows) * Tile::cluster),
          .block = dim3(threads),
          .shared_bytes = shared_bytes,
          .cluster = Tile::cluster,
          .overlap_previous = true,
          .stream = stream},
         args);
}

// Threads of a block of V vectors each that hold `vectors`: whole warps.
template <int V>
int block_threads(int64_t vectors) {
  return static_cast<int>(ceil_div(vectors, V * 32) * 32);
}

// A row of a block, of a multiple of 64 vectors. All three give the same bits: two vectors a
// thread, or four in two parts. Few rows wait for nothing but themselves: scaling on its way early.
// Of many, rms without a residual holds two at once, the others have no registers for it (of a
// copy, 16384 x 4096, H200: rms 0.97, four vectors 0.95; layer 0.90, 0.95; residual rms 0.96,
// 0.98).
template <typename Form>
void launch_block(const typename Form::ForwardArgs& args, int threads, Stream stream) {
  if (args.rows <= 4 * stream.sm_count) {
    return launch_tile<Form, Tile<0, 2>>(args, 2 * threads, stream);
  }
  if constexpr (!Form::layer && std::is_same_v<typename Form::ForwardArgs, Forward>) {
    if (args.residual.data == nullptr) {
      return launch_tile<Form, Tile<0, 2, 2>>(args, 2 * threads, stream);
    }
  }
  launch_tile<Form, Tile<0, 4, 1, 2>>(args, threads, stream);
}

// Narrow rows lie within a warp, several at once; then a block has a row, or two. False, and
// nothing launched, where a row outgrows its registers.
template <typename Form>
bool launch_held(const typename Form::ForwardArgs& args, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<typename Form::T>);
  constexpr int rows = Form::layer && Form::amax ? 3 : 4;  // with four amaxes 8 to 16 bytes spill
  if (vectors <= 16) {
    launch_tile<Form, Tile<16, 1, rows>>(args, 128, stream);
  } else if (vectors <= 32) {
    launch_tile<Form, Tile<32, 1, rows>>(args, 128, stream);
  } else if (vectors <= 64) {
    launch_tile<Form, Tile<32, 2, 2>>(args, 128, stream);
  } else if (vectors <= 128) {
    launch_tile<Form, Tile<32, 4>>(args, 128, stream);
  } else if (vectors <= 2 * 512) {
    launch_block<Form>(args, block_threads<4>(vectors), stream);
  } else if (vectors <= 4 * 512) {
    launch_tile<Form, Tile<0, 4>>(args, block_threads<4>(vectors), stream);
  } else {
    return false;
  }
  return true;
}

// Then a cluster has a row.
template <typename Form>
void launch_forward(const Forward& args, Stream stream) {
  if (launch_held<Form>(args, stream)) return;
  const int64_t vectors = ceil_div(args.cols, vector_size<typename Form::T>);
  const int threads = block_threads<8>(ceil_div(vectors, 4));
  if (stream.capability >= 90 && threads <= ClusterTile::most_threads &&
      InputOf<Form, ClusterTile>::bytes(threads) <= (shared_kib(stream.capability) - 2) * 1024) {
    launch_tile<Form, ClusterTile>(args, threads, stream);
    return;
  }
  note_walk(args.cols);
  launch(long_forward_kernel<Form, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
}

inline bool is_aligned(const NormForward& norm) {
  return are_aligned(name(norm.norm), {{"x", &norm.x},
                                       {"residual", &norm.residual},
                                       {"sum", &norm.sum},
                                       {"weight", &norm.weight},
                                       {"bias", &norm.bias},
                                       {"y", &norm.y},
                                       {"input_bias", &norm.input_bias}});
}

inline Forward arguments(const NormForward& norm) {
  return {common(norm, norm.x),
          matrix(norm.residual),
          matrix(norm.sum),
          matrix(norm.bias),
          matrix(norm.y),
          static_cast<float>(norm.epsilon),
          1.0f / static_cast<float>(norm.x.sizes[1]),
          norm.statistics_given,
          norm.quantized.amax.as<float>()};
}

}  // namespace
}  // namespace redline::cuda
