// Wiring of the gated activations: what they write, where they stop, what they refuse.
#include <gtest/gtest.h>

#include "redline/kernels/gated_activation.h"
#include "tests/cpp/buffer.h"
#include "tests/cpp/shapes.h"

namespace redline {
namespace {

using test::Buffer;
using test::Shape;

constexpr GatedActivation kinds[] = {GatedActivation::swiglu, GatedActivation::geglu,
                                     GatedActivation::reglu, GatedActivation::quick_geglu,
                                     GatedActivation::clamped_swiglu};

// Everything of one call, gradients included.
struct Tensors {
  explicit Tensors(const Shape& s)
      : packed(Buffer(s.dtype, {s.rows, 2 * s.cols}).filled()),
        bias(Buffer(s.dtype, {2 * s.cols}).filled()),
        row_scale(Buffer(s.dtype, {s.rows}).filled()),
        y(s.dtype, {s.rows, s.cols}),
        y_grad(Buffer(s.dtype, {s.rows, s.cols}).filled()),
        packed_grad(s.dtype, {s.rows, 2 * s.cols}),
        row_scale_grad(s.dtype, {s.rows}),
        bias_grad(s.dtype, {2 * s.cols}),
        partial(accumulation_dtype(s.dtype), {cpu::column_chunks(s.rows, s.cols), 2 * s.cols}) {}

  GatedActivationForward forward(GatedActivation kind) const {
    return {.activation = {.kind = kind},
            .gate = half(packed, 0),
            .linear = half(packed, 1),
            .bias = bias,
            .row_scale = row_scale,
            .row_count = {},
            .y = y,
            .quantized = {}};
  }

  GatedActivationBackward backward(GatedActivation kind) const {
    return {.activation = {.kind = kind},
            .y_grad = y_grad,
            .gate = half(packed, 0),
            .linear = half(packed, 1),
            .bias = bias,
            .row_scale = row_scale,
            .row_count = {},
            .gate_grad = half(packed_grad, 0),
            .linear_grad = half(packed_grad, 1),
            .row_scale_grad = row_scale_grad,
            .row_parts = {},
            .bias_grad = {.partial = partial, .total = bias_grad},
            .y = {}};
  }

  // The first or second half of the columns: a view with a gap behind each row.
  static TensorView half(const Buffer& buffer, int64_t which) {
    TensorView view = buffer;
    view.sizes[1] /= 2;
    view.data = view.as<char>() + which * view.sizes[1] * element_bytes(view.dtype);
    return view;
  }

  Buffer packed, bias, row_scale, y, y_grad, packed_grad, row_scale_grad, bias_grad, partial;
};

TEST(GatedActivation, ForwardWritesEveryElement) {
  test::for_shapes([](const Shape& s) {
    for (GatedActivation kind : kinds) {
      const Tensors tensors(s);
      const GatedActivationForward args = tensors.forward(kind);
      check(args);
      run(args, Range{0, s.rows});
      EXPECT_TRUE(tensors.y.is_finite());
    }
  });
}

TEST(GatedActivation, BackwardWritesEveryGradient) {
  test::for_shapes([](const Shape& s) {
    for (GatedActivation kind : kinds) {
      const Tensors tensors(s);
      const GatedActivationBackward args = tensors.backward(kind);
      check(args);
      run(args, Range{0, args.bias_grad.partial.sizes[0]});
      finish(args, Range{0, 2 * s.cols});
      EXPECT_TRUE(tensors.packed_grad.is_finite());
      EXPECT_TRUE(tensors.row_scale_grad.is_finite());
      EXPECT_TRUE(tensors.bias_grad.is_finite());
    }
  });
}

TEST(GatedActivation, RowsPastTheCountGetZeros) {
  const Tensors tensors({DType::float32, 3, 8});
  const Buffer count(DType::int64, {});
  *TensorView(count).as<int64_t>() = 1;
  GatedActivationForward args = tensors.forward(GatedActivation::swiglu);
  args.row_count = count;
  check(args);
  run(args, Range{0, 3});
  EXPECT_TRUE(tensors.y.is_finite());
  EXPECT_EQ(test::read(tensors.y, 8), 0);
  EXPECT_EQ(test::read(tensors.y, 23), 0);
}

TEST(GatedActivation, ArgumentsThatDoNotFitAreRefused) {
  const Tensors tensors({DType::float32, 3, 8});
  EXPECT_THROW(gated_activation_from("silu"), Error);
  GatedActivationForward args = tensors.forward(GatedActivation::swiglu);
  args.bias = tensors.row_scale;
  EXPECT_THROW(check(args), Error);
  args = tensors.forward(GatedActivation::swiglu);
  args.linear = tensors.packed;
  EXPECT_THROW(check(args), Error);
}

}  // namespace
}  // namespace redline
