// The gradient of embedding (kernels/embedding.h). The tokens' positions are put in order of their
// rows of the vocabulary; a group of threads takes the rows that start at some of these places,
// sums each in registers over its tokens and writes it once. Text names a few rows very often: a
// row of many tokens is cut into chunks, whose sums a last launch adds. Rows without tokens are
// nobody's: blocks of their own write the zeros. Bound by bytes; of the floor: bench/results.
#include "redline/kernels/cuda/embedding/order.cuh"

namespace redline {
namespace cuda {
namespace {

constexpr int sum_threads = 128;
constexpr int window = 8;       // sorted places of a group of threads
constexpr int sum_vectors = 8;  // tokens in flight per thread
constexpr int zero_rows = 32;   // of the vocabulary, that a block looks for rows without tokens

struct Backward {
  const void* y_grad;
  void* weight_grad;
  const uint32_t *rows, *order, *begins;  // of sorted places: order.cuh
  float* partial;
  int64_t y_grad_stride, weight_grad_stride, count, vocabulary, hidden;
  int lanes;           // threads of a row
  int64_t sum_blocks;  // the blocks after these write zeros
  bool accumulate;
};

// Where the sum of the chunk lies that starts at sorted place `start`: the first of its row, or a
// further one.
__device__ __forceinline__ int64_t slot_of(int64_t start, bool is_first) {
  return 2 * (start / chunk) + (is_first ? 0 : 1);
}

// The columns of a thread.
template <int V>
struct Slice {
  int64_t first, step;

  __device__ __forceinline__ Slice(int thread, int threads)
      : first((int64_t{blockIdx.y} * threads + thread) * V),
        step(int64_t{gridDim.y} * threads * V) {}
};

// A row of weight_grad, V columns from `col` on: += or = the sums.
template <typename Out, int V>
struct RowOfGradient {
  Out* at;
  Packed<Out, V> before;

  __device__ __forceinline__ RowOfGradient(const Backward& args, int64_t row, int64_t col)
      : at(static_cast<Out*>(args.weight_grad) + row * args.weight_grad_stride + col), before{} {
    if (args.accumulate) before = load_at<Out, V>(at);
  }
  __device__ __forceinline__ void store(float (&sums)[V]) const {
#pragma unroll
    for (int e = 0; e < V; ++e) sums[e] += element(before, e);
    *reinterpret_cast<Packed<Out, V>*>(at) = pack<Out, V>(sums);
  }
};

// Adds V columns from `col` on of `count` tokens, one after another.
template <typename T, int V>
__device__ __forceinline__ void sum_tokens(const Backward& args, const uint32_t* order, int count,
                                           int64_t col, float (&sums)[V]) {
  const T* y_grad = static_cast<const T*>(args.y_grad) + col;
  for (int i = 0; i < count; i += sum_vectors) {
    Packed<T, V> values[sum_vectors];
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      values[k] = {};
      if (i + k < count) {
        values[k] = load_at<T, V>(y_grad + int64_t{order[i + k]} * args.y_grad_stride);
      }
    }
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (i + k < count) sums[e] += element(values[k], e);
      }
    }
  }
}

// --- rows with tokens ---------------------------------------------------------------------------

// The places of a block and those that its last row may reach.
struct Places {
  static constexpr int most = sum_threads * window;
  uint32_t begins[most], rows[most + chunk], order[most + chunk];
};

__device__ __forceinline__ void load_places(const Backward& args, int64_t base, int count,
                                            Places& places) {
  for (int i = threadIdx.x; i < count + chunk; i += sum_threads) {
    const bool any = base + i < args.count;
    places.rows[i] = any ? args.rows[base + i] : UINT32_MAX;
    places.order[i] = any ? args.order[base + i] : 0;
    if (i < count) places.begins[i] = any ? args.begins[base + i] : 0;
  }
  __syncthreads();
}

