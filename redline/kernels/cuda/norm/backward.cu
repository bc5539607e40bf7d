// Over budget: parameters: what a block keeps in registers, beside its arguments.
//
// x_grad, weight_grad and bias_grad of norm (kernels/norm.h). One block a multiprocessor; its
// groups of threads take rows in turn, the loads of the next rows in flight through shared memory,
// from which a row is read twice: for the sums over it and for x_grad. Registers hold the group's
// part of the weight's gradient until the rows end; a second launch adds the blocks' parts in
// order. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/device/row_ring.cuh"
#include "redline/kernels/cuda/norm/long_backward.cuh"
#include "redline/kernels/cuda/sum_chunks.cuh"

namespace redline {
namespace cuda {
namespace {

constexpr int most_threads = 1024;           // of a block: 64 registers a thread
constexpr int most_groups = 15;              // of whole warps: a named barrier each
constexpr int shared_limit = 219 * 1024;     // of a block's 227 on sm_90, without its arrays
constexpr int shared_limit_80 = 155 * 1024;  // of 163 on sm_80

// Lanes: threads of a row within a warp, or 0: whole warps of a block, of each of Cluster blocks. A
// thread has one vector of the row: two of them for rms, whose sums are half of layer's, ran at
// 0.88 of a copy where layer with one ran at 0.93 (H100, 16384 x 4096 bfloat16).
template <int Lanes, int Cluster = 1>
struct Tile {
  static constexpr int lanes = Lanes, cluster = Cluster;
};

// A thread's pieces of a row in the ring, by the first of each tensor's.
template <typename Form>
struct RowPieces {
  using T = typename Form::T;
  using X = typename Form::X;
  static constexpr int N = vector_size<T>, x_size = sizeof(Packed<X, N>) / 16;
  static constexpr int x = 0, y_grad = x_size, sum_grad = x_size + 1;

  static constexpr int count(bool has_sum_grad) { return sum_grad + (has_sum_grad ? x_size : 0); }
};

template <typename Form>
__device__ __forceinline__ void request_row(const Backward& args, RowRing& ring, int64_t row,
                                            bool any, int col) {
  using Pieces = RowPieces<Form>;
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr int N = vector_size<T>;
  constexpr bool Aligned = Form::aligned;
  const int left = args.cols - col;
  if (any && left > 0) {
    ring.request<Aligned, X, N>(Pieces::x, row_at<const X>(args.x, row) + col, left);
    ring.request<Aligned, T, N>(Pieces::y_grad, row_at<const T>(args.y_grad, row) + col, left);
    if (args.sum_grad.data != nullptr) {
      ring.request<Aligned, X, N>(Pieces::sum_grad, row_at<const X>(args.sum_grad, row) + col,
                                  left);
    }
  }
  ring.commit();
}

// The weight as float32 in shared memory, where all groups of the block read it: [N / 4][threads]
// quadruples.
template <typename T>
struct WeightTable {
  static constexpr int N = vector_size<T>;
  float4* memory;
  int threads, thread;

  template <bool Aligned>
  __device__ __forceinline__ void fill(const Backward& args, Columns<Aligned> at) const {
    float w[1][N];
    load_weight<T>(args, at, w);
#pragma unroll
    for (int k = 0; k < N; k += 4) {
      memory[k / 4 * threads + thread] =
          make_float4(w[0][k], w[0][k + 1], w[0][k + 2], w[0][k + 3]);
    }
  }
  // The weight of element i, a constant: one load for four of them, held no longer than they need.
  __device__ __forceinline__ float at(int i) const {
    return reinterpret_cast<const float*>(memory + i / 4 * threads + thread)[i % 4];
  }
};

// A thread's part of one row, in the ring: both passes over it.
template <typename Form>
struct RowTerms {
  using T = typename Form::T;
  using X = typename Form::X;
  using Pieces = RowPieces<Form>;
  static constexpr int N = vector_size<T>;
  static constexpr bool Layer = Form::layer;
  const RowRing& ring;
  const WeightTable<T>& weight;
  int slot;
  RowStatistics of;

  // Of a thread whose vector lies in the row; the ring holds nothing for the others.
  __device__ __forceinline__ void load(float (&y_grad)[N], float (&normalized)[N]) const {
    const Packed<X, N> x = ring.read<X, N>(slot, Pieces::x);
    const Packed<T, N> upstream = ring.read<T, N>(slot, Pieces::y_grad);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      y_grad[i] = to_float(upstream.values[i]);
      normalized[i] = (to_float(x.values[i]) - of.mean) * of.inverse_std;
    }
  }

