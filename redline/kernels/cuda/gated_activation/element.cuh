// What both directions of gated_activation know of an element and where it lies.
#pragma once

#include <limits>

#include "redline/core/dispatch.h"
#include "redline/kernels/cuda/device/nonlinearity.cuh"
#include "redline/kernels/cuda/elements.cuh"
#include "redline/kernels/gated_activation.h"

namespace redline::cuda {
namespace {

struct Parameters {
  float limit, alpha, offset;
};

// f(a) by a nonlinearity without parameters.
template <typename Function>
struct Plain {
  static __device__ __forceinline__ float gate(float a, Parameters) { return Function::value(a); }
  static __device__ __forceinline__ void derive(float a, Parameters, float& value,
                                                float& derivative) {
    Function::derive(a, value, derivative);
  }
  static __device__ __forceinline__ float linear(float b, Parameters) { return b; }
  static __device__ __forceinline__ float linear_gradient(float, float gradient, Parameters) {
    return gradient;
  }
};

// quick_geglu and clamped_swiglu: the first has no limit and no offset. swiglu has a kernel of its
// own: by this one its backward ran at 0.62 of a copy where geglu's ran at 0.83 (H200). NaN stays
// NaN, and passes every comparison.
template <bool Fast>
struct Swish {
  static __device__ __forceinline__ float gate(float a, Parameters p) {
    return swish<Fast>(smaller(a, p.limit), p.alpha);
  }
  static __device__ __forceinline__ void derive(float a, Parameters p, float& value,
                                                float& derivative) {
    derive_swish<Fast>(smaller(a, p.limit), p.alpha, value, derivative);
    derivative = a > p.limit ? 0.0f : derivative;
  }
  static __device__ __forceinline__ float linear(float b, Parameters p) {
    return larger(smaller(b, p.limit), -p.limit) + p.offset;
  }
  static __device__ __forceinline__ float linear_gradient(float b, float gradient, Parameters p) {
    return fabsf(b) > p.limit ? 0.0f : gradient;
  }

 private:
  // One instruction each, where a comparison and a choice are two.
  static __device__ __forceinline__ float smaller(float a, float b) {
    float result;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
  }
  static __device__ __forceinline__ float larger(float a, float b) {
    float result;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
    return result;
  }
};

inline Parameters parameters(const GatedActivationKind& activation) {
  constexpr float no_limit = std::numeric_limits<float>::infinity();
  switch (activation.kind) {
    case GatedActivation::quick_geglu:
      return {no_limit, 1.702f, 0.0f};
    case GatedActivation::clamped_swiglu:
      return {static_cast<float>(activation.limit), static_cast<float>(activation.alpha),
              static_cast<float>(activation.linear_offset)};
    default:
      return {no_limit, 1.0f, 0.0f};
  }
}

struct Common {
  Extent extent;
  Matrix gate, linear, bias, row_scale;
  const int64_t* row_count;
  Parameters parameters;

  // Rows from the device's row count on hold nothing.
  __device__ __forceinline__ bool counts(int64_t row) const {
    return row_count == nullptr || row < *row_count;
  }
  template <typename T>
  __device__ __forceinline__ float scale(int64_t row) const {
    if (row_scale.data == nullptr) return 1.0f;
    return row_scale.is_float32 ? static_cast<const float*>(row_scale.data)[row]
                                : to_float(static_cast<const T*>(row_scale.data)[row]);
  }
  // Both inputs with their halves of the bias.
  template <typename T, bool Aligned>
  __device__ __forceinline__ void add_bias(const Place<Aligned>& at, const Packed<T>& gate_values,
                                           const Packed<T>& linear_values,
                                           float (&a)[vector_size<T>],
                                           float (&b)[vector_size<T>]) const {
    add_mixed<T>(bias.mixed(0), at, gate_values, a);
    add_mixed<T>(bias.mixed(extent.cols), at, linear_values, b);
  }
};

template <typename Args>
Common common(const Args& args, int size) {
  return {.extent = extent("gated_activation", args.gate, size, false),
          .gate = matrix(args.gate, false),
          .linear = matrix(args.linear, false),
          .bias = matrix(args.bias, false),
          .row_scale = matrix(args.row_scale, false),
          .row_count = args.row_count.template as<const int64_t>(),
          .parameters = parameters(args.activation)};
}

// Calls visit.operator()<Kind>(), for elements T.
template <typename T, typename Visit>
void visit_kind(GatedActivation kind, Visit visit) {
  constexpr bool fast = sizeof(T) == 2;
  switch (kind) {
    case GatedActivation::swiglu:
      return visit.template operator()<Plain<Silu<fast>>>();
    case GatedActivation::geglu:
      return visit.template operator()<Plain<Gelu<fast>>>();
    case GatedActivation::reglu:
      return visit.template operator()<Plain<Relu>>();
    default:
      return visit.template operator()<Swish<fast>>();
  }
}

}  // namespace
}  // namespace redline::cuda
