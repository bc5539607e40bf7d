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
};

// 64 registers a thread, 128 where it holds float32 besides 16-bit data or single elements.
template <typename Form, typename Tile>
inline constexpr int blocks_per_sm =
    (Form::aligned && sizeof(typename Form::T) == sizeof(typename Form::X) ? 1024 : 512) /
    Tile::block_threads;

struct Forward : Common {
  Matrix residual, sum, bias, y;
  float epsilon;
};

template <typename T>
__device__ __forceinline__ const T* row_at(const Matrix& from, int64_t row) {
  return static_cast<const T*>(from.data) + row * from.stride;
}

// What is normalised, as it lies in memory: half the registers of its float32, and so twice the
// threads that a multiprocessor has loads in flight for. Held: what residual and sum hold; float32
// without alignment, whatever they hold.
template <typename T, typename Held, int V>
struct RowInput {
  static constexpr int N = vector_size<T>;
  Packed<Held, N> held[V];

  __device__ __forceinline__ float value(int v, int i) const { return to_float(held[v].values[i]); }

  // x, or the rounded x + residual, which is stored on the way.
  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<true> at) {
    if (args.residual.data == nullptr) return reload(args, row, at);
    Packed<T, N> x[V];
    load_vectors(row_at<T>(args.x, row), at, x);
    load_vectors(row_at<Held>(args.residual, row), at, held);
    float sum[V][N];
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) sum[v][i] = to_float(x[v].values[i]) + value(v, i);
      held[v] = pack<Held>(sum[v]);
    }
    store_vectors(static_cast<Held*>(args.sum.data) + row * args.sum.stride, at, sum);
  }
  __device__ __forceinline__ void load(const Forward& args, int64_t row, Columns<false> at) {
    float values[V][N];
    take_vectors<T>(row_of(args.x, row), at, values,
                    [](float& value, float loaded) { value = loaded; });
    if (args.residual.data != nullptr) {
      take_vectors<T>(row_of(args.residual, row), at, values,
                      [](float& value, float loaded) { value += loaded; });
#pragma unroll
      for (int v = 0; v < V; ++v) {
        store_mixed<T>(args.sum.data, args.sum.is_float32, row * args.sum.stride,
                       at.col + v * at.step, at.cols, false, values[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) held[v] = pack<Held>(values[v]);
  }

  // Once more from L2: the sum when there is a residual.
  template <bool Aligned>
  __device__ __forceinline__ void reload(const Forward& args, int64_t row, Columns<Aligned> at) {
    const Matrix& from = args.residual.data != nullptr ? args.sum : args.x;
    if constexpr (Aligned) {
      load_vectors(row_at<Held>(from, row), at, held);
    } else {
      float values[V][N];
      take_vectors<T>(row_of(from, row), at, values,
                      [](float& value, float loaded) { value = loaded; });
#pragma unroll
      for (int v = 0; v < V; ++v) held[v] = pack<Held>(values[v]);
    }
  }

  // Forgets the float32 values: the compiler would rather hold them, in twice the registers, than
  // widen the held ones again.
  __device__ __forceinline__ void forget() {
    if constexpr (sizeof(Held) == 2) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        auto& words = reinterpret_cast<uint32_t(&)[N / 2]>(held[v]);
#pragma unroll
        for (int i = 0; i < N / 2; ++i) asm volatile("" : "+r"(words[i]));
      }
    }
  }

  __device__ __forceinline__ float total() const {
    float result = 0.0f;
#pragma unroll
    for (int k = 0; k < V * N; ++k) result += value(k / N, k % N);
    return result;
  }
  // Elements past the row's end count as the mean.
  template <bool Aligned>
  __device__ __forceinline__ float squares(float mean, Columns<Aligned> at) const {
    float result = 0.0f;
#pragma unroll
    for (int k = 0; k < V * N; ++k) {
      const int col = at.col + k / N * at.step + (Aligned ? 0 : k % N);
      const float x = col < at.cols ? value(k / N, k % N) - mean : 0.0f;
      result += x * x;
    }
    return result;
  }
};

struct Statistics {
  float mean, inverse_std;
};

// Two vectors at a time: more would hold too many weights in registers.
template <typename T, typename Held, int V, bool Aligned>
__device__ __forceinline__ void store_output(const Forward& args, int64_t row, Columns<Aligned> at,
                                             const RowInput<T, Held, V>& in, Statistics found) {
  constexpr int N = vector_size<T>, group = V < 2 ? V : 2;
  T* y = static_cast<T*>(args.y.data) + row * args.y.stride;
#pragma unroll
  for (int first = 0; first < V; first += group) {
    const Columns<Aligned> place = at.from(first);
    float w[group][N];
    load_weight<T>(args, place, w);
#pragma unroll
    for (int k = 0; k < group * N; ++k) {
      w[k / N][k % N] *= (in.value(first + k / N, k % N) - found.mean) * found.inverse_std;
    }
    if (args.bias.data != nullptr) {
      take_vectors<T>(row_of(args.bias, 0), place, w,
                      [](float& value, float loaded) { value += loaded; });
    }
    store_vectors(y, place, w);
  }
}

