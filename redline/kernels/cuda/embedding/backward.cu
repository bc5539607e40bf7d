// The gradient of embedding (kernels/embedding.h): the tokens' positions are sorted by row of the
// vocabulary, stably, on as many bits as the vocabulary has; then each row of the gradient is
// summed in registers over its tokens in order and written once, rows without tokens as zeros. Text
// names a few rows very often: a row of many tokens is cut into chunks that blocks of their own sum
// first. Bound by bytes; of the floor: bench/results.
#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "redline/kernels/cuda/embedding/tokens.cuh"

namespace redline {
namespace cuda {
namespace {

// --- sort ---------------------------------------------------------------------------------------

// The parts of the workspace, each [tokens] but the last two. `rows` are rows of the vocabulary,
// `order` positions among the tokens; sorted_order is what the sum follows.
struct Workspace {
  uint32_t *rows, *sorted_rows, *order, *sorted_order;
  float* partial;  // [chunk_slots, hidden]
  void* sort_space;
};

constexpr int64_t part_size(int64_t elements) { return ceil_div(elements, 64) * 64; }  // 256 bytes

// Tokens of a row that are added one after another.
constexpr int chunk = 64;

// Each `chunk` sorted places hold the start of one row of more than a chunk at most, and of one
// further chunk of such a row: the starts of a kind lie a chunk apart or more.
constexpr int64_t chunk_slots(int64_t tokens) { return 2 * ceil_div(tokens, chunk); }

// Elements before the sort's own space.
constexpr int64_t fixed_size(int64_t tokens, int64_t hidden) {
  return 4 * part_size(tokens) + part_size(chunk_slots(tokens) * hidden);
}

Workspace workspace_of(const EmbeddingBackward& args) {
  uint32_t* begin = args.workspace.as<uint32_t>();
  const int64_t tokens = args.tokens.sizes[0], part = part_size(tokens);
  return {.rows = begin,
          .sorted_rows = begin + part,
          .order = begin + 2 * part,
          .sorted_order = begin + 3 * part,
          .partial = reinterpret_cast<float*>(begin + 4 * part),
          .sort_space = begin + fixed_size(tokens, args.weight_grad.sizes[1])};
}

// Sorts where `space` is given; otherwise tells the bytes that it needs.
size_t sort(const Workspace& at, void* space, size_t bytes, Tokens tokens, Stream stream) {
  const int bits = std::bit_width(static_cast<uint64_t>(tokens.vocabulary));
  check_status(cub::DeviceRadixSort::SortPairs(space, bytes, at.rows, at.sorted_rows, at.order,
                                               at.sorted_order, static_cast<int>(tokens.count), 0,
                                               bits, static_cast<cudaStream_t>(stream.handle)),
               "embedding: sort");
  return bytes;
}

constexpr int sort_threads = 256;

// Tokens without a gradient go behind all rows.
__global__ void __launch_bounds__(sort_threads)
    rows_kernel(Tokens tokens, int64_t padding_index, uint32_t* rows, uint32_t* order) {
  const int64_t i = int64_t{blockIdx.x} * sort_threads + threadIdx.x;
  if (i >= tokens.count) return;
  const int64_t token = read_token(tokens, i);
  const bool counts = token >= 0 && token != padding_index;
  rows[i] = static_cast<uint32_t>(counts ? token : tokens.vocabulary);
  order[i] = static_cast<uint32_t>(i);
}

void sort_by_row(const EmbeddingBackward& args, Tokens tokens, Stream stream) {
  if (tokens.count == 0) return;
  const Workspace at = workspace_of(args);
  launch(rows_kernel,
         {.grid = dim3(ceil_div(tokens.count, sort_threads)),
          .block = dim3(sort_threads),
          .stream = stream},
         tokens, args.padding_index, at.rows, at.order);
  const int64_t used = fixed_size(tokens.count, args.weight_grad.sizes[1]);
  sort(at, at.sort_space, static_cast<size_t>(args.workspace.sizes[0] - used) * 4, tokens, stream);
}

// --- sum ----------------------------------------------------------------------------------------

constexpr int sum_threads = 128;
constexpr int rows_per_lane = 8;  // rows that a thread takes in turn: their searches run at once
constexpr int sum_vectors = 8;    // tokens in flight per thread

struct Backward {
  const void* y_grad;
  void* weight_grad;
  const uint32_t *sorted_rows, *order;
  float* partial;
  int64_t y_grad_stride, weight_grad_stride, count, vocabulary, hidden;
  int lanes;  // threads of a row
  bool accumulate;
};

// The first place in the sorted rows that is not below `row`.
__device__ __forceinline__ int64_t find_row(const Backward& args, int64_t row) {
  int64_t begin = 0, end = args.count;
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (args.sorted_rows[middle] < row) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Adds V columns from `col` on of the tokens at order[begin, end), one after another.
template <typename T, int V>
__device__ __forceinline__ void sum_tokens(const Backward& args, int begin, int end, int64_t col,
                                           float (&sums)[V]) {
  const T* y_grad = static_cast<const T*>(args.y_grad) + col;
  for (int i = begin; i < end; i += sum_vectors) {
    Packed<T, V> values[sum_vectors];
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      values[k] = {};
      if (i + k < end) {
        values[k] = load_at<T, V>(y_grad + int64_t{args.order[i + k]} * args.y_grad_stride);
      }
    }
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (i + k < end) sums[e] += element(values[k], e);
      }
    }
  }
}

// Where the sum of the chunk lies that starts at sorted place `start` of a row from `begin` on.
__device__ __forceinline__ int64_t slot_of(int64_t begin, int64_t start) {
  return 2 * (start / chunk) + (start != begin);
}

// The sorted places of the chunk whose sum is in `slot`; empty where there is none. A row of more
// than a chunk covers the place before which (its start) or after which (a further chunk) it is
// looked for.
__device__ __forceinline__ Range chunk_in(const Backward& args, int64_t slot) {
  const bool starts_row = slot % 2 == 0;
  const int64_t window = slot / 2 * chunk, anchor = window + (starts_row ? chunk : 0);
  if (anchor >= args.count) return {};
  const uint32_t row = args.sorted_rows[anchor];
  if (row >= args.vocabulary) return {};
  const int64_t begin = find_row(args, row);
  const int64_t start = starts_row ? begin : begin + (window - begin + chunk - 1) / chunk * chunk;
  if (start < window || start >= window + chunk || (start == begin) != starts_row) return {};
  const int64_t beyond = max(start, begin + chunk);  // of this row, or the row is one chunk
  if (beyond >= args.count || args.sorted_rows[beyond] != row) return {};
  return {start, min(start + chunk, find_row(args, int64_t{row} + 1))};
}

// Sums of the chunks of rows that have more than one.
template <typename T, int V>
__global__ void __launch_bounds__(sum_threads) chunk_kernel(const Backward args) {
  const Range places = chunk_in(args, blockIdx.x);
  if (places.begin == places.end) return;
  const int64_t first_col = (int64_t{blockIdx.y} * sum_threads + threadIdx.x) * V;
  for (int64_t col = first_col; col < args.hidden; col += int64_t{gridDim.y} * sum_threads * V) {
    float sums[V] = {};
    sum_tokens<T, V>(args, static_cast<int>(places.begin), static_cast<int>(places.end), col, sums);
    float* to = args.partial + blockIdx.x * args.hidden + col;
    *reinterpret_cast<Packed<float, V>*>(to) = pack<float, V>(sums);
  }
}

// Adds V columns of the sums of a row's chunks, one after another.
template <int V>
__device__ __forceinline__ void sum_row_chunks(const Backward& args, int begin, int end,
                                               int64_t col, float (&sums)[V]) {
  for (int64_t start = begin; start < end; start += sum_vectors * chunk) {
    Packed<float, V> values[sum_vectors] = {};
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
      const int64_t at = slot_of(begin, start + k * chunk);
      if (start + k * chunk < end) {
        values[k] = load_at<float, V>(args.partial + at * args.hidden + col);
      }
    }
#pragma unroll
    for (int k = 0; k < sum_vectors; ++k) {
#pragma unroll
      for (int e = 0; e < V; ++e) {
        if (start + k * chunk < end) sums[e] += values[k].values[e];
      }
    }
  }
}

