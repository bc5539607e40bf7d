// Over budget: template parameters: all but the first are deduced.
// Over budget: parameters: a row's parts, each in registers; a struct of them would name nothing.
//
// y = (x - m) * r * w + b (kernels/norm.h). The threads of a row hold it in registers: memory is
// read once and written once, by 16-byte accesses, up to four of them in flight per thread. Rows
// that outgrow a cluster of blocks are read again from L2. Bound by bytes; of the floor:
// bench/results.
#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline {
namespace cuda {
namespace {

// How rows are shared. Lanes: threads of a row within a warp; 0: all threads of a block, of each of
// Cluster blocks. Vectors: of 16 bytes, that a thread holds of a row. Rows: that it holds at once.
template <int Lanes, int Vectors, int Rows = 1, int Cluster = 1>
struct Tile {
  static constexpr int lanes = Lanes, vectors = Vectors, rows = Rows, cluster = Cluster;
  static constexpr int most_threads = Lanes == 0 ? 512 : 128;  // of a block
  static constexpr int groups = Lanes == 0 ? 1 : most_threads / Lanes;
};

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

struct Statistics {
  float mean, inverse_std;
};

// Weight and bias of some vectors: zeros where there is no bias.
template <typename T, int V>
struct Scaling {
  static constexpr int N = vector_size<T>;
  float weight[V][N], bias[V][N];

  template <bool Aligned>
  __device__ __forceinline__ void load(const Forward& args, Columns<Aligned> at) {
    load_weight<T>(args, at, weight);
#pragma unroll
    for (int k = 0; k < V * N; ++k) bias[k / N][k % N] = 0.0f;
    if (args.bias.data != nullptr) {
      take_vectors<T>(row_of(args.bias, 0), at, bias,
                      [](float& value, float loaded) { value = loaded; });
    }
  }
};

// Vectors of the row from `first` on, as many as `by` has.
template <bool Layer, typename T, typename Held, int V, int Group, bool Aligned>
__device__ __forceinline__ void store_vectors_of(const Forward& args, int64_t row,
                                                 Columns<Aligned> at,
                                                 const RowInput<T, Held, V>& in, int first,
                                                 const Scaling<T, Group>& by, Statistics found) {
  constexpr int N = vector_size<T>;
  float y[Group][N];
#pragma unroll
  for (int k = 0; k < Group * N; ++k) {
    const float x = in.value(first + k / N, k % N) - (Layer ? found.mean : 0.0f);
    const float normalized = x * found.inverse_std, weight = by.weight[k / N][k % N];
    y[k / N][k % N] = Layer ? fmaf(normalized, weight, by.bias[k / N][k % N]) : normalized * weight;
  }
  store_vectors(row_at<T>(args.y, row), at.from(first), y);
}

// Sixteen parameters at a time: more would not fit the registers.
template <bool Layer, typename T, typename Held, int V, bool Aligned>
__device__ __forceinline__ void store_output(const Forward& args, int64_t row, Columns<Aligned> at,
                                             const RowInput<T, Held, V>& in, Statistics found) {
  constexpr int group = V < 2 || Layer ? 1 : 2;
#pragma unroll
  for (int first = 0; first < V; first += group) {
    Scaling<T, group> by;
    by.load(args, at.from(first));
    store_vectors_of<Layer>(args, row, at, in, first, by, found);
  }
}

__device__ __forceinline__ void store_statistics(const Forward& args, int64_t row,
                                                 Statistics found) {
  if (args.statistics_given) return;
  args.inverse_std[row] = found.inverse_std;
  if (args.mean != nullptr) args.mean[row] = found.mean;
}

template <bool Layer>
__device__ __forceinline__ Statistics given_statistics(const Forward& args, int64_t row) {
  if (row >= args.rows) return {};
  return {Layer ? args.mean[row] : 0.0f, args.inverse_std[row]};
}

// Rows from the device's row count on.
template <typename T, int V, bool Aligned>
__device__ void zero_row(const Forward& args, int64_t row, Columns<Aligned> at) {
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (col >= args.cols) break;
    store_zeros<Aligned, T>(args.y, row, col, args);
    if (args.sum.data != nullptr) store_zeros<Aligned, T>(args.sum, row, col, args);
  }
  if (at.col == 0) store_statistics(args, row, {});
}

__device__ __forceinline__ float inverse_root(float squares, const Forward& args) {
  return 1.0f / sqrtf(squares / args.cols + args.epsilon);
}

// Within a warp: the mean first, then the squares around it.
template <bool Layer, typename Group, typename In, bool Aligned>
__device__ __forceinline__ Statistics warp_statistics(const Forward& args, const Group& group,
                                                      In& in, Columns<Aligned> at) {
  float mean = 0.0f;  // rms: the compiler drops it
  if constexpr (Layer) {
    const float total = in.total();
    in.forget();
    mean = group.sum(total, nullptr) / args.cols;
  }
  const float squares = in.squares(mean, at);
  in.forget();
  return {mean, inverse_root(group.sum(squares, nullptr), args)};
}

// Over warps: each one's squares are around its own mean, and one exchange joins them (Chan, Golub
// and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances", 1979).
template <typename Tile, typename Group, typename In, bool Aligned>
__device__ __forceinline__ Statistics joined_statistics(const Forward& args, const Group& group,
                                                        In& in, Columns<Aligned> at) {
  constexpr int V = Tile::vectors, N = In::N;
  const int warp_cols = 32 * N;  // of one vector of each lane
  const bool full = args.cols == Group::slot_count(group.warps) * V * warp_cols;
  const auto count = [&](int e) {  // elements that warp e of the row holds
    if (full) return static_cast<float>(V * warp_cols);
    const int rank = e / group.warps, warp = e - rank * group.warps;
    int elements = 0;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int col = (rank * V + v) * at.step + warp * warp_cols;
      elements += min(max(args.cols - col, 0), warp_cols);
    }
    return static_cast<float>(max(elements, 1));
  };
  const int own = static_cast<int>(cluster_rank()) * group.warps + group.warp;
  float found[2] = {warp_sum(in.total()), 0.0f};
  in.forget();
  found[1] = warp_sum(in.squares(__fdividef(found[0], count(own)), at));
  in.forget();
  group.share(found, group.slots);
  const int warps = Group::slot_count(group.warps), lane = static_cast<int>(threadIdx.x) % 32;
  float squares = 0.0f;
  const float mean = group.shared_sum(group.slots) / args.cols;
  for (int e = lane; e < warps; e += 32) {
    const float elements = count(e), off = __fdividef(group.slots[e], elements) - mean;
    squares += group.slots[warps + e] + elements * off * off;
  }
  return {mean, inverse_root(warp_sum(squares), args)};
}

