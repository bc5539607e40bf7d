// The nonlinearities of `activation` and `gated_activation`. value(x) is f(x); derive(x, value,
// derivative) gives f(x) and f'(x). The formulas are those of the CPU (cpu/nonlinearity.h).
#pragma once

namespace redline::cuda {

// What exponents are counted in: for 16-bit data (Fast) in powers of two, so that a factor of the
// argument takes the conversion with it.
template <bool Fast>
constexpr float exponent_unit = Fast ? 1.44269504088896341f : 1.0f;

// e^(exponent / exponent_unit). Fast: one instruction in place of eight; with the conversion off by
// |x| 2^-23 of the value, which is below a thousandth of the rounding that follows. Results below
// 2^-126 are zero: what is made of them is added to 1 or below every 16-bit number.
template <bool Fast>
__device__ __forceinline__ float power(float exponent) {
  if constexpr (!Fast) return expf(exponent);
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(exponent));
  return result;
}

template <bool Fast>
__device__ __forceinline__ float exponential(float x) {
  return power<Fast>(x * exponent_unit<Fast>);
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

// The logistic function of exponent / exponent_unit, right at both ends.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float exponent) {
  return reciprocal<Fast>(1.0f + power<Fast>(-exponent));
}

// The same, and 1 minus it. Fast: the difference, off by 2^-25, which is lost beside the 1 that
// derivatives add where the difference cancels. Otherwise without the cancellation.
template <bool Fast>
__device__ __forceinline__ float sigmoid(float exponent, float& complement) {
  const float e = power<Fast>(-exponent), s = reciprocal<Fast>(1.0f + e);
  if constexpr (Fast) {
    complement = 1.0f - s;
  } else {
    complement = e > 1e30f ? 1.0f : e * s;
  }
  return s;
}

// x * sigmoid(slope * x): silu with slope 1, quick gelu with 1.702.
template <bool Fast>
__device__ __forceinline__ float swish(float x, float slope) {
  const float rate = slope * exponent_unit<Fast>;
  return x * sigmoid<Fast>(rate * x);
}
template <bool Fast>
__device__ __forceinline__ void derive_swish(float x, float slope, float& value,
                                             float& derivative) {
  const float rate = slope * exponent_unit<Fast>;
  float complement;
  const float s = sigmoid<Fast>(rate * x, complement);
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

  // 2u in exponent_units.
  static __device__ __forceinline__ float exponent(float x, float square) {
    constexpr float unit = exponent_unit<Fast>;
    return x * (unit * slope + unit * cubic * square);
  }
  static __device__ __forceinline__ float value(float x) {
    return x * sigmoid<Fast>(exponent(x, x * x));
  }
  static __device__ __forceinline__ void derive(float x, float& value, float& derivative) {
    const float square = x * x;
    float complement;
    const float s = sigmoid<Fast>(exponent(x, square), complement);
    value = x * s;
    derivative = s + value * complement * (slope + 3.0f * cubic * square);
  }
};

// q in order of falling powers.
template <int Count>
__device__ __forceinline__ float polynomial(const float (&q)[Count], float s) {
  float result = q[0];
#pragma unroll
  for (int i = 1; i < Count; ++i) result = result * s + q[i];
  return result;
}

// P(x) = erfc(-x / sqrt(2)) / 2 and its density e^(-x^2 / 2) / sqrt(2 pi). P(-|x|) = e^(-x^2 / 2)
// t q(t - 0.5), t = 1 / (1 + 0.24 |x|), the form of Abramowitz and Stegun's 7.1.26, with q as on
// the CPU (cpu/vector_math.h): half the instructions of erfcf. Fast: q of degree 7, fitted for the
// least largest relative error over |x| <= 14.5, 2.4e-7: a bias's gradient beside 16 bits may be
// float32.
template <bool Fast>
__device__ __forceinline__ float normal_cdf(float x, float& density) {
  constexpr float whole[] = {0.0255180486f, -0.00975879841f, -0.0633387938f, -0.0295283496f,
                             0.115966164f,  0.294963121f,    0.401898354f,   0.391866803f,
                             0.297425389f,  0.181968674f};
  constexpr float brief[] = {-0.0530974097f, -0.0332748347f, 0.114854037f, 0.295308345f,
                             0.401945052f,   0.391857744f,   0.297424776f, 0.181968705f};
  const float e = power<Fast>(-0.5f * exponent_unit<Fast> * x * x);
  const float t = reciprocal<Fast>(1.0f + 0.24f * fabsf(x)), s = t - 0.5f;
  const float tail = e * (t * (Fast ? polynomial(brief, s) : polynomial(whole, s)));
  density = e * 0.398942280401432678f;
  return x < 0.0f ? tail : 1.0f - tail;
}

// P(x) for results of 16 bits: q(t) of degree 4 and t = 1 / (1 + 0.375 |x|), both fitted as above,
// 3.3e-5: a seventh of half a unit in float16's last place (degree 5 leaves 4.1e-6 and forward at
// 0.94 of a copy instead of 0.97, H200). Of all float16 x P(x) is off by 0.57 units at most, where
// erff's is off by 1.7: 1 + erf cancels.
__device__ __forceinline__ float brief_normal_cdf(float x) {
  constexpr float q[] = {-0.0903177187f, 0.199558407f, 0.084123306f, 0.157558411f, 0.149079636f};
  const float e = power<true>(-0.5f * exponent_unit<true> * x * x);
  const float t = reciprocal<true>(1.0f + 0.375f * fabsf(x));
  const float tail = e * (t * polynomial(q, t));
  return x < 0.0f ? tail : 1.0f - tail;
}

template <bool Fast>
struct GeluErf {
  static __device__ __forceinline__ float value(float x) {
    if constexpr (Fast) return x * brief_normal_cdf(x);
    float density;
    return x * normal_cdf<Fast>(x, density);
  }
  // `value` may have other bits than value()'s.
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
