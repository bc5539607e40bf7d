// p = e^(scale s - m) / Z over the keys that are left (kernels/softmax.h). The threads of a row
// hold it in registers as it lies in memory: read once, written once; keys that causal and window
// exclude are written and never read. Rows that outgrow a block are read again from L2. Bound by
// bytes.
#include "redline/kernels/cuda/softmax/mask.h"
#include "redline/kernels/cuda/softmax/rows.cuh"

namespace redline {
namespace cuda {
namespace {

struct ForwardArgs : Shape {
  const void* scores;
  const bool* mask;
  const float* sink;
  void* probabilities;
  float* sink_probability;
  int64_t scores_stride, stride, mask_batch, mask_head, mask_query, mask_key;
  bool heads_together;  // blocks go over the heads of a query before the next query
};

// The index-th row in the order of the blocks.
__device__ __forceinline__ int64_t row_at(const ForwardArgs& args, int64_t index) {
  if (!args.heads_together) return index;
  const uint32_t narrow = static_cast<uint32_t>(index), rest = args.per_batch.quotient(narrow);
  const uint32_t head = args.per_batch.remainder(narrow);
  const uint32_t batch = args.per_head.quotient(rest), query = args.per_head.remainder(rest);
  return (batch * static_cast<uint32_t>(args.heads) + head) * static_cast<uint32_t>(args.queries) +
         query;
}

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// What one row may see.
struct Row : Keys {
  const bool* mask;  // its first key's, or null
  int64_t mask_key;

  __device__ __forceinline__ bool is_masked(int col) const {
    return hold(col) && mask != nullptr && mask[col * mask_key];
  }
};

__device__ __forceinline__ Row row_of(const ForwardArgs& args, const Shape::Place& at) {
  const bool* mask = args.mask;
  if (mask != nullptr) {
    mask += at.batch * args.mask_batch + at.head * args.mask_head + at.query * args.mask_query;
  }
  return {keys_of(args, at.query), mask, args.mask_key};
}

__device__ __forceinline__ float power_of_two(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// e^(scale s - m) as 2^(factor s - origin). 16-bit scores: factor and origin hold log2(e), one
// instruction less; the rounding of factor * s is then one of the exponent, |s| 2^-24. float32
// scores are subtracted first.
template <typename T>
struct Exponent {
  static constexpr bool early = sizeof(T) == 2;
  static constexpr float log2_e = 1.44269504088896341f;
  static constexpr float unit = early ? log2_e : 1.0f;  // of factor and origin

  static __device__ __forceinline__ float power(float score, float factor, float origin) {
    return above(score * factor, origin);
  }
  // Of a number that has the factor already: a maximum, a sink.
  static __device__ __forceinline__ float above(float scaled, float origin) {
    return power_of_two(early ? scaled - origin : (scaled - origin) * log2_e);
  }
};

// The mask of V vectors of scores, a byte beside each score. Aligned: one load a vector, and all of
// them on their way together. As words: of an array of bool the compiler takes each load apart
// before it asks for the next, and a row waits for L2 V times.
template <int V, int Words, bool Aligned>
__device__ __forceinline__ void load_mask(const Row& row, Columns<Aligned> at,
                                          Packed<uint32_t, Words> (&masked)[V]) {
  constexpr int N = Words * 4;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if constexpr (Aligned) {
      if (row.touch(col, N)) {
        masked[v] = *reinterpret_cast<const Packed<uint32_t, Words>*>(row.mask + col);
      }
    } else {
#pragma unroll
      for (int i = 0; i < N; ++i) {
        if (row.is_masked(col + i)) masked[v].values[i / 4] |= 1u << i % 4 * 8;
      }
    }
  }
}

// Of two bytes of `mask`, the lower or the upper ones, a 16-bit half each: all ones where the byte
// is not zero. A bool that came from another type may hold any bits.
__device__ __forceinline__ uint32_t widened(uint32_t mask, bool upper) {
  const uint32_t top_bits = ((mask & 0x7f7f7f7fu) + 0x7f7f7f7fu) | mask;
  uint32_t halves;
  asm("prmt.b32 %0, %1, 0, %2;"  // 8 and above: the byte's top bit, eight times
      : "=r"(halves)
      : "r"(top_bits), "r"(upper ? 0xbbaau : 0x9988u));
  return halves;
}

// Where `masked` is set, `excluded` in place of the score: two 16-bit scores at once.
template <typename T, int Words>
__device__ __forceinline__ void exclude(Packed<T>& held, const Packed<uint32_t, Words>& masked,
                                        T excluded) {
  constexpr int N = Words * 4;
  if constexpr (sizeof(T) == 2) {
    const T two[2] = {excluded, excluded};
    const uint32_t instead = *reinterpret_cast<const uint32_t*>(two);
    auto& words = reinterpret_cast<uint32_t(&)[N / 2]>(held);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const uint32_t ones = widened(masked.values[i / 2], i % 2 == 1);
      words[i] = (words[i] & ~ones) | (instead & ones);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (masked.values[i / 4] & 0xffu << i % 4 * 8) held.values[i] = excluded;
    }
  }
}

// V vectors of a row's scores as they lie in memory, with a value that scales to -inf where the row
// may not look.
template <typename T, int V, bool Aligned>
__device__ __forceinline__ void load_scores(const ForwardArgs& args, const T* scores,
                                            const Row& row, Columns<Aligned> at,
                                            Packed<T> (&held)[V]) {
  constexpr int N = vector_size<T>;
  const T excluded = from_float<T>(args.scale < 0.0f ? -negative_infinity() : negative_infinity());
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (row.touch(col, N)) held[v] = load(scores, Place<Aligned>{0, col, at.cols});
  }
  Packed<uint32_t, N / 4> masked[V] = {};
  if (row.mask != nullptr) load_mask(row, at, masked);
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (!row.touch(col, N)) continue;
    if (row.mask != nullptr) exclude(held[v], masked[v], excluded);
    if (col >= row.begin && col + N <= row.end) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!row.hold(col + i)) held[v].values[i] = excluded;
    }
  }
}

