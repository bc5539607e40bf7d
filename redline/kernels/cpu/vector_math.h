// Elementary functions of vectors, for the per-instruction-set sources alone. float: within 2 units
// in the last place over the whole range, subnormals, infinities and NaN included. double: libm,
// lane by lane (it serves gradcheck).
#pragma once

#include "redline/kernels/cpu/vector.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// Lane by lane: mask is all ones or all zeros, as comparisons give it.
template <typename V, typename M>
REDLINE_INLINE V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// `value` in the element type of the vector, for products with it.
REDLINE_INLINE float element_of(Float32s, double value) { return static_cast<float>(value); }
REDLINE_INLINE double element_of(Float64s, double value) { return value; }

template <typename Function>
REDLINE_INLINE Float64s each_lane(Float64s x, Function function) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = function(x[i]);
  return x;
}

#if defined(__AVX512F__)
// A vector comparison and a blend, and 2^n by integers, are 13 instructions where these are four.
// The forms without a mask draw a warning inside g++ 12's own header.
REDLINE_INLINE Float32s clamp(Float32s x, float low, float high) {  // NaN stays NaN
  const __m512 raised = _mm512_maskz_max_ps(0xffff, _mm512_set1_ps(low), x);
  return _mm512_maskz_min_ps(0xffff, _mm512_set1_ps(high), raised);
}
// p 2^n, rounded once; n holds integers.
REDLINE_INLINE Float32s scale_by_power(Float32s p, Float32s n) {
  return _mm512_maskz_scalef_ps(0xffff, p, n);
}
#else
REDLINE_INLINE Float32s clamp(Float32s x, float low, float high) {
  x = select(x < low, broadcast(low), x);
  return select(x > high, broadcast(high), x);
}
// 2^n for integers n of [-126, 127].
REDLINE_INLINE Float32s power_of_two(Int32s n) {
  return reinterpret_cast<Float32s>((n + 127) << 23);
}
// In two factors, so that subnormal results and the step to infinity come out right.
REDLINE_INLINE Float32s scale_by_power(Float32s p, Float32s n) {
  const Int32s whole = __builtin_convertvector(n, Int32s);
  const Int32s half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
}
#endif

// e^x = 2^n e^r with |r| <= ln(2) / 2; the polynomial is Cephes' (S. Moshier, expf). Below -104, as
// at -inf, it is 0 without the scaling, whose underflow takes the processor 150 cycles: a masked
// softmax took three times as long as one without a mask.
REDLINE_INLINE Float32s exp(Float32s x) {
  const auto vanishes = x < -104.0f;
  x = select(vanishes, broadcast(0.0f), clamp(x, -104.0f, 89.0f));
  const Float32s magic = broadcast(0x1.8p23f);  // adding it rounds to an integer
  const Float32s n = (x * 1.44269504088896341f + magic) - magic;
  const Float32s r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Float32s p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  return select(vanishes, broadcast(0.0f), scale_by_power(p, n));
}
REDLINE_INLINE Float64s exp(Float64s x) {
  return each_lane(x, [](double v) { return ::exp(v); });
}

// 1 / (1 + e^-x), right at both ends.
template <typename V>
REDLINE_INLINE V sigmoid(V x) {
  return 1.0f / (1.0f + exp(-x));
}

// |x| < 0.625 by Cephes' odd polynomial (tanhf), beyond it from e^-2|x|.
REDLINE_INLINE Float32s tanh(Float32s x) {
  const UInt32s sign = reinterpret_cast<UInt32s>(x) & 0x80000000u;
  const Float32s magnitude = reinterpret_cast<Float32s>(reinterpret_cast<UInt32s>(x) ^ sign);
  const Float32s z = x * x;
  Float32s p = broadcast(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Float32s small = p * z * x + x;
  const Float32s e = exp(-2.0f * magnitude);
  const Float32s large = (1.0f - e) / (1.0f + e);
  const Float32s signed_large = reinterpret_cast<Float32s>(reinterpret_cast<UInt32s>(large) | sign);
  return select(magnitude < 0.625f, small, signed_large);
}
REDLINE_INLINE Float64s tanh(Float64s x) {
  return each_lane(x, [](double v) { return ::tanh(v); });
}

// Correctly rounded.
REDLINE_INLINE Float32s sqrt(Float32s x) {
#if defined(__AVX512F__)
  // The form without a mask draws a warning inside g++ 12's own header.
  return reinterpret_cast<Float32s>(_mm512_maskz_sqrt_ps(0xffff, reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__)
  return reinterpret_cast<Float32s>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < lanes<float>; ++i) x[i] = ::sqrtf(x[i]);
  return x;
#endif
}
REDLINE_INLINE Float64s sqrt(Float64s x) {
  return each_lane(x, [](double v) { return ::sqrt(v); });
}

// P(x) = erfc(-x / sqrt(2)) / 2, the normal distribution, and its density e^(-x^2 / 2) / sqrt(2
// pi). P(-|x|) = e^(-x^2 / 2) t q(t), t = 1 / (1 + 0.24 |x|): q is a fit of degree 9 around t = 1 /
// 2 with a relative error of 3.2e-9 for |x| <= 14.5, where P underflows.
REDLINE_INLINE Float32s normal_cdf(Float32s x, Float32s& density) {
  const Float32s magnitude = reinterpret_cast<Float32s>(reinterpret_cast<UInt32s>(x) & 0x7fffffffu);
  const Float32s e = exp(x * x * -0.5f);
  const Float32s t = 1.0f / (1.0f + 0.24f * magnitude);
  const Float32s s = t - 0.5f;
  Float32s q = broadcast(0.0255180486f);
  q = q * s - 0.00975879841f;
  q = q * s - 0.0633387938f;
  q = q * s - 0.0295283496f;
  q = q * s + 0.115966164f;
  q = q * s + 0.294963121f;
  q = q * s + 0.401898354f;
  q = q * s + 0.391866803f;
  q = q * s + 0.297425389f;
  q = q * s + 0.181968674f;
  const Float32s tail = e * (t * q);
  density = e * 0.398942280401432678f;
  return select(x < 0, tail, 1.0f - tail);
}
REDLINE_INLINE Float64s normal_cdf(Float64s x, Float64s& density) {
  density = exp(-0.5 * x * x) * 0.398942280401432678;
  return each_lane(x, [](double v) { return 0.5 * ::erfc(-0.707106781186547524 * v); });
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
