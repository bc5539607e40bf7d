// One pass: parameter, gradient and both averages are read once, all but the gradient written once.
// Bound by bytes in float32 (seven streams), by the root and the division in 16 bits.
#include "redline/kernels/cpu/adamw.h"

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

// A tensor of any dtype as vectors of the arithmetic's type. Conversions stand beside the division
// and the root and hide behind them: in passes of their own they cost bfloat16 a third of the
// speed.
template <typename Acc>
struct Elements {
  void* data;
  DType dtype;

  REDLINE_INLINE Vector<Acc> load_vector(int64_t i, int n) const {
    if constexpr (sizeof(Acc) == 4) {
      if (dtype == DType::bfloat16) return load_half(static_cast<const bfloat16*>(data) + i, n);
      if (dtype == DType::float16) return load_half(static_cast<const float16*>(data) + i, n);
    }
    return load(static_cast<const Acc*>(data) + i, n);
  }

  REDLINE_INLINE void store_vector(int64_t i, Vector<Acc> v, int n) const {
    if constexpr (sizeof(Acc) == 4) {
      if (dtype == DType::bfloat16) return store_half(static_cast<bfloat16*>(data) + i, v, n);
      if (dtype == DType::float16) return store_half(static_cast<float16*>(data) + i, v, n);
    }
    store(static_cast<Acc*>(data) + i, v, n);
  }
};

template <typename Acc>
void update_elements(const AdamWStep& args, int64_t index, Range elements) {
  const AdamWTensor& tensor = args.tensors[index];
  const Factors<Acc> f = factors_of<Acc>(args, index);
  const Elements<Acc> gradients{const_cast<void*>(tensor.gradient), tensor.gradient_dtype};
  const Elements<Acc> averages{tensor.exp_avg, tensor.average_dtype};
  const Elements<Acc> squares{tensor.exp_avg_sq, tensor.average_dtype};
  const Elements<Acc> parameters{tensor.parameter, tensor.parameter_dtype};
  const Elements<Acc> values =
      tensor.master ? Elements<Acc>{tensor.master, DType::float32} : parameters;
  for_vectors<Acc>(static_cast<int>(elements.end - elements.begin), [&](int offset, int n) {
    const int64_t i = elements.begin + offset;
    const Vector<Acc> g = gradients.load_vector(i, n) * f.gradient;
    Vector<Acc> m = averages.load_vector(i, n), v = squares.load_vector(i, n);
    const Vector<Acc> p = values.load_vector(i, n);
    m += f.beta1_rest * (g - m);
    v += f.beta2_rest * (g * g - v);
    const Vector<Acc> change = f.step_size * (m / (sqrt(v) * f.inverse_root + f.epsilon));
    const Vector<Acc> updated = p - (f.decay * p + change);
    averages.store_vector(i, m, n);
    squares.store_vector(i, v, n);
    values.store_vector(i, updated, n);
    if (tensor.master) parameters.store_vector(i, updated, n);
  });
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