// What a thread's exponentials, which are below its own largest exponent, become: e * factor; and
// the row's largest exponent, with the inverse of the sum of the exponentials below it.
struct Normaliser {
  float factor, origin, inverse_sum;
};

__device__ __forceinline__ float origin_of(float maximum) {
  return maximum == negative_infinity() ? 0.0f : maximum;
}

// The maximum over a group of whole warps; `slots` are free again after the next barrier.
template <int Lanes>
__device__ __forceinline__ float group_max(const RowGroup<Lanes, 1>& group, float value,
                                           float* slots) {
  float found[1] = {warp_max(value)};
  if constexpr (Lanes == 0) {
    group.share(found, slots);
    const int lane = static_cast<int>(threadIdx.x) % 32;
    found[0] = warp_max(lane < group.warps ? slots[lane] : negative_infinity());
  }
  return found[0];
}

// A thread's largest exponent and its sum of exponentials below it.
struct Running {
  float maximum = negative_infinity(), total = 0.0f;
};

template <typename T>
__device__ __forceinline__ Running joined(Running a, Running b) {
  const float maximum = fmaxf(a.maximum, b.maximum), origin = origin_of(maximum);
  return {maximum, a.total * Exponent<T>::above(a.maximum, origin) +
                       b.total * Exponent<T>::above(b.maximum, origin)};
}

template <typename T, int Lanes>
__device__ __forceinline__ Normaliser normaliser(const ForwardArgs& args,
                                                 const RowThreads<Lanes>& own, int64_t head,
                                                 Running running) {
  using E = Exponent<T>;
  const float sink = args.sink == nullptr ? negative_infinity() : args.sink[head] * E::unit;
  const float top = fmaxf(group_max(own.group, running.maximum, own.group.slots), sink);
  const float origin = origin_of(top);
  const float below = E::above(running.maximum, origin), total = running.total * below;
  const float whole = own.group.sum(total, own.group.slots + 32) + E::above(sink, origin);
  const float inverse_sum = whole == 0.0f ? 0.0f : 1.0f / whole;
  if (args.sink != nullptr && own.thread == 0 && own.row < args.rows) {
    args.sink_probability[row_at(args, own.row)] = E::above(sink, origin) * inverse_sum;
  }
  return {below * inverse_sum, origin, inverse_sum};
}

