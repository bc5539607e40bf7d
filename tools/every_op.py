#!/usr/bin/env python3
"""Runs every op once in either direction on small CUDA tensors: what the sanitizers watch.

    compute-sanitizer --tool memcheck python3 tools/every_op.py
    compute-sanitizer --tool racecheck python3 tools/every_op.py

Widths: within a warp, of odd length, of a block, of a cluster, beyond one. Each tensor is its own
allocation of the driver: in torch's cached segments a write past a tensor's end hits the next one,
and memcheck says nothing.
"""

import itertools
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # before torch is imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import torch

from redline import ops
from redline.optim import AdamW, clip_grad_norm

WIDTHS = (16, 129, 256, 1000, 1001, 1024, 4096, 16384, 40000, 140001)
DTYPES = (torch.bfloat16, torch.float32)


def both(function, *inputs):
    """Forward, and backward from ones."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    torch.autograd.grad([y.float().sum() for y in outs], leaves, allow_unused=True)


def draw(*shape, dtype):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def norms(width, dtype):
    """Few rows have a kernel of their own. Of many, blocks and clusters walk over more rows than
    they have places to exchange sums in."""
    many = 520 if width < 2048 else 1030 if width <= 4096 else 600 if width <= 16384 else 100
    for count in (5, many):
        norms_of(draw(count, width, dtype=dtype), draw(count, width, dtype=dtype))


def norms_of(x, residual):
    width, dtype = x.shape[1], x.dtype
    weight, bias = draw(width, dtype=dtype), draw(width, dtype=torch.float32)
    both(ops.rms_norm, x, weight)
    both(ops.layer_norm, x, weight, bias)
    both(ops.residual_rms_norm, x, residual, weight)
    both(ops.residual_layer_norm, x, residual, weight, bias)
    ops.residual_rms_norm(x, residual, weight, return_amax=True)
    ops.layer_norm(x, weight, bias, return_amax=True)
    both(
        lambda a, b, w: ops.bias_dropout_residual_rms_norm(a, None, b, 0.5, w), x, residual, weight
    )
    dropped = ops.bias_dropout_residual_layer_norm
    both(lambda a, i, b, w, c: dropped(a, i, b, 0.5, w, c), x, weight, residual, weight, bias)


def rows(width, dtype):
    x, bias = draw(70, width, dtype=dtype), draw(width, dtype=dtype)
    both(ops.activation, x)  # without a bias a matrix is walked as one long row
    both(ops.activation, x, bias)
    both(lambda a: ops.bias_dropout_add(a, None, x, 0.5), x)
    both(lambda a, b: ops.bias_dropout_add(a, b, x, 0.5), x, bias)
    both(ops.gated_activation_pair, x, x.flip(0))
    gain = draw(70, dtype=torch.float32)
    packed, both_biases = draw(70, 2 * width, dtype=dtype), draw(2 * width, dtype=dtype)
    both(lambda a, b, s: ops.gated_activation(a, bias=b, row_scale=s), packed, both_biases, gain)
    both(lambda a, s: ops.gated_activation(a, row_scale=s), packed, gain)
    targets, predict = torch.randint(width, (70,), device="cuda"), {"return_predictions": True}
    both(lambda a: ops.cross_entropy(a, targets, label_smoothing=0.1, logit_softcap=30.0), x)
    both(lambda a: ops.cross_entropy(a * 1, targets, inplace_backward=True), x)
    both(lambda a: ops.cross_entropy(a, targets, "sum", loss_scale=1.0), x)
    both(lambda a: ops.cross_entropy(a, targets, **predict)[0], x)
    both(lambda a: ops.cross_entropy(a, targets, "sum", loss_scale=1.0, **predict)[0], x)
    both(lambda a: 2 * ops.cross_entropy(a * 1, targets, inplace_backward=True, loss_scale=1.0), x)
    tokens = torch.randint(9, (300,), device="cuda")
    both(lambda w: ops.embedding(tokens, w), draw(11, width, dtype=dtype))
    both(lambda s: ops.softmax(s, causal=True), x.view(1, 7, 10, width))
    mask = torch.rand(1, 1, 10, width, device="cuda") > 0.8
    both(lambda s: ops.softmax(s, mask), x.view(1, 7, 10, width))


def products(a, b):
    """Each epilogue, in lines of a whole number of vectors and not."""
    for cols in (b.shape[1], b.shape[1] - 1):
        right, bias = b[:, :cols], draw(cols, dtype=b.dtype)
        _, pre = torch.ops.redline.gemm_gelu(a, right, bias=bias)
        torch.ops.redline.gemm(a, right, epilogue="gelu_grad", pre_activation=pre)
        out, bias_grad = torch.zeros_like(pre), torch.empty_like(pre[:, 0])
        torch.ops.redline.gemm_into(out, a, right, bias_grad=bias_grad)


def heads(dtype):
    cos, sin = draw(40, 16, dtype=torch.float32), draw(40, 16, dtype=torch.float32)
    both(lambda x: ops.rotary(x, cos, sin), draw(2, 33, 3, 64, dtype=dtype))
    q, k = draw(2, 33, 5, 64, dtype=dtype), draw(2, 33, 2, 64, dtype=dtype)
    both(lambda a, b: ops.rotary_pair(a, b, cos, sin), q, k)
    for op in (ops.qkv_rotary, ops.qkv_rotary_split):
        both(lambda x, op=op: op(x, cos, sin, 4, 2), draw(2, 33, 8 * 32, dtype=dtype))
    weight, x = draw(24, 40, dtype=dtype), draw(7, 40, dtype=dtype)
    main_grad = torch.zeros(24, 40, device="cuda")
    both(lambda a, w: ops.linear(a, w, main_grad=main_grad), x, weight)
    both(ops.linear, x, weight, draw(24, dtype=dtype))
    products(x, weight.t())
    targets = torch.randint(24, (7,), device="cuda")
    head = ops.fused_linear_cross_entropy
    both(lambda a, w: head(a, w, targets, main_grad=main_grad), x, weight)
    both(lambda a, w: head(a, w, targets, loss_scale=1.0), x, weight)
    gain, fc1, fc2 = (draw(*s, dtype=dtype) for s in ((40,), (48, 40), (40, 24)))
    both(lambda a, g, w: ops.norm_linear(a, g, None, w, main_grad=main_grad), x, gain, weight)
    both(lambda a, g, w1, w2: ops.norm_mlp(a, g, None, w1, None, w2), x, gain, fc1, fc2)
    both(
        lambda a, g, b, w1, w2: ops.norm_mlp(a, g, None, w1, b, w2, residual=x, activation="gelu"),
        x,
        gain,
        draw(24, dtype=dtype),
        fc1[:24],
        fc2,
    )
    if dtype == torch.bfloat16:
        q, k, v = (draw(2, 64, h, 64, dtype=dtype) for h in (4, 2, 2))
        both(lambda a, b, c: ops.attention(a, b, c, causal=True), q, k, v)


def optimiser(dtype):
    parameters = [torch.nn.Parameter(draw(n, dtype=dtype)) for n in (1, 37, 70001)]
    step = AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    clip_grad_norm(parameters, 1.0, optimizer=step)
    step.step()


def main():
    for width, dtype in itertools.product(WIDTHS, DTYPES):
        norms(width, dtype)
        rows(width, dtype)
    for dtype in DTYPES:
        heads(dtype)
        optimiser(dtype)
    torch.cuda.synchronize()
    print("every op ran")


if __name__ == "__main__":
    main()
