#include "redline/kernels/embedding.h"

#include <algorithm>
#include <utility>

#include "redline/kernels/cpu/embedding.h"
#include "redline/kernels/cpu/isa.h"
#include "redline/kernels/operands.h"

namespace redline {
namespace {

constexpr const char* op = "embedding";
constexpr int64_t int32_limit = int64_t{1} << 31;

void check_token_dtype(const TensorView& tokens) {
  REDLINE_CHECK(tokens.dtype == DType::int64 || tokens.dtype == DType::int32,
                "embedding: tokens: expected int64 or int32, not ", tokens.dtype);
}

int64_t token_at(const TensorView& tokens, int64_t i) {
  return tokens.dtype == DType::int64 ? tokens.as<const int64_t>()[i]
                                      : tokens.as<const int32_t>()[i];
}

// Without a branch per token: a negative one is a large unsigned number.
template <typename Token>
bool all_inside(const Token* tokens, int64_t count, int64_t vocabulary) {
  bool outside = false;
  for (int64_t i = 0; i < count; ++i) {
    outside |= static_cast<uint64_t>(int64_t{tokens[i]}) >= static_cast<uint64_t>(vocabulary);
  }
  return !outside;
}

const cpu::EmbeddingKernels& kernels() {
  return cpu::choose(cpu::baseline::embedding_kernels, cpu::avx2::embedding_kernels,
                     cpu::avx512::embedding_kernels);
}

}  // namespace

void check(const EmbeddingForward& args) {
  check_floating(op, "weight", args.weight);
  check_token_dtype(args.tokens);
  check_vector(op, "tokens", args.tokens, args.tokens.sizes[0]);
  check_rows(op, "weight", args.weight, args.weight.sizes[0], args.weight.sizes[1]);
  check_rows(op, "y", args.y, args.tokens.sizes[0], args.weight.sizes[1]);
  check_matrix(op, "y", args.y, args.y, args.weight.dtype);
}

void check(const EmbeddingBackward& args) {
  check_floating(op, "weight_grad", args.weight_grad);
  check_floating(op, "y_grad", args.y_grad);
  check_token_dtype(args.tokens);
  const int64_t count = args.tokens.sizes[0], vocabulary = args.weight_grad.sizes[0],
                hidden = args.weight_grad.sizes[1];
  check_vector(op, "tokens", args.tokens, count);
  check_rows(op, "y_grad", args.y_grad, count, hidden);
  check_rows(op, "weight_grad", args.weight_grad, vocabulary, hidden);
  check_mixed(op, "weight_grad", args.weight_grad, args.y_grad.dtype);
  REDLINE_CHECK(count < int32_limit && vocabulary < int32_limit,
                "embedding: tokens: expected fewer than 2^31 tokens and rows, not ", count, " and ",
                vocabulary);
  REDLINE_CHECK(args.padding_index >= -1 && args.padding_index < std::max<int64_t>(vocabulary, 1),
                "embedding: padding_index: expected a row of ", vocabulary, ", not ",
                args.padding_index);
  REDLINE_CHECK(args.workspace.present && args.workspace.dtype == DType::int32,
                "embedding: workspace: expected int32, not ", args.workspace);
}

void check_tokens(const TensorView& tokens, int64_t vocabulary) {
  const int64_t count = tokens.sizes[0];
  const bool inside = tokens.dtype == DType::int64
                          ? all_inside(tokens.as<const int64_t>(), count, vocabulary)
                          : all_inside(tokens.as<const int32_t>(), count, vocabulary);
  for (int64_t i = 0; !inside && i < count; ++i) {
    const int64_t token = token_at(tokens, i);
    REDLINE_CHECK(token >= 0 && token < vocabulary, "embedding: tokens: expected 0 to ",
                  vocabulary - 1, ", not ", token);
  }
}

void run(const EmbeddingForward& args, Range tokens) { kernels().forward(args, tokens); }
void run(const EmbeddingBackward& args, Range rows) { kernels().backward(args, rows); }

// Counting sort: the tokens of row v are order[ends[v - 1]] to order[ends[v] - 1], in the order in
// which they occur.
void sort_tokens(const EmbeddingBackward& args) {
  const int64_t count = args.tokens.sizes[0], vocabulary = args.weight_grad.sizes[0];
  check_tokens(args.tokens, vocabulary);
  int32_t* ends = args.workspace.as<int32_t>();
  int32_t* order = ends + vocabulary;
  std::fill_n(ends, vocabulary, 0);
  for (int64_t i = 0; i < count; ++i) ++ends[token_at(args.tokens, i)];
  int32_t begin = 0;
  for (int64_t v = 0; v < vocabulary; ++v) begin += std::exchange(ends[v], begin);
  for (int64_t i = 0; i < count; ++i) {
    order[ends[token_at(args.tokens, i)]++] = static_cast<int32_t>(i);
  }
}

int64_t cpu::embedding_workspace(int64_t tokens, int64_t vocabulary) { return tokens + vocabulary; }

}  // namespace redline
