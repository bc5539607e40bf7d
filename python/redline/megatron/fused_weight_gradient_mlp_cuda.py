"""The two functions of Apex's module of this name, which Megatron's own linear layers call.

Megatron refuses gradient_accumulation_fusion without the module: its output layer is its own.
"""

import torch

import redline._library  # noqa: F401  (registers the ops)

_ops = torch.ops.redline


def wgrad_gemm_accum_fp32(input, grad_output, main_grad):
    """main_grad += grad_output^T input: [out, in], of [rows, out] and [rows, in]."""
    _ops.linear_weight_grad_into(main_grad, grad_output, input)


wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp32  # main_grad's dtype says which
