// The maximum of a row and the sum of e^(x - maximum), block by block: the online softmax
// (Milakov and Gimelshein, 2018). For the per-instruction-set sources alone.
#pragma once

#include "redline/kernels/cpu/vector_math.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

template <typename Acc>
constexpr Acc infinity = static_cast<Acc>(__builtin_inf());

// `value` in the lanes past n.
template <typename Acc>
REDLINE_INLINE Vector<Acc> fill_tail(Vector<Acc> v, int n, Acc value) {
  for (int i = n; i < lanes<Acc>; ++i) v[i] = value;
  return v;
}

template <typename Acc>
REDLINE_INLINE Vector<Acc> larger(Vector<Acc> a, Vector<Acc> b) {
  return select(a > b, a, b);
}

// NaN is passed over; the sum of exponentials meets it.
template <typename Acc>
Acc largest(const Acc* x, int count) {
  Vector<Acc> found[4];
  for (int k = 0; k < 4; ++k) found[k] = broadcast<Acc>(-infinity<Acc>);
  int i = 0;
  for (; i + 4 * lanes<Acc> <= count; i += 4 * lanes<Acc>) {
    for (int k = 0; k < 4; ++k) found[k] = larger<Acc>(load(x + i + k * lanes<Acc>), found[k]);
  }
  for (; i + lanes<Acc> <= count; i += lanes<Acc>) found[0] = larger<Acc>(load(x + i), found[0]);
  if (i < count) {
    const Vector<Acc> tail = fill_tail<Acc>(load(x + i, count - i), count - i, -infinity<Acc>);
    found[0] = larger<Acc>(tail, found[0]);
  }
  return max_lanes<Acc>(
      larger<Acc>(larger<Acc>(found[0], found[1]), larger<Acc>(found[2], found[3])));
}

template <typename Acc>
struct RunningSum {
  Acc maximum = -infinity<Acc>, exponentials = 0;
};

// Adds one block. While every value is -inf the sum stays 0.
template <typename Acc>
REDLINE_INLINE void add_block(RunningSum<Acc>& row, const Acc* x, int count) {
  const Acc maximum = largest(x, count);
  if (maximum > row.maximum) {
    if (row.exponentials != 0) {
      row.exponentials *= exp(broadcast<Acc>(row.maximum - maximum))[0];
    }
    row.maximum = maximum;
  }
  const Acc origin = row.maximum == -infinity<Acc> ? 0 : row.maximum;
  row.exponentials += sum<Acc>(count, [&](int i, int n) {
    return exp(fill_tail<Acc>(load(x + i, n) - origin, n, -infinity<Acc>));
  });
}

}  // namespace
}  // namespace redline::cpu::REDLINE_ISA
