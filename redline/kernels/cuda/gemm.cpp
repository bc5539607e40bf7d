// Products by cuBLASLt. A plan is the heuristic's list of algorithms for one problem; descriptors
// are written anew for each call, on the stack: a few dozen nanoseconds, and nothing is shared.
#include "redline/kernels/gemm.h"

#include <cublasLt.h>
#include <cublas_api.h>
#include <cuda_runtime_api.h>
#include <driver_types.h>
#include <library_types.h>

#include <array>
#include <map>
#include <mutex>
#include <optional>
#include <utility>

#include "redline/kernels/cuda/gemm_problem.h"
#include "redline/kernels/cuda/launch.h"
#include "redline/kernels/cuda/plan_cache.h"

namespace redline {
namespace {

using cuda::GemmProblem;

constexpr const char* op = "gemm";

struct Choice {
  cublasLtMatmulAlgo_t algorithm;
  int64_t workspace;
};

using Plan = cuda::Choices<Choice, 8>;  // in the heuristic's order

void check_library(cublasStatus_t status, const char* what) {
  REDLINE_CHECK(status == CUBLAS_STATUS_SUCCESS, op, ": ", what, ": ",
                cublasLtGetStatusName(status));
}

// --- what lives as long as the process ----------------------------------------------------------

// Never destroyed: the driver may be gone by then.

// A model has tens of shapes; a thousand plans are 0.7 MB.
cuda::PlanCache<GemmProblem, Plan>& plans() {
  static auto& cache = *new cuda::PlanCache<GemmProblem, Plan>(1024);
  return cache;
}

// Of the current device. One serves all threads.
cublasLtHandle_t handle_of(int device) {
  static auto& mutex = *new std::mutex;
  static auto& handles = *new std::map<int, cublasLtHandle_t>;
  const std::lock_guard lock(mutex);
  cublasLtHandle_t& handle = handles[device];
  if (!handle) {
    // It allocates, which a stream capture of this thread would refuse.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    cuda::check_status(cudaThreadExchangeStreamCaptureMode(&mode), "gemm: capture mode");
    const cublasStatus_t status = cublasLtCreate(&handle);
    cuda::check_status(cudaThreadExchangeStreamCaptureMode(&mode), "gemm: capture mode");
    check_library(status, "cublasLtCreate");
  }
  return handle;
}

// --- descriptors --------------------------------------------------------------------------------

cudaDataType_t library_type(int32_t dtype) {
  switch (static_cast<DType>(dtype)) {
    case DType::bfloat16:
      return CUDA_R_16BF;
    case DType::float16:
      return CUDA_R_16F;
    default:
      return CUDA_R_32F;
  }
}

cublasLtEpilogue_t library_epilogue(const GemmProblem& p) {
  int value = CUBLASLT_EPILOGUE_DEFAULT;
  if (p.epilogue == static_cast<int32_t>(GemmEpilogue::gelu_grad)) {
    value = CUBLASLT_EPILOGUE_DGELU;
  } else if (p.epilogue == static_cast<int32_t>(GemmEpilogue::gelu)) {
    value = p.has_pre ? CUBLASLT_EPILOGUE_GELU_AUX : CUBLASLT_EPILOGUE_GELU;
    if (p.has_bias) value |= CUBLASLT_EPILOGUE_BIAS;
  } else if (p.bias_grad != GemmProblem::none) {
    value = p.bias_grad == GemmProblem::of_a ? CUBLASLT_EPILOGUE_BGRADA : CUBLASLT_EPILOGUE_BGRADB;
  } else if (p.has_bias) {
    value = CUBLASLT_EPILOGUE_BIAS;
  }
  return static_cast<cublasLtEpilogue_t>(value);
}

struct Matrix {
  cublasLtMatrixLayoutOpaque_t layout;

  Matrix(int32_t dtype, int64_t rows, int64_t cols, int64_t ld) {
    check_library(cublasLtMatrixLayoutInit(&layout, library_type(dtype), rows, cols, ld), "layout");
  }

  void set_batch(int64_t count, int64_t stride) {
    const auto batch = static_cast<int32_t>(count);
    set(CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, batch);
    set(CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET, stride);
  }