// The largest exponent of V vectors: of 16-bit scores two at a time, before they are scaled.
template <typename T, int V, bool Aligned>
__device__ __forceinline__ float largest_exponent(const Packed<T> (&held)[V], const Row& row,
                                                  Columns<Aligned> at, float factor) {
  constexpr int N = vector_size<T>;
  const auto of_all = [&](auto first, auto join) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
      if (!row.touch(at.col + v * at.step, N)) continue;
      const auto* values = reinterpret_cast<const decltype(first)*>(held[v].values);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof(held[v]) / sizeof(first)); ++i) {
        first = join(first, values[i]);
      }
    }
    return first;
  };
  const bool upward = factor >= 0.0f;
  const T nothing = from_float<T>(upward ? negative_infinity() : -negative_infinity());
  if constexpr (sizeof(T) == 2) {
    const pair_of<T> two = {nothing, nothing};
    const auto found = upward
                           ? of_all(two, [](pair_of<T> a, pair_of<T> b) { return __hmax2(a, b); })
                           : of_all(two, [](pair_of<T> a, pair_of<T> b) { return __hmin2(a, b); });
    return fmaxf(to_float(found.x) * factor, to_float(found.y) * factor);
  } else {
    return upward ? of_all(nothing, [](float a, float b) { return fmaxf(a, b); }) * factor
                  : of_all(nothing, [](float a, float b) { return fminf(a, b); }) * factor;
  }
}

// Up to here a score's product with the factor may stand unrounded beside the largest one's, which
// is rounded: 2^-13 of an exponential. Of a score of 1e18 the difference would be 2^35, and its
// exponential infinite; where both are rounded the largest one's is 1, and the next score of 16
// bits lies so far below that the rounding is no more than that.
inline constexpr float most_near = 2048.0f;

// The exponentials of V vectors, below the thread's largest exponent; zeros where the row sees
// nothing of a vector.
template <typename T, int V, bool Aligned>
__device__ __forceinline__ Running exponentials(Packed<T> (&held)[V], const Row& row,
                                                Columns<Aligned> at, float factor,
                                                float (&out)[V][vector_size<T>]) {
  constexpr int N = vector_size<T>;
  Running running = {largest_exponent(held, row, at, factor), 0.0f};
  const auto fill = [&](auto power) {
#pragma unroll
    for (int v = 0; v < V; ++v) {
#pragma unroll
      for (int i = 0; i < N; ++i) out[v][i] = 0.0f;
      if (!row.touch(at.col + v * at.step, N)) continue;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out[v][i] = power(element(held[v], i));
        running.total += out[v][i];
      }
    }
  };
  const float origin = origin_of(running.maximum);
  if (fabsf(origin) <= most_near) {
    fill([&](float score) { return Exponent<T>::power(score, factor, origin); });
  } else {
    fill([&](float score) { return Exponent<T>::above(__fmul_rn(score, factor), origin); });
  }
  return running;
}

// Threads a multiprocessor holds at least. 1152 and 1280: 56 and 48 registers, the next step is 8.
template <int Lanes, bool Aligned>
inline constexpr int resident = !Aligned     ? 384
                                : Lanes == 0 ? 1152
                                             : 1280;

template <typename T, int Lanes, int V, bool Aligned>
__global__ void __launch_bounds__(RowThreads<Lanes>::most_threads,
                                  resident<Lanes, Aligned> / RowThreads<Lanes>::most_threads)
    forward_kernel(const ForwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[64];
  const RowThreads<Lanes> own(slots);
  // All lanes take part in the sums.
  const int64_t row_index = row_at(args, min(own.row, args.rows - 1));
  const Shape::Place place = args.place(row_index);
  const Row row = row_of(args, place);
  const T* scores = static_cast<const T*>(args.scores) + row_index * args.scores_stride;
  T* out = static_cast<T*>(args.probabilities) + row_index * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  Packed<T> held[V] = {};
  load_scores(args, scores, row, at, held);
  float e[V][N];
  const Running running = exponentials(held, row, at, args.scale * Exponent<T>::unit, e);
  const Normaliser by = normaliser<T>(args, own, place.head, running);
  if (own.row >= args.rows) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (col >= at.cols) break;
#pragma unroll
    for (int i = 0; i < N; ++i) e[v][i] *= by.factor;
    store(out, Place<Aligned>{0, col, at.cols}, pack<T>(e[v]));
  }
}

