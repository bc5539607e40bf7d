#include "redline/kernels/adamw.h"

#include <algorithm>
#include <cmath>

#include "redline/kernels/cpu/adamw.h"
#include "redline/kernels/cpu/isa.h"

namespace redline {
namespace {

constexpr const char* op = "adamw_step";

void check_dtypes(const AdamWTensor& tensor) {
  const DType dtype = tensor.parameter_dtype;
  REDLINE_CHECK(is_floating(dtype), op, ": parameters: expected a floating dtype, not ", dtype);
  const bool wide = dtype == DType::float64;
  REDLINE_CHECK(
      is_floating(tensor.gradient_dtype) && (tensor.gradient_dtype == DType::float64) == wide, op,
      ": gradients: expected a dtype that goes with a parameter in ", dtype, ", not ",
      tensor.gradient_dtype);
  const DType average = tensor.average_dtype;
  REDLINE_CHECK(
      wide ? average == DType::float64 : average == DType::float32 || average == DType::bfloat16,
      op, ": exp_avgs: expected ", wide ? "float64" : "float32 or bfloat16",
      " beside a parameter in ", dtype, ", not ", average);
  REDLINE_CHECK(!tensor.master || element_bytes(dtype) == 2, op,
                ": masters: expected none beside a parameter in ", dtype);
}

void check_scalar(const char* name, const TensorView& scalar) {
  REDLINE_CHECK(scalar.present && scalar.numel() == 1 && scalar.dtype == DType::float32, op, ": ",
                name, ": expected one float32, not ", scalar);
}

void check_range(const char* name, double value, bool inside, const char* range) {
  REDLINE_CHECK(inside, op, ": ", name, ": expected ", range, ", not ", value);
}

double scalar_or_one(const TensorView& scalar) {
  return scalar ? static_cast<double>(*scalar.as<const float>()) : 1.0;
}

int64_t chunks_of(const AdamWTensor& tensor) {
  return (tensor.count + cpu::adamw_chunk - 1) / cpu::adamw_chunk;
}

const cpu::AdamWKernels& kernels() {
  return cpu::choose(cpu::baseline::adamw_kernels, cpu::avx2::adamw_kernels,
                     cpu::avx512::adamw_kernels);
}

}  // namespace

void check(const AdamWStep& args) {
  const TensorView& rate = args.learning_rate;
  REDLINE_CHECK(rate.present && rate.numel() == 1 &&
                    (rate.dtype == DType::float32 || rate.dtype == DType::float64),
                op, ": learning_rate: expected one float32 or float64, not ", rate);
  if (args.clip_coefficient) check_scalar("clip_coefficient", args.clip_coefficient);
  if (args.grad_scale) check_scalar("grad_scale", args.grad_scale);
  if (args.found_inf) check_scalar("found_inf", args.found_inf);
  check_range("beta1", args.beta1, args.beta1 >= 0 && args.beta1 < 1, "a value of [0, 1)");
  check_range("beta2", args.beta2, args.beta2 >= 0 && args.beta2 < 1, "a value of [0, 1)");
  check_range("epsilon", args.epsilon, args.epsilon >= 0, "0 or more");
  check_range("weight_decay", args.weight_decay, args.weight_decay >= 0, "0 or more");
  std::for_each_n(args.tensors, args.tensor_count, check_dtypes);
}

void begin(const AdamWStep& args) {
  const TensorView& rate = args.learning_rate;
  const double lr =
      rate.dtype == DType::float64 ? *rate.as<const double>() : *rate.as<const float>();
  const double gradient = scalar_or_one(args.clip_coefficient) / scalar_or_one(args.grad_scale);
  const double skip = args.found_inf ? *args.found_inf.as<const float>() : 0.0;
  for (int64_t i = 0; i < args.tensor_count; ++i) {
    float& step = *args.tensors[i].step;
    if (skip == 0) step += 1;
    const double t = step;
    args.factors.as<AdamWFactors>()[i] = {
        .gradient = gradient,
        .step_size = lr / (1 - std::pow(args.beta1, t)),
        .decay = lr * args.weight_decay,
        .inverse_root = 1 / std::sqrt(1 - std::pow(args.beta2, t)),
        .skip = skip};
  }
}

int64_t cpu::adamw_chunks(const AdamWStep& args) {
  int64_t chunks = 0;
  for (int64_t i = 0; i < args.tensor_count; ++i) chunks += chunks_of(args.tensors[i]);
  return chunks;
}

void run(const AdamWStep& args, Range chunks) {
  int64_t first = 0;  // chunk of the tensor
  for (int64_t i = 0; i < args.tensor_count && first < chunks.end; ++i) {
    const AdamWTensor& tensor = args.tensors[i];
    const int64_t last = first + chunks_of(tensor);
    const int64_t end = std::min(last, chunks.end);
    for (int64_t chunk = std::max(first, chunks.begin); chunk < end; ++chunk) {
      const int64_t begin = (chunk - first) * cpu::adamw_chunk;
      kernels().update(args, i, {begin, std::min(begin + cpu::adamw_chunk, tensor.count)});
    }
    first = last;
  }
}

}  // namespace redline
