// The tokens' positions in order of their rows of the vocabulary, those of a row as they came: by
// runs, or by CUB's radix sort where there are many.
#pragma once

#include <bit>
#include <cub/device/device_radix_sort.cuh>

#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/embedding/tokens.cuh"

namespace redline::cuda {
namespace {

// The parts of the workspace, each [tokens] but the last three. The first three are what the sum
// follows: the tokens' rows of the vocabulary, their positions, and for each the place where its
// row begins. keys and positions are the sort's.
struct Workspace {
  uint32_t *rows, *order, *begins, *positions;
  uint32_t* keys;  // whole runs
  float* partial;  // [chunk_slots, hidden]
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

// Elements before the sort's own space.
constexpr int64_t fixed_size(int64_t tokens, int64_t hidden) {
  return 4 * part_size(tokens) + runs_size(tokens) + part_size(chunk_slots(tokens) * hidden);
}

Workspace workspace_of(const EmbeddingBackward& args) {
  uint32_t* begin = args.workspace.as<uint32_t>();
  const int64_t tokens = args.tokens.sizes[0], part = part_size(tokens);
  return {.rows = begin,
          .order = begin + part,
          .begins = begin + 2 * part,
          .positions = begin + 3 * part,
          .keys = begin + 4 * part,
          .partial = reinterpret_cast<float*>(begin + 4 * part + runs_size(tokens)),
          .sort_space = begin + fixed_size(tokens, args.weight_grad.sizes[1])};
}

// Tokens without a gradient go behind all rows.
__device__ __forceinline__ uint32_t row_of(const Tokens& tokens, int64_t i, int64_t padding_index) {
  const int64_t token = read_token(tokens, i);
  return static_cast<uint32_t>(token >= 0 && token != padding_index ? token : tokens.vocabulary);
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

// keys: [runs, run_tokens], each run ascending; the last one ends with keys above all.
__global__ void __launch_bounds__(run_tokens)
    runs_kernel(Tokens tokens, int64_t padding_index, uint32_t* keys) {
  __shared__ __align__(16) uint32_t run[run_tokens];
  allow_next_launch();
  const int position = blockIdx.x * run_tokens + threadIdx.x;
  const uint32_t key = position < tokens.count
                           ? row_of(tokens, position, padding_index) << position_bits | position
                           : UINT32_MAX - (run_tokens - 1) + threadIdx.x;
  run[threadIdx.x] = key;
  __syncthreads();
  int below = 0;
#pragma unroll 8
  for (int i = 0; i < run_tokens; i += 4) {
    const uint4 four = *reinterpret_cast<const uint4*>(run + i);
    below += (four.x < key) + (four.y < key) + (four.z < key) + (four.w < key);
  }
  keys[blockIdx.x * run_tokens + below] = key;
}

constexpr int join_tokens = 64, join_parts = 8;  // of a block; of the runs, side by side
constexpr int join_threads = join_tokens * join_parts;

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
    join_kernel(const uint32_t* keys, int runs, int count, Workspace to) {
  extern __shared__ __align__(16) uint32_t all[];
  __shared__ int found[2][join_parts][join_tokens];
  wait_for_previous_launch();
  allow_next_launch();
  for (int i = threadIdx.x; i < runs * run_tokens / 4; i += join_threads) {
    reinterpret_cast<uint4*>(all)[i] = reinterpret_cast<const uint4*>(keys)[i];
  }
  __syncthreads();
  const int own = threadIdx.x % join_tokens, part = threadIdx.x / join_tokens;
  const int index = blockIdx.x * join_tokens + own;  // any order: the place is what counts
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
  if (place >= count) return;  // keys above all
  to.rows[place] = row;
  to.order[place] = key & ((1u << position_bits) - 1);
  to.begins[place] = begin;
}

void sort_by_runs(const EmbeddingBackward& args, Tokens tokens, Stream stream) {
  const Workspace at = workspace_of(args);
  const int runs = static_cast<int>(ceil_div(tokens.count, run_tokens));
  note_choice(tokens.count, " tokens, up to ", run_tokens * most_runs, " by runs: each of ",
              run_tokens, " is sorted, then a token's place is looked for in every one");
  launch(runs_kernel, {.grid = dim3(runs), .block = dim3(run_tokens), .stream = stream}, tokens,
         args.padding_index, at.keys);
  launch(join_kernel,
         {.grid = dim3(runs * run_tokens / join_tokens),
          .block = dim3(join_threads),
          .shared_bytes = runs * run_tokens * 4,
          .overlap_previous = stream.capability >= 90,
          .stream = stream},
         at.keys, runs, static_cast<int>(tokens.count), at);
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

__global__ void __launch_bounds__(sort_threads)
    begins_kernel(const uint32_t* rows, int64_t count, uint32_t* begins) {
  const int64_t i = int64_t{blockIdx.x} * sort_threads + threadIdx.x;
  if (i < count) begins[i] = static_cast<uint32_t>(keys_below(rows, i, rows[i]));
}

void sort_by_radix(const EmbeddingBackward& args, Tokens tokens, Stream stream) {
  const Workspace at = workspace_of(args);
  const LaunchConfig config = {.grid = dim3(ceil_div(tokens.count, sort_threads)),
                               .block = dim3(sort_threads),
                               .stream = stream};
  note_choice(tokens.count, " tokens of ", tokens.vocabulary, " rows: more than runs hold, so by ",
              "CUB's radix sort");
  launch(rows_kernel, config, tokens, args.padding_index, at.keys, at.positions);
  const int64_t used = fixed_size(tokens.count, args.weight_grad.sizes[1]);
  radix_sort(at, at.sort_space, static_cast<size_t>(args.workspace.sizes[0] - used) * 4, tokens,
             stream);
  launch(begins_kernel, config, at.rows, tokens.count, at.begins);
}

void sort_by_row(const EmbeddingBackward& args, Tokens tokens, Stream stream) {
  if (tokens.count == 0) return;
  runs_fit(tokens) ? sort_by_runs(args, tokens, stream) : sort_by_radix(args, tokens, stream);
}

}  // namespace
}  // namespace redline::cuda
