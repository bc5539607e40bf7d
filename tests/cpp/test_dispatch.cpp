#include <gtest/gtest.h>

#include <string>

#include "redline/core/dispatch.h"

namespace redline {
namespace {

std::string message_of_dtype(DType dtype) {
  try {
    visit_dtype<float, bfloat16>("norm", dtype, []<typename T>() {});
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Dispatch, VisitsTheTypeThatTheDtypeNames) {
  int calls = 0;
  DType seen = DType::boolean;
  visit_dtype<double, float, bfloat16>("norm", DType::bfloat16, [&]<typename T>() {
    ++calls;
    seen = dtype_of<T>;
  });
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(seen, DType::bfloat16);
}

TEST(Dispatch, RefusesADtypeThatIsNotCompiled) {
  EXPECT_EQ(message_of_dtype(DType::float32), "nothing was thrown");
  EXPECT_EQ(message_of_dtype(DType::int64).find("norm: no kernel for int64"), 0u);
}

TEST(Dispatch, VisitsACompiledValueAndListsThemOtherwise) {
  int seen = 0;
  visit_value<64, 128>("attention: head_dim", 128, [&]<int Value>() { seen = Value; });
  EXPECT_EQ(seen, 128);
  try {
    visit_value<64, 128>("attention: head_dim", 96, []<int Value>() {});
    FAIL() << "nothing was thrown";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(message.find("attention: head_dim: no kernel for 96; built: 64 128"), 0u) << message;
  }
}

TEST(Dispatch, VisitsABool) {
  for (bool value : {false, true}) {
    bool seen = !value;
    visit_bool(value, [&]<bool Value>() { seen = Value; });
    EXPECT_EQ(seen, value);
  }
}

}  // namespace
}  // namespace redline
