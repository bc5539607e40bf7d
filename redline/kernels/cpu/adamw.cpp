// One pass: parameter, gradient and both averages are read once and written once, in blocks that
// stay in L1. Bound by bytes: seven streams.
#include "redline/kernels/cpu/adamw.h"

#include "redline/kernels/cpu/block.h"
#include "redline/kernels/cpu/vector_math.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// The factors in the arithmetic's type.
template <typename Acc>
struct Factors {
  Acc gradient, step_size, decay, inverse_root, beta1_rest, beta2_rest, epsilon;
};

template <typename Acc>
Factors<Acc> factors_of(const AdamWStep& args, int64_t index) {
  const AdamWFactors& factors = args.factors.as<const AdamWFactors>()[index];
  return {static_cast<Acc>(factors.gradient), static_cast<Acc>(factors.step_size),
          static_cast<Acc>(factors.decay),    static_cast<Acc>(factors.inverse_root),
          static_cast<Acc>(1.0 - args.beta1), static_cast<Acc>(1.0 - args.beta2),
          static_cast<Acc>(args.epsilon)};
}

// A tensor that is read and written, one block of it at a time.
template <typename Acc>
struct Updated {
  void* data;
  DType dtype;
  Block<Acc> block;
  const Acc* in = nullptr;
  Acc* out = nullptr;

  void begin(int64_t offset, int count) {
    in = read<Acc>(data, dtype, offset, count, block);
    out = begin_write<Acc>(data, dtype, offset, block);
  }
  void finish(int64_t offset, int count) { finish_write(data, dtype, offset, count, block); }
};

void round_master(const AdamWTensor& tensor, int64_t offset, int count) {
  if (tensor.parameter_dtype == DType::bfloat16) {
    narrow_block(tensor.master + offset, static_cast<bfloat16*>(tensor.parameter) + offset, count);
  } else {
    narrow_block(tensor.master + offset, static_cast<float16*>(tensor.parameter) + offset, count);
  }
}

template <typename Acc>
void update_elements(const AdamWStep& args, int64_t index, Range elements) {
  const AdamWTensor& tensor = args.tensors[index];
  const Factors<Acc> f = factors_of<Acc>(args, index);
  Block<Acc> gradient_block;
  Updated<Acc> average{tensor.exp_avg, tensor.average_dtype, {}};
  Updated<Acc> square{tensor.exp_avg_sq, tensor.average_dtype, {}};
  Updated<Acc> value{tensor.parameter, tensor.parameter_dtype, {}};
  if (tensor.master) value = {tensor.master, DType::float32, {}};
  for (int64_t offset = elements.begin; offset < elements.end; offset += block_size) {
    const int64_t left = elements.end - offset;
    const int count = static_cast<int>(left < block_size ? left : block_size);
    const Acc* gradient =
        read<Acc>(tensor.gradient, tensor.gradient_dtype, offset, count, gradient_block);
    average.begin(offset, count);
    square.begin(offset, count);
    value.begin(offset, count);
    for_vectors<Acc>(count, [&](int i, int n) {
      const Vector<Acc> g = load(gradient + i, n) * f.gradient;
      Vector<Acc> m = load(average.in + i, n), v = load(square.in + i, n);
      const Vector<Acc> p = load(value.in + i, n);
      m += f.beta1_rest * (g - m);
      v += f.beta2_rest * (g * g - v);
      const Vector<Acc> change = f.step_size * (m / (sqrt(v) * f.inverse_root + f.epsilon));
      store(average.out + i, m, n);
      store(square.out + i, v, n);
      store(value.out + i, p - (f.decay * p + change), n);
    });
    average.finish(offset, count);
    square.finish(offset, count);
    value.finish(offset, count);
    if (tensor.master) round_master(tensor, offset, count);
  }
}

void update(const AdamWStep& args, int64_t index, Range elements) {
  if (args.factors.as<const AdamWFactors>()[index].skip != 0) return;
  if (args.tensors[index].parameter_dtype == DType::float64) {
    update_elements<double>(args, index, elements);
  } else {
    update_elements<float>(args, index, elements);
  }
}

}  // namespace

extern const AdamWKernels adamw_kernels = {update};

}  // namespace redline::cpu::REDLINE_ISA
