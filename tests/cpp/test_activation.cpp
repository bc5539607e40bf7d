// Wiring of the activation kernels: what they write, where they stop, what they refuse.
#include <gtest/gtest.h>

#include "redline/kernels/activation.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

constexpr Activation kinds[] = {Activation::gelu, Activation::gelu_erf, Activation::quick_gelu,
                                Activation::silu, Activation::relu,     Activation::squared_relu};

TEST(Activation, ForwardWritesEveryElement) {
  test::for_shapes([](const Shape& s) {
    for (Activation kind : kinds) {
      const Buffer x = Buffer(s.dtype, {s.rows, s.cols}).filled();
      const Buffer bias = Buffer(s.dtype, {s.cols}).filled();
      const Buffer y(s.dtype, {s.rows, s.cols});
      const ActivationForward args{.kind = kind, .x = x, .bias = bias, .y = y, .quantized = {}};
      check(args);
      const int64_t half = s.rows * s.cols / 2;
      run(args, Range{0, half});
      run(args, Range{half, s.rows * s.cols});
      EXPECT_TRUE(y.is_finite());
    }
  });
}

TEST(Activation, BackwardWritesEveryGradient) {
  test::for_shapes([](const Shape& s) {
    const int64_t chunks = cpu::column_chunks(s.rows, s.cols);
    for (Activation kind : kinds) {
      const Buffer y_grad = Buffer(s.dtype, {s.rows, s.cols}).filled();
      const Buffer x = Buffer(s.dtype, {s.rows, s.cols}).filled();
      const Buffer bias = Buffer(s.dtype, {s.cols}).filled();
      const Buffer x_grad(s.dtype, {s.rows, s.cols}), bias_grad(s.dtype, {s.cols});
      const Buffer partial(accumulation_dtype(s.dtype), {chunks, s.cols});
      const ActivationBackward args{.kind = kind,
                                    .y_grad = y_grad,
                                    .x = x,
                                    .bias = bias,
                                    .x_grad = x_grad,
                                    .bias_grad = {.partial = partial, .total = bias_grad},
                                    .y = {}};
      check(args);
      run(args, Range{0, chunks});
      finish(args, Range{0, s.cols});
      EXPECT_TRUE(x_grad.is_finite());
      EXPECT_TRUE(bias_grad.is_finite());
    }
  });
}

TEST(Activation, ArgumentsThatDoNotFitAreRefused) {
  const Buffer x(DType::float32, {3, 8}), narrow(DType::float32, {3, 7});
  const Buffer integer(DType::int64, {3, 8});
  EXPECT_THROW(activation_from("sine"), Error);
  EXPECT_EQ(activation_from("silu"), Activation::silu);
  EXPECT_THROW(check(ActivationForward{.x = x, .bias = {}, .y = narrow, .quantized = {}}), Error);
  EXPECT_THROW(check(ActivationForward{.x = integer, .bias = {}, .y = integer, .quantized = {}}),
               Error);
}

}  // namespace
}  // namespace redline
