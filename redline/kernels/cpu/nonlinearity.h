// The nonlinearities of `activation` and `gated_activation`, for the per-instruction-set sources.
// value(x) is f(x); derive(x, value, derivative) gives f(x) and f'(x).
#pragma once

#include "redline/kernels/cpu/vector_math.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// sigmoid(x) and 1 - sigmoid(x), the latter without the cancellation where x is large.
template <typename V>
REDLINE_INLINE V sigmoid(V x, V& complement) {
  const V e = exp(-x);
  const V s = 1 / (1 + e);
  complement = select(e > element_of(x, 1e30), V{} + 1, e * s);
  return s;
}

// x * sigmoid(slope * x): silu with slope 1, quick gelu with 1.702.
template <typename V, typename Acc>
REDLINE_INLINE V swish(V x, Acc slope) {
  return x * sigmoid(slope * x);
}
template <typename V, typename Acc>
REDLINE_INLINE void derive_swish(V x, Acc slope, V& value, V& derivative) {
  V complement;
  const V s = sigmoid(slope * x, complement);
  value = x * s;
  derivative = s + slope * value * complement;
}

struct Silu {
  template <typename V>
  static REDLINE_INLINE V value(V x) {
    return x * sigmoid(x);
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    V complement;
    const V s = sigmoid(x, complement);
    value = x * s;
    derivative = s + value * complement;
  }
};

struct QuickGelu {
  template <typename V>
  static REDLINE_INLINE V value(V x) {
    return swish(x, element_of(x, 1.702));
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    derive_swish(x, element_of(x, 1.702), value, derivative);
  }
};

// x / 2 * (1 + tanh(u)) = x * sigmoid(2u), u = sqrt(2 / pi) * (x + 0.044715 x^3): the second form
// does not cancel where x is negative.
struct Gelu {
  static constexpr double slope = 1.59576912160573071;  // 2 sqrt(2 / pi)
  static constexpr double cubic = 0.044715;

  template <typename V>
  static REDLINE_INLINE V value(V x) {
    const auto k = element_of(x, slope), c = element_of(x, slope * cubic);
    return x * sigmoid(x * (k + c * (x * x)));
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    const auto k = element_of(x, slope), c = element_of(x, slope * cubic);
    const V square = x * x;
    V complement;
    const V s = sigmoid(x * (k + c * square), complement);
    value = x * s;
    derivative = s + value * complement * (k + 3 * c * square);
  }
};

// x * P(x), P the normal distribution: 1 / 2 * (1 + erf(x / sqrt(2))).
struct GeluErf {
  template <typename V>
  static REDLINE_INLINE V value(V x) {
    V density;
    return x * normal_cdf(x, density);
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    V density;
    const V cdf = normal_cdf(x, density);
    value = x * cdf;
    derivative = cdf + x * density;
  }
};

// NaN stays NaN: the comparison is false for it.
struct Relu {
  template <typename V>
  static REDLINE_INLINE V value(V x) {
    return select(x < 0, V{}, x);
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    value = select(x < 0, V{}, x);
    derivative = select(x <= 0, V{}, V{} + 1);
  }
};

struct SquaredRelu {
  template <typename V>
  static REDLINE_INLINE V value(V x) {
    const V r = select(x < 0, V{}, x);
    return r * r;
  }
  template <typename V>
  static REDLINE_INLINE void derive(V x, V& value, V& derivative) {
    const V r = select(x < 0, V{}, x);
    value = r * r;
    derivative = 2 * r;
  }
};

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
