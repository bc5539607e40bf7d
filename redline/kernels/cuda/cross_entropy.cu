// Over budget: parameters: scalars in registers; a struct of them would name nothing more.
// Over budget: lines: the two kernels of one op, by two lines of this head.
// loss = lse - x_target and its kin (kernels/cross_entropy.h). Statistics: a block per row reads it
// once by 16-byte loads, four in flight per thread, each thread with a running maximum and sum;
// gradient: one read, one 16-byte write per vector. Rows may start at any address: any vocabulary
// runs this path. Bound by bytes; of the floor: bench/results.
#include "redline/core/dispatch.h"
#include "redline/kernels/cross_entropy.h"
#include "redline/kernels/cuda/device/realign.cuh"
#include "redline/kernels/cuda/device/reduce.cuh"
#include "redline/kernels/cuda/launch.h"

namespace redline {
namespace cuda {
namespace {

constexpr int in_flight = 4;  // vectors that a thread loads before it uses the first

// What both readers of the logits know of them.
struct Logits {
  const void* data;
  const int64_t* targets;
  int64_t rows, stride, vocab_start, ignore_index;
  int cols;
  float softcap;
};

struct StatisticsArgs : Logits {
  float* statistics;
  int width;  // 3, or 4 with the sum of the logits
  bool skip_ignored;
};

struct GradientArgs : Logits {
  const float* statistics;
  const float* loss_grad;
  const float* log_sum_exp_grad;
  const float* count;
  void* logits_grad;
  int64_t grad_stride, loss_grad_stride, vocabulary;
  int width;
  float label_smoothing, z_loss;
};

// Rows go over x and y: their number may pass 2^31.
constexpr int64_t grid_rows = int64_t{1} << 30;

__device__ __forceinline__ int64_t block_row() {
  return int64_t{blockIdx.y} * grid_rows + blockIdx.x;
}

dim3 row_grid(int64_t rows, int64_t depth = 1) {
  return dim3(std::min(rows, grid_rows), ceil_div(rows, grid_rows), depth);
}

__device__ __forceinline__ float capped(float x, float softcap) {
  return softcap == 0.0f ? x : softcap * tanhf(x / softcap);
}

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

__device__ __forceinline__ bool is_class(int64_t target, int64_t vocabulary) {
  return target >= 0 && target < vocabulary;
}

// The maximum of what a thread has seen, the sum of e^(x - maximum), the sum of x.
struct Running {
  float maximum, exponentials, sum;
};

// Adds the vectors; elements past the row's end, which a full tile has not, count as -inf.
template <typename T, bool Full>
__device__ __forceinline__ void add_vectors(const T* row, RowVectors at, float softcap,
                                            Running& running) {
  constexpr int N = vector_size<T>;
  Packed<T> packed[in_flight];
  load_realigned(row, at, packed);
  float x[in_flight][N], maximum = running.maximum;
#pragma unroll
  for (int v = 0; v < in_flight; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      x[v][i] = capped(to_float(packed[v].values[i]), softcap);
      const bool inside = Full || at.col + v * at.step + i < at.cols;
      if (inside) running.sum += x[v][i];
      if (!inside) x[v][i] = negative_infinity();
      maximum = fmaxf(maximum, x[v][i]);
    }
  }
  if (maximum > running.maximum) {
    running.exponentials *= __expf(running.maximum - maximum);
    running.maximum = maximum;
  }
  const float origin = maximum == negative_infinity() ? 0.0f : maximum;
#pragma unroll
  for (int v = 0; v < in_flight; ++v) {
#pragma unroll
    for (int i = 0; i < N; ++i) running.exponentials += __expf(x[v][i] - origin);
  }
}

// The largest value of the block, in every thread.
template <int Threads>
__device__ __forceinline__ float block_max(float value, float* scratch) {
  value = warp_max(value);
  if constexpr (Threads > 32) {
    const int lane = threadIdx.x % 32;
    if (lane == 0) scratch[threadIdx.x / 32] = value;
    __syncthreads();
    value = warp_max(lane < Threads / 32 ? scratch[lane] : negative_infinity());
  }
  return value;
}

template <typename T, int Threads>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    statistics_kernel(const StatisticsArgs args) {
  constexpr int step = Threads * vector_size<T>;
  __shared__ float max_scratch[32], sum_scratch[2 * 32];
  const int64_t row_index = block_row();
  if (row_index >= args.rows) return;
  const int64_t target = args.targets[row_index];
  float* out = args.statistics + row_index * args.width;
  if (args.skip_ignored && target == args.ignore_index) {
    if (threadIdx.x < args.width) out[threadIdx.x] = threadIdx.x == 1 ? 1.0f : 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride;
  const int shift = misalignment(row);
  Running running = {negative_infinity(), 0.0f, 0.0f};
  int base = 0;
  for (; base + in_flight * step <= args.cols; base += in_flight * step) {
    const int col = base + static_cast<int>(threadIdx.x) * vector_size<T>;
    add_vectors<T, true>(row, {col, step, args.cols, shift}, args.softcap, running);
  }
  if (base < args.cols) {
    const int col = base + static_cast<int>(threadIdx.x) * vector_size<T>;
    add_vectors<T, false>(row, {col, step, args.cols, shift}, args.softcap, running);
  }

  const float maximum = block_max<Threads>(running.maximum, max_scratch);
  const float origin = maximum == negative_infinity() ? 0.0f : maximum;
  float sums[2] = {running.exponentials * __expf(running.maximum - origin), running.sum};
  block_sum<Threads>(sums, sum_scratch);
  if (threadIdx.x != 0) return;
  const int64_t target_col = target - args.vocab_start;
  out[0] = maximum;
  out[1] = sums[0];
  out[2] = is_class(target_col, args.cols) ? capped(to_float(row[target_col]), args.softcap) : 0.0f;
  if (args.width == 4) out[3] = sums[1];
}

struct LossArgs {
  const float* statistics;
  const int64_t* targets;
  float* row_loss;
  float* log_sum_exp;
  float* partial;  // [chunks, 2]: sum of losses, rows that count; null without a reduction
  int64_t rows, vocabulary, ignore_index;
  int width;
  float label_smoothing, z_loss;
};

// lse - x as log(Z) + (m - x): what m and x have in common cancels without rounding.
__device__ __forceinline__ float row_loss(const LossArgs& args, int64_t row, int64_t target) {
  const float* statistics = args.statistics + row * args.width;
  const float log_sum = logf(statistics[1]), lse = statistics[0] + log_sum;
  args.log_sum_exp[row] = lse;
  if (target == args.ignore_index) return 0.0f;
  if (!is_class(target, args.vocabulary)) return __int_as_float(0x7fc00000);
  float loss = log_sum + (statistics[0] - statistics[2]);
  if (args.label_smoothing != 0.0f) {
    const float mean = statistics[3] / static_cast<float>(args.vocabulary);
    loss = (1.0f - args.label_smoothing) * loss +
           args.label_smoothing * (log_sum + (statistics[0] - mean));
  }
  return args.z_loss != 0.0f ? loss + args.z_loss * lse * lse : loss;
}

constexpr int loss_threads = 256;

// A chunk of 1024 rows per block (loss_chunks).
__global__ void __launch_bounds__(loss_threads) loss_kernel(const LossArgs args) {
  __shared__ float scratch[2 * 32];
  float sums[2] = {};
#pragma unroll
  for (int i = 0; i < 1024 / loss_threads; ++i) {
    const int64_t row = int64_t{blockIdx.x} * 1024 + i * loss_threads + threadIdx.x;
    if (row >= args.rows) break;
    const int64_t target = args.targets[row];
    const float loss = row_loss(args, row, target);
    args.row_loss[row] = loss;
    sums[0] += loss;
    sums[1] += target != args.ignore_index ? 1.0f : 0.0f;
  }
  if (args.partial == nullptr) return;
  block_sum<loss_threads>(sums, scratch);
  if (threadIdx.x < 2) args.partial[int64_t{blockIdx.x} * 2 + threadIdx.x] = sums[threadIdx.x];
}

// One block adds the chunks: thread t those of index t, t + threads, ...
__global__ void __launch_bounds__(loss_threads)
    sum_losses_kernel(const float* partial, int64_t chunks, bool mean, float* loss, float* count) {
  __shared__ float scratch[2 * 32];
  float sums[2] = {};
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += loss_threads) {
    sums[0] += partial[chunk * 2];
    sums[1] += partial[chunk * 2 + 1];
  }
  block_sum<loss_threads>(sums, scratch);
  if (threadIdx.x != 0) return;
  const float divisor = mean ? sums[1] : 1.0f;
  *count = divisor;
  *loss = sums[0] / divisor;
}

// What one row's gradient is made of: e^(x - maximum) * scale - shift, less `hot` at the target.
struct RowGradient {
  float maximum, scale, shift, hot;
};

__device__ __forceinline__ RowGradient row_gradient(const GradientArgs& args, int64_t row,
                                                    int64_t target) {
  const float* statistics = args.statistics + row * args.width;
  float upstream = 0.0f;
  if (target != args.ignore_index) {
    upstream = args.loss_grad[row * args.loss_grad_stride];
    if (args.count != nullptr) upstream /= *args.count;
    if (!is_class(target, args.vocabulary)) upstream = __int_as_float(0x7fc00000);
  }
  float through_lse = upstream;
  if (args.z_loss != 0.0f) {
    through_lse *= 1.0f + 2.0f * args.z_loss * (statistics[0] + logf(statistics[1]));
  }
  if (args.log_sum_exp_grad != nullptr) through_lse += args.log_sum_exp_grad[row];
  return {statistics[0], through_lse / statistics[1],
          upstream * args.label_smoothing / static_cast<float>(args.vocabulary),
          upstream * (1.0f - args.label_smoothing)};
}

// The gradient of the vector at `col`; `hot_col` is the target's column, or one outside the row.
template <typename T>
__device__ __forceinline__ Packed<T> gradient_vector(const Packed<T>& logits,
                                                     const RowGradient& row, int col, int hot_col,
                                                     float softcap) {
  constexpr int N = vector_size<T>;
  float grad[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const float x = capped(to_float(logits.values[i]), softcap);
    grad[i] = __expf(x - row.maximum) * row.scale - row.shift;
    if (col + i == hot_col) grad[i] -= row.hot;
    if (softcap != 0.0f) grad[i] *= 1.0f - (x / softcap) * (x / softcap);
  }
  return pack<T>(grad);
}

// Elements [col, col + N) of those within the row; row + col is a multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ void store_inside(T* row, int col, int cols, const Packed<T>& packed) {
  constexpr int N = vector_size<T>;
  if (col >= 0 && col + N <= cols) {
    *reinterpret_cast<Packed<T>*>(row + col) = packed;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (col + i >= 0 && col + i < cols) row[col + i] = packed.values[i];
    }
  }
}

