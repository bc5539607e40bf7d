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
constexpr int most_window = 16;  // sorted places of a group of threads
constexpr int sum_vectors = 8;   // tokens or chunks in flight per thread

struct Backward {
  const void* y_grad;
  void* weight_grad;
  const uint32_t *rows, *order, *begins, *named;  // order.cuh
  float* partial;
  int64_t y_grad_stride, weight_grad_stride, count, vocabulary, hidden;
  int lanes, slices;             // threads of a row, and blocks beside each other that share it
  int window;                    // sorted places of a group of threads
  int zero_rows;                 // of a block that writes zeros, a power of two, 32 at most
  int64_t sum_blocks, zero_end;  // the blocks after these write zeros, up to this row
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

  __device__ __forceinline__ Slice(int thread, int threads, int slice, int slices)
      : first((int64_t{slice} * threads + thread) * V), step(int64_t{slices} * threads * V) {}
};

// --- rows with tokens ---------------------------------------------------------------------------

// What follows a token's addition: nothing, or its sum is whole and goes to its row, or is that of
// one of a row's chunks and goes to its slot.
enum class Then : uint32_t { add, write_row, write_slot };

struct alignas(16) Place {
  uint32_t token, to;  // the position; the row or the slot
  Then then;
};

// The places of a block and those that its last chunk may reach.
struct Places {
  static constexpr int most = sum_threads * most_window;
  Place at[most + chunk];
  int starts[sum_threads + 1];  // per group, of its first chunk; the last: of the block's end
  int end;                      // of the places of rows of the vocabulary
};

// Tokens of its row before sorted place `at`.
__device__ __forceinline__ uint32_t rank_of(const Backward& args, int64_t at) {
  return static_cast<uint32_t>(at) - args.begins[at];
}

// Of the chunks that start at place i or later, the first. By whole warps.
__device__ __forceinline__ int first_start(const Backward& args, int64_t base, int i) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (;; i += 32) {
    const int64_t at = base + i + lane;
    const unsigned found = __ballot_sync(~0u, at >= args.count || rank_of(args, at) % chunk == 0);
    if (found != 0) return i + __ffs(found) - 1;
  }
}

__device__ __forceinline__ Place read_place(const Backward& args, int64_t at) {
  Place place = {.token = args.order[at], .to = args.rows[at], .then = Then::add};
  const uint32_t rank = rank_of(args, at);
  const bool is_last = at + 1 == args.count || args.rows[at + 1] != place.to;
  if (is_last && rank < chunk) {
    place.then = Then::write_row;
  } else if (is_last || rank % chunk == chunk - 1) {
    place.then = Then::write_slot;
    place.to = static_cast<uint32_t>(slot_of(at - rank % chunk, rank < chunk));
  }
  return place;
}

__device__ __forceinline__ void load_places(const Backward& args, int64_t base, int groups,
                                            Places& places) {
  const int count = static_cast<int>(min(int64_t{groups} * args.window + chunk, args.count - base));
  if (threadIdx.x == 0) places.end = count;
  __syncthreads();
  for (int i = threadIdx.x; i < count; i += sum_threads) {
    places.at[i] = read_place(args, base + i);
    if (args.rows[base + i] >= args.vocabulary) atomicMin(&places.end, i);
  }
  for (int g = static_cast<int>(threadIdx.x) / 32; g <= groups; g += sum_threads / 32) {
    const int start = first_start(args, base, g * args.window);
    if (threadIdx.x % 32 == 0) places.starts[g] = start;
  }
  __syncthreads();
}

template <typename Out, int V>
__device__ __forceinline__ Out* row_of_gradient(const Backward& args, int64_t row, int64_t col) {
  return static_cast<Out*>(args.weight_grad) + row * args.weight_grad_stride + col;
}

