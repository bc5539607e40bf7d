// gemm without a GPU: what the library is asked for, done by hand; the plans' cache; the refusals.
#include <gtest/gtest.h>

#include <string>
#include <thread>
#include <vector>

#include "redline/kernels/cuda/gemm_problem.h"
#include "redline/kernels/cuda/plan_cache.h"
#include "tests/cpp/buffer.h"

namespace redline {
namespace {

using cuda::GemmProblem;
using test::Buffer;

TensorView turned(TensorView view) {
  std::swap(view.sizes[view.rank - 2], view.sizes[view.rank - 1]);
  std::swap(view.strides[view.rank - 2], view.strides[view.rank - 1]);
  return view;
}

// The last `cols` columns of each row.
TensorView last_columns(TensorView view, int64_t cols) {
  const int last = view.rank - 1;
  view.data = view.as<float>() + view.sizes[last] - cols;
  view.sizes[last] = cols;
  return view;
}

float at(const TensorView& view, int64_t batch, int64_t row, int64_t col) {
  const int rows = view.rank - 2;
  const int64_t first = view.rank == 3 ? batch * view.strides[0] : 0;
  return view.as<float>()[first + row * view.strides[rows] + col * view.strides[rows + 1]];
}

// D = op(A) op(B) as column-major memory says it.
void multiply(const GemmProblem& p, const float* a, const float* b, float* d) {
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    for (int64_t i = 0; i < p.m; ++i) {
      for (int64_t j = 0; j < p.n; ++j) {
        float sum = 0;
        for (int64_t l = 0; l < p.k; ++l) {
          sum += a[batch * p.stride_a + (p.transpose_a ? l + i * p.lda : i + l * p.lda)] *
                 b[batch * p.stride_b + (p.transpose_b ? j + l * p.ldb : l + j * p.ldb)];
        }
        d[batch * p.stride_d + i + j * p.ldd] = sum;
      }
    }
  }
}

void expect_product(const Gemm& args) {
  check(args);
  const auto problem = cuda::problem_of(args, {});
  ASSERT_TRUE(problem);
  const TensorView &left = problem->swapped ? args.b : args.a,
                   &right = problem->swapped ? args.a : args.b;
  multiply(*problem, left.as<float>(), right.as<float>(), args.out.as<float>());
  const int last = args.out.rank - 1;
  for (int64_t batch = 0; batch < problem->batch; ++batch) {
    for (int64_t i = 0; i < args.out.sizes[last - 1]; ++i) {
      for (int64_t j = 0; j < args.out.sizes[last]; ++j) {
        float sum = 0;
        for (int64_t l = 0; l < args.a.sizes[last]; ++l) {
          sum += at(args.a, batch, i, l) * at(args.b, batch, l, j);
        }
        ASSERT_EQ(at(args.out, batch, i, j), sum) << to_text(args.a) << to_text(args.b);
      }
    }
  }
}

constexpr DType f32 = DType::float32, bf16 = DType::bfloat16;

TEST(Gemm, TheLibrarysProblemIsTheProduct) {
  for (const auto& [m, n, k] : std::vector<std::array<int64_t, 3>>{
           {3, 5, 7}, {1, 5, 7}, {3, 1, 7}, {3, 5, 1}, {1, 1, 1}, {8, 8, 8}}) {
    const Buffer a = Buffer(f32, {m, k}).filled(), b = Buffer(f32, {k, n}).filled();
    const Buffer a_turned = Buffer(f32, {k, m}).filled(), b_turned = Buffer(f32, {n, k}).filled();
    const Buffer a_wide = Buffer(f32, {m, k + 3}).filled(),
                 b_wide = Buffer(f32, {k, n + 2}).filled();
    const Buffer out(f32, {m, n}), out_turned(f32, {n, m}), out_wide(f32, {m, n + 1});
    for (const TensorView& left : {TensorView(a), turned(a_turned), last_columns(a_wide, k)}) {
      for (const TensorView& right : {TensorView(b), turned(b_turned), last_columns(b_wide, n)}) {
        for (const TensorView& into :
             {TensorView(out), turned(out_turned), last_columns(out_wide, n)}) {
          expect_product({.a = left, .b = right, .out = into});
        }
      }
    }
  }
}

TEST(Gemm, BatchesHaveTheirOwnStrides) {
  const Buffer a = Buffer(f32, {2, 3, 7}).filled(), b = Buffer(f32, {2, 5, 7}).filled();
  const Buffer out(f32, {2, 3, 5});
  expect_product({.a = a, .b = turned(b), .out = out});
  TensorView shared = turned(b);
  shared.strides[0] = 0;
  expect_product({.a = a, .b = shared, .out = out});
}

// Without an unfit epilogue the empty text; with one, no problem either.
std::string unfit_text(const Gemm& args) {
  check(args);
  const auto found = cuda::unfit_epilogue(args);
  EXPECT_EQ(cuda::problem_of(args, {}).has_value(), !found);
  if (!found) return "";
  return message(found->fallback.tensor, ": ", found->why, "; ", found->fallback.instead);
}

TEST(Gemm, AnUnfitBiasIsNamed) {
  const Buffer a(f32, {4, 8}), b(f32, {8, 16}), out(f32, {4, 16}), out_turned(f32, {16, 4});
  const Buffer bias(f32, {16}), rows(f32, {4});
  Gemm args{.a = a, .b = b, .out = out, .bias = bias};
  EXPECT_EQ(unfit_text(args), "");
  args.out = turned(out_turned);
  EXPECT_EQ(unfit_text(args),
            "bias: it runs along the columns of an out that is column-major; give out contiguous");
  args = {.a = a, .b = b, .out = out, .bias_grad = rows};
  EXPECT_EQ(cuda::problem_of(args, {})->bias_grad, GemmProblem::of_b);
  args.out = turned(out_turned);
  EXPECT_EQ(cuda::problem_of(args, {})->bias_grad, GemmProblem::of_a);
}

TEST(Gemm, AnUnfitActivationIsNamed) {
  const Buffer wide(f32, {8, 8});
  EXPECT_EQ(unfit_text({.a = wide, .b = wide, .out = wide, .epilogue = GemmEpilogue::gelu}),
            "out: the library's gelu is not exact enough for float32; use a 16-bit dtype");
  alignas(16) static uint16_t memory[4 * 16 + 1];
  const Buffer a(bf16, {4, 8}), b(bf16, {8, 16}), out(bf16, {4, 16}), pre_turned(bf16, {16, 4});
  TensorView pre = out;
  pre.data = memory;
  Gemm args{.a = a, .b = b, .out = out, .pre_activation = pre, .epilogue = GemmEpilogue::gelu};
  EXPECT_EQ(unfit_text(args), "");
  args.pre_activation.data = memory + 1;
  EXPECT_EQ(unfit_text(args),
            "pre_activation: its address is no multiple of 16 bytes; give a tensor with an address "
            "of its own, such as a clone");
  args.pre_activation = turned(pre_turned);
  EXPECT_EQ(unfit_text(args), "pre_activation: it lies otherwise than out; give both contiguous");
  const Buffer odd(bf16, {8, 15}), odd_out(bf16, {4, 15}), odd_pre(bf16, {4, 15});
  args.b = odd, args.out = odd_out, args.pre_activation = odd_pre;
  EXPECT_EQ(unfit_text(args),
            "pre_activation: its lines are no multiple of 8 elements; pad them to a multiple of 8");
}

TEST(Gemm, PlansAreSharedByWhatIsAlignedAlike) {
  alignas(256) static float memory[512];
  const Buffer b(f32, {8, 16}), out(f32, {4, 16});
  TensorView a = Buffer(f32, {4, 8});
  const auto align_of = [&](float* data) {
    a.data = data;
    return cuda::problem_of({.a = a, .b = b, .out = out}, {})->align_b;  // A is b
  };
  EXPECT_EQ(align_of(memory), 16);
  EXPECT_EQ(align_of(memory + 4), 16);
  EXPECT_EQ(align_of(memory + 2), 8);
  EXPECT_EQ(align_of(memory + 1), 4);
}

TEST(Gemm, ArgumentsThatDoNotFitAreRefused) {
  const Buffer a(f32, {4, 8}), b(f32, {8, 16}), out(f32, {4, 16}), bias(f32, {16}),
      short_bias(f32, {4});
  const Buffer half(DType::float16, {8, 16}), wide(DType::float64, {4, 16}), pre(f32, {4, 16});
  const Gemm good{.a = a, .b = b, .out = out, .bias = bias};
  EXPECT_NO_THROW(check(good));
  const auto refused = [&](auto change) {
    Gemm args = good;
    change(args);
    EXPECT_THROW(check(args), Error);
  };
  refused([&](Gemm& args) { args.b = a; });
  refused([&](Gemm& args) { args.b = half; });
  refused([&](Gemm& args) { args.out = wide; });
  refused([&](Gemm& args) { args.bias = short_bias; });
  refused([&](Gemm& args) { args.accumulate = true; });
  refused([&](Gemm& args) { args.epilogue = GemmEpilogue::gelu_grad; });
  refused([&](Gemm& args) { args.pre_activation = pre; });
  refused([&](Gemm& args) { args.bias_grad = short_bias; });  // beside a bias
  refused([&](Gemm& args) { args.a.strides[1] = 2; });
}

struct Key {
  int64_t value;
};

TEST(PlanCache, KeepsTheLastUsed) {
  cuda::PlanCache<Key, int> cache(2);
  int got = 0;
  const auto read = [&](int plan) { got = plan; };
  EXPECT_FALSE(cache.use({1}, read));
  cache.put({1}, 10);
  cache.put({2}, 20);
  EXPECT_TRUE(cache.use({1}, read));
  EXPECT_EQ(got, 10);
  cache.put({3}, 30);  // 2 was not used for longest
  EXPECT_EQ(cache.size(), 2u);
  EXPECT_FALSE(cache.use({2}, read));
  EXPECT_TRUE(cache.use({1}, read) && cache.use({3}, read));
  cache.put({3}, 31);  // the first stays
  EXPECT_TRUE(cache.use({3}, read));
  EXPECT_EQ(got, 30);
  cache.forget({3});
  EXPECT_FALSE(cache.use({3}, read));
}

TEST(Choices, AFailedOneIsReplacedByTheNext) {
  cuda::Choices<int, 3> choices;
  EXPECT_EQ(choices.standing(), nullptr);
  choices.add(10);
  choices.add(20);
  EXPECT_EQ(*choices.standing(), 10);
  EXPECT_TRUE(choices.replace(0));
  EXPECT_EQ(*choices.standing(), 20);
  EXPECT_TRUE(choices.replace(0));  // a thread that is late does not fail the second
  EXPECT_EQ(*choices.standing(), 20);
  EXPECT_FALSE(choices.replace(1));
  EXPECT_EQ(choices.standing(), nullptr);
}

TEST(PlanCache, ThreadsShareIt) {
  cuda::PlanCache<Key, int64_t> cache(16);
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&cache] {
      for (int64_t i = 0; i < 20000; ++i) {
        const Key key{i * 7 % 40};
        int64_t got = key.value;
        if (!cache.use(key, [&](int64_t plan) { got = plan; })) cache.put(key, key.value);
        ASSERT_EQ(got, key.value);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(cache.size(), 16u);
}

}  // namespace
}  // namespace redline
