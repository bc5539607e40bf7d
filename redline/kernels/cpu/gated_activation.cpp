// One pass: each vector is read, widened where it is 16-bit, computed and written. The bias's
// gradient is added up in a [2 * cols] row of the workspace on the way.
#include "redline/kernels/cpu/gated_activation.h"

#include "redline/kernels/cpu/column_sums.h"
#include "redline/kernels/cpu/elements.h"
#include "redline/kernels/cpu/nonlinearity.h"

namespace redline::cpu::REDLINE_ISA {
namespace {

// f(a) by a nonlinearity without parameters; nothing is clamped.
template <typename Acc, typename Function>
struct Plain {
  using V = Vector<Acc>;
  explicit Plain(const GatedActivationKind&) {}
  REDLINE_INLINE V gate(V a) const { return Function::value(a); }
  REDLINE_INLINE void derive(V a, V& value, V& derivative) const {
    Function::derive(a, value, derivative);
  }
  REDLINE_INLINE V linear(V b) const { return b; }
  REDLINE_INLINE V linear_gradient(V, V gradient) const { return gradient; }
};

template <typename Acc>
struct ClampedSwiglu {
  using V = Vector<Acc>;
  Acc limit, alpha, offset;

  explicit ClampedSwiglu(const GatedActivationKind& kind)
      : limit(static_cast<Acc>(kind.limit)),
        alpha(static_cast<Acc>(kind.alpha)),
        offset(static_cast<Acc>(kind.linear_offset)) {}
  REDLINE_INLINE V at_most(V v, V most) const { return select(v > most, most, v); }
  REDLINE_INLINE V gate(V a) const { return swish(at_most(a, V{} + limit), alpha); }
  REDLINE_INLINE void derive(V a, V& value, V& derivative) const {
    derive_swish(at_most(a, V{} + limit), alpha, value, derivative);
    derivative = select(a > limit, V{}, derivative);
  }
  REDLINE_INLINE V linear(V b) const {
    const V clamped = at_most(b, V{} + limit);
    return select(clamped < -limit, V{} - limit, clamped) + offset;
  }
  REDLINE_INLINE V linear_gradient(V b, V gradient) const {
    return select(b > limit, V{}, select(b < -limit, V{}, gradient));
  }
};

// gate + bias[:cols] and linear + bias[cols:] of one block of a row.
template <typename T>
struct Inputs {
  using Acc = arithmetic<T>;
  Block<Acc> gate_bias_block, linear_bias_block;
  const T *gate, *linear;
  const Acc *gate_bias, *linear_bias;

  template <typename Args>
  REDLINE_INLINE void read_block(const Args& args, int64_t row, int64_t col, int count) {
    gate = at<const T>(args.gate, row, col);
    linear = at<const T>(args.linear, row, col);
    gate_bias = read_optional(args.bias, col, count, gate_bias_block);
    linear_bias = read_optional(args.bias, args.gate.sizes[1] + col, count, linear_bias_block);
  }
  REDLINE_INLINE Vector<Acc> a(int i, int n) const {
    const Vector<Acc> v = load_wide(gate + i, n);
    return gate_bias ? v + load(gate_bias + i, n) : v;
  }
  REDLINE_INLINE Vector<Acc> b(int i, int n) const {
    const Vector<Acc> v = load_wide(linear + i, n);
    return linear_bias ? v + load(linear_bias + i, n) : v;
  }
};

template <typename Acc>
Acc row_scale_of(const TensorView& row_scale, int64_t row) {
  Block<Acc> block;
  return row_scale ? *read<Acc>(row_scale.data, row_scale.dtype, row, 1, block) : 1;
}

template <typename Kind, typename T>
void forward_rows(const GatedActivationForward& args, Range rows) {
  using Acc = arithmetic<T>;
  const Kind kind(args.activation);
  const int64_t counted = counted_rows(args.row_count, args.gate.sizes[0]);
  Inputs<T> in;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    if (row >= counted) {
      write_zeros(args.y, row);
      continue;
    }
    const Acc scale = row_scale_of<Acc>(args.row_scale, row);
    for_blocks(args.gate.sizes[1], [&](int64_t col, int count) {
      in.read_block(args, row, col, count);
      T* y = at<T>(args.y, row, col);
      for_vectors<Acc>(count, [&](int i, int n) REDLINE_INLINED {
        store_narrow(y + i, kind.gate(in.a(i, n)) * kind.linear(in.b(i, n)) * scale, n);
      });
    });
  }
}

template <typename Kind, typename T>
struct Backward {
  using Acc = arithmetic<T>;
  const GatedActivationBackward& args;
  const Kind kind;
  Acc* gate_sums;  // [cols] each, of the chunk; null where no bias gradient is wanted
  Acc* linear_sums;
  Inputs<T> in;

