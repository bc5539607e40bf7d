// x_grad, weight_grad and bias_grad of norm (kernels/norm.h). A fixed number of blocks walk over
// the rows of their chunks, the next two rows' loads in flight; the weight and its gradient stay in
// registers until the chunk ends; a second launch adds the chunks in order. Bound by bytes; of the
// floor: bench/results.
#include "redline/kernels/cuda/device/row_ring.cuh"
#include "redline/kernels/cuda/norm/row.cuh"
#include "redline/kernels/cuda/sum_chunks.cuh"

namespace redline {
namespace cuda {
namespace {

// Threads that share a row and 16-byte vectors that each of them holds. Registers, 128 a thread:
// one float per element for the weight, each parameter's sum, g and xh.
template <int Threads, int Vectors>
struct Tile {
  static constexpr int threads = Threads, vectors = Vectors;
  static constexpr int rows = Threads == 32 ? 4 : 1;  // rows in flight in a block, a warp each
  static constexpr int block_threads = Threads * rows;
  static constexpr int blocks_per_sm = 512 / block_threads;
};

struct Backward : Common {
  Matrix y_grad, sum_grad, x_grad;
  float* weight_partial;
  float* bias_partial;
  int64_t chunks;
};

template <typename S>
__device__ __forceinline__ S* row_at(const Matrix& of, int64_t row) {
  return static_cast<S*>(of.data) + row * of.stride;
}

template <typename T, typename X, int V, bool Aligned>
__device__ __forceinline__ void load_row(const Backward& args, int64_t row, Columns<Aligned> at,
                                         RowPair<X, T, V>& out) {
  load_vectors(row_at<const X>(args.x, row), at, out.x);
  load_vectors(row_at<const T>(args.y_grad, row), at, out.y);
}

// The rows of a chunk in turn: through a ring where 16-byte accesses are legal.
template <typename T, typename X, typename Tile, bool Aligned>
struct Feed {
  using Ring = RowRing<X, T, Tile::vectors, Tile::block_threads>;
  static constexpr int shared_bytes = Ring::shared_bytes;
  Ring ring;

  __device__ __forceinline__ Feed(void* shared) : ring(shared) {}
  __device__ __forceinline__ void request(const Backward& args, int64_t row, int64_t end,
                                          Columns<true> at) {
    const bool any = row < end;
    ring.request(any ? row_at<const X>(args.x, row) : nullptr,
                 any ? row_at<const T>(args.y_grad, row) : nullptr, at);
  }
  __device__ __forceinline__ void receive(const Backward&, int64_t, Columns<true> at,
                                          RowPair<X, T, Tile::vectors>& out) {
    ring.receive(out, at);
  }
};

template <typename T, typename X, typename Tile>
struct Feed<T, X, Tile, false> {
  static constexpr int shared_bytes = 0;
  __device__ __forceinline__ Feed(void*) {}
  __device__ __forceinline__ void request(const Backward&, int64_t, int64_t, Columns<false>) {}
  __device__ __forceinline__ void receive(const Backward& args, int64_t row, Columns<false> at,
                                          RowPair<X, T, Tile::vectors>& out) {
    load_row(args, row, at, out);
  }
};

// r, mean(g) and mean(g * xh) of a row, with g = y_grad * w and xh = (x - mean) * r.
struct RowMeans {
  float inverse_std, gradient, product;
};

struct RowStatistics {
  float mean, inverse_std;
};

template <bool Layer>
__device__ __forceinline__ RowStatistics statistics_of(const Backward& args, int64_t row) {
  return {Layer ? args.mean[row] : 0.0f, args.inverse_std[row]};
}

// g and xh of a row; the products that the sums over rows take on the way.
template <typename T, bool Layer, int V>
struct RowTerms {
  static constexpr int N = vector_size<T>;
  float g[V][N], normalized[V][N];