// Tokens from place i on that are of its row, a chunk at most.
__device__ __forceinline__ int tokens_from(const Places& places, int i) {
  int begin = i + 1, end = i + chunk;
  while (begin < end) {
    const int middle = (begin + end) / 2;
    if (places.rows[middle] == places.rows[i]) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin - i;
}

template <typename T, typename Out, int V>
__device__ __forceinline__ void sum_window(const Backward& args) {
  __shared__ Places places;
  const int groups = sum_threads / args.lanes, group = static_cast<int>(threadIdx.x) / args.lanes;
  const int64_t base = int64_t{blockIdx.x} * groups * window;
  load_places(args, base, groups * window, places);
  if (group >= groups) return;
  const Slice<V> columns(static_cast<int>(threadIdx.x) % args.lanes, args.lanes);
  for (int i = group * window; i < (group + 1) * window; ++i) {
    const uint32_t row = places.rows[i];
    if (row >= args.vocabulary) return;
    const int64_t at = base + i, before = at - places.begins[i];  // tokens of its row
    if (before % chunk != 0) continue;
    const int count = tokens_from(places, i);
    const bool is_whole = before == 0 && (count < chunk || places.rows[i + chunk] != row);
    for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
      float sums[V] = {};
      if (is_whole) {
        const RowOfGradient<Out, V> to(args, row, col);
        sum_tokens<T, V>(args, places.order + i, count, col, sums);
        to.store(sums);
      } else {
        sum_tokens<T, V>(args, places.order + i, count, col, sums);
        float* to = args.partial + slot_of(at, before == 0) * args.hidden + col;
        *reinterpret_cast<Packed<float, V>*>(to) = pack<float, V>(sums);
      }
    }
  }
}

// --- rows without -------------------------------------------------------------------------------

template <typename Out, int V>
__device__ __forceinline__ void write_zeros(const Backward& args) {
  __shared__ int64_t ends[2];
  __shared__ uint32_t named;
  const int64_t first = (blockIdx.x - args.sum_blocks) * zero_rows;
  if (threadIdx.x == 0) named = 0;
  if (threadIdx.x < 2) {
    const int64_t row = min(first + threadIdx.x * zero_rows, args.vocabulary);
    ends[threadIdx.x] = keys_below(args.rows, args.count, static_cast<uint32_t>(row));
  }
  __syncthreads();
  for (int64_t i = ends[0] + threadIdx.x; i < ends[1]; i += sum_threads) {
    atomicOr(&named, 1u << (args.rows[i] - first));
  }
  __syncthreads();
  const int groups = sum_threads / args.lanes, group = static_cast<int>(threadIdx.x) / args.lanes;
  if (group >= groups) return;
  const Slice<V> columns(static_cast<int>(threadIdx.x) % args.lanes, args.lanes);
  for (int r = group; r < zero_rows; r += groups) {
    if (first + r >= args.vocabulary) return;
    if (named >> r & 1) continue;
    Out* to = static_cast<Out*>(args.weight_grad) + (first + r) * args.weight_grad_stride;
    for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
      *reinterpret_cast<Packed<Out, V>*>(to + col) = Packed<Out, V>{};
    }
  }
}

// Four blocks: left to itself the compiler spills a register of float32.
template <typename T, typename Out, int V>
__global__ void __launch_bounds__(sum_threads, 4) sum_kernel(const Backward args) {
  wait_for_previous_launch();
  allow_next_launch();
  if (blockIdx.x < args.sum_blocks) {
    sum_window<T, Out, V>(args);
  } else {
    write_zeros<Out, V>(args);
  }
}

// --- rows of several chunks ---------------------------------------------------------------------

// Adds V columns of the sums of a row's chunks, one after another.
template <int V>
__device__ __forceinline__ void sum_chunks_of(const Backward& args, Range places, int64_t col,
                                              float (&sums)[V]) {
  for (int64_t start = places.begin; start < places.end; start += sum_vectors * chunk) {
    Packed<float, V> values[sum_vectors] = {};
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      const int64_t at = start + k * chunk, slot = slot_of(at, at == places.begin);
      if (at < places.end) values[k] = load_at<float, V>(args.partial + slot * args.hidden + col);
    }
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (start + k * chunk < places.end) sums[e] += values[k].values[e];
      }
    }
  }
}