  // Adds to the sums over this row, g * xh and g, and to those over rows, y_grad * xh and y_grad.
  __device__ __forceinline__ void sum(float (&sums)[Layer ? 2 : 1], float (&weight_sums)[N],
                                      float (&bias_sums)[N]) const {
    float y_grad[N], normalized[N];
    load(y_grad, normalized);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float g = weight.at(i) * y_grad[i];
      weight_sums[i] += y_grad[i] * normalized[i];
      sums[0] += g * normalized[i];
      if constexpr (Layer) {
        bias_sums[i] += y_grad[i];
        sums[1] += g;
      }
    }
  }

  // x_grad; the residual's gradient joins before the rounding.
  __device__ __forceinline__ void store(const Backward& args, int64_t index,
                                        Columns<Form::aligned> at, RowMeans means) const {
    float y_grad[N], normalized[N], out[1][N];
    load(y_grad, normalized);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      float g = weight.at(i) * y_grad[i] - normalized[i] * means.product;
      if constexpr (Layer) g -= means.gradient;
      out[0][i] = g * means.inverse_std;
    }
    if (args.sum_grad.data != nullptr) {
      const Packed<X, N> sum_grad = ring.read<X, N>(slot, Pieces::sum_grad);
#pragma unroll
      for (int i = 0; i < N; ++i) out[0][i] += to_float(sum_grad.values[i]);
    }
    store_vectors(row_at<X>(args.x_grad, index), at, out);
  }
};

// The block's sums, group after group, into its chunk's row of `partial`. `exchange` is the ring's
// memory, which nothing is on its way to any more.
template <int N, bool Aligned>
__device__ __forceinline__ void store_partial(float* partial, const Backward& args, int64_t chunk,
                                              const float (&sums)[N], Columns<Aligned> at,
                                              float* exchange) {
  if (partial == nullptr) return;
  const int width = at.step, group = static_cast<int>(threadIdx.x) * N / width;
  const int place = static_cast<int>(threadIdx.x) * N % width;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    *reinterpret_cast<float4*>(exchange + group * width + place + i) =
        make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __syncthreads();
  const int first = at.col - place;  // this block's first column
  float* row = partial + chunk * args.cols + first;
  for (int col = threadIdx.x; col < min(width, args.cols - first); col += blockDim.x) {
    float total = 0.0f;
    for (int g = 0; g < args.layout.groups; ++g) total += exchange[g * width + col];
    row[col] = total;
  }
}

// How many of the rows row, row + stride, ... lie below `end`.
__device__ __forceinline__ int rows_from(int64_t row, int64_t end, int64_t stride) {
  return row < end ? static_cast<int>((end - row - 1) / stride) + 1 : 0;
}