  template <typename X, typename Visit>
  __device__ __forceinline__ void compute(const float (&weight)[V][N], RowStatistics of,
                                          const RowPair<X, T, V>& in, Visit visit) {
#pragma unroll
    for (int k = 0; k < V * N; ++k) {
      const int v = k / N, i = k % N;
      const float y_grad = to_float(in.y[v].values[i]);  // zero past the row's end
      normalized[v][i] = (to_float(in.x[v].values[i]) - of.mean) * of.inverse_std;
      g[v][i] = weight[v][i] * y_grad;
      visit(v, i, y_grad, y_grad * normalized[v][i]);
    }
  }

  // Adds g * xh and g.
  __device__ __forceinline__ void add_to(float (&sums)[Layer ? 2 : 1]) const {
#pragma unroll
    for (int k = 0; k < V * N; ++k) {
      sums[0] += g[k / N][k % N] * normalized[k / N][k % N];
      if constexpr (Layer) sums[1] += g[k / N][k % N];
    }
  }

  // x_grad; the residual's gradient joins before the rounding.
  template <typename X, bool Aligned>
  __device__ __forceinline__ void store_x_grad(const Backward& args, int64_t row,
                                               Columns<Aligned> at, RowMeans means,
                                               const Packed<X, N> (&sum_grad)[V]) {
#pragma unroll
    for (int k = 0; k < V * N; ++k) {
      float& value = g[k / N][k % N];
      value -= normalized[k / N][k % N] * means.product;
      if constexpr (Layer) value -= means.gradient;
      value *= means.inverse_std;
      if (args.sum_grad.data != nullptr) value += to_float(sum_grad[k / N].values[k % N]);
    }
    store_vectors(row_at<X>(args.x_grad, row), at, g);
  }
};

template <bool Layer>
__device__ __forceinline__ RowMeans means_of(const float (&sums)[Layer ? 2 : 1], int cols,
                                             float inverse_std) {
  const float count = static_cast<float>(cols);
  return {inverse_std, Layer ? sums[Layer ? 1 : 0] / count : 0.0f, sums[0] / count};
}

// The chunk's sums, warp after warp where each warp held rows of its own.
template <typename Tile, int V, int N>
__device__ __forceinline__ void store_partial(float* partial, const Backward& args, int thread,
                                              const float (&sums)[V][N], float* exchange) {
  if (partial == nullptr) return;
  float* row = partial + blockIdx.x * args.cols;
  const int own = threadIdx.x / Tile::threads;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = (v * Tile::threads + thread) * N;
    float total[N];
    if constexpr (Tile::rows > 1) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < N; ++i) exchange[(own * N + i) * Tile::threads + thread] = sums[v][i];
      __syncthreads();
      if (own != 0) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        total[i] = 0.0f;
        for (int r = 0; r < Tile::rows; ++r) {
          total[i] += exchange[(r * N + i) * Tile::threads + thread];
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) total[i] = sums[v][i];
    }
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (col + i < args.cols) row[col + i] = total[i];
    }
  }
}