// Vectors lie at the gradient's multiples of 16 bytes; the first may begin before the row. Logits
// and gradient in one memory lie alike, so that each vector is then read by the thread that writes
// it.
template <typename T, int Threads>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    gradient_kernel(const GradientArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  const int64_t row_index = block_row();
  if (row_index >= args.rows) return;
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride;
  T* grad = static_cast<T*>(args.logits_grad) + row_index * args.grad_stride;
  const int first = -misalignment(grad) / static_cast<int>(sizeof(T));
  const int shift = misalignment(row + first);
  const int64_t target = args.targets[row_index];
  const bool ignored = target == args.ignore_index;
  const bool zeros = ignored && args.log_sum_exp_grad == nullptr;
  const RowGradient found = zeros ? RowGradient{} : row_gradient(args, row_index, target);
  const int64_t target_col = target - args.vocab_start;
  const int hot_col = !ignored && is_class(target_col, args.cols) ? static_cast<int>(target_col)
                                                                  : args.cols + step * in_flight;
  const int begin = first + static_cast<int>(blockIdx.z * in_flight * step + threadIdx.x * N);
  for (int col = begin; col < args.cols; col += gridDim.z * in_flight * step) {
    Packed<T> packed[in_flight] = {};
    if (!zeros) load_realigned(row, {col, step, args.cols, shift}, packed);
#pragma unroll
    for (int v = 0; v < in_flight; ++v) {
      const int at = col + v * step;
      if (!zeros) packed[v] = gradient_vector(packed[v], found, at, hot_col, args.softcap);
      if (at < args.cols) store_inside(grad, at, args.cols, packed[v]);
    }
  }
}

