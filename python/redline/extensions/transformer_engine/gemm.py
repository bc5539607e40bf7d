# Over budget: parameters: the signatures are Transformer Engine's.
# ruff: noqa: N803  (A and B are its names)
"""Plain products in Transformer Engine's words: layouts in column-major letters, wider outputs."""

import torch

from redline.extensions.transformer_engine.refusals import PRECISION, refuse
from redline.extensions.transformer_engine.table import composed

LAYOUTS = ("TN", "NN", "NT")


def _factors(A, B, layout):
    """The left and the right factor of each layout, as matrices."""
    a, b = A.reshape(-1, A.shape[-1]), B.reshape(-1, B.shape[-1])
    if layout == "TN":
        return b, a.t()
    return (b, a) if layout == "NN" else (b.t(), a)


def _product(left, right, dtype):
    if dtype == left.dtype:
        return left @ right
    if left.is_cuda and dtype == torch.float32 and left.dtype != torch.float64:
        return torch.mm(left, right, out_dtype=dtype)
    wide = torch.promote_types(left.dtype, dtype)
    return (left.to(wide) @ right.to(wide)).to(dtype)


def _check(A, B, layout):
    refuse("te_general_gemm", "layout", layout, LAYOUTS)
    for name, tensor in (("A", A), ("B", B)):
        if tensor.dtype.itemsize < 2 or not tensor.dtype.is_floating_point:
            refuse("te_general_gemm", name, tensor.dtype, ("a plain floating dtype",), PRECISION)


def general_gemm(
    A,
    B,
    *,
    out_dtype=None,
    layout="TN",
    out=None,
    bias=None,
    grad=False,
    accumulate=False,
    **ignored,
):
    """(out, bias_grad, None, None). Not differentiable.

    out: TN: B A^T (A the weight [out, in], B the input); NN: B A (A the weight, B the output's
    gradient); NT: B^T A (A the input, B the output's gradient). bias is added; with `grad` it is
    not, and bias_grad is the sum of B's rows in its dtype. Into `out` the product is written, or
    with `accumulate` added. out_dtype: float32 from 16-bit factors is not rounded between.
    """
    _check(A, B, layout)
    with torch.no_grad():
        left, right = _factors(A, B, layout)
        dtype = out_dtype or (A.dtype if out is None else out.dtype)
        result = _product(left, right, dtype)
        bias_grad = None
        if bias is not None and grad:
            bias_grad = B.reshape(-1, B.shape[-1]).sum(0, dtype=bias.dtype)
        elif bias is not None:
            result = result + bias.to(dtype)
        if layout != "NT":
            result = result.view(*B.shape[:-1], result.shape[-1])
        if out is None:
            return result, bias_grad, None, None
        if accumulate:
            out.add_(result.view(out.shape))
        else:
            out.copy_(result.view(out.shape))
        return out, bias_grad, None, None


@composed(
    "torch.mm, with a float32 output of 16-bit factors",
    "quantised factors; not differentiable, as there",
)
def te_general_gemm(A, B, out_dtype=None, layout="TN", out=None, bias=None, grad=False):
    """`general_gemm` with the arguments in the order that Megatron gives them."""
    return general_gemm(A, B, out_dtype=out_dtype, layout=layout, out=out, bias=bias, grad=grad)
