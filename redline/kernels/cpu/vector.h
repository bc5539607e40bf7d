// Vectors of the instruction set an object is compiled for: loads, stores, sums in a fixed order.
// Included by the per-instruction-set sources alone. Everything has internal linkage and nothing
// here may pull in an inline function of the standard library: the linker would keep one copy for
// all objects, and it could be the AVX-512 one.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#include "redline/core/dtype.h"

#define REDLINE_INLINE inline __attribute__((always_inline))
// Behind a long lambda's parameters: one that is called for whole vectors and for the rest must not
// become a function, or `n` is a variable in every copy (AdamW: 2.4 times slower).
#define REDLINE_INLINED __attribute__((always_inline))

namespace redline::cpu::REDLINE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int vector_bytes = 64;
#elif defined(__AVX2__)
constexpr int vector_bytes = 32;
#else
constexpr int vector_bytes = 16;
#endif

// How far ahead a walk asks for memory. On a Xeon two threads copy 16 MB in 1.29 ms without these
// hints and in 0.59 with them, at any distance from 1 to 8 KB (docs/cpu.md).
constexpr int prefetch_bytes = 2048;

using Float32s __attribute__((vector_size(vector_bytes))) = float;
using Int32s __attribute__((vector_size(vector_bytes))) = int32_t;
using UInt32s __attribute__((vector_size(vector_bytes))) = uint32_t;
using UInt16s __attribute__((vector_size(vector_bytes / 2))) = uint16_t;
using Float64s __attribute__((vector_size(vector_bytes))) = double;
using Int64s __attribute__((vector_size(vector_bytes))) = int64_t;

template <typename Acc>
struct VectorOf;
template <>
struct VectorOf<float> {
  using type = Float32s;
  using integer = Int32s;
};
template <>
struct VectorOf<double> {
  using type = Float64s;
  using integer = Int64s;
};
template <typename Acc>
using Vector = typename VectorOf<Acc>::type;  // of the accumulation type, float or double

template <typename Acc>
constexpr int lanes = vector_bytes / static_cast<int>(sizeof(Acc));

template <typename Acc>
REDLINE_INLINE Vector<Acc> broadcast(Acc value) {
  return Vector<Acc>{} + value;
}

// The first `count` elements, zeros behind them.
template <typename T>
REDLINE_INLINE Vector<T> load(const T* from, int count = lanes<T>) {
  Vector<T> v{};
  memcpy(&v, from, count == lanes<T> ? sizeof(v) : static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <typename T>
REDLINE_INLINE void store(T* to, Vector<T> v, int count = lanes<T>) {
  memcpy(to, &v, count == lanes<T> ? sizeof(v) : static_cast<size_t>(count) * sizeof(T));
}

// Asks for the line that a walk through memory, now at `address`, reaches soon.
REDLINE_INLINE void prefetch(const void* address) {
  __builtin_prefetch(static_cast<const char*>(address) + prefetch_bytes);
}

// load() and store() of memory that is walked from end to end and not in cache.
template <typename T>
REDLINE_INLINE Vector<T> load_ahead(const T* from, int count) {
  prefetch(from);
  return load(from, count);
}
template <typename T>
REDLINE_INLINE void store_ahead(T* to, Vector<T> v, int count) {
  prefetch(to);
  store(to, v, count);
}

// Calls body(offset, count) for each vector of [0, count); count < lanes in the last call alone.
template <typename Acc, typename Body>
REDLINE_INLINE void for_vectors(int count, Body body) {
  int i = 0;
  for (; i + lanes<Acc> <= count; i += lanes<Acc>) body(i, lanes<Acc>);
  if (i < count) body(i, count - i);
}

// Lanes added as a tree of fixed shape.
template <typename Acc>
REDLINE_INLINE Acc sum_lanes(Vector<Acc> v) {
  Acc values[lanes<Acc>];
  memcpy(values, &v, sizeof(v));
  for (int width = lanes<Acc> / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) values[i] += values[i + width];
  }
  return values[0];
}

template <typename Acc>
REDLINE_INLINE Acc max_lanes(Vector<Acc> v) {
  Acc values[lanes<Acc>];
  memcpy(values, &v, sizeof(v));
  Acc result = values[0];
  for (int i = 1; i < lanes<Acc>; ++i) result = values[i] > result ? values[i] : result;
  return result;
}

// Sum of term(offset, count) over [0, count): four running vectors hide the latency of the add.
// A term must be zero in the lanes past `count`. The vectors are named: an array indexed by the
// loop would live in memory.
template <typename Acc, typename Term>
REDLINE_INLINE Acc sum(int count, Term term) {
  constexpr int n = lanes<Acc>;
  Vector<Acc> a{}, b{}, c{}, d{};
  int i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
    a += term(i, n);
    b += term(i + n, n);
    c += term(i + 2 * n, n);
    d += term(i + 3 * n, n);
  }
  for (; i + n <= count; i += n) a += term(i, n);
  if (i < count) b += term(i, count - i);
  return sum_lanes<Acc>((a + b) + (c + d));
}

