// loss = lse - x_target and its kin (kernels/cross_entropy.h). Statistics: a block per row reads it
// once by 16-byte loads, four in flight per thread, each thread with a running maximum and sum.
// Rows may start at any address: any vocabulary runs this path. Bound by bytes; of the floor:
// bench/results.
#include "redline/kernels/cuda/cross_entropy/logits.cuh"
#include "redline/kernels/cuda/device/reduce.cuh"

namespace redline {
namespace cuda {
namespace {

struct StatisticsArgs : Logits {
  float* statistics;
  int width;  // 3, or 4 with the sum of the logits
  bool skip_ignored;
};

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

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

}  // namespace redline
