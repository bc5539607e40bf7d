// Statistics and gradient of cross_entropy in one pass (kernels/cross_entropy.h). A row lies in the
// shared memory of a block or of a cluster: it is read once, each thread adds up what it copied
// itself as it comes, the blocks send one another their statistics, and each thread writes the
// gradient of what it copied. At least three blocks share a multiprocessor, so that one row's loads
// run under another's stores. Two passes on other GPUs than Hopper, for rows that are longer or no
// whole number of vectors: docs/cross_entropy.md.
#pragma once

#include "redline/kernels/cuda/cross_entropy/gradient.cuh"
#include "redline/kernels/cuda/cross_entropy/largest.cuh"
#include "redline/kernels/cuda/device/copy_async.cuh"
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
constexpr int groups_limit = 5;  // wait_for_copies() counts four that are on their way
static_assert(part_limit <= groups_limit * in_flight * most_threads * 16);

struct PromisedArgs : GradientArgs {
  float* found;  // the statistics
  int64_t* predictions;
  int part;      // columns of a block: whole lines of 128 bytes
  bool aligned;  // every row of the logits and of the gradient starts at a multiple of 16 bytes
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

// Copies this thread's vectors of the row into `tile`, in groups of `in_flight`: their number. Of
// unaligned rows element by element: so that strides change no bit, a path for them and no more.
template <typename T, int Threads>
__device__ __forceinline__ int request(T* tile, const T* row, int cols, bool aligned) {
  constexpr int N = vector_size<T>, step = Threads * N;
  int groups = 0;
  for (int first = 0; first < cols; first += in_flight * step, ++groups) {
#pragma unroll
    for (int v = 0; v < in_flight; ++v) {
      const int col = first + v * step + static_cast<int>(threadIdx.x) * N;
      if (col >= cols) continue;
      if (aligned) {
        copy_async(tile + col, row + col);
      } else {
        *reinterpret_cast<Packed<T>*>(tile + col) = load<T>(row, col, cols, false);
      }
    }
    __pipeline_commit();
  }
  return groups;
}

// A vector of the tile, or -inf beyond the row: by words, where elements would be selected one by
// one.
template <typename T>
__device__ __forceinline__ Packed<T> read_or_outside(const T* tile, int col, int cols) {
  constexpr uint32_t outside = sizeof(T) == 4                     ? 0xff800000u
                               : std::is_same_v<T, __nv_bfloat16> ? 0xff80ff80u
                                                                  : 0xfc00fc00u;
  uint4 words = {outside, outside, outside, outside};
  if (col < cols) words = *reinterpret_cast<const uint4*>(tile + col);
  return *reinterpret_cast<const Packed<T>*>(&words);
}

// What this thread has copied, as it comes; where `largest` is given, it too.
template <typename T, int Threads>
__device__ __forceinline__ Running add_tile(const T* tile, int cols, int groups, Formula formula,
                                            Largest* largest) {
  constexpr int N = vector_size<T>, step = Threads * N;
  Running running = {negative_infinity(), 0.0f, 0.0f};
  RowVectors at = {static_cast<int>(threadIdx.x) * N, step, cols, 0};
  for (int later = groups - 1; later >= 0; --later) {
    wait_for_copies(later);
    Packed<T> packed[in_flight];
#pragma unroll
    for (int v = 0; v < in_flight; ++v) packed[v] = read_or_outside(tile, at.col + v * step, cols);
    if (largest != nullptr) note_largest(packed, at.col, *largest);
    add_vectors(packed, at, formula, running);
    at.col += in_flight * step;
  }
  return running;
}

template <typename T, int Threads>
__device__ __forceinline__ void write_zeros(T* grad, int cols, bool aligned) {
  for (int col = threadIdx.x * vector_size<T>; col < cols; col += Threads * vector_size<T>) {
    store(grad, col, cols, aligned, Packed<T>{});
  }
}

template <typename T, int Threads, int Cluster, bool Predict>
__global__ void __launch_bounds__(Threads, 1024 / Threads)
    promised_kernel(const PromisedArgs args) {
  constexpr int N = vector_size<T>, step = Threads * N;
  extern __shared__ __align__(128) char dynamic_shared[];
  __shared__ RowMemory<Cluster> memory;
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
    write_zeros<T, Threads>(grad, cols, args.aligned);
    if (rank == 0 && thread < args.width) statistics[thread] = thread == 1 ? 1.0f : 0.0f;
    return;
  }
  if constexpr (Cluster > 1) {
    if (thread == 0) memory.came.init(1);
    cluster_arrive_relaxed();
  }
  T* tile = reinterpret_cast<T*>(dynamic_shared);
  const T* row = static_cast<const T*>(args.data) + row_index * args.stride + begin;
  const int groups = request<T, Threads>(tile, row, cols, args.aligned);
  const float upstream = upstream_of(args, row_index, target);
  Largest largest = {negative_infinity(), 0};
  Running running = add_tile<T, Threads>(tile, cols, groups, {args.softcap, args.width == 4},
                                         Predict ? &largest : nullptr);
  // The target's logit, by the thread that copied it: the row may be written over from here on.
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
  if (Predict && ignored) return write_zeros<T, Threads>(grad, cols, args.aligned);
  const RowGradient found =
      row_gradient(args, row_index, upstream, running.maximum, running.exponentials);
#pragma unroll 2
  for (int col = thread * N; col < cols; col += step) {
    const Packed<T> logits = *reinterpret_cast<const Packed<T>*>(tile + col);
    store(grad, col, cols, args.aligned,
          gradient_vector(logits, found, col, hot_col, args.softcap));
  }
}

template <typename T, int Threads, int Cluster, bool Predict>
void launch_promised(PromisedArgs args, Stream stream) {
  constexpr int line = 128 / static_cast<int>(sizeof(T));
  args.part = static_cast<int>(ceil_div(ceil_div(args.cols, Cluster), line)) * line;
  launch(promised_kernel<T, Threads, Cluster, Predict>,
         {.grid = dim3(args.rows * Cluster),
          .block = dim3(Threads),
          .shared_bytes = args.part * static_cast<int>(sizeof(T)),
          .cluster = Cluster,
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
  const bool aligned =
      are_aligned("cross_entropy", {{"logits", &args.logits}, {"logits_grad", &args.logits_grad}});
  note_choice("the gradient in the pass of the statistics: a row fits the shared memory of ",
              cluster, " blocks");
  const PromisedArgs device = {gradient_args(gradient_of(args)), args.statistics.as<float>(),
                               args.predictions.as<int64_t>(), 0, aligned};
  visit_dtype<float, bfloat16, float16>("cross_entropy", args.logits.dtype, [&]<typename Host>() {
    choose_promised<device_type<Host>, Predict>(device, cluster, stream);
  });
}

}  // namespace
}  // namespace redline::cuda