// Adds the tokens of places [begin, end), whole chunks, V columns from `col` on. The loads do not
// wait for the end of a row: most have one token.
template <typename T, typename Out, int V, bool Accumulate>
__device__ __forceinline__ void sum_places(const Backward& args, const Place* places, int begin,
                                           int end, int64_t col) {
  const T* y_grad = static_cast<const T*>(args.y_grad) + col;
  float sums[V] = {};
  for (int i = begin; i < end; i += sum_vectors) {
    Packed<T, V> values[sum_vectors];
    Packed<Out, V> before[Accumulate ? sum_vectors : 1];
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      if (i + k < end) {
        const Place place = places[i + k];
        values[k] = load_at<T, V>(y_grad + int64_t{place.token} * args.y_grad_stride);
        if (Accumulate && place.then == Then::write_row) {
          before[k] = load_at<Out, V>(row_of_gradient<Out, V>(args, place.to, col));
        }
      }
    }
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      if (i + k >= end) break;
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] += element(values[k], e);
      const Place place = places[i + k];
      if (place.then == Then::add) continue;
      if (place.then == Then::write_row) {
        if constexpr (Accumulate) {
#pragma unroll
          for (int e = 0; e < V; ++e) sums[e] += element(before[k], e);
        }
        store_whole(row_of_gradient<Out, V>(args, place.to, col), pack<Out, V>(sums));
      } else {
        store_whole(args.partial + place.to * args.hidden + col, pack<float, V>(sums));
      }
#pragma unroll
      for (int e = 0; e < V; ++e) sums[e] = 0.0f;
    }
  }
}

template <typename T, typename Out, int V, bool Accumulate>
__device__ __forceinline__ void sum_window(const Backward& args, int64_t block) {
  __shared__ Places places;
  const int groups = sum_threads / args.lanes, group = static_cast<int>(threadIdx.x) / args.lanes;
  const int slice = static_cast<int>(block % args.slices);
  load_places(args, block / args.slices * groups * args.window, groups, places);
  if (group >= groups) return;
  const Slice<V> columns(static_cast<int>(threadIdx.x) % args.lanes, args.lanes, slice,
                         args.slices);
  for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
    sum_places<T, Out, V, Accumulate>(args, places.at, places.starts[group],
                                      min(places.starts[group + 1], places.end), col);
  }
}

// --- rows without -------------------------------------------------------------------------------

template <typename Out, int V>
__device__ __forceinline__ void write_zeros(const Backward& args, int64_t block) {
  const int64_t first = block * args.zero_rows;
  const uint32_t named = args.count > 0 ? args.named[first / 32] >> (first % 32) : 0;
  const int groups = sum_threads / args.lanes, group = static_cast<int>(threadIdx.x) / args.lanes;
  if (group >= groups) return;
  const Slice<V> columns(static_cast<int>(threadIdx.x) % args.lanes, args.lanes, 0, 1);
  for (int r = group; r < args.zero_rows; r += groups) {
    if (first + r >= args.zero_end) return;
    if (named >> r & 1) continue;
    Out* to = row_of_gradient<Out, V>(args, first + r, 0);
    for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
      store_whole(to + col, Packed<Out, V>{});
    }
  }
}