template <typename Form, typename Tile>
__global__ void __launch_bounds__(Tile::block_threads, Tile::blocks_per_sm)
    backward_kernel(const Backward args) {
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int V = Tile::vectors, N = vector_size<T>, step = Tile::threads * N, R = Tile::rows;
  extern __shared__ int4 ring_memory[];
  __shared__ float scratch[2][64];
  __shared__ float exchange[R > 1 ? Tile::block_threads * N : 1];
  const int thread = threadIdx.x % Tile::threads;
  const Columns<Aligned> at = {thread * N, step, args.cols};
  const int64_t rows_per_chunk = (args.rows + args.chunks - 1) / args.chunks;
  const int64_t begin = blockIdx.x * rows_per_chunk;
  const int64_t end = min(args.rows, begin + rows_per_chunk);
  const int64_t counted = min(end, counted_rows(args));
  int64_t row = begin + threadIdx.x / Tile::threads;

  Feed<T, X, Tile, Aligned> feed(ring_memory);
  feed.request(args, row, counted, at);
  feed.request(args, row + R, counted, at);
  float weight[V][N], weight_sums[V][N] = {}, bias_sums[Layer ? V : 1][N] = {};
  load_weight<T>(args, at, weight);
  RowStatistics statistics = {};
  if (row < counted) statistics = statistics_of<Layer>(args, row);
  for (int turn = 0; row < counted; row += R, turn ^= 1) {
    RowPair<X, T, V> in;
    feed.receive(args, row, at, in);
    feed.request(args, row + 2 * R, counted, at);
    Packed<X, N> sum_grad[V] = {};
    if (args.sum_grad.data != nullptr)
      load_vectors(row_at<const X>(args.sum_grad, row), at, sum_grad);
    RowTerms<T, Layer, V> terms;
    terms.compute(weight, statistics, in, [&](int v, int i, float y_grad, float product) {
      weight_sums[v][i] += product;
      if constexpr (Layer) bias_sums[v][i] += y_grad;
    });
    const float inverse_std = statistics.inverse_std;
    if (row + R < counted) statistics = statistics_of<Layer>(args, row + R);
    float sums[Layer ? 2 : 1] = {};
    terms.add_to(sums);
    block_sum<Tile::threads>(sums, scratch[turn]);
    terms.store_x_grad(args, row, at, means_of<Layer>(sums, args.cols, inverse_std), sum_grad);
  }
  for (; row < end; row += R) {
    for (int v = 0; v < V; ++v) {
      store_zeros<Aligned, T>(args.x_grad, row, at.col + v * step, args);
    }
  }
  store_partial<Tile>(args.weight_partial, args, thread, weight_sums, exchange);
  if constexpr (Layer) store_partial<Tile>(args.bias_partial, args, thread, bias_sums, exchange);
}

// Rows that outgrow the tiles: x_grad reads the row twice, the second time from L2.
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_x_grad_kernel(const Backward args) {
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>, step = Threads * N;
  __shared__ float scratch[64];
  const int64_t row = blockIdx.x;
  const bool counted = row < counted_rows(args);
  RowTerms<T, Layer, 1> terms;
  const auto at = [&](int col) { return Columns<Aligned>{col, step, args.cols}; };
  const RowStatistics statistics = statistics_of<Layer>(args, row);
  const auto read = [&](int col) {
    RowPair<X, T, 1> in;
    float weight[1][N];
    load_row(args, row, at(col), in);
    load_weight<T>(args, at(col), weight);
    terms.compute(weight, statistics, in, [](int, int, float, float) {});
  };
  float sums[Layer ? 2 : 1] = {};
  for (int col = threadIdx.x * N; counted && col < args.cols; col += step) {
    read(col);
    terms.add_to(sums);
  }
  block_sum<Threads>(sums, scratch);
  const RowMeans means = means_of<Layer>(sums, args.cols, statistics.inverse_std);
  for (int col = threadIdx.x * N; col < args.cols; col += step) {
    if (counted) {
      read(col);
      Packed<X, N> sum_grad[1] = {};
      if (args.sum_grad.data != nullptr) {
        load_vectors(row_at<const X>(args.sum_grad, row), at(col), sum_grad);
      }
      terms.store_x_grad(args, row, at(col), means, sum_grad);
    } else {
      store_zeros<Aligned, T>(args.x_grad, row, col, args);
    }
  }
}

// Partial sums of the long rows: a thread owns N columns of one chunk of rows.
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_partial_kernel(const Backward args) {
  using T = typename Form::T;
  using X = typename Form::X;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>;
  const int col = (blockIdx.x * Threads + threadIdx.x) * N;
  if (col >= args.cols) return;
  const int64_t rows_per_chunk = (args.rows + args.chunks - 1) / args.chunks;
  const int64_t begin = blockIdx.y * rows_per_chunk;
  const int64_t end = min(counted_rows(args), begin + rows_per_chunk);
  float weight_sums[N] = {}, bias_sums[N] = {};
  const Columns<Aligned> at = {col, 0, args.cols};
  for (int64_t row = begin; row < end; ++row) {
    RowPair<X, T, 1> in;
    load_row(args, row, at, in);
    const RowStatistics of = statistics_of<Layer>(args, row);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float y_grad = to_float(in.y[0].values[i]);
      weight_sums[i] += y_grad * (to_float(in.x[0].values[i]) - of.mean) * of.inverse_std;
      bias_sums[i] += y_grad;
    }
  }
  const int64_t offset = blockIdx.y * args.cols + col;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (col + i >= args.cols) break;
    if (args.weight_partial != nullptr) args.weight_partial[offset + i] = weight_sums[i];
    if (args.bias_partial != nullptr) args.bias_partial[offset + i] = bias_sums[i];
  }
}