template <typename Form, typename Tile, typename Group, typename In, bool Aligned>
__device__ __forceinline__ Statistics statistics_of(const Forward& args, const Group& group,
                                                    int64_t row, In& in, Columns<Aligned> at) {
  if (args.statistics_given) return given_statistics<Form::layer>(args, row);
  if constexpr (Tile::lanes != 0) return warp_statistics<Form::layer>(args, group, in, at);
  if constexpr (Form::layer) return joined_statistics<Tile>(args, group, in, at);
  float squares[1] = {in.squares(0.0f, at)};
  in.forget();
  squares[0] = warp_sum(squares[0]);
  group.share(squares, group.slots);
  return {0.0f, inverse_root(group.shared_sum(group.slots), args)};
}

template <typename Form, typename Tile>
__global__ void __launch_bounds__(Tile::most_threads, blocks_per_sm<Form, Tile>)
    forward_kernel(const Forward args) {
  using T = typename Form::T;
  using Group = RowGroup<Tile::lanes, Tile::cluster>;
  constexpr int N = vector_size<T>, V = Tile::vectors, R = Tile::rows, L = Tile::lanes;
  __shared__ float slots[L == 0 ? 2 * Group::slot_count(Tile::most_threads / 32) : 1];
  if constexpr (Tile::cluster > 1) cluster_arrive();  // the others' shared memory is there
  const int threads = L == 0 ? static_cast<int>(blockDim.x) : L;
  const int thread = static_cast<int>(threadIdx.x) % threads;
  const int first = static_cast<int>(cluster_rank()) * V * threads + thread;  // of its vectors
  const Columns<Form::aligned> at = {first * N, threads * N, args.cols};
  const int64_t first_row = int64_t{blockIdx.x / Tile::cluster} * (Tile::groups * R) +
                            static_cast<int>(threadIdx.x) / threads;
  const int64_t counted = counted_rows(args);
  const Group group = {slots, thread / 32, threads / 32};

  RowInput<T, typename Form::X, V> in[R] = {};
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first_row + r * Tile::groups;
    if (row < counted) in[r].load(args, row, at);
  }
  if constexpr (Tile::cluster > 1) cluster_wait();
  constexpr bool keeps_scaling = R > 1 && V == 1;  // of several rows: read once
  Scaling<T, 1> by;
  if constexpr (keeps_scaling) by.load(args, at);
#pragma unroll
  for (int r = 0; r < R; ++r) {
    const int64_t row = first_row + r * Tile::groups;
    const Statistics found = statistics_of<Form, Tile>(args, group, row, in[r], at);
    if (row >= args.rows) continue;
    if (row >= counted) {
      zero_row<T, V>(args, row, at);
      continue;
    }
    if (at.col == 0) store_statistics(args, row, found);
    if constexpr (keeps_scaling) {
      store_vectors_of<Form::layer>(args, row, at, in[r], 0, by, found);
    } else {
      store_output<Form::layer>(args, row, at, in[r], found);
    }
  }
}