template <typename Args>
Logits logits_of(const Args& args) {
  // A column index may pass the row's end by all blocks' steps.
  REDLINE_CHECK(args.logits.sizes[1] < 1 << 30,
                "cross_entropy: logits: expected fewer than 2^30 columns");
  return {.data = args.logits.data,
          .targets = args.targets.template as<const int64_t>(),
          .rows = args.logits.sizes[0],
          .stride = args.logits.strides[0],
          .vocab_start = args.vocab_start,
          .ignore_index = args.ignore_index,
          .cols = static_cast<int>(args.logits.sizes[1]),
          .softcap = static_cast<float>(args.softcap)};
}

// Threads of a block, by the vectors of a row alone: four per thread where the row has them.
template <typename Visit>
void visit_threads(int64_t vectors, Visit visit) {
  if (vectors <= 4 * 32) {
    visit.template operator()<32>();
  } else if (vectors <= 4 * 256) {
    visit.template operator()<128>();
  } else {
    visit.template operator()<512>();
  }
}

}  // namespace
}  // namespace cuda

void run(const CrossEntropyStatistics& args, Stream stream) {
  using namespace cuda;
  StatisticsArgs device = {logits_of(args), args.statistics.as<float>(),
                           static_cast<int>(args.statistics.sizes[1]), args.skip_ignored};
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      launch(statistics_kernel<T, threads>,
             {.grid = row_grid(device.rows), .block = dim3(threads), .stream = stream}, device);
    });
  });
}

