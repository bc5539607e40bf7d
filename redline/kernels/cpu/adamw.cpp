// One pass: parameter, gradient and both averages are read once, all but the gradient written once.
// Bound by bytes in float32 (seven streams), by the root and the division in 16 bits.
#include "redline/kernels/cpu/adamw.h"

#include <type_traits>

#include "redline/kernels/cpu/elements.h"
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

// G, A, P: what gradient, averages and parameter hold; V: what is updated, the float32 master or
// the parameter itself. Conversions stand beside the division and the root and hide behind them: in
// passes of their own they cost bfloat16 a third of the speed.
template <typename G, typename A, typename P, typename V>
void update_elements(const AdamWStep& args, int64_t index, Range elements) {
  using Acc = arithmetic<V>;
  constexpr bool has_master = !std::is_same_v<V, P>;
  const AdamWTensor& tensor = args.tensors[index];
  const Factors<Acc> f = factors_of<Acc>(args, index);
  const G* gradients = static_cast<const G*>(tensor.gradient) + elements.begin;
  A* averages = static_cast<A*>(tensor.exp_avg) + elements.begin;
  A* squares = static_cast<A*>(tensor.exp_avg_sq) + elements.begin;
  P* parameters = static_cast<P*>(tensor.parameter) + elements.begin;
  V* values = static_cast<V*>(has_master ? tensor.master : tensor.parameter) + elements.begin;
  const int count = static_cast<int>(elements.end - elements.begin);
  for_vectors<Acc>(count, [&](int i, int n) REDLINE_INLINED {
    const Vector<Acc> g = load_wide(gradients + i, n) * f.gradient;
    Vector<Acc> m = load_wide(averages + i, n), v = load_wide(squares + i, n);
    const Vector<Acc> p = load_wide(values + i, n);
    m += f.beta1_rest * (g - m);
    v += f.beta2_rest * (g * g - v);
    const Vector<Acc> change = f.step_size * (m / (sqrt(v) * f.inverse_root + f.epsilon));
    const Vector<Acc> updated = p - (f.decay * p + change);
    store_narrow(averages + i, m, n);
    store_narrow(squares + i, v, n);
    store_narrow(values + i, updated, n);
    if constexpr (has_master) store_narrow(parameters + i, updated, n);
  });
}

// The check has refused float64 beside anything else, and a master beside a wide parameter.
template <typename G, typename P, typename V>
void update_with(const AdamWStep& args, int64_t index, Range elements) {
  if constexpr (sizeof(P) != 8) {
    if (args.tensors[index].average_dtype == DType::bfloat16) {
      return update_elements<G, bfloat16, P, V>(args, index, elements);
    }
  }
  update_elements<G, arithmetic<P>, P, V>(args, index, elements);
}

void update(const AdamWStep& args, int64_t index, Range elements) {
  if (args.factors.as<const AdamWFactors>()[index].skip != 0) return;
  const AdamWTensor& tensor = args.tensors[index];
  visit_storage(tensor.parameter_dtype, [&]<typename P>() {
    visit_storage(tensor.gradient_dtype, [&]<typename G>() {
      if constexpr ((sizeof(P) == 8) == (sizeof(G) == 8)) {
        if constexpr (sizeof(P) == 2) {
          if (tensor.master) return update_with<G, P, float>(args, index, elements);
        }
        update_with<G, P, P>(args, index, elements);
      }
    });
  });
}

}  // namespace

extern const AdamWKernels adamw_kernels = {update};

}  // namespace redline::cpu::REDLINE_ISA
