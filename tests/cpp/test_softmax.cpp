// Wiring of the softmax kernels: what they write, which keys they leave, what they refuse.
#include <gtest/gtest.h>

#include "redline/kernels/softmax.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

constexpr int64_t heads = 2;

TEST(Softmax, ForwardAndBackwardWriteEveryElement) {
  test::for_shapes([](const Shape& s) {
    const int64_t rows = heads * s.rows;
    const DType wide = accumulation_dtype(s.dtype);
    const SoftmaxRows shape{.heads = heads, .queries = s.rows, .scale = 0.5};
    const Buffer scores = Buffer(s.dtype, {rows, s.cols}).filled();
    const Buffer mask = Buffer(DType::boolean, {1, heads, s.rows, s.cols}).filled();
    const Buffer sink = Buffer(wide, {heads}).filled();
    const Buffer probabilities(s.dtype, {rows, s.cols}), sink_probability(wide, {rows});
    const SoftmaxForward forward{.shape = shape,
                                 .scores = scores,
                                 .mask = mask,
                                 .sink = sink,
                                 .probabilities = probabilities,
                                 .sink_probability = sink_probability,
                                 .window = 7,
                                 .causal = true};
    check(forward);
    run(forward, Range{0, rows});
    EXPECT_TRUE(probabilities.is_finite());
    EXPECT_TRUE(sink_probability.is_finite());

    const Buffer scores_grad(s.dtype, {rows, s.cols});
    const Buffer sink_rows(wide, {rows}), sink_grad(wide, {heads});
    const SoftmaxBackward backward{.shape = shape,
                                   .probabilities_grad = scores,
                                   .probabilities = probabilities,
                                   .sink_probability = sink_probability,
                                   .scores_grad = scores_grad,
                                   .sink_rows = sink_rows,
                                   .sink_grad = sink_grad};
    check(backward);
    run(backward, Range{0, rows});
    finish(backward, Range{0, heads});
    EXPECT_TRUE(scores_grad.is_finite());
    EXPECT_TRUE(sink_grad.is_finite());
  });
}

TEST(Softmax, CausalAndWindowLeaveTheLastKeys) {
  const auto keys = [](int64_t query, int64_t queries, int64_t count, int64_t window) {
    const Range range = allowed_keys(query, queries, count, true, window);
    return std::pair(range.begin, range.end);
  };
  EXPECT_EQ(keys(0, 4, 4, 0), std::pair(int64_t{0}, int64_t{1}));
  EXPECT_EQ(keys(3, 4, 4, 0), std::pair(int64_t{0}, int64_t{4}));
  EXPECT_EQ(keys(3, 4, 4, 2), std::pair(int64_t{2}, int64_t{4}));
  EXPECT_EQ(keys(0, 2, 5, 0), std::pair(int64_t{0}, int64_t{4}));  // aligned at the bottom right
  EXPECT_EQ(keys(0, 4, 2, 0), std::pair(int64_t{0}, int64_t{0}));  // a row without keys
}

TEST(Softmax, ArgumentsThatDoNotFitAreRefused) {
  const Buffer scores(DType::float32, {4, 8}), narrow(DType::float32, {4, 7});
  SoftmaxForward args;
  args.shape = {.heads = 1, .queries = 4};
  args.scores = scores;
  args.probabilities = narrow;
  EXPECT_THROW(check(args), Error);
}

}  // namespace
}  // namespace redline