template <typename T, typename Out, int V>
__device__ __forceinline__ void sum_row(const Backward& args, int64_t row, int begin, int end,
                                        int64_t col) {
  if (args.accumulate && begin == end) return;
  float sums[V] = {};
  if (end - begin > chunk) {
    sum_row_chunks(args, begin, end, col, sums);
  } else {
    sum_tokens<T, V>(args, begin, end, col, sums);
  }
  Out* to = static_cast<Out*>(args.weight_grad) + row * args.weight_grad_stride + col;
  if (args.accumulate) {
    const Packed<Out, V> before = load_at<Out, V>(to);
#pragma unroll
    for (int e = 0; e < V; ++e) sums[e] += element(before, e);
  }
  *reinterpret_cast<Packed<Out, V>*>(to) = pack<Out, V>(sums);
}

// A block takes rows_per_lane rows for each group of `lanes` threads, and a slice of the columns.
// Its rows lie a grid apart: those of many tokens are neighbours in most vocabularies.
// Four blocks: left to itself the compiler keeps float32 to 64 registers and spills one.
template <typename T, typename Out, int V>
__global__ void __launch_bounds__(sum_threads, 4) sum_kernel(const Backward args) {
  __shared__ int begins[sum_threads * rows_per_lane], ends[sum_threads * rows_per_lane];
  const int groups = sum_threads / args.lanes, rows = groups * rows_per_lane;
  const auto row_at = [&](int i) {
    return (int64_t{i / groups} * gridDim.x + blockIdx.x) * groups + i % groups;
  };
  for (int i = threadIdx.x; i < 2 * rows; i += sum_threads) {
    const int64_t row = row_at(i / 2) + i % 2;
    (i % 2 ? ends : begins)[i / 2] = static_cast<int>(find_row(args, min(row, args.vocabulary)));
  }
  __syncthreads();
  const int group = threadIdx.x / args.lanes;
  if (group >= groups) return;
  const int64_t first_col = (int64_t{blockIdx.y} * args.lanes + threadIdx.x % args.lanes) * V;
  for (int i = group; i < rows; i += groups) {
    const int64_t row = row_at(i);
    if (row >= args.vocabulary) return;
    for (int64_t col = first_col; col < args.hidden; col += int64_t{gridDim.y} * args.lanes * V) {
      sum_row<T, Out, V>(args, row, begins[i], ends[i], col);
    }
  }
}