 private:
  template <typename T>
  void set(cublasLtMatrixLayoutAttribute_t attribute, const T& value) {
    check_library(cublasLtMatrixLayoutSetAttribute(&layout, attribute, &value, sizeof(value)),
                  "layout");
  }
};

// `vector` is the bias or its gradient.
struct Descriptors {
  cublasLtMatmulDescOpaque_t operation;
  Matrix a, b, d;

  Descriptors(const GemmProblem& p, const void* vector, const void* pre)
      : a(p.factors, p.transpose_a ? p.k : p.m, p.transpose_a ? p.m : p.k, p.lda),
        b(p.factors, p.transpose_b ? p.n : p.k, p.transpose_b ? p.k : p.n, p.ldb),
        d(p.out, p.m, p.n, p.ldd) {
    const auto compute = p.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F;
    check_library(cublasLtMatmulDescInit(&operation, compute, CUDA_R_32F), "description");
    set(CUBLASLT_MATMUL_DESC_TRANSA, p.transpose_a ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_TRANSB, p.transpose_b ? CUBLAS_OP_T : CUBLAS_OP_N);
    set(CUBLASLT_MATMUL_DESC_EPILOGUE, library_epilogue(p));
    if (p.sm_target) set(CUBLASLT_MATMUL_DESC_SM_COUNT_TARGET, p.sm_target);
    if (vector) set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, vector);
    if (pre) {
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_POINTER, pre);
      set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_LD, p.ld_pre);
    }
    if (p.batch == 1) return;
    a.set_batch(p.batch, p.stride_a);
    b.set_batch(p.batch, p.stride_b);
    d.set_batch(p.batch, p.stride_d);
    if (pre) set(CUBLASLT_MATMUL_DESC_EPILOGUE_AUX_BATCH_STRIDE, p.stride_pre);
  }

 private:
  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value) {
    const auto* from = reinterpret_cast<const char*>(&value);  // a pointer is a value here
    check_library(cublasLtMatmulDescSetAttribute(&operation, attribute, from, sizeof(value)),
                  "description");
  }
};

// --- choice -------------------------------------------------------------------------------------

struct Preference {
  cublasLtMatmulPreferenceOpaque_t value;

  Preference(const GemmProblem& p, Stream stream) {
    check_library(cublasLtMatmulPreferenceInit(&value), "preference");
    // As torch has: Hopper's kernels split long sums through more of it.
    const uint64_t most = (stream.capability >= 90 ? uint64_t{32} : uint64_t{8}) << 20;
    set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, most);
    // Parts of a sum are kept in float32 and added in a step of their own. Reduction in place adds
    // them as their blocks come, and one in the output's type rounds each part to it.
    set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
        uint32_t{CUBLASLT_REDUCTION_SCHEME_NONE | CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE});
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, static_cast<uint32_t>(p.align_a));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, static_cast<uint32_t>(p.align_b));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, static_cast<uint32_t>(p.align_d));
    set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, static_cast<uint32_t>(p.align_d));
  }

 private:
  template <typename T>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, const T& number) {
    check_library(cublasLtMatmulPreferenceSetAttribute(&value, attribute, &number, sizeof(number)),
                  "preference");
  }
};

// The heuristic asks an address for its alignment alone: this one has what the plan's key says.
const void* address_aligned_to(int32_t bytes) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): nothing is read there
  return reinterpret_cast<const void*>(static_cast<uintptr_t>(bytes));
}

Plan choose(const GemmProblem& p, Stream stream) {
  Descriptors of(p, address_aligned_to(p.align_vector), address_aligned_to(p.align_pre));
  Preference preference(p, stream);
  std::array<cublasLtMatmulHeuristicResult_t, Plan::capacity> found;
  int count = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      handle_of(stream.device), &of.operation, &of.a.layout, &of.b.layout, &of.d.layout,
      &of.d.layout, &preference.value, static_cast<int>(found.size()), found.data(), &count);
  Plan plan;
  if (status != CUBLAS_STATUS_SUCCESS) return plan;
  for (int i = 0; i < count; ++i) {
    if (found[i].state != CUBLAS_STATUS_SUCCESS) continue;
    plan.add({found[i].algo, static_cast<int64_t>(found[i].workspaceSize)});
  }
  return plan;
}