// Of a row that a block reads once more for every sum, through `in`. `at` gives the columns of a
// thread from its column `first` on.
template <typename Form, int Threads, typename In, typename At>
__device__ __forceinline__ Statistics long_statistics(const Forward& args, int64_t row, In& in,
                                                      int first, int stride, At at) {
  __shared__ float scratch[2][32];
  float total[1] = {}, squares[1] = {};
  for (int col = first; col < args.cols; col += stride) {
    in.load(args, row, at(col));
    total[0] += in.total();
    squares[0] += in.squares(0.0f, at(col));
  }
  float mean = 0.0f;
  if constexpr (Form::layer) {
    block_sum<Threads>(total, scratch[0]);
    mean = total[0] / args.cols;
    squares[0] = 0.0f;
    for (int col = first; col < args.cols; col += stride) {
      in.reload(args, row, at(col));
      squares[0] += in.squares(mean, at(col));
    }
  }
  block_sum<Threads>(squares, scratch[1]);
  return {mean, inverse_root(squares[0], args)};
}

// Rows that outgrow the registers of a cluster, or of a block where there are no clusters.
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_forward_kernel(const Forward args) {
  using T = typename Form::T;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>, V = 2, step = Threads * N, stride = V * step;
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N;
  const auto at = [&](int col) { return Columns<Aligned>{col, step, args.cols}; };
  if (row >= counted_rows(args)) {
    for (int col = first; col < args.cols; col += stride) zero_row<T, V>(args, row, at(col));
    return;
  }
  RowInput<T, typename Form::X, V> in;
  const Statistics found = args.statistics_given
                               ? given_statistics<Layer>(args, row)
                               : long_statistics<Form, Threads>(args, row, in, first, stride, at);
  if (threadIdx.x == 0) store_statistics(args, row, found);
  constexpr int W = Aligned ? V : 1;  // registers
  RowInput<T, typename Form::X, W> again;
#pragma unroll 1
  for (int col = first; col < args.cols; col += W * step) {
    again.reload(args, row, at(col));
    store_output<Layer>(args, row, at(col), again, found);
  }
}

template <typename Form, typename Tile>
void launch_tile(const Forward& args, int threads, Stream stream) {
  note_sharing(args.cols, Tile::lanes, Tile::cluster);
  launch(forward_kernel<Form, Tile>,
         {.grid = dim3(ceil_div(args.rows, Tile::groups * Tile::rows) * Tile::cluster),
          .block = dim3(threads),
          .cluster = Tile::cluster,
          .stream = stream},
         args);
}

// Threads of a block of V vectors each that hold `vectors`: whole warps.
template <int V>
int block_threads(int64_t vectors) {
  return static_cast<int>(ceil_div(vectors, V * 32) * 32);
}

// Narrow rows lie within a warp, several at once; then a block has a row, then a cluster.
template <typename Form>
void launch_forward(const Forward& args, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<typename Form::T>);
  if (vectors <= 16) return launch_tile<Form, Tile<16, 1, 4>>(args, 128, stream);
  if (vectors <= 32) return launch_tile<Form, Tile<32, 1, 4>>(args, 128, stream);
  if (vectors <= 64) return launch_tile<Form, Tile<32, 2, 2>>(args, 128, stream);
  if (vectors <= 128) return launch_tile<Form, Tile<32, 4>>(args, 128, stream);
  if (vectors <= 4 * 512)
    return launch_tile<Form, Tile<0, 4>>(args, block_threads<4>(vectors), stream);
  if (stream.capability >= 90 && vectors <= 8 * 4 * 512) {  // small blocks: one loads, one stores
    return launch_tile<Form, Tile<0, 4, 1, 8>>(args, block_threads<4>(ceil_div(vectors, 8)),
                                               stream);
  }
  note_walk(args.cols);
  launch(long_forward_kernel<Form, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
}

template <typename T, bool Layer>
void choose_forward(const Forward& args, bool aligned, Stream stream) {
  if (!aligned) return launch_forward<Form<T, float, Layer, false>>(args, stream);
  if constexpr (sizeof(T) == 2) {
    const Matrix& normalized = args.residual.data == nullptr ? args.x : args.sum;
    if (!normalized.is_float32) {
      return launch_forward<Form<T, T, Layer, true>>(args, stream);
    }
  }
  launch_forward<Form<T, float, Layer, true>>(args, stream);
}

}  // namespace
}  // namespace cuda

void run(const NormForward& norm, Stream stream) {
  using namespace cuda;
  const bool aligned = are_aligned(name(norm.norm), {{"x", &norm.x},
                                                     {"residual", &norm.residual},
                                                     {"sum", &norm.sum},
                                                     {"weight", &norm.weight},
                                                     {"bias", &norm.bias},
                                                     {"y", &norm.y}});
  const Forward args = {common(norm, norm.x), matrix(norm.residual),
                        matrix(norm.sum),     matrix(norm.bias),
                        matrix(norm.y),       static_cast<float>(norm.epsilon),
                        norm.statistics_given};
  visit_dtype<float, bfloat16, float16>("norm", norm.y.dtype, [&]<typename T>() {
    visit_bool(norm.norm == Norm::layer,
               [&]<bool layer>() { choose_forward<device_type<T>, layer>(args, aligned, stream); });
  });
}

}  // namespace redline