template <typename T, typename Out, int V>
void launch_sum(Backward args, Stream stream) {
  const int64_t vectors = ceil_div(args.hidden, V);
  args.lanes = static_cast<int>(std::clamp<int64_t>(vectors, 1, sum_threads));
  const int64_t rows = int64_t{sum_threads / args.lanes} * rows_per_lane;
  const int64_t slices = std::min<int64_t>(ceil_div(vectors, sum_threads), 65535);
  if (args.count > chunk) {
    launch(chunk_kernel<T, V>,
           {.grid = dim3(chunk_slots(args.count), slices),
            .block = dim3(sum_threads),
            .stream = stream},
           args);
  }
  // A block searches its rows first: slices of the columns only where blocks are few.
  const int64_t blocks = ceil_div(args.vocabulary, rows);
  const int64_t wanted = ceil_div(16 * int64_t{stream.usable_sms()}, std::max<int64_t>(blocks, 1));
  launch(sum_kernel<T, Out, V>,
         {.grid = dim3(blocks, std::min(slices, wanted)),
          .block = dim3(sum_threads),
          .stream = stream},
         args);
}

}  // namespace

int64_t embedding_workspace(int64_t tokens, int64_t vocabulary, int64_t hidden) {
  if (tokens == 0) return 0;
  const size_t bytes = sort({}, nullptr, 0, {nullptr, false, tokens, vocabulary}, {});
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
                         .sorted_rows = at.sorted_rows,
                         .order = at.sorted_order,
                         .partial = at.partial,
                         .y_grad_stride = y_grad.strides[0],
                         .weight_grad_stride = weight_grad.strides[0],
                         .count = tokens.count,
                         .vocabulary = tokens.vocabulary,
                         .hidden = weight_grad.sizes[1],
                         .lanes = 1,
                         .accumulate = embedding.accumulate};
  const bool aligned = is_aligned({&y_grad, &weight_grad});
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
