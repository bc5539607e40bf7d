// Matrix products with what follows them in one pass: f(a b + bias), rounded once. On CUDA
// cuBLASLt's (kernels/gemm.h); on the CPU, of float64 and of nothing ATen's, with the epilogue in
// steps, each of which rounds, as where the library has no such epilogue.
#pragma once

#include "redline/kernels/gemm.h"
#include "redline/ops/torch.h"

namespace redline::ops {

struct GemmOptions {
  std::optional<at::Tensor> bias = {};            // [N] of out's dtype
  std::string_view epilogue = "none";             // "gelu" (its tanh form) or "gelu_grad"
  std::optional<at::Tensor> pre_activation = {};  // with gelu_grad: [M, N] of out's dtype
  std::optional<at::ScalarType> out_dtype = {};   // a's, or float32
};

// [M, N] of a [M, K] and b [K, N], or of each with a leading batch.
at::Tensor gemm(const at::Tensor& a, const at::Tensor& b, const GemmOptions& options = {});

// {gelu(p), p} of p = a b + bias: gelu_grad's pre_activation.
std::tuple<at::Tensor, at::Tensor> gemm_gelu(const at::Tensor& a, const at::Tensor& b,
                                             const std::optional<at::Tensor>& bias = {});

// out + a b, or a b alone, into out [M, N] of any floating dtype and any strides. bias_grad [M] of
// out's dtype gets the sum of a over K: the bias's gradient where a b is a weight's, y_grad^T x.
void gemm_into(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
               bool accumulate = true, const std::optional<at::Tensor>& bias_grad = {});

// --- below the dispatcher, for kernels of other ops: no meta tensors ----------------------------

struct GemmOperands {
  at::Tensor a, b, out;                                       // of any strides
  at::Tensor bias = {}, pre_activation = {}, bias_grad = {};  // or undefined
  GemmEpilogue epilogue = GemmEpilogue::none;
  bool accumulate = false;
};

void gemm_out(const GemmOperands& operands);

}  // namespace redline::ops
