// x_grad, weight_grad and bias_grad of norm (kernels/norm.h). A fixed number of blocks walk over
// the rows of their chunks, the next row's loads in flight while this row's sums are taken; the
// weight's gradient stays in registers until the chunk ends; a second launch adds the chunks in
// order. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/norm/row.cuh"
#include "redline/kernels/cuda/sum_chunks.cuh"

namespace redline {
namespace cuda {
namespace {

// Threads that share a row and 16-byte vectors that each of them holds. Registers: two vectors of
// each input in flight and one float per element for each parameter's sum.
template <int Threads, int Vectors>
struct Tile {
  static constexpr int threads = Threads, vectors = Vectors;
  static constexpr int rows = Threads == 32 ? 4 : 1;  // rows in flight in a block, a warp each
  static constexpr int block_threads = Threads * rows;
  static constexpr int blocks_per_sm = rows > 1 ? 3 : 512 / block_threads;
};

struct Backward : Common {
  Matrix y_grad, sum_grad, x_grad;
  float* weight_partial;
  float* bias_partial;
  int64_t chunks;
};

// mean(g) and mean(g * xh) of a row, with g = y_grad * w and xh = (x - mean) * r.
struct RowMeans {
  float gradient, product;
};

// V vectors of a row as they lie in memory.
template <typename T, typename X, int V>
struct RowInput {
  Packed<X, vector_size<T>> x[V];
  Packed<T, vector_size<T>> y_grad[V];

  __device__ __forceinline__ void load(const Backward& args, int64_t row, Columns at) {
    load_vectors(static_cast<const X*>(args.x.data) + row * args.x.stride, at, x);
    load_vectors(static_cast<const T*>(args.y_grad.data) + row * args.y_grad.stride, at, y_grad);
  }
};

// The same as g and xh; the products that the sums over rows take on the way.
template <typename T, bool Layer, int V>
struct RowTerms {
  static constexpr int N = vector_size<T>;
  float g[V][N], normalized[V][N];

  template <typename X, typename Visit>
  __device__ __forceinline__ void compute(const Backward& args, int64_t row, Columns at,
                                          const RowInput<T, X, V>& in, Visit visit) {
    const float mean = Layer ? args.mean[row] : 0.0f;
    const float inverse_std = args.inverse_std[row];
    load_weight<T>(args, at, g);
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        const float y_grad = to_float(in.y_grad[v].values[i]);  // zero past the row's end
        normalized[v][i] = (to_float(in.x[v].values[i]) - mean) * inverse_std;
        g[v][i] *= y_grad;
        visit(v, i, y_grad, y_grad * normalized[v][i]);
      }
    }
  }

  // x_grad; the residual's gradient joins before the rounding.
  template <typename X>
  __device__ __forceinline__ void store_x_grad(const Backward& args, int64_t row, Columns at,
                                               RowMeans means) {
    const float inverse_std = args.inverse_std[row];
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        g[v][i] -= normalized[v][i] * means.product;
        if constexpr (Layer) g[v][i] -= means.gradient;
        g[v][i] *= inverse_std;
      }
    }
    if (args.sum_grad.data != nullptr) {
      take_vectors<T>(row_of(args.sum_grad, row), at, g,
                      [](float& value, float loaded) { value += loaded; });
    }
    X* x_grad = static_cast<X*>(args.x_grad.data) + row * args.x_grad.stride;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      store(x_grad, at.col + v * at.step, args.cols, args.aligned, pack<X>(g[v]));
    }
  }
};

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

template <typename T, typename X, bool Layer, typename Tile>
__global__ void __launch_bounds__(Tile::block_threads, Tile::blocks_per_sm)
    backward_kernel(const Backward args) {
  constexpr int V = Tile::vectors, N = vector_size<T>, step = Tile::threads * N;
  __shared__ float scratch[2][64];
  __shared__ float exchange[Tile::rows > 1 ? Tile::block_threads * N : 1];
  const int thread = threadIdx.x % Tile::threads;
  const Columns at = {thread * N, step, args.cols, args.aligned};
  const int64_t rows_per_chunk = (args.rows + args.chunks - 1) / args.chunks;
  const int64_t begin = blockIdx.x * rows_per_chunk;
  const int64_t end = min(args.rows, begin + rows_per_chunk);
  const int64_t counted = min(end, counted_rows(args));
  int64_t row = begin + threadIdx.x / Tile::threads;

  float weight_sums[V][N] = {}, bias_sums[Layer ? V : 1][N] = {};
  RowInput<T, X, V> in;
  if (row < counted) in.load(args, row, at);
  for (int turn = 0; row < counted; row += Tile::rows, turn ^= 1) {
    RowTerms<T, Layer, V> terms;
    terms.compute(args, row, at, in, [&](int v, int i, float y_grad, float product) {
      weight_sums[v][i] += product;
      if constexpr (Layer) bias_sums[v][i] += y_grad;
    });
    if (row + Tile::rows < counted) in.load(args, row + Tile::rows, at);
    float sums[Layer ? 2 : 1] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        sums[0] += terms.g[v][i] * terms.normalized[v][i];
        if constexpr (Layer) sums[1] += terms.g[v][i];
      }
    }
    block_sum<Tile::threads>(sums, scratch[turn]);
    const float cols = static_cast<float>(args.cols);
    const RowMeans means = {Layer ? sums[Layer ? 1 : 0] / cols : 0.0f, sums[0] / cols};
    terms.template store_x_grad<X>(args, row, at, means);
  }
  for (; row < end; row += Tile::rows) {
    for (int v = 0; v < V; ++v) {
      store_zeros<T>(args.x_grad, row, at.col + v * step, args);
    }
  }
  store_partial<Tile>(args.weight_partial, args, thread, weight_sums, exchange);
  if constexpr (Layer) store_partial<Tile>(args.bias_partial, args, thread, bias_sums, exchange);
}

