// Over budget: parameters: cuBLASLt's own signatures.
// What follows when an algorithm of cuBLASLt fails: the heuristic and the product are this file's,
// which the linker takes in place of the library's; descriptors are the library's own. No GPU.
#include <cublasLt.h>
#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "redline/core/watch.h"
#include "redline/kernels/gemm.h"
#include "tests/cpp/buffer.h"

namespace {

// What the heuristic finds, algorithms number 0, 1, ..., and the status of each.
struct Library {
  std::vector<cublasStatus_t> algorithms;
  std::vector<uint64_t> run = {};  // in order
  std::vector<size_t> workspaces = {};
  int asked = 0;
} library;

size_t workspace_of(uint64_t algorithm) { return 256 * (algorithm + 1); }

}  // namespace

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(&library);
  return CUBLAS_STATUS_SUCCESS;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t, int capacity,
                                              cublasLtMatmulHeuristicResult_t* results,
                                              int* count) {
  ++library.asked;
  *count = std::min(capacity, static_cast<int>(library.algorithms.size()));
  for (int i = 0; i < *count; ++i) {
    results[i] = {};
    results[i].state = CUBLAS_STATUS_SUCCESS;
    results[i].algo.data[0] = static_cast<uint64_t>(i);
    results[i].workspaceSize = workspace_of(results[i].algo.data[0]);
  }
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t, const void*, const void*,
                              cublasLtMatrixLayout_t, const void*, cublasLtMatrixLayout_t,
                              const void*, const void*, cublasLtMatrixLayout_t, void*,
                              cublasLtMatrixLayout_t, const cublasLtMatmulAlgo_t* algorithm, void*,
                              size_t workspace, cudaStream_t) {
  library.run.push_back(algorithm->data[0]);
  library.workspaces.push_back(workspace);
  return library.algorithms[algorithm->data[0]];
}

}  // extern "C"

namespace redline {
namespace {

using test::Buffer;

class Choices final : public Watcher {
 public:
  Choices() {
    current = this;
    find_watcher.store([]() -> Watcher* { return current; });
    ++watchers;
  }
  ~Choices() override { --watchers; }

  void choice(std::string_view why) override { lines.emplace_back(why); }
  void fallback(const Fallback&, std::string_view) override {}
  void launch(const Launch&) override {}
  void bytes(int64_t) override {}

  std::vector<std::string> lines;
  static inline Watcher* current = nullptr;
};

constexpr auto works = CUBLAS_STATUS_SUCCESS, fails = CUBLAS_STATUS_EXECUTION_FAILED,
               unsupported = CUBLAS_STATUS_NOT_SUPPORTED;

// As ops/gemm.cpp calls; how many algorithms failed.
int multiply(Gemm args) {
  int failed = 0;
  while (true) {
    const auto bytes = workspace_bytes(args, {});
    args.workspace = {&library, bytes.value_or(-1)};
    if (run(args, {})) return failed;
    ++failed;
  }
}

// Each test multiplies in a size of its own, for a plan lives as long as the process.
struct Product {
  explicit Product(int64_t n)
      : a(DType::float32, {4, 6}), b(DType::float32, {6, n}), out(DType::float32, {4, n}) {}
  operator Gemm() const { return {.a = a, .b = b, .out = out}; }

  Buffer a, b, out;
};

TEST(GemmFailures, TheNextAlgorithmIsTakenAndStays) {
  library = {.algorithms = {fails, unsupported, works}};
  const Product product(8);
  const Choices seen;
  EXPECT_EQ(multiply(product), 2);
  EXPECT_EQ(multiply(product), 0);
  EXPECT_EQ(library.run, (std::vector<uint64_t>{0, 1, 2, 2}));
  EXPECT_EQ(library.workspaces, (std::vector<size_t>{256, 512, 768, 768}));
  EXPECT_EQ(library.asked, 1);
  ASSERT_EQ(seen.lines.size(), 2u);
  for (const std::string& line : seen.lines) {
    EXPECT_NE(line.find("; the algorithms before it failed"), std::string::npos) << line;
  }
}

TEST(GemmFailures, TheFirstThatWorksSaysNothingOfOthers) {
  library = {.algorithms = {works, fails}};
  const Choices seen;
  EXPECT_EQ(multiply(Product(12)), 0);
  ASSERT_EQ(seen.lines.size(), 1u);
  EXPECT_EQ(seen.lines[0].find("failed"), std::string::npos) << seen.lines[0];
}

TEST(GemmFailures, TheLastNamesSizesAndStatusAndTheNextCallAsksAgain) {
  library = {.algorithms = {unsupported, fails}};
  const Product product(16);
  try {
    multiply(product);
    FAIL() << "no algorithm was left";
  } catch (const Error& error) {
    const std::string text = error.what();
    EXPECT_EQ(text.find("gemm: every algorithm of cuBLASLt for m 16, n 4, k 6 failed, the last "
                        "with CUBLAS_STATUS_EXECUTION_FAILED"),
              0u)
        << text;
  }
  library.algorithms = {works};
  EXPECT_EQ(multiply(product), 0);
  EXPECT_EQ(library.asked, 2);
}

TEST(GemmFailures, AWorkspaceOfTheAlgorithmThatFailedMeanwhileIsNotUsed) {
  library = {.algorithms = {fails, works}};
  const Product product(20);
  Gemm args = product;
  args.workspace = {&library, *workspace_bytes(args, {})};
  EXPECT_FALSE(run(args, {}));
  EXPECT_FALSE(run(args, {}));  // 256 bytes, and the next wants 512
  EXPECT_EQ(library.run, (std::vector<uint64_t>{0}));
}

}  // namespace
}  // namespace redline
