// Weight and bias of norm's forward.
#pragma once

#include "redline/kernels/cuda/norm/row_input.cuh"

namespace redline::cuda {
namespace {

// Of one vector: zeros where there is no bias.
template <typename T>
struct Scaling {
  float weight[1][vector_size<T>], bias[1][vector_size<T>];
};

// Whether there is a weight of T and for layer a bias of T, as in most norms. With 16 bits a layer
// norm without a bias is none of them: a test for it spilled 24 to 36 bytes of narrow rows.
template <bool Layer, typename T>
__device__ __forceinline__ bool holds_scaling(const Forward& args) {
  const auto holds = [](const Matrix& of) { return sizeof(T) == 4 || !of.is_float32; };
  return args.weight.data != nullptr && holds(args.weight) && (!Layer || holds(args.bias));
}

// Where the scaling of a thread's vectors comes from. Early: of the first so many it is read before
// the row's statistics are known, as it lies in memory. Which of the forms it has is asked once a
// vector: asked for each load, forward took 42 million instructions where this takes 26 (layer,
// 16384 x 4096, H200), and 81 us against 68.
template <bool Layer, typename T, int Early>
struct ScalingSource {
  static constexpr int N = vector_size<T>;
  bool simple;
  Packed<T> weight[Early > 0 ? Early : 1], bias[Early > 0 ? Early : 1];

  template <bool Aligned>
  __device__ __forceinline__ void load(const Forward& args, Columns<Aligned> at) {
    simple = Aligned && holds_scaling<Layer, T>(args);
    if constexpr (Early > 0) {
      if (!simple) return;
      load_raw(args, at, weight, bias);
      forget_wide(weight);  // or it is taken apart, and so waited for, before the statistics
      if (Layer) forget_wide(bias);
    }
  }

  // Of vector v, the first of `at`.
  template <bool Aligned>
  __device__ __forceinline__ Scaling<T> take(const Forward& args, Columns<Aligned> at,
                                             int v) const {
    Scaling<T> out = {};
    if (Aligned && simple) {
      Packed<T> raw_weight[1] = {weight[0]}, raw_bias[1] = {bias[0]};
      if constexpr (Early > 0) {
        raw_weight[0] = weight[v];
        raw_bias[0] = bias[v];
      } else {
        load_raw(args, at, raw_weight, raw_bias);
      }
      forget_wide(raw_weight);
      forget_wide(raw_bias);
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out.weight[0][i] = element(raw_weight[0], i) + args.offset;
        if (Layer) out.bias[0][i] = element(raw_bias[0], i);
      }
      return out;
    }
    load_weight<T>(args, at, out.weight);
    if (Layer && args.bias.data != nullptr) {
      take_vectors<T>(row_of(args.bias, 0), at, out.bias,
                      [](float& value, float loaded) { value = loaded; });
    }
    return out;
  }

 private:
  template <int V, bool Aligned>
  static __device__ __forceinline__ void load_raw(const Forward& args, Columns<Aligned> at,
                                                  Packed<T> (&weight)[V], Packed<T> (&bias)[V]) {
    load_vectors(static_cast<const T*>(args.weight.data), at, weight);
    if (!Layer) return;
    if (args.bias.data != nullptr) {
      load_vectors(static_cast<const T*>(args.bias.data), at, bias);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) bias[v] = {};
    }
  }
};

}  // namespace
}  // namespace redline::cuda
