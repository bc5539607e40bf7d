// Copies rows (kernels/embedding.h). Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/embedding/tokens.cuh"

namespace redline {
namespace cuda {
namespace {

constexpr int forward_threads = 256;
constexpr int forward_vectors = 2;  // in flight per thread

struct Forward {
  Tokens tokens;
  const void* weight;
  void* y;
  int64_t weight_stride, y_stride, hidden;
  int lanes;     // threads of a row
  bool streams;  // y outgrows the second-level cache
};

// H100, of a copy: 16384 x 4096 streaming 0.90, otherwise 0.89; 16384 x 2048 0.91, 0.89; 8192 x
// 1024 (17 MB, which the next kernel finds in the cache) 0.99, 0.99.
constexpr int64_t streaming_bytes = 32 << 20;

template <typename T, int V>
__global__ void __launch_bounds__(forward_threads) forward_kernel(const Forward args) {
  wait_for_previous_launch();
  const int lane = threadIdx.x % args.lanes, rows = forward_threads / args.lanes;
  const int64_t row = int64_t{blockIdx.x} * rows + threadIdx.x / args.lanes;
  if (threadIdx.x >= rows * args.lanes || row >= args.tokens.count) return;
  const int64_t token = read_token(args.tokens, row);
  const T* from = static_cast<const T*>(args.weight) + token * args.weight_stride;
  T* to = static_cast<T*>(args.y) + row * args.y_stride;
  Packed<T, V> absent;
#pragma unroll
  for (int i = 0; i < V; ++i) absent.values[i] = from_float<T>(nanf(""));
  const int step = args.lanes * V;
  for (int64_t col = lane * V; col < args.hidden; col += int64_t{forward_vectors} * step) {
    Packed<T, V> values[forward_vectors];
#pragma unroll
    for (int k = 0; k < forward_vectors; ++k) {
      values[k] = absent;
      if (token >= 0 && col + k * step < args.hidden)
        values[k] = load_at<T, V>(from + col + k * step);
    }
#pragma unroll
    for (int k = 0; k < forward_vectors; ++k) {
      T* at = to + col + k * step;
      if (col + k * step >= args.hidden) continue;
      args.streams ? store_streaming(at, values[k]) : store_whole(at, values[k]);
    }
  }
}

template <typename T, int V>
void launch_forward(Forward args, Stream stream) {
  const int64_t vectors = ceil_div(args.hidden, V);
  args.lanes =
      static_cast<int>(std::clamp<int64_t>(ceil_div(vectors, forward_vectors), 1, forward_threads));
  note_choice(args.lanes, " threads copy a row of ", args.hidden, " columns");
  launch(forward_kernel<T, V>,
         {.grid = dim3(ceil_div(args.tokens.count, forward_threads / args.lanes)),
          .block = dim3(forward_threads),
          .overlap_previous = true,
          .stream = stream},
         args);
}

}  // namespace
}  // namespace cuda

void run(const EmbeddingForward& embedding, Stream stream) {
  using namespace cuda;
  const TensorView &weight = embedding.weight, &y = embedding.y;
  const Forward args = {
      .tokens = tokens_of(embedding.tokens, weight.sizes[0]),
      .weight = weight.data,
      .y = y.data,
      .weight_stride = weight.strides[0],
      .y_stride = y.strides[0],
      .hidden = y.sizes[1],
      .lanes = 1,
      .streams = y.sizes[0] * y.sizes[1] * element_bytes(y.dtype) > streaming_bytes};
  const bool aligned = are_aligned("embedding", {{"weight", &weight}, {"y", &y}});
  visit_dtype<float, bfloat16, float16>("embedding: weight", y.dtype, [&]<typename T>() {
    using Device = device_type<T>;
    aligned ? launch_forward<Device, vector_size<Device>>(args, stream)
            : launch_forward<Device, 1>(args, stream);
  });
}

}  // namespace redline
