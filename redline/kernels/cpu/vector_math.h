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
  const M yes_bits = reinterpret_cast<M>(yes);
  const M no_bits = reinterpret_cast<M>(no);
  return reinterpret_cast<V>((yes_bits & mask) | (no_bits & ~mask));
}

template <typename Function>
REDLINE_INLINE Float64s each_lane(Float64s x, Function function) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = function(x[i]);
  return x;
}

// 2^n for integers n of [-126, 127].
REDLINE_INLINE Float32s power_of_two(Int32s n) {
  return reinterpret_cast<Float32s>((n + 127) << 23);
}

// e^x = 2^n e^r with |r| <= ln(2) / 2; the polynomial is Cephes' (S. Moshier, expf). 2^n goes in
// two factors so that subnormal results and the step to infinity come out right.
REDLINE_INLINE Float32s exp(Float32s x) {
  const Float32s low = broadcast(-104.0f), high = broadcast(89.0f);
  x = select(x < low, low, x);
  x = select(x > high, high, x);
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
  const Int32s whole = __builtin_convertvector(n, Int32s);
  const Int32s half = whole >> 1;
  return p * power_of_two(half) * power_of_two(whole - half);
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
  return reinterpret_cast<Float32s>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
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

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