// The choice that stands and its number; nothing where there is none.
std::optional<std::pair<Choice, int>> standing_choice(const GemmProblem& p, Stream stream) {
  std::optional<std::pair<Choice, int>> choice;
  const auto read = [&](const Plan& plan) {
    if (const Choice* standing = plan.standing()) choice.emplace(*standing, plan.number());
  };
  if (!plans().use(p, read)) {
    const Plan plan = choose(p, stream);
    plans().put(p, plan);
    read(plan);
  }
  return choice;
}

// After the last the plan is forgotten: the next call asks the heuristic again.
void replace_choice(const GemmProblem& p, int failed, cublasStatus_t status) {
  bool left = true;
  plans().use(p, [&](Plan& plan) { left = plan.replace(failed); });
  if (left) return;
  plans().forget(p);
  fail(__FILE__, __LINE__, op, ": every algorithm of cuBLASLt for m ", p.m, ", n ", p.n, ", k ",
       p.k, " failed, the last with ", cublasLtGetStatusName(status));
}

// --- what a watcher is told ---------------------------------------------------------------------

// What follows the product in its epilogue; nothing where there is none.
const char* epilogue_text(const Gemm& args) {
  if (args.epilogue == GemmEpilogue::gelu) return args.bias ? "bias and gelu" : "gelu";
  if (args.epilogue == GemmEpilogue::gelu_grad) return "gelu's derivative";
  if (args.bias_grad) return "the bias's gradient";
  return args.bias ? "bias" : nullptr;
}

constexpr const char* in_steps = ": it runs in steps behind the product";

void note_no_algorithm(const Gemm& args) {
  const char* epilogue = epilogue_text(args);
  if (epilogue == nullptr) return;  // the product itself has none: an error, not a fallback
  note_fallback({op, "epilogue", "give 16-bit tensors whose rows are a multiple of 16 bytes"},
                "cuBLASLt has no algorithm for ", args.a, " times ", args.b, " with ", epilogue,
                in_steps);
}

void report_product(const Gemm& args, int number) {
  Watcher* seen = watcher();
  if (seen == nullptr) return;
  const char* epilogue = epilogue_text(args);
  note_choice("the product is the library's: cuBLASLt, by its heuristic",
              epilogue ? ", in its epilogue " : "", epilogue ? epilogue : "",
              args.accumulate ? ", added to out" : "",
              number > 0 ? "; the algorithms before it failed" : "");
  seen->launch({.kernel = "cublasLtMatmul", .by_library = true});
}

}  // namespace

// --- the contract -------------------------------------------------------------------------------

std::optional<int64_t> workspace_bytes(const Gemm& args, Stream stream) {
  if (const auto unfit = cuda::unfit_epilogue(args)) {
    note_fallback(unfit->fallback, unfit->why, in_steps);
    return std::nullopt;
  }
  const auto problem = cuda::problem_of(args, stream);
  const auto choice = problem ? standing_choice(*problem, stream) : std::nullopt;
  if (!choice) {
    note_no_algorithm(args);
    return std::nullopt;
  }
  return choice->first.workspace;
}

bool run(const Gemm& args, Stream stream) {
  const auto problem = cuda::problem_of(args, stream);
  const auto choice = problem ? standing_choice(*problem, stream) : std::nullopt;
  if (!problem || !choice) {
    fail(__FILE__, __LINE__, op, ": cuBLASLt has no algorithm for ", args.a, " times ", args.b,
         " into ", args.out);
  }
  const auto& [algorithm, workspace] = choice->first;
  if (args.workspace.bytes < workspace) return false;  // another thread's call failed meanwhile
  const TensorView &left = problem->swapped ? args.b : args.a,
                   &right = problem->swapped ? args.a : args.b;
  const TensorView& vector = args.bias_grad ? args.bias_grad : args.bias;
  Descriptors of(*problem, vector.data, args.pre_activation.data);
  const float one = 1, beta = args.accumulate ? 1 : 0;
  const cublasStatus_t status = cublasLtMatmul(
      handle_of(stream.device), &of.operation, &one, left.data, &of.a.layout, right.data,
      &of.b.layout, &beta, args.out.data, &of.d.layout, args.out.data, &of.d.layout, &algorithm,
      args.workspace.data, workspace, static_cast<cudaStream_t>(stream.handle));
  if (status == CUBLAS_STATUS_SUCCESS) {
    report_product(args, choice->second);
    return true;
  }
  replace_choice(*problem, choice->second, status);
  return false;
}

}  // namespace redline
