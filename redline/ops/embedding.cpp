#include "redline/ops/embedding.h"

#include "redline/kernels/embedding.h"
#include "redline/ops/registration.h"
#include "redline/ops/run.h"
#include "redline/ops/strict.h"

namespace redline::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

void check_tokens_dtype(const Tensor& tokens) {
  TORCH_CHECK(tokens.scalar_type() == at::kLong || tokens.scalar_type() == at::kInt,
              "embedding: tokens: expected int64 or int32, not ", tokens.scalar_type());
}

void check_floating_type(const char* name, const Tensor& tensor) {
  TORCH_CHECK(at::isFloatingType(tensor.scalar_type()), "embedding: ", name,
              ": expected a floating dtype, not ", tensor.scalar_type());
}

// The row that padding_idx names; -1 for none.
int64_t padding_row(std::optional<int64_t> padding_idx, int64_t vocabulary) {
  if (!padding_idx) return -1;
  TORCH_CHECK(*padding_idx >= -vocabulary && *padding_idx < vocabulary,
              "embedding: padding_idx: expected a row of ", vocabulary, ", not ", *padding_idx);
  return *padding_idx < 0 ? *padding_idx + vocabulary : *padding_idx;
}

Tensor embedding_forward(const Tensor& tokens, const Tensor& weight) {
  check_tokens_dtype(tokens);
  TORCH_CHECK(weight.dim() == 2, "embedding: weight: expected [vocabulary, hidden], not a rank of ",
              weight.dim());
  check_floating_type("weight", weight);
  check_devices("embedding", weight, {{"tokens", tokens}});
  c10::SymDimVector sizes(tokens.sym_sizes().begin(), tokens.sym_sizes().end());
  sizes.push_back(weight.sym_size(1));
  Tensor y = empty_of(sizes, weight.options());
  if (weight.is_meta()) return y;
  const Tensor flat = contiguous("embedding", "tokens", tokens),
               weight_rows = with_rows("embedding", "weight", weight);
  note_bytes(flat.nbytes() + 2 * y.nbytes());  // the rows of the tokens alone
  const EmbeddingForward args{
      .tokens = view_vector(flat), .weight = view_rows(weight_rows), .y = view_rows(y)};
  if (run_on_cuda(weight, args)) return y;
  check_tokens(args.tokens, weight.size(0));
  parallel_ranges(flat.numel(), rows_per_task(weight.size(1)), "tokens",
                  [&](Range range) { run(args, range); });
  return y;
}

int64_t workspace_size(const Tensor& y_grad, int64_t tokens, int64_t vocabulary) {
  if constexpr (with_cuda) {
    if (y_grad.is_cuda()) {
      const c10::OptionalDeviceGuard guard(y_grad.device());
      return cuda::embedding_workspace(tokens, vocabulary, y_grad.size(-1));
    }
  }
  return cpu::embedding_workspace(tokens, vocabulary);
}

void check_backward(const Tensor& y_grad, const Tensor& tokens) {
  check_tokens_dtype(tokens);
  check_floating_type("y_grad", y_grad);
  TORCH_CHECK(y_grad.dim() == tokens.dim() + 1, "embedding: y_grad: expected a rank of ",
              tokens.dim() + 1, ", not ", y_grad.dim());
  check_devices("embedding", y_grad, {{"tokens", tokens}});
}

void check_buffer(const Tensor& buffer, const Tensor& y_grad) {
  const at::ScalarType type = buffer.scalar_type(), wide = accumulation_type(y_grad);
  check_devices("embedding", y_grad, {{"buffer", buffer}});
  TORCH_CHECK(type == y_grad.scalar_type() || type == wide, "embedding: buffer: expected ",
              y_grad.scalar_type(), " or ", wide, ", not ", type);
  TORCH_CHECK(buffer.dim() == 2 && buffer.sym_size(1) == y_grad.sym_size(-1),
              "embedding: buffer: expected [vocabulary, ", y_grad.sym_size(-1), "], not ",
              buffer.sym_sizes());
}

