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
  return a > b ? a : b;
}

// The largest term(offset, count) over [0, count), -inf where there is none. NaN is passed over:
// the sum of exponentials meets it.
template <typename Acc, typename Term>
REDLINE_INLINE Acc largest(int count, Term term) {
  constexpr int n = lanes<Acc>;
  Vector<Acc> a = broadcast<Acc>(-infinity<Acc>), b = a, c = a, d = a;
  int i = 0;
  for (; i + 4 * n <= count; i += 4 * n) {
    a = larger<Acc>(term(i, n), a);
    b = larger<Acc>(term(i + n, n), b);
    c = larger<Acc>(term(i + 2 * n, n), c);
    d = larger<Acc>(term(i + 3 * n, n), d);
  }
  for (; i + n <= count; i += n) a = larger<Acc>(term(i, n), a);
  if (i < count) {
    b = larger<Acc>(fill_tail<Acc>(term(i, count - i), count - i, -infinity<Acc>), b);
  }
  return max_lanes<Acc>(larger<Acc>(larger<Acc>(a, b), larger<Acc>(c, d)));
}

template <typename Acc>
struct RunningSum {
  Acc maximum = -infinity<Acc>, exponentials = 0;
};

// Adds one block. While every value is -inf the sum stays 0.
template <typename Acc>
REDLINE_INLINE void add_block(RunningSum<Acc>& row, const Acc* x, int count) {
  const Acc maximum = largest<Acc>(count, [&](int i, int n) { return load_ahead(x + i, n); });
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
