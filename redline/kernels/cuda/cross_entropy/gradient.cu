// The gradient of cross_entropy (kernels/cross_entropy.h): one read, one 16-byte write per vector.
// Rows may start at any address: any vocabulary runs this path. Bound by bytes; of the floor:
// bench/results.
#include "redline/kernels/cuda/cross_entropy/gradient.cuh"
#include "redline/kernels/cuda/device/dependent_launch.cuh"

namespace redline {
namespace cuda {
namespace {

// Vectors lie at the gradient's multiples of 16 bytes; the first may begin before the row. Logits
// and gradient in one memory lie alike, so that each vector is then read by the thread that writes
// it. Aligned: all rows of both start at such a multiple.
template <typename T, int Threads, bool Aligned>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    gradient_kernel(const GradientArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  wait_for_previous_launch();
  const int64_t row_index = block_row();
  if (row_index >= args.rows) return;
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride;
  T* grad = static_cast<T*>(args.logits_grad) + row_index * args.grad_stride;
  const int first = Aligned ? 0 : -misalignment(grad) / static_cast<int>(sizeof(T));
  const int shift = Aligned ? 0 : misalignment(row + first);
  const int64_t target = args.targets[row_index];
  const bool ignored = target == args.ignore_index;
  const bool zeros = ignored && args.log_sum_exp_grad == nullptr;
  const T zero = from_float<T>(0.0f);
  Packed<T> packed[in_flight] = {};
  int col = first + static_cast<int>(blockIdx.z * in_flight * step + threadIdx.x * N);
  if (!zeros) load_realigned<Aligned>(row, {col, step, args.cols, shift}, packed, zero);
  const float* statistics = args.statistics + row_index * args.width;
  const RowGradient found =
      zeros ? RowGradient{}
            : row_gradient(args, row_index, upstream_of(args, row_index, target), statistics[0],
                           statistics[1]);
  const int64_t target_col = target - args.vocab_start;
  const int hot_col = !ignored && is_class(target_col, args.cols) ? static_cast<int>(target_col)
                                                                  : args.cols + step * in_flight;
  const int tile = static_cast<int>(gridDim.z) * in_flight * step;
  while (col < args.cols) {
#pragma unroll
    for (int v = 0; v < in_flight; ++v) {
      const int at = col + v * step;
      if (!zeros) packed[v] = gradient_vector(packed[v], found, at, hot_col, args.softcap);
      if constexpr (Aligned) {
        if (at < args.cols) *reinterpret_cast<Packed<T>*>(grad + at) = packed[v];
      } else {
        if (at < args.cols) store_inside(grad, at, args.cols, packed[v]);
      }
    }
    col += tile;
    if (!zeros) load_realigned<Aligned>(row, {col, step, args.cols, shift}, packed, zero);
  }
}

}  // namespace
}  // namespace cuda

void run(const CrossEntropyGradient& args, Stream stream) {
  using namespace cuda;
  const GradientArgs device = gradient_args(args);
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_threads(ceil_div(device.cols, vector_size<T>), [&]<int threads>() {
      // Few rows are cut into pieces, for no sum crosses a piece: four blocks per multiprocessor.
      const int64_t pieces =
          ceil_div(device.cols + vector_size<T>, int64_t{threads} * vector_size<T> * in_flight);
      const int64_t wanted =
          ceil_div(4 * int64_t{stream.usable_sms()}, std::max<int64_t>(device.rows, 1));
      visit_bool(
          are_aligned("cross_entropy",
                      {{"logits", &args.logits}, {"logits_grad", &args.logits_grad}}, realigned),
          [&]<bool aligned>() {
            launch(gradient_kernel<T, threads, aligned>,
                   {.grid = row_grid(device.rows, std::min(pieces, wanted)),
                    .block = dim3(threads),
                    .overlap_previous = true,
                    .stream = stream},
                   device);
          });
    });
  });
}

}  // namespace redline