// Bytes [begin, end) that a tensor with elements reaches.
std::pair<const char*, const char*> reach(const Tensor& tensor) {
  int64_t last = 0;
  for (int64_t i = 0; i < tensor.dim(); ++i) last += (tensor.size(i) - 1) * tensor.stride(i);
  const char* begin = static_cast<const char*>(tensor.const_data_ptr());
  return {begin, begin + (last + 1) * tensor.element_size()};
}

// Every element of the buffer is its own, and none is read as y_grad.
void check_overlap(const Tensor& buffer, const Tensor& y_grad) {
  if (buffer.numel() == 0) return;
  const int64_t rows = buffer.size(0), cols = buffer.size(1);
  TORCH_CHECK(buffer.stride(1) == 1 || cols == 1,
              "embedding: buffer: expected adjacent columns, not a stride of ", buffer.stride(1));
  TORCH_CHECK(buffer.stride(0) >= cols || rows == 1,
              "embedding: buffer: expected rows that do not overlap, not a stride of ",
              buffer.stride(0), " for ", cols, " columns");
  if (y_grad.numel() == 0) return;
  const auto [begin, end] = reach(buffer);
  const auto [y_begin, y_end] = reach(y_grad);
  TORCH_CHECK(end <= y_begin || y_end <= begin,
              "embedding: buffer: expected memory of its own, not that of y_grad");
}

// Adds to `weight_grad`, or fills it.
void sum_gradients(const Tensor& y_grad, const Tensor& tokens, const Tensor& weight_grad,
                   std::optional<int64_t> padding_idx, bool accumulate) {
  const Tensor flat = contiguous("embedding", "tokens", tokens),
               y_grad_rows = with_rows("embedding", "y_grad", y_grad);
  const int64_t count = flat.numel(), vocabulary = weight_grad.size(0), hidden = y_grad.size(-1);
  const int64_t written = accumulate ? 2 * std::min(count, vocabulary) : vocabulary;  // rows
  note_bytes(flat.nbytes() + y_grad.nbytes() + written * hidden * weight_grad.element_size());
  const Tensor workspace =
      at::empty({workspace_size(y_grad, count, vocabulary)}, tokens.options().dtype(at::kInt));
  const EmbeddingBackward args{.y_grad = view_rows(y_grad_rows),
                               .tokens = view_vector(flat),
                               .weight_grad = view(weight_grad),
                               .workspace = view(workspace),
                               .padding_index = padding_row(padding_idx, vocabulary),
                               .accumulate = accumulate};
  if (run_on_cuda(y_grad, args)) return;
  sort_tokens(args);
  parallel_ranges(vocabulary, rows_per_task(hidden),
                  "rows of the table, each with its tokens in order,",
                  [&](Range range) { run(args, range); });
}

Tensor backward(const Tensor& y_grad, const Tensor& tokens, c10::SymInt vocabulary,
                std::optional<int64_t> padding_idx) {
  check_backward(y_grad, tokens);
  Tensor weight_grad = empty_of({std::move(vocabulary), y_grad.sym_size(-1)}, y_grad.options());
  if (!y_grad.is_meta()) sum_gradients(y_grad, tokens, weight_grad, padding_idx, false);
  return weight_grad;
}

void backward_into(const Tensor& buffer, const Tensor& y_grad, const Tensor& tokens,
                   std::optional<int64_t> padding_idx) {
  check_backward(y_grad, tokens);
  check_buffer(buffer, y_grad);
  if (!y_grad.is_meta()) {
    check_overlap(buffer, y_grad);
    sum_gradients(y_grad, tokens, buffer, padding_idx, true);
  }
  buffer.unsafeGetTensorImpl()->bump_version();
}

// --- derivative ---------------------------------------------------------------------------------

void check_padding(const Tensor& weight, std::optional<int64_t> padding_idx) {
  const auto vocabulary = weight.dim() == 2 ? weight.sym_size(0).maybe_as_int() : std::nullopt;
  if (vocabulary) padding_row(padding_idx, *vocabulary);
}

