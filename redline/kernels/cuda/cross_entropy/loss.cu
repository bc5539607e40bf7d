// loss = lse - x_target and its kin (kernels/cross_entropy.h), and the statistics that it is made
// of: statistics_kernel.cuh.
// Rows may start at any address: any vocabulary runs this path. Bound by bytes; of the floor:
// bench/results.
#include "redline/kernels/cuda/cross_entropy/statistics_kernel.cuh"

namespace redline {
namespace cuda {
namespace {

// Where the reduced loss goes, and what it is divided by.
struct Total {
  float *loss, *count;
  bool mean;
};

struct LossArgs {
  const float* statistics;
  const int64_t* targets;
  float* row_loss;
  float* log_sum_exp;
  float* partial;  // [chunks, 2]: sum of losses, rows that count; null without a reduction
  Total total;     // of one chunk, which needs no second launch
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

// From the sum of the losses and the number of rows that count.
__device__ __forceinline__ void write_total(const Total& total, const float (&sums)[2]) {
  const float divisor = total.mean ? sums[1] : 1.0f;
  *total.count = divisor;
  *total.loss = sums[0] / divisor;
}

constexpr int loss_threads = 256;

// A chunk of 1024 rows per block (loss_chunks).
__global__ void __launch_bounds__(loss_threads) loss_kernel(const LossArgs args) {
  __shared__ float scratch[2 * 32];
  float sums[2] = {};
  wait_for_previous_launch();
  allow_next_launch();
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
  if (gridDim.x == 1) {
    if (threadIdx.x == 0) write_total(args.total, sums);
  } else if (threadIdx.x < 2) {
    args.partial[int64_t{blockIdx.x} * 2 + threadIdx.x] = sums[threadIdx.x];
  }
}

// One block adds the chunks: thread t those of index t, t + threads, ...
__global__ void __launch_bounds__(loss_threads)
    sum_losses_kernel(const float* partial, int64_t chunks, Total total) {
  __shared__ float scratch[2 * 32];
  float sums[2] = {};
  wait_for_previous_launch();
  for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += loss_threads) {
    sums[0] += partial[chunk * 2];
    sums[1] += partial[chunk * 2 + 1];
  }
  block_sum<loss_threads>(sums, scratch);
  if (threadIdx.x == 0) write_total(total, sums);
}

}  // namespace
}  // namespace cuda

void run(const CrossEntropyStatistics& args, Stream stream) {
  if (args.predictions) return cuda::run_with_predictions(args, stream);
  cuda::launch_statistics<false>(args, stream);
}

void run(const CrossEntropyLoss& args, Stream stream) {
  using namespace cuda;
  const bool reduced = args.reduction != Reduction::none;
  const LossArgs device = {.statistics = args.statistics.as<const float>(),
                           .targets = args.targets.as<const int64_t>(),
                           .row_loss = args.row_loss.as<float>(),
                           .log_sum_exp = args.log_sum_exp.as<float>(),
                           .partial = reduced ? args.partial.as<float>() : nullptr,
                           .total = {.loss = args.loss.as<float>(),
                                     .count = args.count.as<float>(),
                                     .mean = args.reduction == Reduction::mean},
                           .rows = args.targets.sizes[0],
                           .vocabulary = args.vocabulary,
                           .ignore_index = args.ignore_index,
                           .width = static_cast<int>(args.statistics.sizes[1]),
                           .label_smoothing = static_cast<float>(args.label_smoothing),
                           .z_loss = static_cast<float>(args.z_loss)};
  const int64_t chunks = loss_chunks(device.rows);
  const bool sums_chunks = reduced && chunks != 1;  // of no rows too
  note_choice("the rows' losses", sums_chunks ? ", in chunks added in index order" : "");
  launch(loss_kernel,
         {.grid = dim3(chunks),
          .block = dim3(loss_threads),
          .overlap_previous = true,
          .stream = stream},
         device);
  if (!sums_chunks) return;
  launch(sum_losses_kernel,
         {.grid = dim3(1), .block = dim3(loss_threads), .overlap_previous = true, .stream = stream},
         device.partial, chunks, device.total);
}

}  // namespace redline