void run(const CrossEntropyLoss& args, Stream stream) {
  using namespace cuda;
  const bool reduced = args.reduction != Reduction::none;
  const LossArgs device = {.statistics = args.statistics.as<const float>(),
                           .targets = args.targets.as<const int64_t>(),
                           .row_loss = args.row_loss.as<float>(),
                           .log_sum_exp = args.log_sum_exp.as<float>(),
                           .partial = reduced ? args.partial.as<float>() : nullptr,
                           .rows = args.targets.sizes[0],
                           .vocabulary = args.vocabulary,
                           .ignore_index = args.ignore_index,
                           .width = static_cast<int>(args.statistics.sizes[1]),
                           .label_smoothing = static_cast<float>(args.label_smoothing),
                           .z_loss = static_cast<float>(args.z_loss)};
  const int64_t chunks = loss_chunks(device.rows);
  launch(loss_kernel, {.grid = dim3(chunks), .block = dim3(loss_threads), .stream = stream},
         device);
  if (!reduced) return;
  launch(sum_losses_kernel, {.grid = dim3(1), .block = dim3(loss_threads), .stream = stream},
         device.partial, chunks, args.reduction == Reduction::mean, args.loss.as<float>(),
         args.count.as<float>());
}

void run(const CrossEntropyGradient& args, Stream stream) {
  using namespace cuda;
  const GradientArgs device = {logits_of(args),
                               args.statistics.as<const float>(),
                               args.loss_grad.as<const float>(),
                               args.log_sum_exp_grad.as<const float>(),
                               args.count.as<const float>(),
                               args.logits_grad.data,
                               args.logits_grad.strides[0],
                               args.loss_grad.strides[0],
                               args.vocabulary,
                               static_cast<int>(args.statistics.sizes[1]),
                               static_cast<float>(args.label_smoothing),
                               static_cast<float>(args.z_loss)};
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      // Few rows are cut into pieces, for no sum crosses a piece: four blocks per multiprocessor.
      const int64_t pieces =
          ceil_div(device.cols + vector_size<T>, int64_t{threads} * vector_size<T> * in_flight);
      const int64_t wanted =
          ceil_div(4 * int64_t{stream.usable_sms()}, std::max<int64_t>(device.rows, 1));
      launch(gradient_kernel<T, threads>,
             {.grid = row_grid(device.rows, std::min(pieces, wanted)),
              .block = dim3(threads),
              .stream = stream},
             device);
    });
  });
}

}  // namespace redline