// Through the dispatcher, so that tracing sees the inner op.
Tensor call_forward(const Tensor& tokens, const Tensor& weight) {
  const at::AutoDispatchBelowADInplaceOrView below;
  static const auto op = find_op<decltype(embedding_forward)>("redline::embedding_forward");
  return op.call(tokens, weight);
}

struct EmbeddingFunction {
  static Tensor forward(AutogradContext* ctx, const Tensor& weight, const Tensor& tokens,
                        std::optional<int64_t> padding_idx) {
    ctx->save_for_backward({tokens});
    ctx->saved_data["vocabulary"] = weight.sym_size(0);
    ctx->saved_data["padding_idx"] = padding_idx;
    return call_forward(tokens, weight);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const Tensor weight_grad = embedding_backward(
        grads[0], ctx->get_saved_variables()[0], ctx->saved_data["vocabulary"].toSymInt(),
        ctx->saved_data["padding_idx"].toOptional<int64_t>());
    return {weight_grad, Tensor(), Tensor()};
  }
};

Tensor differentiable(const Tensor& tokens, const Tensor& weight,
                      std::optional<int64_t> padding_idx) {
  check_padding(weight, padding_idx);
  // A node that no derivative needs costs 0.7 us, a tenth of a lookup of 256 tokens. A forward-mode
  // derivative needs one, which refuses it.
  const bool has_node =
      (at::GradMode::is_enabled() && weight.requires_grad()) || weight._fw_grad(0).defined();
  if (!has_node) return call_forward(tokens, weight);
  return StrictNode<EmbeddingFunction>::apply(weight, tokens, padding_idx);
}

Tensor without_derivative(const Tensor& tokens, const Tensor& weight,
                          std::optional<int64_t> padding_idx) {
  check_padding(weight, padding_idx);
  return embedding_forward(tokens, weight);
}

void implement_inner(torch::Library& m) {
  m.impl("embedding_forward", embedding_forward);
  m.impl("embedding_backward", backward);
  m.impl("embedding_backward_into", backward_into);
}

}  // namespace

Tensor embedding(const Tensor& tokens, const Tensor& weight, std::optional<int64_t> padding_idx) {
  static const auto op = find_op<decltype(embedding)>("redline::embedding");
  return op.call(tokens, weight, padding_idx);
}

Tensor embedding_backward(const Tensor& y_grad, const Tensor& tokens, c10::SymInt vocabulary,
                          std::optional<int64_t> padding_idx) {
  static const auto op = find_op<decltype(backward)>("redline::embedding_backward");
  return op.call(y_grad, tokens, std::move(vocabulary), padding_idx);
}

void embedding_backward_into(const Tensor& buffer, const Tensor& y_grad, const Tensor& tokens,
                             std::optional<int64_t> padding_idx) {
  static const auto op = find_op<decltype(backward_into)>("redline::embedding_backward_into");
  op.call(buffer, y_grad, tokens, padding_idx);
}

TORCH_LIBRARY_FRAGMENT(redline, m) {
  m.def("embedding(Tensor tokens, Tensor weight, int? padding_idx=None) -> Tensor");
  m.def("embedding_forward(Tensor tokens, Tensor weight) -> Tensor");
  m.def(
      "embedding_backward(Tensor y_grad, Tensor tokens, SymInt vocabulary, int? padding_idx=None) "
      "-> Tensor");
  // An op of its own: inductor (torch 2.11) does not lower an optional tensor that is written to.
  m.def(
      "embedding_backward_into(Tensor(a!) buffer, Tensor y_grad, Tensor tokens, "
      "int? padding_idx=None) -> ()");
}

const Registration registration({
    .public_ops = {"embedding"},
    .inner_ops = {"embedding_forward", "embedding_backward", "embedding_backward_into"},
    .inner = implement_inner,
    .without_derivative = [](torch::Library& m) { m.impl("embedding", without_derivative); },
    .differentiable = [](torch::Library& m) { m.impl("embedding", differentiable); },
});

}  // namespace redline::ops