// Rows that outgrow the tiles: x_grad reads the row twice, the second time from L2.
template <typename T, typename X, bool Layer, int Threads>
__global__ void __launch_bounds__(Threads) long_x_grad_kernel(const Backward args) {
  constexpr int N = vector_size<T>;
  __shared__ float scratch[64];
  const int64_t row = blockIdx.x;
  const bool counted = row < counted_rows(args);
  RowInput<T, X, 1> in;
  RowTerms<T, Layer, 1> terms;
  const auto at = [&](int col) { return Columns{col, Threads * N, args.cols, args.aligned}; };
  const auto read = [&](int col) {
    in.load(args, row, at(col));
    terms.compute(args, row, at(col), in, [](int, int, float, float) {});
  };
  float sums[2] = {};
  for (int col = threadIdx.x * N; counted && col < args.cols; col += Threads * N) {
    read(col);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      sums[0] += terms.g[0][i] * terms.normalized[0][i];
      sums[1] += terms.g[0][i];
    }
  }
  block_sum<Threads>(sums, scratch);
  const float cols = static_cast<float>(args.cols);
  const RowMeans means = {Layer ? sums[1] / cols : 0.0f, sums[0] / cols};
  for (int col = threadIdx.x * N; col < args.cols; col += Threads * N) {
    if (counted) {
      read(col);
      terms.template store_x_grad<X>(args, row, at(col), means);
    } else {
      store_zeros<T>(args.x_grad, row, col, args);
    }
  }
}

// Partial sums of the long rows: a thread owns N columns of one chunk of rows.
template <typename T, typename X, bool Layer, int Threads>
__global__ void __launch_bounds__(Threads) long_partial_kernel(const Backward args) {
  constexpr int N = vector_size<T>;
  const int col = (blockIdx.x * Threads + threadIdx.x) * N;
  if (col >= args.cols) return;
  const int64_t rows_per_chunk = (args.rows + args.chunks - 1) / args.chunks;
  const int64_t begin = blockIdx.y * rows_per_chunk;
  const int64_t end = min(counted_rows(args), begin + rows_per_chunk);
  float weight_sums[N] = {}, bias_sums[N] = {};
  for (int64_t row = begin; row < end; ++row) {
    const X* x_row = static_cast<const X*>(args.x.data) + row * args.x.stride;
    const T* y_grad_row = static_cast<const T*>(args.y_grad.data) + row * args.y_grad.stride;
    const Packed<X, N> x = load<X, N>(x_row, col, args.cols, args.aligned);
    const Packed<T, N> y_grad = load<T, N>(y_grad_row, col, args.cols, args.aligned);
    const float mean = Layer ? args.mean[row] : 0.0f, inverse_std = args.inverse_std[row];
#pragma unroll
    for (int i = 0; i < N; ++i) {
      weight_sums[i] += to_float(y_grad.values[i]) * (to_float(x.values[i]) - mean) * inverse_std;
      bias_sums[i] += to_float(y_grad.values[i]);
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

template <typename T, typename X, bool Layer, typename Tile>
void launch_tile(const Backward& args, Stream stream) {
  launch(backward_kernel<T, X, Layer, Tile>,
         {.grid = dim3(args.chunks), .block = dim3(Tile::block_threads), .stream = stream}, args);
}

template <typename T, typename X, bool Layer>
void launch_backward(const Backward& args, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<T>);
  if (vectors <= 32) return launch_tile<T, X, Layer, Tile<32, 1>>(args, stream);
  if (vectors <= 64) return launch_tile<T, X, Layer, Tile<32, 2>>(args, stream);
  if (vectors <= 256) return launch_tile<T, X, Layer, Tile<128, 2>>(args, stream);
  if (vectors <= 512) return launch_tile<T, X, Layer, Tile<256, 2>>(args, stream);
  if (vectors <= 1024) return launch_tile<T, X, Layer, Tile<512, 2>>(args, stream);
  launch(long_x_grad_kernel<T, X, Layer, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
  if (args.weight_partial == nullptr && args.bias_partial == nullptr) return;
  launch(long_partial_kernel<T, X, Layer, 128>,
         {.grid = dim3(ceil_div(vectors, 128), args.chunks), .block = dim3(128), .stream = stream},
         args);
}

template <typename T>
void choose_backward(const Backward& args, bool wide_x, bool layer, Stream stream) {
  visit_bool(layer, [&]<bool Layer>() {
    if constexpr (sizeof(T) == 2) {
      if (wide_x) return launch_backward<T, float, Layer>(args, stream);
    }
    launch_backward<T, T, Layer>(args, stream);
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
  const Backward args = {common(norm, norm.x, aligned),
                         matrix(norm.y_grad),
                         matrix(norm.sum_grad),
                         matrix(norm.x_grad),
                         norm.weight_partial.as<float>(),
                         norm.bias_partial.as<float>(),
                         chunks};
  visit_dtype<float, bfloat16, float16>("norm", norm.y_grad.dtype, [&]<typename T>() {
    choose_backward<device_type<T>>(args, norm.x.dtype == DType::float32, norm.norm == Norm::layer,
                                    stream);
  });
  if (norm.weight_grad) sum_chunks(norm.weight_partial, norm.weight_grad, stream);
  if (norm.bias_grad) sum_chunks(norm.bias_partial, norm.bias_grad, stream);
}

}  // namespace redline
