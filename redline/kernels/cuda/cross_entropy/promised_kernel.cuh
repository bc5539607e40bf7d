// Statistics and gradient of cross_entropy in one pass (kernels/cross_entropy.h). A row lies in the
// shared memory of a block or of a cluster: it is read once, each thread adds up what it copied
// itself as it comes, the blocks send one another their statistics, and each thread writes the
// gradient of what it copied. At least three blocks share a multiprocessor, so that one row's loads
// run under another's stores. A row that starts anywhere lies as far past a multiple of 16 bytes in
// shared memory as in memory: what crosses over is whole pieces of 16 bytes, what is added up are
// the elements of an aligned row, out of two pieces each. Two passes on other GPUs than Hopper and
// for longer rows: docs/cross_entropy.md.
#pragma once

#include "redline/kernels/cuda/cross_entropy/gradient.cuh"
#include "redline/kernels/cuda/cross_entropy/largest.cuh"
#include "redline/kernels/cuda/device/copy_async.cuh"
#include "redline/kernels/cuda/device/dependent_launch.cuh"
#include "redline/kernels/cuda/device/shared_barrier.cuh"

namespace redline::cuda {

// run() of arguments with predictions, as launch_promises().
void run_with_predictions(const CrossEntropyPromise& args, int cluster, Stream stream);

namespace {

constexpr int most_threads = 256;
// A block's part of a row: a third of the multiprocessor's 228 KiB, without the KiB that each block
// takes for itself and what its arrays take. 152064 16-bit classes are four such parts.
constexpr int arrays_limit = 768;
constexpr int part_limit = 228 * 1024 / 3 - 1024 - arrays_limit;
// For rows that start anywhere: 31 bytes past a sector as in memory, a piece before and two behind.
constexpr int piece_room = 128;
constexpr int groups_limit = 5;  // wait_for_copies() counts four that are on their way
static_assert(part_limit <= groups_limit * in_flight * most_threads * 16);

struct PromisedArgs : GradientArgs {
  float* found;  // the statistics
  int64_t* predictions;
  int part;  // columns of a block: whole lines of 128 bytes
  int room;  // bytes of shared memory beyond its part: none, or piece_room
};

// What the blocks of a row tell one another.
template <int Cluster>
struct RowMemory {
  float scratch[statistics_scratch];
  float gathered[3][Cluster];
  SharedBarrier came;
  float largest[2][Cluster];  // values, and the bits of their columns
};

static_assert(sizeof(RowMemory<8>) + sizeof(LargestScratch<most_threads>) <= arrays_limit);

// The row's largest logit, in the first block that has it.
template <int Cluster>
__device__ __forceinline__ Largest first_largest(const RowMemory<Cluster>& memory) {
  Largest all = {memory.largest[0][0], __float_as_int(memory.largest[1][0])};
#pragma unroll
  for (int block = 1; block < Cluster; ++block) {
    const float value = memory.largest[0][block];
    if (!isnan(all.value) && (isnan(value) || value > all.value)) {
      all = {value, __float_as_int(memory.largest[1][block])};
    }
  }
  return all;
}

// What all blocks of the row have seen, in every thread: the same order in each block. With Predict
// `largest` comes in as the block's and goes out as the row's.
template <typename T, bool Predict, int Cluster>
__device__ __forceinline__ Running over_cluster(const Running& own, Largest& largest,
                                                RowMemory<Cluster>& memory) {
  cluster_wait();  // the others' barriers are there
  const uint32_t thread = threadIdx.x, rank = cluster_rank();
  if (thread == 0) memory.came.expect(Cluster * (Predict ? 5 : 3) * 4);
  if (thread < Cluster) {
    memory.came.send(&memory.gathered[0][rank], thread, own.maximum);
    memory.came.send(&memory.gathered[1][rank], thread, own.exponentials);
    memory.came.send(&memory.gathered[2][rank], thread, own.sum);
    if constexpr (Predict) {
      memory.came.send(&memory.largest[0][rank], thread, largest.value);
      memory.came.send(&memory.largest[1][rank], thread, __int_as_float(largest.col));
    }
  }
  memory.came.wait(0);
  if constexpr (Predict) largest = first_largest(memory);
  Running all = {memory.gathered[0][0], 0.0f, 0.0f};
#pragma unroll
  for (int block = 1; block < Cluster; ++block) {
    all.maximum = fmaxf(all.maximum, memory.gathered[0][block]);
  }
#pragma unroll
  for (int block = 0; block < Cluster; ++block) {
    all.exponentials +=
        rescaled<T>(memory.gathered[1][block], memory.gathered[0][block], all.maximum);
    all.sum += memory.gathered[2][block];
  }
  return all;
}

// Where a row lies in shared memory: as far past a sector of 32 bytes as in memory, so that no
// copy fetches a sector twice.
template <typename T>
__device__ __forceinline__ T* tile_of(char* shared, const T* row, int room) {
  const int past = static_cast<int>(reinterpret_cast<uintptr_t>(row) % 32);
  return reinterpret_cast<T*>(shared + (room == 0 ? 0 : 32 + past));
}

// Elements of a row before its first multiple of 16 bytes.
template <typename T>
__device__ __forceinline__ int head_of(int shift) {
  return shift == 0 ? 0 : (16 - shift) / static_cast<int>(sizeof(T));
}

// What lies before the row's first and behind its last multiple of 16 bytes, and -inf behind it up
// to a whole vector.
template <typename T>
__device__ __forceinline__ void copy_edges(T* tile, const T* row, int cols, int head) {
  constexpr int N = vector_size<T>;
  static_assert(3 * N <= 32);
  const int thread = static_cast<int>(threadIdx.x), tail = head + max(cols - head, 0) / N * N;
  const int col = thread < N ? thread : tail + thread - N;
  if (thread < N ? col < head : thread < 3 * N && col < (cols + N - 1) / N * N) {
    tile[col] = col < cols ? row[col] : from_float<T>(negative_infinity());
  }
}

// Copies the row's pieces into `tile`, in groups of `in_flight` a thread: their number. A group
// has the last piece of the vectors of its number; the first may lie in the group before.
template <typename T, int Threads>
__device__ __forceinline__ int request(T* tile, const T* row, int cols, int head) {
  constexpr int N = vector_size<T>, step = Threads * N;
  int groups = 0;
  for (int first = 0; first < cols; first += in_flight * step, ++groups) {
#pragma unroll
    for (int v = 0; v < in_flight; ++v) {
      const int col = head + first + v * step + static_cast<int>(threadIdx.x) * N;
      if (col + N <= cols) copy_async(tile + col, row + col);
    }
    __pipeline_commit();
  }
  return groups;
}

// The vector at `from`, which lies `shift` bytes past a multiple of 16.
template <typename T>
__device__ __forceinline__ Packed<T> read_shifted(const T* from, int shift) {
  const auto* pieces = reinterpret_cast<const uint4*>(reinterpret_cast<const char*>(from) - shift);
  uint4 words = pieces[0];
  if (shift != 0) words = shift_bytes(words, pieces[1], shift);
  return *reinterpret_cast<const Packed<T>*>(&words);
}

// A row in shared memory, `shift` bytes past a multiple of 16. Shared: a thread reads what others
// have copied.
template <typename T>
struct Tile {
  const T* data;
  int cols, groups, shift;
  bool shared;
};

// Four vectors of it, -inf beyond the row: by words, where elements would be selected one by one.
// All are asked for before the first is shifted.
template <typename T>
__device__ __forceinline__ void read_vectors(const Tile<T>& tile, RowVectors at,
                                             Packed<T> (&out)[in_flight]) {
  constexpr uint32_t outside = sizeof(T) == 4                     ? 0xff800000u
                               : std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u
                                                                  : 0xfc00fc00u;
  uint4 low[in_flight], high[in_flight];
  const auto read = [&](uint4(&words)[in_flight], int bytes) {
#pragma unroll
    for (int v = 0; v < in_flight; ++v) {
      const int col = at.col + v * at.step;
      words[v] = {outside, outside, outside, outside};
      if (col >= at.cols) continue;
      const char* from = reinterpret_cast<const char*>(tile.data + col);
      words[v] = *reinterpret_cast<const uint4*>(from + bytes);
    }
  };
  read(low, -tile.shift);
  if (tile.shift != 0) {
    read(high, 16 - tile.shift);
#pragma unroll
    for (int v = 0; v < in_flight; ++v) low[v] = shift_bytes(low[v], high[v], tile.shift);
  }
#pragma unroll
  for (int v = 0; v < in_flight; ++v) out[v] = *reinterpret_cast<const Packed<T>*>(&low[v]);
}

// The row as it comes; where `largest` is given, it too.
template <typename T, int Threads>
__device__ __forceinline__ Running add_tile(const Tile<T>& tile, Formula formula,
                                            Largest* largest) {
  constexpr int N = vector_size<T>, step = Threads * N;
  Running running = {negative_infinity(), 0.0f, 0.0f};
  RowVectors at = {static_cast<int>(threadIdx.x) * N, step, tile.cols, 0};
  for (int later = tile.groups - 1; later >= 0; --later) {
    wait_for_copies(later);
    if (tile.shared) __syncthreads();
    Packed<T> packed[in_flight];
    read_vectors(tile, at, packed);
    if (largest != nullptr) note_largest(packed, at.col, *largest);
    add_vectors(packed, at, formula, running);
    at.col += in_flight * step;
  }
  return running;
}

template <typename T, int Threads>
__device__ __forceinline__ void write_zeros(T* grad, int cols) {
  constexpr int N = vector_size<T>;
  const int before = misalignment(grad) / static_cast<int>(sizeof(T));
  for (int col = static_cast<int>(threadIdx.x) * N - before; col < cols; col += Threads * N) {
    store_inside(grad, col, cols, Packed<T>{});
  }
}

template <typename T, int Threads, int Cluster, bool Predict>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    promised_kernel(const PromisedArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  extern __shared__ __align__(128) char dynamic_shared[];
  __shared__ RowMemory<Cluster> memory;
  wait_for_previous_launch();
  allow_next_launch();
  const int64_t row_index = blockIdx.x / Cluster;
  const int rank = Cluster > 1 ? static_cast<int>(cluster_rank()) : 0;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = int64_t{rank} * args.part;
  const int cols = min(args.part, static_cast<int>(args.cols - begin));
  T* grad = static_cast<T*>(args.logits_grad) + row_index * args.grad_stride + begin;
  float* statistics = args.found + row_index * args.width;
  const int64_t target = args.targets[row_index];
  const bool ignored = target == args.ignore_index;  // for all blocks of the row alike
  if (ignored && !Predict) {
    write_zeros<T, Threads>(grad, cols);
    if (rank == 0 && thread < args.width) statistics[thread] = thread == 1 ? 1.0f : 0.0f;
    return;
  }
  if constexpr (Cluster > 1) {
    if (thread == 0) memory.came.init(1);
    cluster_arrive_relaxed();
  }
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride + begin;
  T* tile = tile_of(dynamic_shared, row, args.room);
  const int shift = misalignment(row), head = head_of<T>(shift);
  const int groups = request<T, Threads>(tile, row, cols, head);
  const int apart = (shift - misalignment(grad)) & 15;
  const bool shared = shift != 0 || apart != 0 || cols % N != 0;
  if (shared) copy_edges(tile, row, cols, head);
  const float upstream = upstream_of(args, row_index, target);
  Largest largest = {negative_infinity(), 0};
  Running running =
      add_tile<T, Threads>({tile, cols, groups, shift, shared}, {args.softcap, args.width == 4},
                           Predict ? &largest : nullptr);
  // The target's logit, by the thread that added it up: the row may be written over from here on.
  const bool exists = is_class(target, args.vocabulary);
  const int hot_col = exists ? static_cast<int>(target - begin) : -1;
  if (hot_col >= 0 && hot_col < cols && hot_col / N % Threads == thread) {
    statistics[2] = capped(to_float(tile[hot_col]), args.softcap);
  }
  running = over_block<T, Threads>(running, memory.scratch);
  if constexpr (Predict) {
    __shared__ LargestScratch<Threads> scratch;
    largest = over_block(tile, cols, largest, running.exponentials, scratch);
    if (largest.col != nowhere) largest.col += static_cast<int>(begin);
  }
  if constexpr (Cluster > 1) running = over_cluster<T, Predict>(running, largest, memory);
  if (rank == 0 && thread == 0) {
    statistics[0] = running.maximum;
    statistics[1] = running.exponentials;
    if (!exists) statistics[2] = 0.0f;
    if (args.width == 4) statistics[3] = running.sum;
    if (Predict) args.predictions[row_index] = prediction_of(largest);
  }
  if (Predict && ignored) return write_zeros<T, Threads>(grad, cols);
  const RowGradient found =
      row_gradient(args, row_index, upstream, running.maximum, running.exponentials);
  // No sum here, so that vectors lie at the gradient's multiples of 16 bytes; over the logits, and
  // wherever both lie alike, they are the pieces that were copied.
  const int before = misalignment(grad) / static_cast<int>(sizeof(T));
#pragma unroll 2
  for (int col = thread * N - before; col < cols; col += step) {
    const Packed<T> logits = read_shifted(tile + col, apart);
    store_inside(grad, col, cols, gradient_vector(logits, found, col, hot_col, args.softcap));
  }
}

template <typename T, int Threads, int Cluster, bool Predict>
void launch_promised(PromisedArgs args, Stream stream) {
  constexpr int line = 128 / static_cast<int>(sizeof(T));
  args.part = static_cast<int>(ceil_div(ceil_div(args.cols, Cluster), line)) * line;
  const int bytes = args.part * static_cast<int>(sizeof(T));
  if (args.room == 0 && bytes + piece_room <= part_limit) args.room = piece_room;
  launch(promised_kernel<T, Threads, Cluster, Predict>,
         {.grid = dim3(args.rows * Cluster),
          .block = dim3(Threads),
          .shared_bytes = bytes + args.room,
          .cluster = Cluster,
          .overlap_previous = true,
          .stream = stream},
         args);
}

template <typename T, bool Predict>
void choose_promised(const PromisedArgs& args, int cluster, Stream stream) {
  const int64_t vectors = ceil_div(args.cols, vector_size<T>);
  if (cluster == 8) return launch_promised<T, most_threads, 8, Predict>(args, stream);
  if (cluster == 4) return launch_promised<T, most_threads, 4, Predict>(args, stream);
  if (cluster == 2) return launch_promised<T, most_threads, 2, Predict>(args, stream);
  if (vectors <= 4 * 32) return launch_promised<T, 32, 1, Predict>(args, stream);
  if (vectors <= 4 * 256) return launch_promised<T, 128, 1, Predict>(args, stream);
  launch_promised<T, most_threads, 1, Predict>(args, stream);
}

// For rows that fit the shared memory of `cluster` blocks.
template <bool Predict>
void launch_promises(const CrossEntropyPromise& args, int cluster, Stream stream) {
  const bool aligned = are_aligned(
      "cross_entropy", {{"logits", &args.logits}, {"logits_grad", &args.logits_grad}}, realigned);
  note_choice("the gradient in the pass of the statistics: a row fits the shared memory of ",
              cluster, " blocks");
  const PromisedArgs device = {gradient_args(gradient_of(args)), args.statistics.as<float>(),
                               args.predictions.as<int64_t>(), 0, aligned ? 0 : piece_room};
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    choose_promised<device_type<Host>, Predict>(device, cluster, stream);
  });
}

}  // namespace
}  // namespace redline::cuda
