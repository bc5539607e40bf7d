// p = e^(scale s - m) / Z over the keys that are left (kernels/softmax.h). The threads of a row
// hold it in registers as it lies in memory: read once, written once; keys that causal and window
// exclude are written and never read. Rows that outgrow a block are read again from L2. Bound by
// bytes.
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
};

__device__ __forceinline__ float negative_infinity() { return __int_as_float(0xff800000); }

// What one row may see.
struct Row : Keys {
  const bool* mask;  // its first key's, or null
  int64_t mask_key;

  __device__ __forceinline__ bool sees(int col) const {
    return hold(col) && (mask == nullptr || !mask[col * mask_key]);
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
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (!row.touch(col, N)) continue;
    if (row.mask == nullptr && col >= row.begin && col + N <= row.end) continue;  // sees all of it
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!row.sees(col + i)) held[v].values[i] = excluded;
    }
  }
}

// What a row's scores become: 2^(s * factor - origin) * inverse_sum.
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

template <typename T, int Lanes>
__device__ __forceinline__ Normaliser normaliser(const ForwardArgs& args,
                                                 const RowThreads<Lanes>& own, int64_t head,
                                                 Running running) {
  using E = Exponent<T>;
  const float sink = args.sink == nullptr ? negative_infinity() : args.sink[head] * E::unit;
  const float top = fmaxf(group_max(own.group, running.maximum, own.group.slots), sink);
  const float origin = origin_of(top);
  const float total = running.total * E::above(running.maximum, origin);
  const float whole = own.group.sum(total, own.group.slots + 32) + E::above(sink, origin);
  const float inverse_sum = whole == 0.0f ? 0.0f : 1.0f / whole;
  if (args.sink != nullptr && own.thread == 0 && own.row < args.rows) {
    args.sink_probability[own.row] = E::above(sink, origin) * inverse_sum;
  }
  return {args.scale * E::unit, origin, inverse_sum};
}

template <typename T>
__device__ __forceinline__ Packed<T> probabilities(const Packed<T>& scores, const Normaliser& by) {
  constexpr int N = vector_size<T>;
  float p[N];
#pragma unroll
  for (int i = 0; i < N; ++i) {
    p[i] = Exponent<T>::power(element(scores, i), by.factor, by.origin) * by.inverse_sum;
  }
  return pack<T>(p);
}

// Adds V vectors; those of which the row sees nothing are passed over.
template <typename T, int V, bool Aligned>
__device__ __forceinline__ void add_exponentials(Packed<T> (&held)[V], const Row& row,
                                                 Columns<Aligned> at, float factor,
                                                 Running& running) {
  constexpr int N = vector_size<T>;
  float larger = running.maximum;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!row.touch(at.col + v * at.step, N)) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) larger = fmaxf(larger, element(held[v], i) * factor);
  }
  forget_wide(held);
  const float origin = origin_of(larger);
  running.total *= Exponent<T>::above(running.maximum, origin);
  running.maximum = larger;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    if (!row.touch(at.col + v * at.step, N)) continue;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      running.total += Exponent<T>::power(element(held[v], i), factor, origin);
    }
  }
  forget_wide(held);
}

template <typename T, int Lanes, int V, bool Aligned>
__global__ void __launch_bounds__(RowThreads<Lanes>::most_threads,
                                  (Aligned ? 768 : 384) / RowThreads<Lanes>::most_threads)
    forward_kernel(const ForwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[64];
  const RowThreads<Lanes> own(slots);
  const int64_t row_index = min(own.row, args.rows - 1);  // all lanes take part in the sums
  const Shape::Place place = args.place(row_index);
  const Row row = row_of(args, place);
  const T* scores = static_cast<const T*>(args.scores) + row_index * args.scores_stride;
  T* out = static_cast<T*>(args.probabilities) + row_index * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  Packed<T> held[V] = {};
  load_scores(args, scores, row, at, held);
  Running running;
  add_exponentials(held, row, at, args.scale * Exponent<T>::unit, running);
  const Normaliser by = normaliser<T>(args, own, place.head, running);
  if (own.row >= args.rows) return;
#pragma unroll
  for (int v = 0; v < V; ++v) {
    const int col = at.col + v * at.step;
    if (col >= at.cols) break;
    const bool any = row.touch(col, N);
    store(out, Place<Aligned>{0, col, at.cols}, any ? probabilities(held[v], by) : Packed<T>{});
  }
}

// Rows that outgrow a block's registers.
template <typename T, bool Aligned>
__global__ void __launch_bounds__(512) long_forward_kernel(const ForwardArgs args) {
  constexpr int N = vector_size<T>;
  __shared__ float slots[64];
  const RowThreads<0> own(slots);
  if (own.row >= args.rows) return;
  const Shape::Place place = args.place(own.row);
  const Row row = row_of(args, place);
  const T* scores = static_cast<const T*>(args.scores) + own.row * args.scores_stride;
  T* out = static_cast<T*>(args.probabilities) + own.row * args.stride;
  const Columns<Aligned> at = {own.thread * N, own.threads * N, args.cols};
  Packed<T> held[1];
  Running running;
  for (int col = at.col; col < row.end; col += at.step) {
    held[0] = {};
    load_scores(args, scores, row, Columns<Aligned>{col, at.step, at.cols}, held);
    add_exponentials(held, row, Columns<Aligned>{col, at.step, at.cols},
                     args.scale * Exponent<T>::unit, running);
  }
  const Normaliser by = normaliser<T>(args, own, place.head, running);
  for (int col = at.col; col < at.cols; col += at.step) {
    held[0] = {};
    load_scores(args, scores, row, Columns<Aligned>{col, at.step, at.cols}, held);
    store(out, Place<Aligned>{0, col, at.cols},
          row.touch(col, N) ? probabilities(held[0], by) : Packed<T>{});
  }
}

}  // namespace
}  // namespace cuda

void run(const SoftmaxForward& args, Stream stream) {
  using namespace cuda;
  const bool aligned = is_aligned({&args.scores, &args.probabilities});
  const ForwardArgs device = {shape_of(args, args.scores), args.scores.data,
                              args.mask.as<const bool>(),  args.sink.as<const float>(),
                              args.probabilities.data,     args.sink_probability.as<float>(),
                              args.scores.strides[0],      args.probabilities.strides[0],
                              args.mask.strides[0],        args.mask.strides[1],
                              args.mask.strides[2],        args.mask.strides[3]};
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
