#include <gtest/gtest.h>

#include <string>

#include "redline/core/check.h"
#include "redline/core/dtype.h"

namespace redline {
namespace {

std::string message_of(void (*refuse)()) {
  try {
    refuse();
  } catch (const Error& error) {
    return error.what();
  }
  return "nothing was thrown";
}

TEST(Check, PassesInSilence) { EXPECT_NO_THROW(REDLINE_CHECK(1 + 1 == 2, "never")); }

TEST(Check, JoinsThePiecesAndNamesTheLine) {
  const std::string message = message_of([] {
    REDLINE_CHECK(false, "norm: x: expected ", DType::float32, ", not ", 3, std::string(" rows"));
  });
  EXPECT_EQ(message.find("norm: x: expected float32, not 3 rows (test_check.cpp:"), 0u) << message;
}

TEST(Check, ErrorIsARuntimeError) { EXPECT_THROW(REDLINE_CHECK(false, "no"), std::runtime_error); }

TEST(Check, EvaluatesItsConditionOnce) {
  int calls = 0;
  REDLINE_CHECK(++calls > 0, "never");
  EXPECT_EQ(calls, 1);
}

TEST(Check, IsOneStatement) {
  if (true)
    REDLINE_CHECK(true, "never");
  else
    FAIL();
}

}  // namespace
}  // namespace redline
