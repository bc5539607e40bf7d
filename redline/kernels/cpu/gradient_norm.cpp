// Squares are exact in float64 for every narrower dtype; the sum of a chunk has a fixed order. One
// pass, bound by bytes.
#include "redline/kernels/cpu/gradient_norm.h"

#include <string.h>

#include "redline/kernels/cpu/block.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

using NarrowFloat32s __attribute__((vector_size(vector_bytes / 2))) = float;

// As many float32 as there are float64 lanes, widened; zeros behind `count`.
REDLINE_INLINE Float64s load_wide(const float* from, int count) {
  prefetch(from);
  NarrowFloat32s v{};
  memcpy(&v, from, count == lanes<double> ? sizeof(v) : static_cast<size_t>(count) * 4);
  return __builtin_convertvector(v, Float64s);
}
REDLINE_INLINE Float64s load_wide(const double* from, int count) { return load(from, count); }

template <typename Acc>
double sum_squares_of(const GradientTensor& tensor, Range elements) {
  Block<Acc> block;
  double total = 0;
  for_blocks(elements.end - elements.begin, [&](int64_t offset, int count) {
    const Acc* values = read<Acc>(tensor.data, tensor.dtype, elements.begin + offset, count, block);
    total += sum<double>(count, [&](int i, int n) {
      const Float64s wide = load_wide(values + i, n);
      return wide * wide;
    });
  });
  return total;
}

template <typename Acc>
void scale_elements(const GradientTensor& tensor, Acc coefficient, Range elements) {
  Block<Acc> block;
  for_blocks(elements.end - elements.begin, [&](int64_t offset, int count) {
    const int64_t first = elements.begin + offset;
    const Acc* values = read<Acc>(tensor.data, tensor.dtype, first, count, block);
    Acc* out = begin_write(tensor.data, tensor.dtype, first, block);
    for_vectors<Acc>(count,
                     [&](int i, int n) { store(out + i, load(values + i, n) * coefficient, n); });
    finish_write(tensor.data, tensor.dtype, first, count, block);
  });
}

double sum_squares(const GradientTensor& tensor, Range elements) {
  return tensor.dtype == DType::float64 ? sum_squares_of<double>(tensor, elements)
                                        : sum_squares_of<float>(tensor, elements);
}

void scale(const GradientTensor& tensor, float coefficient, Range elements) {
  if (tensor.dtype == DType::float64) {
    scale_elements<double>(tensor, coefficient, elements);
  } else {
    scale_elements<float>(tensor, coefficient, elements);
  }
}

}  // namespace

extern const GradientNormKernels gradient_norm_kernels = {sum_squares, scale};

}  // namespace redline::cpu::REDLINE_ISA