// Rows from the device's row count on.
template <typename T, int Threads, bool Aligned>
__device__ void zero_row(const Forward& args, int64_t row, int thread) {
  for (int col = thread * vector_size<T>; col < args.cols; col += Threads * vector_size<T>) {
    store_zeros<Aligned, T>(args.y, row, col, args);
    if (args.sum.data != nullptr) store_zeros<Aligned, T>(args.sum, row, col, args);
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

template <typename Form, typename Tile>
__global__ void __launch_bounds__(Tile::block_threads, blocks_per_sm<Form, Tile>)
    forward_kernel(const Forward args) {
  using T = typename Form::T;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>, V = Tile::vectors;
  __shared__ float scratch[2][32];
  const int thread = threadIdx.x % Tile::threads;
  const int64_t row = int64_t{blockIdx.x} * Tile::rows + threadIdx.x / Tile::threads;
  if (row >= args.rows) return;
  if (row >= counted_rows(args)) return zero_row<T, Tile::threads, Aligned>(args, row, thread);
  const Columns<Aligned> at = {thread * N, Tile::threads * N, args.cols};

  RowInput<T, typename Form::X, V> in;
  in.load(args, row, at);
  float mean = 0.0f;  // rms: the compiler drops it
  if constexpr (Layer) {
    float total[1] = {in.total()};
    in.forget();
    block_sum<Tile::threads>(total, scratch[0]);
    mean = total[0] / args.cols;
  }
  float squares[1] = {in.squares(mean, at)};
  in.forget();
  block_sum<Tile::threads>(squares, scratch[1]);
  const float inverse_std = 1.0f / sqrtf(squares[0] / args.cols + args.epsilon);
  if (thread == 0) store_statistics(args, row, {mean, inverse_std});
  store_output(args, row, at, in, {mean, inverse_std});
}

// Rows that outgrow a block's registers.
template <typename Form, int Threads>
__global__ void __launch_bounds__(Threads) long_forward_kernel(const Forward args) {
  using T = typename Form::T;
  constexpr bool Layer = Form::layer, Aligned = Form::aligned;
  constexpr int N = vector_size<T>, V = 2, step = Threads * N, stride = V * step;
  __shared__ float scratch[2][32];
  const int64_t row = blockIdx.x;
  const int first = threadIdx.x * N;
  const auto at = [&](int col) { return Columns<Aligned>{col, step, args.cols}; };
  if (row >= counted_rows(args)) return zero_row<T, Threads, Aligned>(args, row, threadIdx.x);
  RowInput<T, typename Form::X, V> in;
  float total[1] = {}, squares[1] = {};
  for (int col = first; col < args.cols; col += stride) {
    in.load(args, row, at(col));
    total[0] += in.total();
    squares[0] += in.squares(0.0f, at(col));
  }
  float mean = 0.0f;
  if constexpr (Layer) {
    block_sum<Threads>(total, scratch[0]);
    mean = total[0] / args.cols;
    squares[0] = 0.0f;
    for (int col = first; col < args.cols; col += stride) {
      in.reload(args, row, at(col));
      squares[0] += in.squares(mean, at(col));
    }
  }
  block_sum<Threads>(squares, scratch[1]);
  const float inverse_std = 1.0f / sqrtf(squares[0] / args.cols + args.epsilon);
  if (threadIdx.x == 0) store_statistics(args, row, {mean, inverse_std});
  for (int col = first; col < args.cols; col += stride) {
    in.reload(args, row, at(col));
    store_output(args, row, at(col), in, {mean, inverse_std});
  }
}

// The narrowest tile that holds the row: more rows per multiprocessor, shorter sums.
template <typename Form>
void launch_forward(const Forward& args, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<typename Form::T>);
  const auto launch_tile = [&]<int Threads, int Vectors>() {
    using Shape = Tile<Threads, Vectors>;
    launch(forward_kernel<Form, Shape>,
           {.grid = dim3(ceil_div(args.rows, Shape::rows)),
            .block = dim3(Shape::block_threads),
            .stream = stream},
           args);
  };
  if (vectors <= 32) return launch_tile.template operator()<32, 1>();
  if (vectors <= 128) return launch_tile.template operator()<32, 4>();
  if (vectors <= 512) return launch_tile.template operator()<128, 4>();
  if (vectors <= 1024) return launch_tile.template operator()<256, 4>();
  if (vectors <= 2048) return launch_tile.template operator()<512, 4>();
  launch(long_forward_kernel<Form, 1024>,
         {.grid = dim3(args.rows), .block = dim3(1024), .stream = stream}, args);
}

template <typename T, bool Layer>
void choose_forward(const Forward& args, bool aligned, Stream stream) {
  if (!aligned) return launch_forward<Form<T, float, Layer, false>>(args, stream);
  if constexpr (sizeof(T) == 2) {
    if (args.residual.data == nullptr || !args.sum.is_float32) {
      return launch_forward<Form<T, T, Layer, true>>(args, stream);
    }
  }
  launch_forward<Form<T, float, Layer, true>>(args, stream);
}

}  // namespace
}  // namespace cuda

void run(const NormForward& norm, Stream stream) {
  using namespace cuda;
  const bool aligned =
      is_aligned({&norm.x, &norm.residual, &norm.sum, &norm.weight, &norm.bias, &norm.y});
  const Forward args = {common(norm, norm.x), matrix(norm.residual),
                        matrix(norm.sum),     matrix(norm.bias),
                        matrix(norm.y),       static_cast<float>(norm.epsilon)};
  visit_dtype<float, bfloat16, float16>("norm", norm.x.dtype, [&]<typename T>() {
    visit_bool(norm.norm == Norm::layer,
               [&]<bool layer>() { choose_forward<device_type<T>, layer>(args, aligned, stream); });
  });
}

}  // namespace redline