template <typename Form, typename Tile>
__global__ void __launch_bounds__(most_threads, 1) backward_kernel(const Backward args) {
  using T = typename Form::T;
  using Group = RowGroup<Tile::lanes, Tile::cluster>;
  constexpr bool Layer = Form::layer;
  constexpr int N = vector_size<T>, sum_count = Layer ? 2 : 1;
  extern __shared__ int4 ring_memory[];
  __shared__ float scratch[2][2 * Group::post_count(32)];
  __shared__ ByteBarrier arrived[2];  // across blocks: of either scratch
  allow_next_launch();
  if constexpr (Tile::cluster > 1) {
    if (threadIdx.x < 2) arrived[threadIdx.x].init();
    cluster_arrive();
  }
  const Layout& layout = args.layout;
  const int threads = Tile::lanes == 0 ? layout.threads : Tile::lanes;
  const int group = Tile::cluster > 1 ? 0 : static_cast<int>(threadIdx.x) / threads;
  const int thread = static_cast<int>(threadIdx.x) - group * threads;
  const int first = static_cast<int>(cluster_rank()) * threads + thread;  // of the row's vectors
  const Columns<Form::aligned> at = {first * N, threads * N, args.cols};
  const int groups = Tile::cluster > 1 ? 1 : layout.groups;
  const int64_t stride = args.chunks * groups, chunk = blockIdx.x / Tile::cluster;
  int64_t row = chunk * groups + group;
  int left = rows_from(row, counted_rows(args), stride);  // of this group, from `row` on

  RowRing ring(ring_memory + group * layout.slots * layout.pieces * threads, layout.pieces, threads,
               thread, layout.slots);
  for (int k = 0; k < layout.slots; ++k) {
    request_row<Form>(args, ring, row + k * stride, k < left, at.col);
  }
  const WeightTable<T> weight = {reinterpret_cast<float4*>(ring_memory) + layout.ring_bytes / 16,
                                 threads, thread};
  if (group == 0) weight.fill(args, at);
  float weight_sums[N] = {}, bias_sums[N] = {}, sums[sum_count] = {};
  RowStatistics following = {};  // of the next row, loaded a row ahead of its use
  if (left > 1 && Form::aligned) following = statistics_of<Layer>(args, row + stride);
  const Group sharing = {nullptr, thread / 32, threads / 32, groups > 1 ? group + 1 : 0};
  __syncthreads();
  if constexpr (Tile::cluster > 1) cluster_wait();
  const auto sum_next = [&](RowStatistics of) {
    ring.receive();
    const RowTerms<Form> terms = {ring, weight, ring.last(), of};
    if (at.col < at.cols) terms.sum(sums, weight_sums, bias_sums);
  };
  if (left > 0) sum_next(statistics_of<Layer>(args, row));
  // The first pass over the next row stands between a row's sums and their use: no one waits.
  for (int turn = 0; left > 0; row += stride, --left, turn = (turn + 1) % 4) {
    float row_sums[sum_count];
#pragma unroll
    for (int k = 0; k < sum_count; ++k) {
      row_sums[k] = sums[k];
      sums[k] = 0.0f;
    }
    float* slots = scratch[turn % 2] + group * Group::post_count(threads / 32) * sum_count;
    sharing.post(row_sums, slots, arrived + turn % 2);
    const int slot = ring.last();
    if (left > 1) {
      if (!Form::aligned) following = statistics_of<Layer>(args, row + stride);  // no registers
      sum_next(following);
    }
    // Read again rather than held: registers.
    const RowTerms<Form> terms = {ring, weight, slot, statistics_of<Layer>(args, row)};
    if (left > 2 && Form::aligned) following = statistics_of<Layer>(args, row + 2 * stride);
    sharing.collect(row_sums, slots, arrived + turn % 2, turn / 2);
    const RowMeans means = means_of<Layer>(row_sums, args.cols, terms.of.inverse_std);
    if (at.col < at.cols) terms.store(args, row, at, means);
    request_row<Form>(args, ring, row + layout.slots * stride, left > layout.slots, at.col);
  }
  for (; row < args.rows; row += stride) {
    if (at.col < at.cols) store_zeros<Form::aligned, T>(args.x_grad, row, at.col, args);
  }
  float* exchange = reinterpret_cast<float*>(ring_memory);
  store_partial(args.weight_partial, args, chunk, weight_sums, at, exchange);
  if constexpr (Layer) store_partial(args.bias_partial, args, chunk, bias_sums, at, exchange);
}

// --- choice -------------------------------------------------------------------------------------

// Which tile a shape takes, of a kernel for `N` elements a vector: by the columns alone.
enum class Sharing { half_warp, warp, block, pair, eight, walk };

struct Plan {
  Sharing sharing;
  int threads;  // of a group, one vector each
  int groups;   // of a block
  int cluster;
};

Plan plan(int64_t vectors, int capability) {
  const auto whole = [](int64_t count) { return static_cast<int>(ceil_div(count, 32) * 32); };
  if (vectors <= 16) return {Sharing::half_warp, 16, most_threads / 16, 1};
  if (vectors <= 32) return {Sharing::warp, 32, most_threads / 32, 1};
  if (vectors <= most_threads) {
    const int threads = whole(vectors);
    return {Sharing::block, threads, std::min(most_groups, most_threads / threads), 1};
  }
  if (capability >= 90 && vectors <= 2 * most_threads) {
    return {Sharing::pair, whole(ceil_div(vectors, 2)), 1, 2};
  }
  if (capability >= 90 && vectors <= 8 * most_threads) {
    return {Sharing::eight, whole(ceil_div(vectors, 8)), 1, 8};
  }
  return {Sharing::walk, 0, 1, 1};
}

