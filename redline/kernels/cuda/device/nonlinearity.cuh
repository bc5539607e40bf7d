// The nonlinearities of `activation` and `gated_activation`. value(x) is f(x); derive(x, value,
// derivative) gives f(x) and f'(x). The formulas are those of the CPU (cpu/nonlinearity.h).
#pragma once

namespace redline::cuda {

// Fast, for 16-bit data: two instructions in place of eight; off by |x| 2^-23 of the value, which
// is below a thousandth of the rounding that follows. Results below 2^-126 are zero: what is made
// of them is added to 1 or below every 16-bit number.
template <bool Fast>
__device__ __forceinline__ float exponential(float x) {
  if constexpr (!Fast) return expf(x);
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x * 1.44269504088896341f));
  return result;
}

// 1 / x for x >= 1, off by two units in the last place at most; zero above 2^126. Fast: one
// instruction, without those for subnormal results.
template <bool Fast>
__device__ __forceinline__ float reciprocal(float x) {
  if constexpr (!Fast) return __fdividef(1.0f, x);
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Right at both ends.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float x) {
  return reciprocal<Fast>(1.0f + exponential<Fast>(-x));
}

// sigmoid(x) and 1 - sigmoid(x), the latter without the cancellation where x is large.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float x, float& complement) {
  const float e = exponential<Fast>(-x), s = reciprocal<Fast>(1.0f + e);
  complement = e > 1e30f ? 1.0f : e * s;
  return s;
}

// x * sigmoid(slope * x): silu with slope 1, quick gelu with 1.702.
template <bool Fast>
__device__ __forceinline__ float swish(float x, float slope) {
  return x * sigmoid<Fast>(slope * x);
}
template <bool Fast>
__device__ __forceinline__ void derive_swish(float x, float slope, float& value,
                                             float& derivative) {
  float complement;
  const float s = sigmoid<Fast>(slope * x, complement);
  value = x * s;
  derivative = s + slope * value * complement;
}

template <bool Fast>
struct Silu {
  static __device__ __forceinline__ float value(float x) { return swish<Fast>(x, 1.0f); }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    derive_swish<Fast>(x, 1.0f, value, derivative);
  }
};

template <bool Fast>
struct QuickGelu {
  static __device__ __forceinline__ float value(float x) { return swish<Fast>(x, 1.702f); }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    derive_swish<Fast>(x, 1.702f, value, derivative);
  }
};

// x / 2 * (1 + tanh(u)) = x * sigmoid(2u): the second form does not cancel where x is negative.
template <bool Fast>
struct Gelu {
  static constexpr float slope = 1.59576912160573071f;  // 2 sqrt(2 / pi)
  static constexpr float cubic = slope * 0.044715f;

  static __device__ __forceinline__ float value(float x) {
    return x * sigmoid<Fast>(x * (slope + cubic * (x * x)));
  }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    const float square = x * x;
    float complement;
    const float s = sigmoid<Fast>(x * (slope + cubic * square), complement);
    value = x * s;
    derivative = s + value * complement * (slope + 3.0f * cubic * square);
  }
};

// P(x) = erfc(-x / sqrt(2)) / 2 and its density e^(-x^2 / 2) / sqrt(2 pi). P(-|x|) = e^(-x^2 / 2)
// t q(t), t = 1 / (1 + 0.24 |x|), with q as on the CPU (cpu/vector_math.h): half the instructions
// of erfcf. Fast: q of degree 7, fitted for the least largest relative error over |x| <= 14.5,
// 2.4e-7.
template <bool Fast>
__device__ __forceinline__ float normal_cdf(float x, float& density) {
  const float e = exponential<Fast>(-0.5f * x * x);
  const float t = reciprocal<Fast>(1.0f + 0.24f * fabsf(x)), s = t - 0.5f;
  constexpr float whole[] = {0.0255180486f, -0.00975879841f, -0.0633387938f, -0.0295283496f,
                             0.115966164f,  0.294963121f,    0.401898354f,   0.391866803f,
                             0.297425389f,  0.181968674f};
  constexpr float brief[] = {-0.0530974097f, -0.0332748347f, 0.114854037f, 0.295308345f,
                             0.401945052f,   0.391857744f,   0.297424776f, 0.181968705f};
  float q = Fast ? brief[0] : whole[0];
#pragma unroll
  for (int i = 1; i < (Fast ? 8 : 10); ++i) q = q * s + (Fast ? brief[i] : whole[i]);
  const float tail = e * (t * q);
  density = e * 0.398942280401432678f;
  return x < 0.0f ? tail : 1.0f - tail;
}

template <bool Fast>
struct GeluErf {
  static __device__ __forceinline__ float value(float x) {
    float density;
    return x * normal_cdf<Fast>(x, density);
  }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    float density;
    const float cdf = normal_cdf<Fast>(x, density);
    value = x * cdf;
    derivative = cdf + x * density;
  }
};

// NaN stays NaN: the comparison is false for it.
struct Relu {
  static __device__ __forceinline__ float value(float x) { return x < 0.0f ? 0.0f : x; }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    value = x < 0.0f ? 0.0f : x;
    derivative = x <= 0.0f ? 0.0f : 1.0f;
  }
};

struct SquaredRelu {
  static __device__ __forceinline__ float value(float x) {
    const float r = x < 0.0f ? 0.0f : x;
    return r * r;
  }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    const float r = x < 0.0f ? 0.0f : x;
    value = r * r;
    derivative = 2.0f * r;
  }
};

}  // namespace redline::cuda