// --- 16-bit storage ---------------------------------------------------------------------------

REDLINE_INLINE Float32s widen(bfloat16, UInt16s bits) {
  const UInt32s wide = __builtin_convertvector(bits, UInt32s) << 16;
  return reinterpret_cast<Float32s>(wide);
}

// Round to nearest, ties to even; NaN stays NaN.
REDLINE_INLINE UInt16s narrow(bfloat16, Float32s v) {
  const UInt32s bits = reinterpret_cast<UInt32s>(v);
  const UInt32s rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UInt32s nan = reinterpret_cast<UInt32s>(v != v);
  return __builtin_convertvector((rounded & ~nan) | (nan & 0x7fc0u), UInt16s);
}

#if defined(__AVX512F__)
// With a mask of ones: the forms without one draw a warning inside g++ 12's own header.
REDLINE_INLINE Float32s widen(float16, UInt16s bits) {
  return reinterpret_cast<Float32s>(_mm512_maskz_cvtph_ps(0xffff, reinterpret_cast<__m256i>(bits)));
}
REDLINE_INLINE UInt16s narrow(float16, Float32s v) {
  return reinterpret_cast<UInt16s>(
      _mm512_maskz_cvtps_ph(0xffff, reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
REDLINE_INLINE Float32s widen(float16, UInt16s bits) {
  return reinterpret_cast<Float32s>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(bits)));
}
REDLINE_INLINE UInt16s narrow(float16, Float32s v) {
  return reinterpret_cast<UInt16s>(
      _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
}
#else
// Exponent moved by a product with 2^112, which also normalises subnormals; infinities and NaN keep
// their mantissa under a full exponent.
REDLINE_INLINE Float32s widen(float16, UInt16s half_bits) {
  const UInt32s bits = __builtin_convertvector(half_bits, UInt32s);
  const UInt32s magnitude = (bits & 0x7fffu) << 13;
  const Float32s scaled = reinterpret_cast<Float32s>(magnitude) * 0x1p112f;
  const UInt32s special = reinterpret_cast<UInt32s>(magnitude >= (0x7c00u << 13));
  const UInt32s value =
      (reinterpret_cast<UInt32s>(scaled) & ~special) | ((magnitude | 0x7f800000u) & special);
  return reinterpret_cast<Float32s>(value | ((bits & 0x8000u) << 16));
}
// Adding a power of two with its last bit where the result's is makes the adder round.
REDLINE_INLINE UInt16s narrow(float16, Float32s v) {
  const UInt32s bits = reinterpret_cast<UInt32s>(v);
  const UInt32s magnitude = bits & 0x7fffffffu;
  const Float32s absolute = reinterpret_cast<Float32s>(magnitude);
  const UInt32s subnormal =
      reinterpret_cast<UInt32s>(absolute + 0.5f) - 0x3f000000u;  // 0.5f: last bit is 2^-24
  const UInt32s normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const UInt32s is_small = reinterpret_cast<UInt32s>(absolute < 0x1p-14f);
  const UInt32s is_large = reinterpret_cast<UInt32s>(absolute >= 65520.0f);
  const UInt32s is_nan = reinterpret_cast<UInt32s>(v != v);
  UInt32s result = (subnormal & is_small) | (normal & ~is_small);
  result = (result & ~is_large) | (is_large & 0x7c00u);
  result = (result & ~is_nan) | (is_nan & 0x7e00u);
  return __builtin_convertvector(result | ((bits >> 16) & 0x8000u), UInt16s);
}
#endif

template <typename Half>
REDLINE_INLINE Float32s load_half(const Half* from, int count = lanes<float>) {
  UInt16s bits{};
  memcpy(&bits, from, count == lanes<float> ? sizeof(bits) : static_cast<size_t>(count) * 2);
  return widen(Half{}, bits);
}

template <typename Half>
REDLINE_INLINE void store_half(Half* to, Float32s v, int count = lanes<float>) {
  const UInt16s bits = narrow(Half{}, v);
  memcpy(to, &bits, count == lanes<float> ? sizeof(bits) : static_cast<size_t>(count) * 2);
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