template <typename Form, typename Tile>
void launch_tile(Backward args, const Plan& plan, Stream stream) {
  using Pieces = RowPieces<Form>;
  Layout& layout = args.layout;
  const int block = plan.threads * plan.groups;
  const int table = plan.threads * Pieces::N * static_cast<int>(sizeof(float));
  const int limit = stream.capability >= 90 ? shared_limit : shared_limit_80;
  layout.threads = plan.threads;
  layout.groups = plan.groups;
  layout.pieces = Pieces::count(args.sum_grad.data != nullptr);
  // Two rows at once for narrow ones, of which a block has many: more ran slower (H100, 1M x 128:
  // 0.93 of a copy, with three 0.90); three for wide ones (16384 x 4096: 0.89, with two 0.84).
  layout.slots = Tile::lanes != 0 ? 2 : 3;
  if (layout.slots * layout.pieces * block * 16 + table > limit) layout.slots = 2;
  layout.ring_bytes = layout.slots * layout.pieces * block * 16;
  launch(backward_kernel<Form, Tile>,
         {.grid = dim3(args.chunks * Tile::cluster),
          .block = dim3(block),
          .shared_bytes = layout.ring_bytes + table,
          .cluster = Tile::cluster,
          .stream = stream},
         args);
}

template <typename Form>
void launch_backward(const Backward& args, Stream stream) {
  using T = typename Form::T;
  const Plan chosen = plan(ceil_div(args.cols, vector_size<T>), stream.capability);
  switch (chosen.sharing) {
    case Sharing::half_warp:
      return launch_tile<Form, Tile<16>>(args, chosen, stream);
    case Sharing::warp:
      return launch_tile<Form, Tile<32>>(args, chosen, stream);
    case Sharing::block:
      return launch_tile<Form, Tile<0>>(args, chosen, stream);
    case Sharing::pair:
      return launch_tile<Form, Tile<0, 2>>(args, chosen, stream);
    case Sharing::eight:
      return launch_tile<Form, Tile<0, 8>>(args, chosen, stream);
    case Sharing::walk:
      return launch_long_backward<Form>(args, stream);
  }
}

template <typename T>
void choose_backward(const Backward& args, bool is_wide, bool layer, bool aligned, Stream stream) {
  visit_bool(layer, [&]<bool Layer>() {
    visit_bool(aligned, [&]<bool Aligned>() {
      if constexpr (sizeof(T) == 2) {
        if (is_wide) return launch_backward<Form<T, float, Layer, Aligned>>(args, stream);
      }
      launch_backward<Form<T, T, Layer, Aligned>>(args, stream);
    });
  });
}

}  // namespace

// A block for each of the 132 multiprocessors of an H100, or as many clusters as it runs at once
// (of eight blocks, 15: with 16, two rounds, 1024 x 65536 took 271 us and with 15 176); constants,
// not questions to the device: the order of the sum over rows must not change from one GPU to the
// next.
int64_t norm_chunks(DType y_grad, int64_t rows, int64_t cols, int capability) {
  const Plan chosen = plan(ceil_div(cols, 16 / element_bytes(y_grad)), capability);
  const int64_t most = chosen.cluster == 8 ? 15 : 132 / chosen.cluster;
  return std::clamp<int64_t>(ceil_div(rows, chosen.groups), 1, most);
}

}  // namespace cuda

void run(const NormBackward& norm, Stream stream) {
  using namespace cuda;
  const bool aligned =
      is_aligned({&norm.x, &norm.y_grad, &norm.weight, &norm.sum_grad, &norm.x_grad});
  const TensorView& partial = norm.weight_partial ? norm.weight_partial : norm.bias_partial;
  const int64_t chunks =
      partial ? partial.sizes[0]
              : norm_chunks(norm.y_grad.dtype, norm.x.sizes[0], norm.x.sizes[1], stream.capability);
  const Backward args = {common(norm, norm.x),
                         matrix(norm.y_grad),
                         matrix(norm.sum_grad),
                         matrix(norm.x_grad),
                         norm.weight_partial.as<float>(),
                         norm.bias_partial.as<float>(),
                         chunks,
                         {}};
  visit_dtype<float, bfloat16, float16>("norm", norm.y_grad.dtype, [&]<typename T>() {
    choose_backward<device_type<T>>(args, norm.x.dtype == DType::float32, norm.norm == Norm::layer,
                                    aligned, stream);
  });
  sum_chunks({norm.weight_partial, norm.weight_grad}, {norm.bias_partial, norm.bias_grad}, stream);
}

}  // namespace redline
