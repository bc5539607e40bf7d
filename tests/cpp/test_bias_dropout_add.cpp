// Wiring of dropout with bias and residual: what it writes, and that the draw is one element's own.
#include <gtest/gtest.h>

#include <algorithm>

#include "redline/kernels/bias_dropout_add.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

TEST(BiasDropoutAdd, ForwardAndBackwardWriteEveryElement) {
  test::for_shapes([](const Shape& s) {
    const Buffer x = Buffer(s.dtype, {s.rows, s.cols}).filled();
    const Buffer bias = Buffer(s.dtype, {s.cols}).filled();
    const Buffer residual = Buffer(s.dtype, {s.rows, s.cols}).filled();
    const Buffer y(s.dtype, {s.rows, s.cols}), rng_state = Buffer(DType::int64, {2}).filled();
    const BiasDropoutAddForward forward{.x = x,
                                        .bias = bias,
                                        .residual = residual,
                                        .y = y,
                                        .rng_state = rng_state,
                                        .philox = {.seed = 5},
                                        .probability = 0.5};
    check(forward);
    run(forward, Range{0, s.rows * s.cols});
    EXPECT_TRUE(y.is_finite());

    const int64_t chunks = cpu::column_chunks(s.rows, s.cols);
    const Buffer x_grad(s.dtype, {s.rows, s.cols}), bias_grad(s.dtype, {s.cols});
    const Buffer partial(accumulation_dtype(s.dtype), {chunks, s.cols});
    const BiasDropoutAddBackward backward{.y_grad = residual,
                                          .rng_state = rng_state,
                                          .x_grad = x_grad,
                                          .bias_grad = {.partial = partial, .total = bias_grad},
                                          .probability = 0.5};
    check(backward);
    run(backward, Range{0, chunks});
    finish(backward, Range{0, s.cols});
    EXPECT_TRUE(x_grad.is_finite());
    EXPECT_TRUE(bias_grad.is_finite());
  });
}

TEST(BiasDropoutAdd, TheDrawDoesNotDependOnTheRange) {
  const int64_t count = 3 * 33;
  const Buffer x = Buffer(DType::float32, {3, 33}).filled();
  const Buffer whole(DType::float32, {3, 33}), pieces(DType::float32, {3, 33});
  const Buffer rng_state(DType::int64, {2});
  BiasDropoutAddForward args{.x = x,
                             .bias = {},
                             .residual = x,
                             .y = whole,
                             .rng_state = rng_state,
                             .philox = {.seed = 5},
                             .probability = 0.3};
  run(args, Range{0, count});
  args.y = pieces;
  for (int64_t at = 0; at < count; at += 7) run(args, Range{at, std::min(at + 7, count)});
  for (int64_t at = 0; at < count; ++at) {
    EXPECT_EQ(test::read(whole, at), test::read(pieces, at)) << at;
  }
}

TEST(BiasDropoutAdd, ArgumentsThatDoNotFitAreRefused) {
  const Buffer x(DType::float32, {3, 8}), narrow(DType::float32, {3, 7});
  BiasDropoutAddForward args;
  args.x = x;
  args.residual = x;
  args.y = narrow;
  EXPECT_THROW(check(args), Error);
  args.y = x;
  args.probability = 1.5;
  EXPECT_THROW(check(args), Error);
}

TEST(ColumnSums, ChunksOnCudaFitAGridsSecondDimension) {
  for (const int64_t rows : {int64_t{1}, int64_t{40}, int64_t{1} << 23, int64_t{1} << 31}) {
    for (const int64_t cols : {1, 64, 4096, 1 << 20}) {
      for (const int64_t blocks : {2, 3, 4}) {
        const int64_t chunks = cuda::column_chunks(rows, cols, blocks);
        EXPECT_GE(chunks, 1);
        EXPECT_LE(chunks, 65535);
        EXPECT_GE(chunks * ((rows + chunks - 1) / chunks), rows);
      }
    }
  }
}

}  // namespace
}  // namespace redline
