// Wiring of the norm kernels: what they write, where they stop, what they refuse.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <tuple>

#include "redline/kernels/column_sums.h"
#include "redline/kernels/norm.h"
#include "tests/cpp/buffer.h"

namespace redline {
namespace {

using test::Buffer;

struct Case {
  DType dtype;
  Norm norm;
  int64_t rows, cols;
};

struct NormTensors {
  explicit NormTensors(const Case& c)
      : norm(c.norm),
        x(Buffer(c.dtype, {c.rows, c.cols}).filled()),
        residual(Buffer(c.dtype, {c.rows, c.cols}).filled()),
        weight(Buffer(c.dtype, {c.cols}).filled()),
        bias(Buffer(c.dtype, {c.cols}).filled()),
        y(c.dtype, {c.rows, c.cols}),
        sum(c.dtype, {c.rows, c.cols}),
        mean(accumulation_dtype(c.dtype), {c.rows}),
        inverse_std(accumulation_dtype(c.dtype), {c.rows}) {}

  NormForward forward() const {
    NormForward args;
    args.norm = norm;
    args.x = x;
    args.weight = weight;
    args.y = y;
    args.inverse_std = inverse_std;
    if (norm == Norm::layer) {
      args.bias = bias;
      args.mean = mean;
    }
    return args;
  }

  Norm norm;
  Buffer x, residual, weight, bias, y, sum, mean, inverse_std;
};

struct NormGradients {
  explicit NormGradients(const Case& c)
      : y_grad(Buffer(c.dtype, {c.rows, c.cols}).filled()),
        x_grad(c.dtype, {c.rows, c.cols}),
        weight_grad(c.dtype, {c.cols}),
        bias_grad(c.dtype, {c.cols}),
        weight_partial(accumulation_dtype(c.dtype), {cpu::column_chunks(c.rows, c.cols), c.cols}),
        bias_partial(accumulation_dtype(c.dtype), {cpu::column_chunks(c.rows, c.cols), c.cols}) {}

  NormBackward backward(const NormTensors& tensors) const {
    NormBackward args;
    args.norm = tensors.norm;
    args.y_grad = y_grad;
    args.x = tensors.x;
    args.weight = tensors.weight;
    args.inverse_std = tensors.inverse_std;
    args.x_grad = x_grad;
    args.weight_partial = weight_partial;
    args.weight_grad = weight_grad;
    if (tensors.norm == Norm::layer) {
      args.mean = tensors.mean;
      args.bias_partial = bias_partial;
      args.bias_grad = bias_grad;
    }
    return args;
  }

