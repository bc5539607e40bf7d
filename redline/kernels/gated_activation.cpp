#include "redline/kernels/gated_activation.h"

#include <optional>
#include <string_view>

#include "redline/kernels/cpu/gated_activation.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "gated_activation";

const cpu::GatedActivationKernels& kernels() {
  return cpu::choose(cpu::baseline::gated_activation_kernels, cpu::avx2::gated_activation_kernels,
                     cpu::avx512::gated_activation_kernels);
}

// What both directions read.
template <typename Args>
void check_inputs(const Args& args) {
  const TensorView& gate = args.gate;
  REDLINE_CHECK(gate.rank == 2, op, ": gate: expected [rows, cols], not ", gate);
  check_floating(op, "gate", gate);
  check_matrix(op, "gate", gate, gate, gate.dtype);
  check_matrix(op, "linear", args.linear, gate, gate.dtype);
  check_parameter(op, "bias", args.bias, 2 * gate.sizes[1], gate.dtype);
  check_parameter(op, "row_scale", args.row_scale, gate.sizes[0], gate.dtype);
  check_row_count(op, args.row_count);
}

std::optional<GatedActivation> named(std::string_view kind) {
  if (kind == "swiglu") return GatedActivation::swiglu;
  if (kind == "geglu") return GatedActivation::geglu;
  if (kind == "reglu") return GatedActivation::reglu;
  if (kind == "quick_geglu") return GatedActivation::quick_geglu;
  if (kind == "clamped_swiglu") return GatedActivation::clamped_swiglu;
  return std::nullopt;
}

}  // namespace

bool is_gated_activation(std::string_view kind) { return named(kind).has_value(); }

GatedActivation gated_activation_from(std::string_view kind) {
  const std::optional<GatedActivation> found = named(kind);
  REDLINE_CHECK(found, op, ": kind: expected one of ", gated_activation_kinds, ", not ", kind);
  return *found;
}

void check(const GatedActivationForward& args) {
  check_inputs(args);
  check_matrix(op, "y", args.y, args.gate, args.gate.dtype);
  check_not_quantized(op, args.quantized);
}

void check(const GatedActivationBackward& args) {
  check_inputs(args);
  const TensorView& gate = args.gate;
  check_matrix(op, "y_grad", args.y_grad, gate, gate.dtype);
  check_matrix(op, "gate_grad", args.gate_grad, gate, gate.dtype);
  check_matrix(op, "linear_grad", args.linear_grad, gate, gate.dtype);
  if (args.y) check_matrix(op, "y", args.y, gate, gate.dtype);
  check_parameter(op, "row_scale_grad", args.row_scale_grad, gate.sizes[0], gate.dtype);
  if (args.row_parts) {
    const TensorView& parts = args.row_parts;
    REDLINE_CHECK(parts.rank == 2 && parts.sizes[1] == gate.sizes[0] &&
                      parts.dtype == DType::float32 &&
                      (parts.strides[0] == parts.sizes[1] || parts.numel() == 0),
                  op, ": row_parts: expected [blocks, ", gate.sizes[0], "] float32, not ", parts);
  }
  check_column_sums(op, "bias_grad", args.bias_grad, 2 * gate.sizes[1],
                    accumulation_dtype(gate.dtype));
}

void run(const GatedActivationForward& args, Range rows) { kernels().forward(args, rows); }

void run(const GatedActivationBackward& args, Range range) {
  if (!args.bias_grad.total) {
    kernels().backward(args, 0, range);
    return;
  }
  for (int64_t chunk = range.begin; chunk < range.end; ++chunk) {
    const int64_t chunks = args.bias_grad.partial.sizes[0];
    kernels().backward(args, chunk, chunk_rows(args.gate.sizes[0], chunks, chunk));
  }
}

void finish(const GatedActivationBackward& args, Range cols) { kernels().finish(args, cols); }

}  // namespace redline
