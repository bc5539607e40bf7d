// The statistics of all rows: a block per row reads it once by 16-byte loads, each thread with a
// running maximum and sum, its next four vectors on their way while four are added. With Predict
// where the largest logit is too: a kernel of its own, for the columns cost registers.
#pragma once

#include "redline/kernels/cuda/cross_entropy/largest.cuh"
#include "redline/kernels/cuda/device/dependent_launch.cuh"

namespace redline::cuda {

// run() of arguments with predictions.
void run_with_predictions(const CrossEntropyStatistics& args, Stream stream);

namespace {

struct StatisticsArgs : Logits {
  float* statistics;
  int64_t* predictions;
  int width;  // 3, or 4 with the sum of the logits
  bool skip_ignored;
};

template <typename T, int Threads, bool Aligned, bool Predict>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    statistics_kernel(const StatisticsArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  __shared__ float scratch[statistics_scratch];
  wait_for_previous_launch();
  allow_next_launch();
  const int64_t row_index = block_row();
  if (row_index >= args.rows) return;
  const int64_t target = args.targets[row_index];
  float* out = args.statistics + row_index * args.width;
  if (args.skip_ignored && target == args.ignore_index) {
    if (threadIdx.x < args.width) out[threadIdx.x] = threadIdx.x == 1 ? 1.0f : 0.0f;
    return;
  }
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride;
  const T outside = from_float<T>(negative_infinity());
  RowVectors at = {static_cast<int>(threadIdx.x) * N, step, args.cols,
                   Aligned ? 0 : misalignment(row)};
  Running running = {negative_infinity(), 0.0f, 0.0f};
  Largest largest_seen = {negative_infinity(), 0};
  Packed<T> packed[in_flight], next[in_flight];
  load_realigned<Aligned>(row, at, packed, outside);
  for (int base = 0; base < args.cols; base += in_flight * step) {
    RowVectors following = at;
    following.col += in_flight * step;
    if (Aligned) load_realigned<Aligned>(row, following, next, outside);
    if constexpr (Predict) note_largest(packed, at.col, largest_seen);
    add_vectors(packed, at, {args.softcap, args.width == 4}, running);
    at = following;
    if constexpr (Aligned) {
#pragma unroll
      for (int v = 0; v < in_flight; ++v) packed[v] = next[v];
    } else {  // no registers for two tiles besides what is shifted
      load_realigned<Aligned>(row, at, packed, outside);
    }
  }

  running = over_block<T, Threads>(running, scratch);
  if constexpr (Predict) {
    __shared__ LargestScratch<Threads> memory;
    const Largest found = over_block(row, args.cols, largest_seen, running.exponentials, memory);
    if (threadIdx.x == 0) {
      args.predictions[row_index] = args.vocab_start + prediction_of(found);
    }
  }
  if (threadIdx.x != 0) return;
  const int64_t target_col = target - args.vocab_start;
  out[0] = running.maximum;
  out[1] = running.exponentials;
  out[2] = is_class(target_col, args.cols) ? capped(to_float(row[target_col]), args.softcap) : 0.0f;
  if (args.width == 4) out[3] = running.sum;
}

template <bool Predict>
void launch_statistics(const CrossEntropyStatistics& args, Stream stream) {
  const StatisticsArgs device = {logits_of(args), args.statistics.as<float>(),
                                 args.predictions.as<int64_t>(),
                                 static_cast<int>(args.statistics.sizes[1]), args.skip_ignored};
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      visit_bool(are_aligned("cross_entropy", {{"logits", &args.logits}}, realigned),
                 [&]<bool aligned>() {
                   launch(statistics_kernel<T, threads, aligned, Predict>,
                          {.grid = row_grid(device.rows),
                           .block = dim3(threads),
                           .overlap_previous = true,
                           .stream = stream},
                          device);
                 });
    });
  });
}

}  // namespace
}  // namespace redline::cuda
