// y = (x - m) * r * w + b (kernels/norm.h). The threads of a row hold it in registers: memory is
// read once and written once, by 16-byte accesses, up to four of them in flight per thread. Rows
// that outgrow a block are read again from L2. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/norm/row.cuh"

namespace redline {
namespace cuda {
namespace {

// Threads that share a row and 16-byte vectors that each of them holds.
template <int Threads, int Vectors>
struct Tile {
  static constexpr int threads = Threads, vectors = Vectors;
  static constexpr int rows = Threads == 32 ? 4 : 1;  // rows of a block, a warp each
  static constexpr int block_threads = Threads * rows;
  static constexpr int blocks_per_sm = 768 / block_threads;  // 85 registers a thread
};

struct Forward : Common {
  Matrix residual, sum, bias, y;
  float epsilon;
};

// x of V vectors; with a residual the rounded x + residual, which is stored on the way. A float32
// residual comes two vectors at a time: more would not fit the registers.
template <typename T, int V>
__device__ __forceinline__ void load_input(const Forward& args, int64_t row, Columns at,
                                           float (&x)[V][vector_size<T>]) {
  constexpr int N = vector_size<T>, group = V < 2 ? V : 2;
  Packed<T, N> raw[V];
  load_vectors(static_cast<const T*>(args.x.data) + row * args.x.stride, at, raw);
#pragma unroll
  for (int v = 0; v < V; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) x[v][i] = to_float(raw[v].values[i]);
  }
  if (args.residual.data == nullptr) return;
#pragma unroll
  for (int first = 0; first < V; first += group) {
    auto& part = reinterpret_cast<float(&)[group][N]>(x[first]);
    const Columns place = {at.col + first * at.step, at.step, at.cols, at.aligned};
    take_vectors<T>(row_of(args.residual, row), place, part,
                    [](float& value, float loaded) { value += loaded; });
  }
#pragma unroll
  for (int v = 0; v < V; ++v) {
    store_mixed<T>(args.sum.data, args.sum.is_float32, row * args.sum.stride, at.col + v * at.step,
                   at.cols, at.aligned, x[v]);
  }
}

struct Statistics {
  float mean, inverse_std;
};

// Two vectors at a time: more would hold too many weights in registers.
template <typename T, int V>
__device__ __forceinline__ void store_output(const Forward& args, int64_t row, Columns at,
                                             const float (&x)[V][vector_size<T>],
                                             Statistics found) {
  constexpr int N = vector_size<T>, group = V < 2 ? V : 2;
  T* y = static_cast<T*>(args.y.data) + row * args.y.stride;
#pragma unroll
  for (int first = 0; first < V; first += group, at.col += group * at.step) {
    float w[group][N];
    load_weight<T>(args, at, w);
#pragma unroll
    for (int v = 0; v < group; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) w[v][i] *= (x[first + v][i] - found.mean) * found.inverse_std;
    }
    if (args.bias.data != nullptr) {
      take_vectors<T>(row_of(args.bias, 0), at, w,
                      [](float& value, float loaded) { value += loaded; });
    }
#pragma unroll
    for (int v = 0; v < group; ++v) {
      store(y, at.col + v * at.step, at.cols, at.aligned, pack<T>(w[v]));
    }
  }
}

// Rows from the device's row count on.
template <typename T, int Threads>
__device__ void zero_row(const Forward& args, int64_t row, int thread) {
  for (int col = thread * vector_size<T>; col < args.cols; col += Threads * vector_size<T>) {
    store_zeros<T>(args.y, row, col, args);
    if (args.sum.data != nullptr) store_zeros<T>(args.sum, row, col, args);
  }
  if (thread == 0) {
    args.inverse_std[row] = 0.0f;
    if (args.mean != nullptr) args.mean[row] = 0.0f;
  }
}

__device__ __forceinline__ void store_statistics(const Forward& args, int64_t row,
                                                 Statistics found) {
  args.inverse_std[row] = found.inverse_std;
  if (args.mean != nullptr) args.mean[row] = found.mean;
}

template <typename T, bool Layer, typename Tile>
__global__ void __launch_bounds__(Tile::block_threads, Tile::blocks_per_sm)
    forward_kernel(const Forward args) {
  constexpr int N = vector_size<T>, V = Tile::vectors;
  __shared__ float scratch[2][32];
  const int thread = threadIdx.x % Tile::threads;
  const int64_t row = int64_t{blockIdx.x} * Tile::rows + threadIdx.x / Tile::threads;
  if (row >= args.rows) return;
  if (row >= counted_rows(args)) return zero_row<T, Tile::threads>(args, row, thread);
  const Columns at = {thread * N, Tile::threads * N, args.cols, args.aligned};

  float x[V][N];
  load_input<T>(args, row, at, x);

  float mean = 0.0f;  // rms: the compiler drops it
  if constexpr (Layer) {
    float total[1] = {};
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) total[0] += x[v][i];
    }
    block_sum<Tile::threads>(total, scratch[0]);
    mean = total[0] / args.cols;
  }
  float squares[1] = {};
