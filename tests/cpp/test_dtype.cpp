#include <gtest/gtest.h>

#include "redline/core/dtype.h"
#include "redline/kernels/cuda/capability.h"

namespace redline {
namespace {

static_assert(dtype_of<double> == DType::float64);
static_assert(dtype_of<float> == DType::float32);
static_assert(dtype_of<float16> == DType::float16);
static_assert(dtype_of<bfloat16> == DType::bfloat16);
static_assert(dtype_of<int64_t> == DType::int64);
static_assert(dtype_of<int32_t> == DType::int32);
static_assert(dtype_of<bool> == DType::boolean);

// What a device may be asked for, by what the code there was made from.
static_assert(cuda::usable_capability(80, 80) == 80 && cuda::usable_capability(86, 80) == 86);
static_assert(cuda::usable_capability(90, 90) == 90 && cuda::usable_capability(120, 90) == 120);
static_assert(cuda::usable_capability(90, 80) == 89 && cuda::usable_capability(100, 86) == 89);

static_assert(sizeof(float16) == 2 && sizeof(bfloat16) == 2);
static_assert(element_bytes(DType::float64) == 8 && element_bytes(DType::int64) == 8);
static_assert(element_bytes(DType::float32) == 4 && element_bytes(DType::int32) == 4);
static_assert(element_bytes(DType::float16) == 2 && element_bytes(DType::bfloat16) == 2);
static_assert(element_bytes(DType::float8_e4m3) == 1 && element_bytes(DType::float8_e5m2) == 1);
static_assert(element_bytes(DType::boolean) == 1);

static_assert(accumulation_dtype(DType::float64) == DType::float64);
static_assert(accumulation_dtype(DType::float32) == DType::float32);
static_assert(accumulation_dtype(DType::bfloat16) == DType::float32);

TEST(DType, ArithmeticHappensInTheFourFloatingTypes) {
  for (DType dtype : {DType::float64, DType::float32, DType::float16, DType::bfloat16}) {
    EXPECT_TRUE(is_floating(dtype)) << name(dtype);
  }
  for (DType dtype : {DType::float8_e4m3, DType::int64, DType::int32, DType::boolean}) {
    EXPECT_FALSE(is_floating(dtype)) << name(dtype);
  }
}

TEST(DType, IsNamedAsInTorch) {
  EXPECT_EQ(to_text(DType::bfloat16), "bfloat16");
  EXPECT_EQ(to_text(DType::float8_e4m3), "float8_e4m3");
  EXPECT_EQ(to_text(DType::boolean), "bool");
}

}  // namespace
}  // namespace redline