  Backward(const GatedActivationBackward& args, int64_t chunk)
      : args(args),
        kind(args.activation),
        gate_sums(begin_chunk<Acc>(args.bias_grad, chunk)),
        linear_sums(gate_sums ? gate_sums + args.gate.sizes[1] : nullptr) {}

  // Returns the block's part of row_scale_grad.
  REDLINE_INLINE Acc run_block(int64_t row, int64_t col, int count, Acc scale) {
    in.read_block(args, row, col, count);
    const T* y_grad = at<const T>(args.y_grad, row, col);
    T* gate_grad = at<T>(args.gate_grad, row, col);
    T* linear_grad = at<T>(args.linear_grad, row, col);
    T* y = args.y ? at<T>(args.y, row, col) : nullptr;
    return sum<Acc>(count, [&](int i, int n) REDLINE_INLINED {
      const Vector<Acc> g = load_wide(y_grad + i, n), b = in.b(i, n), linear = kind.linear(b);
      Vector<Acc> value, derivative;
      kind.derive(in.a(i, n), value, derivative);
      const Vector<Acc> scaled = g * scale;
      const Vector<Acc> to_gate = scaled * linear * derivative;
      const Vector<Acc> to_linear = kind.linear_gradient(b, scaled * value);
      store_narrow(gate_grad + i, to_gate, n);
      store_narrow(linear_grad + i, to_linear, n);
      if (y) store_narrow(y + i, value * linear * scale, n);
      if (gate_sums) {
        add_to(gate_sums + col + i, to_gate, n);
        add_to(linear_sums + col + i, to_linear, n);
      }
      return g * value * linear;  // zero past n: y_grad is
    });
  }

  void store_row_scale_grad(int64_t row, Acc value) {
    if (!args.row_scale_grad) return;
    Block<Acc> block;
    const TensorView& grad = args.row_scale_grad;
    *begin_write(grad.data, grad.dtype, row, block) = value;
    finish_write(grad.data, grad.dtype, row, 1, block);
  }

  void run_rows(Range rows) {
    const int64_t counted = counted_rows(args.row_count, args.gate.sizes[0]);
    for (int64_t row = rows.begin; row < rows.end; ++row) {
      Acc total = 0;
      if (row >= counted) {
        write_zeros(args.gate_grad, row);
        write_zeros(args.linear_grad, row);
        if (args.y) write_zeros(args.y, row);
      } else {
        const Acc scale = row_scale_of<Acc>(args.row_scale, row);
        for_blocks(args.gate.sizes[1],
                   [&](int64_t col, int count) { total += run_block(row, col, count, scale); });
      }
      store_row_scale_grad(row, total);
    }
  }
};

// Calls visit.operator()<Kind, T>() with the storage type.
template <typename Args, typename Visit>
void visit_kind(const Args& args, Visit visit) {
  visit_storage(args.gate.dtype, [&]<typename T>() {
    using Acc = arithmetic<T>;
    switch (args.activation.kind) {
      case GatedActivation::swiglu:
        return visit.template operator()<Plain<Acc, Silu>, T>();
      case GatedActivation::geglu:
        return visit.template operator()<Plain<Acc, Gelu>, T>();
      case GatedActivation::reglu:
        return visit.template operator()<Plain<Acc, Relu>, T>();
      case GatedActivation::quick_geglu:
        return visit.template operator()<Plain<Acc, QuickGelu>, T>();
      case GatedActivation::clamped_swiglu:
        return visit.template operator()<ClampedSwiglu<Acc>, T>();
    }
  });
}

void forward(const GatedActivationForward& args, Range rows) {
  visit_kind(args, [&]<typename Kind, typename T>() { forward_rows<Kind, T>(args, rows); });
}

void backward(const GatedActivationBackward& args, int64_t chunk, Range rows) {
  visit_kind(args,
             [&]<typename Kind, typename T>() { Backward<Kind, T>(args, chunk).run_rows(rows); });
}

void finish(const GatedActivationBackward& args, Range cols) {
  finish_columns(args.bias_grad, cols);
}

}  // namespace

extern const GatedActivationKernels gated_activation_kernels = {forward, backward, finish};

}  // namespace redline::cpu::REDLINE_ISA