template <typename Form>
void launch_backward(const Backward& args, Stream stream) {
  using T = typename Form::T;
  const int64_t vectors = ceil_div(args.cols, vector_size<T>);
  const auto launch_tile = [&]<int Threads, int Vectors>() {
    using Shape = Tile<Threads, Vectors>;
    launch(backward_kernel<Form, Shape>,
           {.grid = dim3(args.chunks),
            .block = dim3(Shape::block_threads),
            .shared_bytes = Feed<T, typename Form::X, Shape, Form::aligned>::shared_bytes,
            .stream = stream},
           args);
  };
  if (vectors <= 32) return launch_tile.template operator()<32, 1>();
  if (vectors <= 64) return launch_tile.template operator()<32, 2>();
  if (vectors <= 256) return launch_tile.template operator()<128, 2>();
  if (vectors <= 512) return launch_tile.template operator()<256, 2>();
  if (vectors <= 1024) return launch_tile.template operator()<512, 2>();
  launch(long_x_grad_kernel<Form, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
  if (args.weight_partial == nullptr && args.bias_partial == nullptr) return;
  launch(long_partial_kernel<Form, 128>,
         {.grid = dim3(ceil_div(vectors, 128), args.chunks), .block = dim3(128), .stream = stream},
         args);
}

template <typename T>
void choose_backward(const Backward& args, bool wide_x, bool layer, bool aligned, Stream stream) {
  visit_bool(layer, [&]<bool Layer>() {
    visit_bool(aligned, [&]<bool Aligned>() {
      if constexpr (sizeof(T) == 2) {
        if (wide_x) return launch_backward<Form<T, float, Layer, Aligned>>(args, stream);
      }
      launch_backward<Form<T, T, Layer, Aligned>>(args, stream);
    });
  });
}

}  // namespace

// As many chunks as blocks fit on the 132 multiprocessors of an H100 with 512 threads each, so that
// every block is resident; a constant, not a question to the device: the order of the sum over rows
// must not change from one GPU to the next.
int64_t norm_chunks(int64_t rows, int64_t cols) {
  const int64_t vectors = ceil_div(cols, 8);
  const int64_t block_threads = vectors <= 256 ? 128 : (vectors <= 512 ? 256 : 512);
  const int64_t rows_at_once = vectors <= 64 ? 4 : 1;
  return std::clamp<int64_t>(ceil_div(rows, rows_at_once), 1, 132 * 512 / block_threads);
}

}  // namespace cuda

void run(const NormBackward& norm, Stream stream) {
  using namespace cuda;
  const bool aligned =
      is_aligned({&norm.x, &norm.y_grad, &norm.weight, &norm.sum_grad, &norm.x_grad});
  const TensorView& partial = norm.weight_partial ? norm.weight_partial : norm.bias_partial;
  const int64_t chunks =
      partial ? partial.sizes[0] : cuda::norm_chunks(norm.x.sizes[0], norm.x.sizes[1]);
  const Backward args = {common(norm, norm.x),
                         matrix(norm.y_grad),
                         matrix(norm.sum_grad),
                         matrix(norm.x_grad),
                         norm.weight_partial.as<float>(),
                         norm.bias_partial.as<float>(),
                         chunks};
  visit_dtype<float, bfloat16, float16>("norm", norm.y_grad.dtype, [&]<typename T>() {
    choose_backward<device_type<T>>(args, norm.x.dtype == DType::float32, norm.norm == Norm::layer,
                                    aligned, stream);
  });
  if (norm.weight_grad) sum_chunks(norm.weight_partial, norm.weight_grad, stream);
  if (norm.bias_grad) sum_chunks(norm.bias_partial, norm.bias_grad, stream);
}

}  // namespace redline
