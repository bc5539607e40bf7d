#include "redline/kernels/gradient_norm.h"

#include <algorithm>
#include <cmath>

#include "redline/kernels/cpu/gradient_norm.h"
#include "redline/kernels/cpu/isa.h"

namespace redline {
namespace {

void check_gradients(const char* op, const GradientList& list) {
  for (int64_t i = 0; i < list.tensor_count; ++i) {
    const DType dtype = list.tensors[i].dtype;
    REDLINE_CHECK(is_floating(dtype), op, ": gradients: expected a floating dtype, not ", dtype);
  }
}

// norm: of the accumulation dtype.
void check_norm(const char* op, const TensorView& norm) {
  REDLINE_CHECK(norm.present && norm.numel() == 1 &&
                    (norm.dtype == DType::float32 || norm.dtype == DType::float64),
                op, ": norm: expected one float32 or float64, not ", norm);
}

void check_coefficient(const char* op, const TensorView& coefficient) {
  REDLINE_CHECK(
      coefficient.present && coefficient.numel() == 1 && coefficient.dtype == DType::float32, op,
      ": coefficient: expected one float32, not ", coefficient);
}

int64_t chunks_of(const GradientTensor& tensor) {
  return (tensor.count + gradient_chunk - 1) / gradient_chunk;
}

// Calls body(tensor, elements, chunk) for each chunk of the range.
template <typename Body>
void for_chunks(const GradientList& list, Range chunks, Body body) {
  int64_t first = 0;  // chunk of the tensor
  for (int64_t i = 0; i < list.tensor_count && first < chunks.end; ++i) {
    const GradientTensor& tensor = list.tensors[i];
    const int64_t last = first + chunks_of(tensor);
    for (int64_t chunk = std::max(first, chunks.begin); chunk < std::min(last, chunks.end);
         ++chunk) {
      const int64_t begin = (chunk - first) * gradient_chunk;
      body(tensor, Range{begin, std::min(begin + gradient_chunk, tensor.count)}, chunk);
    }
    first = last;
  }
}

const cpu::GradientNormKernels& kernels() {
  return cpu::choose(cpu::baseline::gradient_norm_kernels, cpu::avx2::gradient_norm_kernels,
                     cpu::avx512::gradient_norm_kernels);
}

}  // namespace

int64_t gradient_chunks(const GradientList& list) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < list.tensor_count; ++i) chunks += chunks_of(list.tensors[i]);
  return chunks;
}

void check(const GradientNorm& args) {
  constexpr const char* op = "gradient_norm";
  check_gradients(op, args.gradients);
  check_norm(op, args.norm);
  check_vector(op, "partial", args.partial, gradient_chunks(args.gradients));
}

void check(const ClipCoefficient& args) {
  constexpr const char* op = "clip_coefficient";
  check_norm(op, args.norm);
  check_coefficient(op, args.coefficient);
  REDLINE_CHECK(args.max_norm >= 0, op, ": max_norm: expected 0 or more, not ", args.max_norm);
}

void check(const ScaleGradients& args) {
  constexpr const char* op = "scale_gradients";
  check_gradients(op, args.gradients);
  check_coefficient(op, args.coefficient);
}

void run(const GradientNorm& args, Range chunks) {
  double* const partial = args.partial.as<double>();
  for_chunks(args.gradients, chunks,
             [&](const GradientTensor& tensor, Range elements, int64_t chunk) {
               partial[chunk] = kernels().sum_squares(tensor, elements);
             });
}

void finish(const GradientNorm& args) {
  const double* const partial = args.partial.as<const double>();
  double sum = 0;
  for (int64_t chunk = 0; chunk < args.partial.sizes[0]; ++chunk) sum += partial[chunk];
  if (args.norm.dtype == DType::float64) {
    *args.norm.as<double>() = std::sqrt(sum);
  } else {
    *args.norm.as<float>() = static_cast<float>(std::sqrt(sum));
  }
}

void run(const ClipCoefficient& args) {
  const TensorView& norm = args.norm;
  const double value =
      norm.dtype == DType::float64 ? *norm.as<const double>() : *norm.as<const float>();
  const double ratio = args.max_norm / (value + 1e-6);
  *args.coefficient.as<float>() = ratio > 1 ? 1.0f : static_cast<float>(ratio);  // NaN stays
}

void run(const ScaleGradients& args, Range chunks) {
  const float coefficient = *args.coefficient.as<const float>();
  if (coefficient == 1) return;
  for_chunks(args.gradients, chunks, [&](const GradientTensor& tensor, Range elements, int64_t) {
    kernels().scale(tensor, coefficient, elements);
  });
}

}  // namespace redline
