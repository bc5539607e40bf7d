// The tokens' positions in order of their rows of the vocabulary, those of a row as they came: by
// runs, or by CUB's radix sort where there are many.
#pragma once

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/embedding/tokens.cuh"

namespace redline::cuda {
namespace {

// The parts of the workspace, each [tokens] but the last four. The first three are what the sum
// follows: the tokens' rows of the vocabulary, their positions, and for each the place where its
// row begins. keys and positions are the sort's.
struct Workspace {
  uint32_t *rows, *order, *begins, *positions;
  uint32_t* keys;   // whole runs
  uint32_t* named;  // a bit of each row of the vocabulary: it has tokens
  float* partial;   // [chunk_slots, hidden]
  void* sort_space;
};

constexpr int64_t part_size(int64_t elements) { return ceil_div(elements, 64) * 64; }  // 256 bytes

constexpr int run_tokens = 512;
constexpr int64_t runs_size(int64_t tokens) { return ceil_div(tokens, run_tokens) * run_tokens; }

// Tokens of a row that are added one after another.
constexpr int chunk = 64;

// Each `chunk` sorted places hold the start of one row of more than a chunk at most, and of one
// further chunk of such a row: the starts of a kind lie a chunk apart or more.
constexpr int64_t chunk_slots(int64_t tokens) { return 2 * ceil_div(tokens, chunk); }

constexpr int64_t named_words(int64_t vocabulary) { return ceil_div(vocabulary, 32); }

// Elements before the sort's own space.
constexpr int64_t fixed_size(int64_t tokens, int64_t vocabulary, int64_t hidden) {
  return 4 * part_size(tokens) + runs_size(tokens) + part_size(named_words(vocabulary)) +
         part_size(chunk_slots(tokens) * hidden);
}

Workspace workspace_of(const EmbeddingBackward& args) {
  uint32_t* begin = args.workspace.as<uint32_t>();
  const int64_t tokens = args.tokens.sizes[0], part = part_size(tokens);
  const int64_t vocabulary = args.weight_grad.sizes[0], hidden = args.weight_grad.sizes[1];
  uint32_t* named = begin + 4 * part + runs_size(tokens);
  return {.rows = begin,
          .order = begin + part,
          .begins = begin + 2 * part,
          .positions = begin + 3 * part,
          .keys = begin + 4 * part,
          .named = named,
          .partial = reinterpret_cast<float*>(named + part_size(named_words(vocabulary))),
          .sort_space = begin + fixed_size(tokens, vocabulary, hidden)};
}

// Tokens without a gradient go behind all rows.
__device__ __forceinline__ uint32_t row_of(const Tokens& tokens, int64_t i, int64_t padding_index) {
  const int64_t token = read_token(tokens, i);
  return static_cast<uint32_t>(token >= 0 && token != padding_index ? token : tokens.vocabulary);
}

// By the first token of the row.
__device__ __forceinline__ void set_named(uint32_t* named, uint32_t row, const Tokens& tokens) {
  if (row < tokens.vocabulary) atomicOr(named + row / 32, 1u << (row % 32));
}

// How many of `count` ascending keys are below `key`.
template <typename Count>
__device__ __forceinline__ Count keys_below(const uint32_t* keys, Count count, uint32_t key) {
  Count begin = 0, end = count;
  while (begin < end) {
    const Count middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// --- by runs ------------------------------------------------------------------------------------

// Two launches: one sorts runs of 512 tokens, the other looks in every run for the place of each
// token. The radix sort takes six launches and five memsets (H100, 16384 tokens of 128256 rows: 41
// us); counting the smaller keys among all, in one launch, took 43.
constexpr int most_runs = 32, position_bits = 14;
static_assert(run_tokens * most_runs == 1 << position_bits);

// A key is the row above the position: no two are the same, and all fit 32 bits.
// The last row of all is for the filler, whose keys are above every token's.
bool runs_fit(const Tokens& tokens) {
  constexpr int64_t rows = int64_t{1} << (32 - position_bits);
  return tokens.count <= run_tokens * most_runs && tokens.vocabulary < rows - 1;
}

constexpr int run_parts = 4;  // blocks of a run, and threads of a token

// to.keys: [runs, run_tokens], each run ascending; the last one ends with keys above all.
__global__ void __launch_bounds__(run_tokens)
    runs_kernel(Tokens tokens, int64_t padding_index, Workspace to) {
  __shared__ __align__(16) uint32_t run[run_tokens];
  allow_next_launch();
  const int64_t words = named_words(tokens.vocabulary), block = blockIdx.y * gridDim.x + blockIdx.x;
  for (int64_t i = block * run_tokens + threadIdx.x; i < words;
       i += int64_t{gridDim.x} * gridDim.y * run_tokens) {
    to.named[i] = 0;
  }
  const int position = blockIdx.x * run_tokens + threadIdx.x;
  run[threadIdx.x] = position < tokens.count
                         ? row_of(tokens, position, padding_index) << position_bits | position
                         : UINT32_MAX - (run_tokens - 1) + threadIdx.x;
  __syncthreads();
  const int part = threadIdx.x % run_parts;
  const uint32_t key = run[(blockIdx.y * run_tokens + threadIdx.x) / run_parts];
  int below = 0;
#pragma unroll 8
  for (int i = 4 * part; i < run_tokens; i += 4 * run_parts) {
    const uint4 four = *reinterpret_cast<const uint4*>(run + i);
    below += (four.x < key) + (four.y < key) + (four.z < key) + (four.w < key);
  }
#pragma unroll
  for (int lane = 1; lane < run_parts; lane *= 2) below += __shfl_xor_sync(~0u, below, lane);
  if (part == 0) to.keys[blockIdx.x * run_tokens + below] = key;
}

// What needs no order is done while the tokens are sorted, as much as memory takes in that time:
// the last rows, a quarter at most, are zeroed, named or not, and where y_grad is no larger it is
// brought to the L2 cache.
constexpr int64_t ahead_bytes = int64_t{16} << 20;

struct Ahead {
  char* zeros = nullptr;
  const char* read = nullptr;
  int64_t zeros_stride, read_stride, zeros_size, read_size;  // bytes, of rows
  int64_t zero_rows = 0, read_rows = 0;
  int blocks = 0;
};

__device__ __forceinline__ void prefetch(const char* from, uint32_t bytes) {
#if __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#endif
}

// Before any wait: runs_kernel is launched without overlap, so all earlier kernels have ended.
__device__ __forceinline__ void work_ahead(const Ahead& ahead) {
  const int thread = blockIdx.x * blockDim.x + threadIdx.x, threads = ahead.blocks * blockDim.x;
  for (int64_t i = thread; i < ahead.read_rows; i += threads) {
    prefetch(ahead.read + i * ahead.read_stride, static_cast<uint32_t>(ahead.read_size));
  }
  const int vectors = static_cast<int>(ahead.zeros_size / 16);
  for (int i = thread; i < ahead.zero_rows * vectors; i += threads) {
    char* to = ahead.zeros + i / vectors * ahead.zeros_stride + i % vectors * 16;
    *reinterpret_cast<uint4*>(to) = uint4{};
  }
}

constexpr int join_tokens = 128, join_parts = 8;  // of a block, at most; of the runs, side by side
constexpr int join_threads = join_tokens * join_parts;

// So many that about 128 blocks share them.
int join_tokens_of(int runs) {
  return std::clamp(static_cast<int>(std::bit_ceil(4u * static_cast<unsigned>(runs))), 32,
                    join_tokens);
}

// How many keys of a run are below both.
__device__ __forceinline__ void add_below(const uint32_t* run, const uint32_t (&key)[2],
                                          int (&below)[2]) {
  int at[2] = {};
#pragma unroll
  for (int step = run_tokens / 2; step > 0; step /= 2) {
#pragma unroll
    for (int k = 0; k < 2; ++k) at[k] += run[at[k] + step - 1] < key[k] ? step : 0;
  }
#pragma unroll
  for (int k = 0; k < 2; ++k) below[k] += at[k] + (run[at[k]] < key[k] ? 1 : 0);
}

__global__ void __launch_bounds__(join_threads)
    join_kernel(Tokens tokens, int runs, Workspace to, Ahead ahead) {
  extern __shared__ __align__(16) uint32_t all[];
  __shared__ int found[2][join_parts][join_tokens];
  if (blockIdx.x < ahead.blocks) {
    allow_next_launch();
    return work_ahead(ahead);
  }
  wait_for_previous_launch();
  allow_next_launch();
  for (int i = threadIdx.x; i < runs * run_tokens / 4; i += blockDim.x) {
    reinterpret_cast<uint4*>(all)[i] = reinterpret_cast<const uint4*>(to.keys)[i];
  }
  __syncthreads();
  const int count = blockDim.x / join_parts, own = threadIdx.x % count, part = threadIdx.x / count;
  const int index =
      (blockIdx.x - ahead.blocks) * count + own;  // any order: the place is what counts
  const uint32_t key = all[index], row = key >> position_bits;
  int below[2] = {};  // the key itself, the first that its row may have
  for (int run = part; run < runs; run += join_parts) {
    add_below(all + run * run_tokens, {key, row << position_bits}, below);
  }
  found[0][part][own] = below[0];
  found[1][part][own] = below[1];
  __syncthreads();
  if (part != 0) return;
  int place = 0, begin = 0;
#pragma unroll
  for (int k = 0; k < join_parts; ++k) {
    place += found[0][k][own];
    begin += found[1][k][own];
  }
  if (place >= tokens.count) return;  // keys above all
  to.rows[place] = row;
  to.order[place] = key & ((1u << position_bits) - 1);
  to.begins[place] = begin;
  if (place == begin) set_named(to.named, row, tokens);
}

Ahead ahead_of(const EmbeddingBackward& args, const Tokens& tokens, bool aligned, Stream stream) {
  const TensorView &y_grad = args.y_grad, &weight_grad = args.weight_grad;
  Ahead ahead = {};
  ahead.read_size = y_grad.sizes[1] * element_bytes(y_grad.dtype);
  ahead.zeros_size = weight_grad.sizes[1] * element_bytes(weight_grad.dtype);
  ahead.read_stride = y_grad.strides[0] * element_bytes(y_grad.dtype);
  ahead.zeros_stride = weight_grad.strides[0] * element_bytes(weight_grad.dtype);
  if (!aligned || tokens.count == 0 || !runs_fit(tokens) || ahead.zeros_size == 0) return ahead;
  if (!args.accumulate) {
    ahead.zero_rows = std::min(tokens.vocabulary / 4, ahead_bytes / ahead.zeros_size);
  }
  if (tokens.count * ahead.read_size <= ahead_bytes) ahead.read_rows = tokens.count;
  ahead.read = static_cast<const char*>(y_grad.data);
  ahead.zeros = static_cast<char*>(weight_grad.data) +
                (tokens.vocabulary - ahead.zero_rows) * ahead.zeros_stride;
  if (ahead.zero_rows + ahead.read_rows > 0) ahead.blocks = stream.sm_count;
  return ahead;
}

void sort_by_runs(const EmbeddingBackward& args, Tokens tokens, const Ahead& ahead, Stream stream) {
  const Workspace at = workspace_of(args);
  const int runs = static_cast<int>(ceil_div(tokens.count, run_tokens));
  const int joined = join_tokens_of(runs);
  note_choice(tokens.count, " tokens, up to ", run_tokens * most_runs, " by runs: each of ",
              run_tokens, " is sorted, then a token's place is looked for in every one");
  launch(runs_kernel, {.grid = dim3(runs, run_parts), .block = dim3(run_tokens), .stream = stream},
         tokens, args.padding_index, at);
  launch(join_kernel,
         {.grid = dim3(ahead.blocks + runs * run_tokens / joined),
          .block = dim3(joined * join_parts),
          .shared_bytes = runs * run_tokens * 4,
          .overlap_previous = true,
          .stream = stream},
         tokens, runs, at, ahead);
}

// --- by radix sort ------------------------------------------------------------------------------

// Sorts where `space` is given; otherwise tells the bytes that it needs.
size_t radix_sort(const Workspace& at, void* space, size_t bytes, Tokens tokens, Stream stream) {
  const int bits = std::bit_width(static_cast<uint64_t>(tokens.vocabulary));
  check_status(cub::DeviceRadixSort::SortPairs(space, bytes, at.keys, at.rows, at.positions,
                                               at.order, static_cast<int>(tokens.count), 0, bits,
                                               static_cast<cudaStream_t>(stream.handle)),
               "embedding: sort");
  return bytes;
}

constexpr int sort_threads = 256;

__global__ void __launch_bounds__(sort_threads)
    rows_kernel(Tokens tokens, int64_t padding_index, uint32_t* rows, uint32_t* positions) {
  const int64_t i = int64_t{blockIdx.x} * sort_threads + threadIdx.x;
  if (i >= tokens.count) return;
  rows[i] = row_of(tokens, i, padding_index);
  positions[i] = static_cast<uint32_t>(i);
}

__global__ void __launch_bounds__(sort_threads) begins_kernel(Tokens tokens, Workspace to) {
  const int64_t i = int64_t{blockIdx.x} * sort_threads + threadIdx.x;
  if (i >= tokens.count) return;
  const int64_t begin = keys_below(to.rows, i, to.rows[i]);
  to.begins[i] = static_cast<uint32_t>(begin);
  if (i == begin) set_named(to.named, to.rows[i], tokens);
}

void sort_by_radix(const EmbeddingBackward& args, Tokens tokens, Stream stream) {
  const Workspace at = workspace_of(args);
  const LaunchConfig config = {.grid = dim3(ceil_div(tokens.count, sort_threads)),
                               .block = dim3(sort_threads),
                               .stream = stream};
  note_choice(tokens.count, " tokens of ", tokens.vocabulary, " rows: more than runs hold, so by ",
              "CUB's radix sort");
  check_status(cudaMemsetAsync(at.named, 0, named_words(tokens.vocabulary) * 4,
                               static_cast<cudaStream_t>(stream.handle)),
               "embedding: named rows");
  launch(rows_kernel, config, tokens, args.padding_index, at.keys, at.positions);
  const int64_t used = fixed_size(tokens.count, tokens.vocabulary, args.weight_grad.sizes[1]);
  radix_sort(at, at.sort_space, static_cast<size_t>(args.workspace.sizes[0] - used) * 4, tokens,
             stream);
  launch(begins_kernel, config, tokens, at);
}

void sort_by_row(const EmbeddingBackward& args, Tokens tokens, const Ahead& ahead, Stream stream) {
  if (tokens.count == 0) return;
  runs_fit(tokens) ? sort_by_runs(args, tokens, ahead, stream)
                   : sort_by_radix(args, tokens, stream);
}

}  // namespace
}  // namespace redline::cuda
