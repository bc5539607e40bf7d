// Wiring of the embedding kernels: what they write, where they stop, what they refuse.
#include <gtest/gtest.h>

#include "redline/kernels/embedding.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

constexpr int64_t vocabulary = 5;

TEST(Embedding, ForwardAndBackwardWriteEveryElement) {
  test::for_shapes([](const Shape& s) {
    const Buffer tokens = Buffer(DType::int64, {s.rows}).filled();
    const Buffer weight = Buffer(s.dtype, {vocabulary, s.cols}).filled();
    const Buffer y(s.dtype, {s.rows, s.cols});
    const EmbeddingForward forward{.tokens = tokens, .weight = weight, .y = y};
    check(forward);
    check_tokens(tokens, vocabulary);
    run(forward, Range{0, s.rows});
    EXPECT_TRUE(y.is_finite());

    const Buffer weight_grad(s.dtype, {vocabulary, s.cols});
    const Buffer workspace(DType::int32, {cpu::embedding_workspace(s.rows, vocabulary)});
    EmbeddingBackward backward{.y_grad = y,
                               .tokens = tokens,
                               .weight_grad = weight_grad,
                               .workspace = workspace,
                               .padding_index = 1};
    check(backward);
    sort_tokens(backward);
    run(backward, Range{0, 2});
    run(backward, Range{2, vocabulary});
    EXPECT_TRUE(weight_grad.is_finite());
    backward.accumulate = true;
    run(backward, Range{0, vocabulary});
    EXPECT_TRUE(weight_grad.is_finite());
  });
}

TEST(Embedding, ATokenOutsideTheVocabularyIsRefused) {
  const Buffer tokens = Buffer(DType::int32, {3}).filled();  // 0, 1, 2
  EXPECT_NO_THROW(check_tokens(tokens, 3));
  EXPECT_THROW(check_tokens(tokens, 2), Error);
  TensorView(tokens).as<int32_t>()[0] = -1;
  EXPECT_THROW(check_tokens(tokens, 3), Error);
}

TEST(Embedding, ArgumentsThatDoNotFitAreRefused) {
  const Buffer tokens(DType::int64, {3}), weight(DType::float32, {5, 8});
  const Buffer narrow(DType::float32, {3, 7}), y(DType::float32, {3, 8});
  EXPECT_THROW(check(EmbeddingForward{.tokens = tokens, .weight = weight, .y = narrow}), Error);
  EXPECT_THROW(check(EmbeddingForward{.tokens = narrow, .weight = weight, .y = y}), Error);
}

}  // namespace
}  // namespace redline