// A block has `chunk` sorted places, in which one row of more than a chunk starts at most.
template <typename Out, int V>
__global__ void __launch_bounds__(sum_threads) chunks_kernel(const Backward args) {
  __shared__ Range places;
  // rows and begins are read before the wait: the sort had ended before sum_kernel, which waited
  // for it, allowed this launch.
  const int64_t at = int64_t{blockIdx.x} * chunk + threadIdx.x;
  if (threadIdx.x == 0) places = {};
  __syncthreads();
  if (threadIdx.x < chunk && at + chunk < args.count) {
    const uint32_t row = args.rows[at];
    if (args.begins[at] == at && row < args.vocabulary && args.rows[at + chunk] == row) {
      places = {at, keys_below(args.rows, args.count, row + 1)};
    }
  }
  __syncthreads();
  wait_for_previous_launch();  // by every block: what follows on the stream waits for this kernel
  if (places.begin == places.end) return;
  const int64_t row = args.rows[places.begin];
  const Slice<V> columns(static_cast<int>(threadIdx.x), sum_threads);
  for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
    const RowOfGradient<Out, V> to(args, row, col);
    float sums[V] = {};
    sum_chunks_of<V>(args, places, col, sums);
    to.store(sums);
  }
}

template <typename T, typename Out, int V>
void launch_sum(Backward args, Stream stream) {
  const int64_t vectors = ceil_div(args.hidden, V);
  args.lanes = static_cast<int>(std::clamp<int64_t>(vectors, 1, sum_threads));
  args.sum_blocks = ceil_div(args.count, int64_t{sum_threads / args.lanes} * window);
  const int64_t zero_blocks = args.accumulate ? 0 : ceil_div(args.vocabulary, zero_rows);
  const int64_t slices = std::clamp<int64_t>(ceil_div(vectors, sum_threads), 1, 65535);
  const bool overlaps = stream.capability >= 90;
  note_choice("rows of the vocabulary with tokens, each summed once in order of occurrence",
              zero_blocks > 0 ? "; blocks of their own write zeros for the others" : "");
  launch(sum_kernel<T, Out, V>,
         {.grid = dim3(args.sum_blocks + zero_blocks, slices),
          .block = dim3(sum_threads),
          .overlap_previous = overlaps,
          .stream = stream},
         args);
  if (args.count <= chunk) return;
  note_choice("rows of more than ", chunk, " tokens: the sums of their chunks, in order");
  launch(chunks_kernel<Out, V>,
         {.grid = dim3(ceil_div(args.count, chunk), slices),
          .block = dim3(sum_threads),
          .overlap_previous = overlaps,
          .stream = stream},
         args);
}

}  // namespace

int64_t embedding_workspace(int64_t tokens, int64_t vocabulary, int64_t hidden) {
  if (tokens == 0) return 0;
  const Tokens all = {nullptr, false, tokens, vocabulary};
  const size_t bytes = runs_fit(all) ? 0 : radix_sort({}, nullptr, 0, all, {});
  return fixed_size(tokens, hidden) + ceil_div(static_cast<int64_t>(bytes), 4);
}

}  // namespace cuda

void run(const EmbeddingBackward& embedding, Stream stream) {
  using namespace cuda;
  const TensorView &y_grad = embedding.y_grad, &weight_grad = embedding.weight_grad;
  const Tokens tokens = tokens_of(embedding.tokens, weight_grad.sizes[0]);
  const Workspace at = workspace_of(embedding);
  const Backward args = {.y_grad = y_grad.data,
                         .weight_grad = weight_grad.data,
                         .rows = at.rows,
                         .order = at.order,
                         .begins = at.begins,
                         .partial = at.partial,
                         .y_grad_stride = y_grad.strides[0],
                         .weight_grad_stride = weight_grad.strides[0],
                         .count = tokens.count,
                         .vocabulary = tokens.vocabulary,
                         .hidden = weight_grad.sizes[1],
                         .lanes = 1,
                         .sum_blocks = 0,
                         .accumulate = embedding.accumulate};
  const bool aligned =
      are_aligned("embedding", {{"y_grad", &y_grad}, {"weight_grad", &weight_grad}});
  const bool wide = weight_grad.dtype == DType::float32;
  visit_dtype<float, bfloat16, float16>("embedding: y_grad", y_grad.dtype, [&]<typename T>() {
    using Device = device_type<T>;
    constexpr int vector = vector_size<Device>;
    sort_by_row(embedding, tokens, stream);
    visit_bool(wide, [&]<bool is_wide>() {
      using Out = std::conditional_t<is_wide, float, Device>;
      aligned ? launch_sum<Device, Out, vector>(args, stream)
              : launch_sum<Device, Out, 1>(args, stream);
    });
  });
}

}  // namespace redline