// Rows that outgrow a block's registers.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(512) long_forward_kernel(const ForwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[64];
  const RowThreads<0> own(slots);
  if (own.row >= args.rows) return;
  const int64_t row_index = row_at(args, own.row);
  const Shape::Place place = args.place(row_index);
  const Row row = row_of(args, place);
  const T* scores = static_cast<const T*>(args.scores) + row_index * args.scores_stride;
  T* out = static_cast<T*>(args.probabilities) + row_index * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  const float factor = args.scale * Exponent<T>::unit;
  Packed<T> held[1];
  float e[1][N];
  Running running;
  for (int col = at.col; col < row.end; col += at.step) {
    const Columns<Aligned> part = {col, at.step, at.cols};
    held[0] = {};
    load_scores(args, scores, row, part, held);
    running = joined<T>(running, exponentials(held, row, part, factor, e));
  }
  const Normaliser by = normaliser<T>(args, own, place.head, running);
  for (int col = at.col; col < at.cols; col += at.step) {
    const Columns<Aligned> part = {col, at.step, at.cols};
    held[0] = {};
    load_scores(args, scores, row, part, held);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float power = Exponent<T>::power(element(held[0], i), factor, by.origin);
      e[0][i] = row.touch(col, N) ? power * by.inverse_sum : 0.0f;
    }
    store(out, Place<Aligned>{0, col, at.cols}, pack<T>(e[0]));
  }
}

}  // namespace
}  // namespace cuda

// Whether a head's rows push a mask that all heads share out of the second-level cache (50 MB, in
// two halves) before the next head asks for it. (H100, of a copy: 32 x 4096 x 4096 0.96, head by
// head 0.81; 64 x 2048 x 2048 0.95, 0.93; 128 x 1000 x 1000, 5 MB a head, 0.96, 1.00.)
bool reads_mask_again(const SoftmaxForward& args) {
  const int64_t* strides = args.mask.strides;  // one row for all queries stays in the cache
  if (!args.mask || strides[1] != 0 || strides[2] == 0) return false;
  const int64_t element = 2 * element_bytes(args.scores.dtype) + 1;
  return args.mask.sizes[2] * args.mask.sizes[3] * element > 16 << 20;
}

void run(const SoftmaxForward& args, Stream stream) {
  using namespace cuda;
  const bool aligned =
      are_aligned("softmax", {{"scores", &args.scores}, {"probabilities", &args.probabilities}}) &&
      is_read_by_vectors(args.mask, 16 / element_bytes(args.scores.dtype));
  const bool heads_together = reads_mask_again(args) && args.scores.sizes[0] <= INT32_MAX;
  const ForwardArgs device = {shape_of(args, args.scores),
                              args.scores.data,
                              args.mask.as<const bool>(),
                              args.sink.as<const float>(),
                              args.probabilities.data,
                              args.sink_probability.as<float>(),
                              args.scores.strides[0],
                              args.probabilities.strides[0],
                              args.mask.strides[0],
                              args.mask.strides[1],
                              args.mask.strides[2],
                              args.mask.strides[3],
                              heads_together};
  visit_dtype<float, bfloat16, float16>("softmax", args.scores.dtype, [&]<typename Host>() {
    using T = device_type<Host>;
    if (device.rows == 0) return;
    visit_bool(aligned, [&]<bool Aligned>() {
      const bool held = visit_sharing(ceil_div(device.cols, vector_size<T>), device.rows,
                                      [&]<int Lanes, int V>(int64_t blocks, int threads) {
                                        launch(forward_kernel<T, Lanes, V, Aligned>,
                                               config_of(blocks, threads, stream), device);
                                      });
      if (held) return;
      launch(long_forward_kernel<T, Aligned>, config_of(device.rows, 512, stream), device);
    });
  });
}

}  // namespace redline
