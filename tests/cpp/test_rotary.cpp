// Wiring of the rotary kernel: what it writes, where positions come from, what it refuses.
#include <gtest/gtest.h>

#include "redline/kernels/rotary.h"
#include "tests/cpp/buffer.h"

namespace redline {
namespace {

using test::Buffer;

constexpr DType dtypes[] = {DType::float64, DType::float32, DType::bfloat16, DType::float16};

// A batch of 2, 5 tokens, one group of 3 heads of which 2 turn, and tables of 9 positions.
struct Tensors {
  Tensors(DType dtype, int64_t head_dim, int64_t rotary_dim)
      : x(Buffer(dtype, {2, 5, 3, head_dim}).filled()),
        cos(Buffer(DType::float32, {9, rotary_dim / 2}).filled()),
        sin(Buffer(DType::float32, {9, rotary_dim / 2}).filled()),
        y(dtype, {2, 5, 3, head_dim}) {}

  Rotary args() const {
    return {.x = x,
            .cos = cos,
            .sin = sin,
            .positions = {},
            .cu_seqlens = {},
            .y = y,
            .group_heads = 3,
            .rotated_heads = 2};
  }

  Buffer x, cos, sin, y;
};

TEST(Rotary, WritesEveryElementBothWays) {
  for (DType dtype : dtypes) {
    for (int64_t head_dim : {2, 7, 16, 66}) {
      for (bool interleaved : {false, true}) {
        const Tensors tensors(dtype, head_dim, head_dim / 4 * 2);
        Rotary args = tensors.args();
        args.interleaved = interleaved;
        args.backward = !interleaved;
        check(args);
        check_positions(args);
        run(args, Range{0, 3});
        run(args, Range{3, 10});
        EXPECT_TRUE(tensors.y.is_finite()) << name(dtype) << " head_dim " << head_dim;
      }
    }
  }
}

TEST(Rotary, TakesPositionsAndRefusesOneOutsideTheTables) {
  const Tensors tensors(DType::float32, 8, 8);
  const Buffer positions = Buffer(DType::int64, {2, 5}).filled();
  Rotary args = tensors.args();
  args.positions = positions;
  check(args);
  EXPECT_NO_THROW(check_positions(args));
  run(args, Range{0, 10});
  EXPECT_TRUE(tensors.y.is_finite());
  TensorView(positions).as<int64_t>()[4] = 9;
  EXPECT_THROW(check_positions(args), Error);
  TensorView(positions).as<int64_t>()[4] = -1;
  EXPECT_THROW(check_positions(args), Error);
}

TEST(Rotary, TurnsASecondTensorsHeadsToo) {
  for (bool backward : {false, true}) {
    const Tensors tensors(DType::bfloat16, 16, 8), second(DType::bfloat16, 16, 8);
    Rotary args = tensors.args();
    args.group_heads = args.rotated_heads = 1;
    args.backward = backward;
    args.second_x = second.x;
    args.second_y = second.y;
    check(args);
    run(args, Range{0, 10});
    EXPECT_TRUE(tensors.y.is_finite());
    EXPECT_TRUE(second.y.is_finite());
    args.second_y = tensors.cos;
    EXPECT_THROW(check(args), Error);
    args.second_y = second.y;
    args.group_heads = 3;
    EXPECT_THROW(check(args), Error);
  }
}

TEST(Rotary, ArgumentsThatDoNotFitAreRefused) {
  const Tensors tensors(DType::float32, 8, 8), wide(DType::float32, 16, 16);
  Rotary args = tensors.args();
  args.cos = wide.cos;
  args.sin = wide.sin;
  EXPECT_THROW(check(args), Error);
  args = tensors.args();
  args.y = wide.y;
  EXPECT_THROW(check(args), Error);
  args = tensors.args();
  args.group_heads = 2;
  EXPECT_THROW(check(args), Error);
}

}  // namespace
}  // namespace redline