template <typename T, typename Out, int V, bool Accumulate>
__global__ void __launch_bounds__(sum_threads, 4) sum_kernel(const Backward args) {
  wait_for_previous_launch();
  allow_next_launch();
  if (blockIdx.x < args.sum_blocks) {
    sum_window<T, Out, V, Accumulate>(args, blockIdx.x);
  } else {
    write_zeros<Out, V>(args, blockIdx.x - args.sum_blocks);
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
template <typename Out, int V, bool Accumulate>
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
  const Slice<V> columns(static_cast<int>(threadIdx.x), sum_threads, blockIdx.y, gridDim.y);
  for (int64_t col = columns.first; col < args.hidden; col += columns.step) {
    Out* to = row_of_gradient<Out, V>(args, row, col);
    Packed<Out, V> before = {};
    if constexpr (Accumulate) before = load_at<Out, V>(to);
    float sums[V] = {};
    sum_chunks_of<V>(args, places, col, sums);
#pragma unroll
    for (int e = 0; e < V; ++e) sums[e] += element(before, e);
    store_whole(to, pack<Out, V>(sums));
  }
}

// A block that writes zeros writes 64 KiB, so that the multiprocessors end together.
int zero_rows_of(int64_t row_bytes) {
  const int64_t rows = (int64_t{64} << 10) / std::max<int64_t>(row_bytes, 1);
  return static_cast<int>(std::bit_floor(static_cast<uint64_t>(std::clamp<int64_t>(rows, 1, 32))));
}

template <typename T, typename Out, int V, bool Accumulate>
void launch_sum(Backward args, Stream stream) {
  const int64_t vectors = ceil_div(args.hidden, V);
  args.lanes = static_cast<int>(std::clamp<int64_t>(vectors, 1, sum_threads));
  args.slices = static_cast<int>(std::clamp<int64_t>(ceil_div(vectors, sum_threads), 1, 4096));
  args.window = args.count < 16384 ? 8 : most_window;  // few: more blocks are worth more
  const int64_t places = int64_t{sum_threads / args.lanes} * args.window;  // of a block
  args.sum_blocks = ceil_div(args.count, places) * args.slices;
  args.zero_rows = zero_rows_of(args.hidden * int64_t{sizeof(Out)});
  const int64_t zero_blocks = Accumulate ? 0 : ceil_div(args.zero_end, args.zero_rows);
  note_choice("rows of the vocabulary with tokens, each summed once in order of occurrence",
              zero_blocks > 0 ? "; blocks of their own write zeros for the others" : "");
  launch(sum_kernel<T, Out, V, Accumulate>,
         {.grid = dim3(args.sum_blocks + zero_blocks),
          .block = dim3(sum_threads),
          .overlap_previous = args.count > 0,
          .stream = stream},
         args);
  if (args.count <= chunk) return;
  note_choice("rows of more than ", chunk, " tokens: the sums of their chunks, in order");
  launch(chunks_kernel<Out, V, Accumulate>,
         {.grid = dim3(ceil_div(args.count, chunk), args.slices),
          .block = dim3(sum_threads),
          .overlap_previous = true,
          .stream = stream},
         args);
}

}  // namespace

int64_t embedding_workspace(int64_t tokens, int64_t vocabulary, int64_t hidden) {
  if (tokens == 0) return 0;
  const Tokens all = {nullptr, false, tokens, vocabulary};
  const size_t bytes = runs_fit(all) ? 0 : radix_sort({}, nullptr, 0, all, {});
  return fixed_size(tokens, vocabulary, hidden) + ceil_div(static_cast<int64_t>(bytes), 4);
}

}  // namespace cuda

void run(const EmbeddingBackward& embedding, Stream stream) {
  using namespace cuda;
  const TensorView &y_grad = embedding.y_grad, &weight_grad = embedding.weight_grad;
  const Tokens tokens = tokens_of(embedding.tokens, weight_grad.sizes[0]);
  const Workspace at = workspace_of(embedding);
  const bool aligned =
      are_aligned("embedding", {{"y_grad", &y_grad}, {"weight_grad", &weight_grad}});
  const Ahead ahead = ahead_of(embedding, tokens, aligned, stream);
  const Backward args = {.y_grad = y_grad.data,
                         .weight_grad = weight_grad.data,
                         .rows = at.rows,
                         .order = at.order,
                         .begins = at.begins,
                         .named = at.named,
                         .partial = at.partial,
                         .y_grad_stride = y_grad.strides[0],
                         .weight_grad_stride = weight_grad.strides[0],
                         .count = tokens.count,
                         .vocabulary = tokens.vocabulary,
                         .hidden = weight_grad.sizes[1],
                         .lanes = 1,
                         .slices = 1,
                         .window = 1,
                         .zero_rows = 1,
                         .sum_blocks = 0,
                         .zero_end = tokens.vocabulary - ahead.zero_rows};
  const bool wide = weight_grad.dtype == DType::float32;
  visit_dtype<float, bfloat16, float16>("embedding: y_grad", y_grad.dtype, [&]<typename T>() {
    using Device = device_type<T>;
    constexpr int vector = vector_size<Device>;
    sort_by_row(embedding, tokens, ahead, stream);
    visit_bool(wide, [&]<bool is_wide>() {
      visit_bool(embedding.accumulate, [&]<bool accumulate>() {
        using Out = std::conditional_t<is_wide, float, Device>;
        aligned ? launch_sum<Device, Out, vector, accumulate>(args, stream)
                : launch_sum<Device, Out, 1, accumulate>(args, stream);
      });
    });
  });
}

}  // namespace redline
