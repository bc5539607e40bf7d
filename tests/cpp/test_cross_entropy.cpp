// Wiring of the cross entropy kernels: what they write, where they stop, what they refuse.
#include <gtest/gtest.h>

#include <cstring>

#include "redline/kernels/cross_entropy.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

struct Tensors {
  explicit Tensors(const Shape& s)
      : cols(s.cols),
        logits(Buffer(s.dtype, {s.rows, s.cols}).filled()),
        targets(Buffer(DType::int64, {s.rows}).filled()),
        statistics(accumulation_dtype(s.dtype), {s.rows, 4}),
        row_loss(accumulation_dtype(s.dtype), {s.rows}),
        log_sum_exp(accumulation_dtype(s.dtype), {s.rows}),
        loss(accumulation_dtype(s.dtype), {1}),
        count(accumulation_dtype(s.dtype), {1}),
        predictions(DType::int64, {s.rows}),
        loss_grad(Buffer(accumulation_dtype(s.dtype), {s.rows}).filled()),
        logits_grad(s.dtype, {s.rows, s.cols}) {}

  CrossEntropyStatistics first() const {
    return {.logits = logits, .targets = targets, .statistics = statistics, .softcap = 30};
  }
  CrossEntropyLoss second() const {
    return {.statistics = statistics,
            .targets = targets,
            .row_loss = row_loss,
            .log_sum_exp = log_sum_exp,
            .loss = loss,
            .count = count,
            .partial = {},
            .vocabulary = cols,
            .label_smoothing = 0.1,
            .z_loss = 1e-4,
            .reduction = Reduction::mean};
  }
  CrossEntropyGradient third() const {
    return {.logits = logits,
            .targets = targets,
            .statistics = statistics,
            .loss_grad = loss_grad,
            .log_sum_exp_grad = {},
            .count = count,
            .logits_grad = logits_grad,
            .vocabulary = cols,
            .label_smoothing = 0.1,
            .z_loss = 1e-4,
            .softcap = 30};
  }

  int64_t cols;
  Buffer logits, targets, statistics, row_loss, log_sum_exp, loss, count, predictions, loss_grad,
      logits_grad;
};

TEST(CrossEntropy, WritesStatisticsLossAndGradient) {
  test::for_shapes([](const Shape& s) {
    if (s.cols < 3) return;  // the targets are 0, 1 and 2
    const Tensors tensors(s);
    check(tensors.first());
    run(tensors.first(), Range{0, s.rows});
    EXPECT_TRUE(tensors.statistics.is_finite());
    check(tensors.second());
    run(tensors.second(), Range{0, s.rows});
    finish(tensors.second());
    EXPECT_TRUE(tensors.row_loss.is_finite());
    EXPECT_TRUE(tensors.log_sum_exp.is_finite());
    EXPECT_EQ(tensors.loss.is_finite(), s.rows > 0);  // the mean of nothing is NaN
    check(tensors.third());
    run(tensors.third(), Range{0, s.rows});
    EXPECT_TRUE(tensors.logits_grad.is_finite());
  });
}

TEST(CrossEntropy, APromiseOverTheLogitsHasTheBitsOfTwoPasses) {
  test::for_shapes([](const Shape& s) {
    if (s.cols < 3) return;
    const Tensors two(s), one(s);
    CrossEntropyGradient gradient = two.third();
    gradient.count = {};
    run(two.first(), Range{0, s.rows});
    run(gradient, Range{0, s.rows});
    const CrossEntropyPromise promise = {.logits = one.logits,
                                         .targets = one.targets,
                                         .loss_scale = one.loss_grad,
                                         .count = {},
                                         .statistics = one.statistics,
                                         .logits_grad = one.logits,
                                         .label_smoothing = 0.1,
                                         .z_loss = 1e-4,
                                         .softcap = 30};
    check(promise);
    run(promise, Range{0, s.rows});
    const TensorView ours = one.logits, theirs = two.logits_grad;
    EXPECT_EQ(std::memcmp(ours.data, theirs.data, ours.bytes()), 0);
    const TensorView found = one.statistics, expected = two.statistics;
    EXPECT_EQ(std::memcmp(found.data, expected.data, found.bytes()), 0);
  });
}

TEST(CrossEntropy, PredictsTheFirstOfTheLargestBesideTheSameStatistics) {
  test::for_shapes([](const Shape& s) {
    if (s.cols < 3) return;
    const Tensors with(s), without(s);
    CrossEntropyStatistics args = with.first();
    args.predictions = with.predictions;
    check(args);
    run(args, Range{0, s.rows});
    run(without.first(), Range{0, s.rows});
    const TensorView ours = with.statistics, theirs = without.statistics, x = with.logits;
    EXPECT_EQ(std::memcmp(ours.data, theirs.data, ours.bytes()), 0);
    for (int64_t row = 0; row < s.rows; ++row) {
      int64_t expected = 0;
      for (int64_t col = 1; col < s.cols; ++col) {
        const int64_t at = row * s.cols;
        if (test::read(x, at + col) > test::read(x, at + expected)) expected = col;
      }
      EXPECT_EQ(args.predictions.as<int64_t>()[row], expected) << to_text(x) << " row " << row;
    }
  });
}

TEST(CrossEntropy, APredictionThatCannotBeIsRefused) {
  const Tensors tensors({DType::float32, 3, 16});
  CrossEntropyStatistics args = tensors.first();
  args.predictions = tensors.row_loss;
  EXPECT_THROW(check(args), Error);
  args.predictions = tensors.predictions;
  EXPECT_NO_THROW(check(args));
  args.vocab_start = 16;  // beside a softcap
  EXPECT_THROW(check(args), Error);
  args.softcap = 0;
  EXPECT_NO_THROW(check(args));
  args.skip_ignored = true;
  EXPECT_THROW(check(args), Error);
}

TEST(CrossEntropy, ATargetThatIsNoClassIsRefused) {
  const Tensors tensors({DType::float32, 3, 16});
  EXPECT_NO_THROW(check_targets("op", tensors.targets, 3, -100));
  EXPECT_THROW(check_targets("op", tensors.targets, 2, -100), Error);
  EXPECT_NO_THROW(check_targets("op", tensors.targets, 2, 2));
}

TEST(CrossEntropy, ArgumentsThatDoNotFitAreRefused) {
  const Tensors tensors({DType::float32, 3, 16});
  CrossEntropyStatistics args = tensors.first();
  args.targets = tensors.row_loss;
  EXPECT_THROW(check(args), Error);
  CrossEntropyGradient gradient = tensors.third();
  gradient.logits_grad = tensors.statistics;
  EXPECT_THROW(check(gradient), Error);
  EXPECT_NO_THROW(check(CrossEntropyCount{tensors.targets, tensors.count}));
  EXPECT_THROW(check(CrossEntropyCount{tensors.targets, tensors.row_loss}), Error);
  EXPECT_NO_THROW(check(CrossEntropyRescale{tensors.logits_grad, tensors.count, tensors.loss}));
  EXPECT_THROW(check(CrossEntropyRescale{tensors.logits_grad, tensors.row_loss, tensors.loss}),
               Error);
}

}  // namespace
}  // namespace redline
