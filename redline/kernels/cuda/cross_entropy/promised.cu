// Statistics and gradient in one pass (promised_kernel.cuh), or in two; and what a promise was off.
#include "redline/kernels/cuda/cross_entropy/promised_kernel.cuh"

namespace redline {
namespace cuda {
namespace {

constexpr int count_threads = 1024;

__global__ void __launch_bounds__(count_threads)
    count_kernel(const int64_t* targets, int rows, int64_t ignore_index, float* count) {
  __shared__ int counts[count_threads / 32];
  wait_for_previous_launch();
  allow_next_launch();
  int own = 0;
#pragma unroll 8
  for (int row = threadIdx.x; row < rows; row += count_threads) {
    own += targets[row] != ignore_index ? 1 : 0;
  }
  const int lane = threadIdx.x % 32, of_warp = __reduce_add_sync(~0u, own);
  if (lane == 0) counts[threadIdx.x / 32] = of_warp;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int of_block = __reduce_add_sync(~0u, counts[lane]);
  if (lane == 0) *count = static_cast<float>(of_block);
}

template <typename T>
struct Kept {
  T* data;
  int64_t stride, rows;
  int cols;
};

// As few blocks as fill the device: where the promise was kept they end at once.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(most_threads)
    rescale_kernel(Kept<T> kept, const float* given, const float* promised) {
  constexpr int N = vector_size<T>;
  wait_for_previous_launch();
  if (*given == *promised) return;
  const float by = *given / *promised;
  for (int64_t row = blockIdx.x; row < kept.rows; row += gridDim.x) {
    for (int col = threadIdx.x * N; col < kept.cols; col += most_threads * N) {
      const Packed<T> packed = load<T>(kept.data + row * kept.stride, col, kept.cols, Aligned);
      float values[N];
#pragma unroll
      for (int i = 0; i < N; ++i) values[i] = element(packed, i) * by;
      store(kept.data + row * kept.stride, col, kept.cols, Aligned, pack<T>(values));
    }
  }
}

// Blocks per row, the fewest whose parts are small enough; 0 where eight are not. A matter of shape
// and dtype, for the order of the sums is one of the parts.
int cluster_of(int64_t row_bytes) {
  const int64_t limit = part_limit - (row_bytes % vector_bytes == 0 ? 0 : piece_room);
  for (const int cluster : {1, 2, 4, 8}) {
    if (row_bytes <= cluster * limit) return cluster;
  }
  return 0;
}

}  // namespace
}  // namespace cuda

void run(const CrossEntropyPromise& args, Stream stream) {
  using namespace cuda;
  const int64_t rows = args.logits.sizes[0];
  const int64_t row_bytes = args.logits.sizes[1] * element_bytes(args.logits.dtype);
  const int cluster = cluster_of(row_bytes);
  if (stream.capability / 10 != 9 || cluster == 0 || rows * cluster > INT32_MAX) {
    run(statistics_of(args), stream);
    run(gradient_of(args), stream);
    return;
  }
  if (args.predictions) return run_with_predictions(args, cluster, stream);
  launch_promises<false>(args, cluster, stream);
}

void run(const CrossEntropyCount& args, Stream stream) {
  using namespace cuda;
  note_choice("one block counts what a mean divides by");
  launch(
      count_kernel,
      {.grid = dim3(1), .block = dim3(count_threads), .overlap_previous = true, .stream = stream},
      args.targets.as<const int64_t>(), static_cast<int>(args.targets.sizes[0]), args.ignore_index,
      args.count.as<float>());
}

void run(const CrossEntropyRescale& args, Stream stream) {
  using namespace cuda;
  const TensorView& grad = args.logits_grad;
  const int64_t blocks = std::min<int64_t>(grad.sizes[0], 8 * int64_t{stream.usable_sms()});
  visit_dtype<float, bfloat16, float16>("cross_entropy", grad.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    visit_bool(are_aligned("cross_entropy", {{"logits_grad", &grad}}), [&]<bool aligned>() {
      note_choice("the promised gradient by what the promise was off");
      launch(rescale_kernel<T, aligned>,
             {.grid = dim3(blocks),
              .block = dim3(most_threads),
              .overlap_previous = true,
              .stream = stream},
             Kept<T>{grad.as<T>(), grad.strides[0], grad.sizes[0], static_cast<int>(grad.sizes[1])},
             args.given.as<const float>(), args.promised.as<const float>());
    });
  });
}

}  // namespace redline