  Buffer y_grad, x_grad, weight_grad, bias_grad, weight_partial, bias_partial;
};

class NormKernel : public testing::TestWithParam<std::tuple<DType, Norm>> {
 protected:
  // Runs test(Case) over odd, tiny, empty and unaligned shapes.
  template <typename Test>
  void for_shapes(Test test) {
    const auto [dtype, norm] = GetParam();
    for (int64_t rows : {0, 1, 3, 130}) {
      for (int64_t cols : {1, 7, 16, 33, 1025}) {
        SCOPED_TRACE("rows " + std::to_string(rows) + ", cols " + std::to_string(cols));
        test(Case{dtype, norm, rows, cols});
      }
    }
  }
};

TEST_P(NormKernel, ForwardWritesEveryOutput) {
  for_shapes([](const Case& c) {
    const NormTensors tensors(c);
    const NormForward args = tensors.forward();
    check(args);
    run(args, Range{0, c.rows});
    EXPECT_TRUE(tensors.y.is_finite());
    EXPECT_TRUE(tensors.inverse_std.is_finite());
    EXPECT_TRUE(c.norm == Norm::rms || tensors.mean.is_finite());
  });
}

TEST_P(NormKernel, ForwardWithAResidualWritesTheSum) {
  for_shapes([](const Case& c) {
    const NormTensors tensors(c);
    NormForward args = tensors.forward();
    args.residual = tensors.residual;
    args.sum = tensors.sum;
    check(args);
    run(args, Range{0, c.rows});
    EXPECT_TRUE(tensors.y.is_finite());
    EXPECT_TRUE(tensors.sum.is_finite());
  });
}

TEST_P(NormKernel, ARangeLeavesOtherRowsAlone) {
  for_shapes([](const Case& c) {
    if (c.rows < 2) return;
    const NormTensors tensors(c);
    run(tensors.forward(), Range{0, 1});
    EXPECT_TRUE(std::isfinite(test::read(tensors.y, c.cols - 1)));
    EXPECT_TRUE(std::isnan(test::read(tensors.y, c.cols)));
  });
}

TEST_P(NormKernel, BackwardWritesEveryGradient) {
  for_shapes([](const Case& c) {
    const NormTensors tensors(c);
    run(tensors.forward(), Range{0, c.rows});
    const NormGradients gradients(c);
    const NormBackward args = gradients.backward(tensors);
    check(args);
    run(args, Range{0, args.weight_partial.sizes[0]});
    finish(args, Range{0, c.cols});
    EXPECT_TRUE(gradients.x_grad.is_finite());
    EXPECT_TRUE(gradients.weight_grad.is_finite());
    EXPECT_TRUE(c.norm == Norm::rms || gradients.bias_grad.is_finite());
  });
}

TEST_P(NormKernel, BehindDropoutWritesEveryOutputAndGradient) {
  for_shapes([](const Case& c) {
    const NormTensors tensors(c);
    const Buffer rng_state = Buffer(DType::int64, {2}).filled();
    NormForward forward = tensors.forward();
    forward.residual = tensors.residual;
    forward.sum = tensors.sum;
    forward.input_bias = tensors.bias;
    forward.rng_state = rng_state;
    forward.philox = {.seed = 5, .offset = 8};
    forward.probability = 0.5;
    check(forward);
    run(forward, Range{0, c.rows});
    EXPECT_TRUE(tensors.y.is_finite());
    EXPECT_TRUE(tensors.sum.is_finite());
    EXPECT_EQ(forward.rng_state.as<int64_t>()[0], 5);
    EXPECT_EQ(forward.rng_state.as<int64_t>()[1], 8);

    const NormGradients gradients(c);
    const Buffer input_grad(c.dtype, {c.rows, c.cols}), input_bias_grad(c.dtype, {c.cols});
    const int64_t chunks = cpu::column_chunks(c.rows, c.cols);
    const Buffer partial(accumulation_dtype(c.dtype), {chunks, c.cols});
    NormBackward backward = gradients.backward(tensors);
    backward.x = tensors.sum;
    backward.rng_state = rng_state;
    backward.input_grad = input_grad;
    backward.input_bias_grad = {.partial = partial, .total = input_bias_grad};
    backward.probability = 0.5;
    check(backward);
    run(backward, Range{0, chunks});
    finish(backward, Range{0, c.cols});
    EXPECT_TRUE(gradients.x_grad.is_finite());
    EXPECT_TRUE(input_grad.is_finite());
    EXPECT_TRUE(input_bias_grad.is_finite());
  });
}

TEST_P(NormKernel, FindsTheLargestMagnitudeOfEachRow) {
  for_shapes([](const Case& c) {
    const NormTensors tensors(c);
    const Buffer amax(accumulation_dtype(c.dtype), {c.rows});
    NormForward args = tensors.forward();
    args.quantized.amax = amax;
    check(args);
    run(args, Range{0, c.rows});
    for (int64_t row = 0; row < c.rows; ++row) {
      double largest = 0;
      for (int64_t col = 0; col < c.cols; ++col) {
        largest = std::max(largest, std::abs(test::read(tensors.y, row * c.cols + col)));
      }
      EXPECT_EQ(test::read(amax, row), largest) << "row " << row;
    }
  });
}

std::string case_name(const testing::TestParamInfo<std::tuple<DType, Norm>>& info) {
  const auto [dtype, norm] = info.param;
  return std::string(norm == Norm::rms ? "rms_" : "layer_") + name(dtype);
}

INSTANTIATE_TEST_SUITE_P(Of, NormKernel,
                         testing::Combine(testing::Values(DType::float64, DType::float32,
                                                          DType::bfloat16, DType::float16),
                                          testing::Values(Norm::rms, Norm::layer)),
                         case_name);

TEST(NormArguments, ThatDoNotFitAreRefused) {
  const NormTensors tensors({DType::float32, Norm::rms, 3, 8});
  const NormTensors layer({DType::float32, Norm::layer, 3, 8});
  const Buffer narrow(DType::float32, {3, 7}), integer(DType::int64, {8});
  NormForward args = tensors.forward();
  args.y = narrow;
  EXPECT_THROW(check(args), Error);
  args = tensors.forward();
  args.weight = integer;
  EXPECT_THROW(check(args), Error);
  args = tensors.forward();
  args.quantized.amax = tensors.y;  // not of rows
  EXPECT_THROW(check(args), Error);
  args.quantized.amax = tensors.mean;
  check(args);
  args.statistics_given = true;
  EXPECT_THROW(check(args), Error);
  args = tensors.forward();
  args.quantized.scale = tensors.mean;
  EXPECT_THROW(check(args), Error);
  args = layer.forward();
  args.mean = {};
  EXPECT_THROW(check(args), Error);
}

TEST(NormArguments, OfDropoutThatDoNotFitAreRefused) {
  const NormTensors tensors({DType::float32, Norm::rms, 3, 8});
  const Buffer rng_state(DType::int64, {2}), row_count(DType::int64, {1});
  NormForward forward = tensors.forward();
  forward.rng_state = rng_state;
  EXPECT_THROW(check(forward), Error);  // without a residual
  forward.residual = tensors.residual;
  forward.sum = tensors.sum;
  check(forward);
  forward.row_count = row_count;
  EXPECT_THROW(check(forward), Error);
  const NormGradients gradients({DType::float32, Norm::rms, 3, 8});
  NormBackward backward = gradients.backward(tensors);
  check(backward);
  backward.rng_state = rng_state;
  EXPECT_THROW(check(backward), Error);  // without an input_grad
  backward.input_grad = tensors.sum;
  check(backward);
  backward.row_count = row_count;
  EXPECT_THROW(check(backward), Error);
}

}  // namespace
}  // namespace redline
