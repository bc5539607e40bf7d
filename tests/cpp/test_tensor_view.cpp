#include <gtest/gtest.h>

#include <string>

#include "redline/core/tensor_view.h"
#include "tests/cpp/buffer.h"

namespace redline {
namespace {

using test::Buffer;

template <typename Refuse>
std::string message_of(Refuse refuse) {
  try {
    refuse();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(TensorView, CountsInSixtyFourBits) {
  TensorView view;
  view.rank = 2;
  view.dtype = DType::bfloat16;
  view.sizes[0] = int64_t{1} << 20;
  view.sizes[1] = int64_t{1} << 20;
  EXPECT_EQ(view.numel(), int64_t{1} << 40);
  EXPECT_EQ(view.bytes(), int64_t{1} << 41);
}

TEST(TensorView, TellsAnAbsentTensorFromAnEmptyOne) {
  EXPECT_FALSE(TensorView{});
  EXPECT_TRUE(TensorView(Buffer(DType::float32, {0, 4})));
}

TEST(TensorView, ReadsLikeATensorInAMessage) {
  EXPECT_EQ(to_text(Buffer(DType::float16, {2, 3, 4})), "[2, 3, 4] float16");
}

TEST(TensorView, RowsHaveAdjacentColumns) {
  TensorView view = Buffer(DType::float32, {3, 4});
  EXPECT_TRUE(is_rows(view));
  view.strides[0] = 7;  // a gap behind each row
  EXPECT_TRUE(is_rows(view));
  view.strides[1] = 2;
  EXPECT_FALSE(is_rows(view));
  view.sizes[1] = 1;  // one column is next to itself
  EXPECT_TRUE(is_rows(view));
}

TEST(TensorView, CheckRowsNamesOpTensorExpectedAndGiven) {
  const Buffer x(DType::float32, {3, 4});
  EXPECT_NO_THROW(check_rows("norm", "x", x, 3, 4));
  const std::string message = message_of([&] { check_rows("norm", "x", x, 3, 5); });
  EXPECT_EQ(message.find("norm: x: expected [3, 5], not [3, 4] float32"), 0u) << message;
  TensorView transposed = x;
  transposed.strides[1] = 4;
  EXPECT_NE(message_of([&] { check_rows("norm", "x", transposed, 3, 4); }).find("stride of 4"),
            std::string::npos);
}

TEST(TensorView, CheckVectorNamesOpTensorExpectedAndGiven) {
  const Buffer weight(DType::float32, {4});
  EXPECT_NO_THROW(check_vector("norm", "weight", weight, 4));
  const std::string message = message_of([&] { check_vector("norm", "weight", weight, 5); });
  EXPECT_EQ(message.find("norm: weight: expected [5], not [4] float32"), 0u) << message;
  EXPECT_NE(message_of([&] { check_vector("norm", "weight", {}, 4); }), "nothing was thrown");
}

}  // namespace
}  // namespace redline
