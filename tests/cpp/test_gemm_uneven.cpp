// What becomes of a product whose sizes are no whole vectors, without the library that runs it.
#include <gtest/gtest.h>

#include "redline/ops/gemm_uneven.h"

namespace redline::ops {
namespace {

using at::Tensor;

// [rows, cols] in rows of whole vectors.
Tensor padded(int64_t rows, int64_t cols) {
  return torch::randn({rows, (cols + 63) / 64 * 64}).to(at::kBFloat16).narrow(1, 0, cols);
}

void run(const GemmOperands& o) {
  const auto wide = [](const Tensor& tensor) { return tensor.to(at::kDouble); };
  Tensor product = wide(o.a).matmul(wide(o.b));
  if (o.bias.defined()) product += wide(o.bias);
  if (o.accumulate) product += wide(o.out);
  Tensor out = o.out;
  out.copy_(product);
}

// How many it becomes in the end.
int products(const GemmOperands& o) {
  const auto split = split_uneven(o);
  return split ? products(split->first) + products(split->second) : 1;
}

int products_of(int64_t m, int64_t n, int64_t k, bool transposed) {
  return products({.a = transposed ? padded(k, m).t() : padded(m, k),
                   .b = transposed ? padded(n, k).t() : padded(k, n),
                   .out = padded(m, n)});
}

TEST(GemmUneven, EachSizeAlongWhichNeighboursLie) {
  EXPECT_EQ(products_of(512, 513, 520, false), 2);  // n: b and out are row-major
  EXPECT_EQ(products_of(513, 512, 520, false), 1);  // m: no neighbours lie along it
  EXPECT_EQ(products_of(513, 512, 520, true), 2);   // a is column-major
  EXPECT_EQ(products_of(520, 512, 513, false), 2);  // k
  EXPECT_EQ(products_of(520, 513, 521, false), 3);  // n, then k of the larger part
  EXPECT_EQ(products_of(520, 512, 512, false), 1);
}

TEST(GemmUneven, NotWhereItGainsNothing) {
  EXPECT_EQ(products_of(64, 65, 64, false), 1);  // small
  GemmOperands o = {.a = padded(512, 520), .b = padded(520, 513), .out = padded(512, 513)};
  o.epilogue = GemmEpilogue::gelu;
  EXPECT_FALSE(split_uneven(o));
  o.epilogue = GemmEpilogue::none;
  o.out = torch::zeros({512, 513}, at::kBFloat16);  // unaligned rows
  EXPECT_FALSE(split_uneven(o));
}

TEST(GemmUneven, PartsGiveTheProduct) {
  const Tensor bias = torch::randn({513}).to(at::kBFloat16);
  const Tensor a = padded(512, 520), b = padded(520, 513), out = padded(512, 513);
  const auto split = split_uneven({.a = a, .b = b, .out = out, .bias = bias});
  ASSERT_TRUE(split && !split->sum.defined());
  run(split->first);
  run(split->second);
  Tensor whole = torch::empty_like(out);
  run({.a = a, .b = b, .out = whole, .bias = bias});
  EXPECT_TRUE(torch::equal(out, whole));
}

// Rounded once: both parts go into float32, which is then added to out.
TEST(GemmUneven, ASumOverKIsRoundedOnce) {
  const Tensor a = padded(520, 513), b = padded(513, 512), out = padded(520, 512);
  const auto split = split_uneven({.a = a, .b = b, .out = out, .accumulate = true});
  ASSERT_TRUE(split && split->sum.scalar_type() == at::kFloat);
  EXPECT_FALSE(split->first.accumulate);
  EXPECT_TRUE(split->second.accumulate);
  run(split->first);
  run(split->second);
  const Tensor whole = a.to(at::kDouble).matmul(b.to(at::kDouble));
  EXPECT_TRUE(torch::allclose(split->sum.to(at::kDouble), whole, 1e-5, 1e-4));
}

}  // namespace
}  // namespace redline::ops