#pragma unroll
  for (int v = 0; v < V; ++v) {
    squares[0] = sum_of_squares(x[v], mean, at.col + v * at.step, args.cols, squares[0]);
  }
  block_sum<Tile::threads>(squares, scratch[1]);
  const float inverse_std = 1.0f / sqrtf(squares[0] / args.cols + args.epsilon);
  if (thread == 0) store_statistics(args, row, {mean, inverse_std});

  store_output<T>(args, row, at, x, {mean, inverse_std});
}

// Rows that outgrow a block's registers are read again from L2: the sum when there is a residual.
template <typename T, int V>
__device__ __forceinline__ void reload_input(const Forward& args, int64_t row, Columns at,
                                             float (&x)[V][vector_size<T>]) {
  const Matrix& from = args.residual.data != nullptr ? args.sum : args.x;
  take_vectors<T>(row_of(from, row), at, x, [](float& value, float loaded) { value = loaded; });
}

template <typename T, bool Layer, int Threads>
__global__ void __launch_bounds__(Threads) long_forward_kernel(const Forward args) {
  constexpr int N = vector_size<T>, V = 2, step = Threads * N, stride = V * step;
  __shared__ float scratch[2][32];
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N;
  const auto at = [&](int col) { return Columns{col, step, args.cols, args.aligned}; };
  if (row >= counted_rows(args)) return zero_row<T, Threads>(args, row, threadIdx.x);
  float x[V][N], total[1] = {}, squares[1] = {};
  for (int col = first; col < args.cols; col += stride) {
    load_input<T>(args, row, at(col), x);
#pragma unroll
    for (int k = 0; k < V * N; ++k) {
      total[0] += x[k / N][k % N];
      squares[0] += x[k / N][k % N] * x[k / N][k % N];
    }
  }
  float mean = 0.0f;
  if constexpr (Layer) {
    block_sum<Threads>(total, scratch[0]);
    mean = total[0] / args.cols;
    squares[0] = 0.0f;
    for (int col = first; col < args.cols; col += stride) {
      reload_input<T>(args, row, at(col), x);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        squares[0] = sum_of_squares(x[v], mean, col + v * step, args.cols, squares[0]);
      }
    }
  }
  block_sum<Threads>(squares, scratch[1]);
  const float inverse_std = 1.0f / sqrtf(squares[0] / args.cols + args.epsilon);
  if (threadIdx.x == 0) store_statistics(args, row, {mean, inverse_std});
  for (int col = first; col < args.cols; col += stride) {
    reload_input<T>(args, row, at(col), x);
    store_output<T>(args, row, at(col), x, {mean, inverse_std});
  }
}

template <typename T, bool Layer, typename Tile>
void launch_tile(const Forward& args, Stream stream) {
  launch(forward_kernel<T, Layer, Tile>,
         {.grid = dim3(ceil_div(args.rows, Tile::rows)),
          .block = dim3(Tile::block_threads),
          .stream = stream},
         args);
}

// The narrowest tile that holds the row: more rows per multiprocessor, shorter sums. Two vectors
// per thread: four take 88 registers and leave too few threads on a multiprocessor.
template <typename T, bool Layer>
void launch_forward(const Forward& args, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<T>);
  if (vectors <= 32) return launch_tile<T, Layer, Tile<32, 1>>(args, stream);
  if (vectors <= 64) return launch_tile<T, Layer, Tile<32, 2>>(args, stream);
  if (vectors <= 128) return launch_tile<T, Layer, Tile<32, 4>>(args, stream);
  if (vectors <= 256) return launch_tile<T, Layer, Tile<64, 4>>(args, stream);
  if (vectors <= 512) return launch_tile<T, Layer, Tile<128, 4>>(args, stream);
  if (vectors <= 1024) return launch_tile<T, Layer, Tile<256, 4>>(args, stream);
  if (vectors <= 2048) return launch_tile<T, Layer, Tile<512, 4>>(args, stream);
  launch(long_forward_kernel<T, Layer, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
}

}  // namespace
}  // namespace cuda

void run(const NormForward& norm, Stream stream) {
  using namespace cuda;
  const bool aligned =
      is_aligned({&norm.x, &norm.residual, &norm.sum, &norm.weight, &norm.bias, &norm.y});
  const Forward args = {common(norm, norm.x, aligned),
                        matrix(norm.residual),
                        matrix(norm.sum),
                        matrix(norm.bias),
                        matrix(norm.y),
                        static_cast<float>(norm.epsilon)};
  visit_dtype<float, bfloat16, float16>("norm", norm.x.dtype, [&]<typename T>() {
    visit_bool(norm.norm == Norm::layer,
               [&]<bool layer>() { launch_forward<device_type<T>, layer>(args, stream); });
  });
}

}  // namespace redline
