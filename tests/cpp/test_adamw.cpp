// Wiring of the optimiser's kernels: AdamW, the norm of gradients and clipping by it.
#include <gtest/gtest.h>

#include "redline/kernels/adamw.h"
#include "redline/kernels/gradient_norm.h"
#include "tests/cpp/buffer.h"

namespace redline {
namespace {

using test::Buffer;

Buffer scalar(float value) {
  Buffer buffer(DType::float32, {1});
  *TensorView(buffer).as<float>() = value;
  return buffer;
}

// A parameter of `count` elements with what belongs to it.
struct Parameter {
  Parameter(DType dtype, int64_t count)
      : parameter(Buffer(dtype, {count}).filled()),
        gradient(Buffer(dtype, {count}).filled()),
        exp_avg(Buffer(DType::float32, {count}).filled()),
        exp_avg_sq(Buffer(DType::float32, {count}).filled()),
        master(Buffer(DType::float32, {count}).filled()),
        step(scalar(0)),
        has_master(element_bytes(dtype) == 2) {
    const TensorView square = exp_avg_sq;
    for (int64_t at = 0; at < count; ++at) square.as<float>()[at] *= square.as<float>()[at];
  }

  AdamWTensor tensor() const {
    const TensorView view = parameter;
    return {.parameter = view.data,
            .gradient = TensorView(gradient).data,
            .exp_avg = TensorView(exp_avg).data,
            .exp_avg_sq = TensorView(exp_avg_sq).data,
            .master = has_master ? TensorView(master).as<float>() : nullptr,
            .step = TensorView(step).as<float>(),
            .count = view.numel(),
            .parameter_dtype = view.dtype,
            .gradient_dtype = view.dtype};
  }

  Buffer parameter, gradient, exp_avg, exp_avg_sq, master, step;
  bool has_master;
};

class AdamW : public testing::Test {
 protected:
  AdamWStep args() const {
    return {.tensors = tensors,
            .tensor_count = 3,
            .learning_rate = learning_rate,
            .clip_coefficient = {},
            .grad_scale = {},
            .found_inf = found_inf,
            .factors = factors};
  }

  void take_step() const {
    check(args());
    begin(args());
    const int64_t chunks = cpu::adamw_chunks(args());
    for (int64_t chunk = 0; chunk < chunks; ++chunk) run(args(), Range{chunk, chunk + 1});
  }

  Parameter wide{DType::float32, 2 * cpu::adamw_chunk + 3}, narrow{DType::bfloat16, 33},
      empty{DType::float32, 0};
  AdamWTensor tensors[3] = {wide.tensor(), narrow.tensor(), empty.tensor()};
  Buffer learning_rate = scalar(0.01f), found_inf = scalar(0);
  Buffer factors = Buffer(DType::float64, {3 * sizeof(AdamWFactors) / sizeof(double)});
};

TEST_F(AdamW, UpdatesEveryParameterAndAdvancesTheStep) {
  const double before = test::read(wide.parameter, 2 * cpu::adamw_chunk + 2);
  take_step();
  EXPECT_EQ(test::read(wide.step, 0), 1);
  EXPECT_NE(test::read(wide.parameter, 2 * cpu::adamw_chunk + 2), before);
  for (const Buffer* buffer : {&wide.parameter, &wide.exp_avg, &wide.exp_avg_sq, &narrow.parameter,
                               &narrow.exp_avg, &narrow.exp_avg_sq, &narrow.master}) {
    EXPECT_TRUE(buffer->is_finite());
  }
}

TEST_F(AdamW, WritesNothingWhereAnInfinityWasFound) {
  const double before = test::read(wide.parameter, 0);
  found_inf = scalar(1);
  take_step();
  EXPECT_EQ(test::read(wide.step, 0), 0);
  EXPECT_EQ(test::read(wide.parameter, 0), before);
}

TEST_F(AdamW, RefusesWhatDoesNotFit) {
  tensors[0].parameter_dtype = DType::int64;
  EXPECT_THROW(check(args()), Error);
  tensors[0] = wide.tensor();
  learning_rate = Buffer(DType::int64, {1});
  EXPECT_THROW(check(args()), Error);
}

TEST(GradientNorm, IsWrittenAndClips) {
  for (DType dtype : {DType::float64, DType::float32, DType::bfloat16, DType::float16}) {
    const Buffer first = Buffer(dtype, {gradient_chunk + 5}).filled();
    const Buffer second = Buffer(dtype, {1}).filled();
    const GradientTensor tensors[] = {
        {.data = TensorView(first).data, .count = gradient_chunk + 5, .dtype = dtype},
        {.data = TensorView(second).data, .count = 1, .dtype = dtype}};
    const GradientList list{.tensors = tensors, .tensor_count = 2};
    const int64_t chunks = gradient_chunks(list);
    EXPECT_EQ(chunks, 3);
    const Buffer partial(DType::float64, {chunks}), norm(DType::float32, {});
    const GradientNorm args{.gradients = list, .partial = partial, .norm = norm};
    check(args);
    run(args, Range{0, chunks});
    finish(args);
    EXPECT_TRUE(norm.is_finite()) << name(dtype);

    const Buffer coefficient(DType::float32, {});
    const ClipCoefficient clip{.norm = norm, .coefficient = coefficient, .max_norm = 1};
    check(clip);
    run(clip);
    EXPECT_LT(test::read(coefficient, 0), 1);
    const ScaleGradients scale{.gradients = list, .coefficient = coefficient};
    check(scale);
    run(scale, Range{0, chunks});
    EXPECT_TRUE(first.is_finite());
    EXPECT_LT(std::abs(test::read(second, 0)), 0.1);
  }
}

}  // namespace
}  // namespace redline
