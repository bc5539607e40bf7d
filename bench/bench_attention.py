"""Causal attention: 2 and 5 products of half of the square."""

import torch
import torch.nn.functional as F

from bench import Case
from redline import ops

# (batch, sequence, heads, kv_heads, head_dim)
SIZES = [
    (4, 4096, 32, 8, 128),
    (4, 4096, 32, 32, 64),
    (1, 16384, 32, 8, 128),
    (16, 512, 32, 8, 128),
]
SIZES_CPU = [(4, 256, 8, 2, 64), (1, 1024, 8, 8, 64)]


def stock(q, k, v):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2)


def with_backward(forward):
    def call(q, k, v, upstream):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(forward(*leaves), leaves, upstream)

    return call


def cases(device):
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    name = "bf16" if device == "cuda" else "f32"
    variants = {"redline": lambda q, k, v: ops.attention(q, k, v, causal=True), "eager": stock}
    for batch, sequence, heads, kv_heads, dim in SIZES if device == "cuda" else SIZES_CPU:
        shapes = [(batch, sequence, n, dim) for n in (heads, kv_heads, kv_heads, heads)]
        elements = [torch.Size(shape).numel() * dtype.itemsize for shape in shapes]
        product = batch * heads * sequence * sequence * dim  # multiply-adds of half a square, twice
        shape = f"{batch} x {sequence} x {heads} ({kv_heads}) x {dim}"

        def make(count, shapes=shapes):
            return lambda: tuple(
                torch.randn(*size, device=device, dtype=dtype) for size in shapes[:count]
            )

        calls = {k: torch.no_grad()(call) for k, call in variants.items()}
        yield Case("attention", "fwd", shape, name, sum(elements), make(3), calls, 2 * product)
        calls = {k: with_backward(call) for k, call in variants.items()}
        moved = 3 * sum(elements)
        yield Case("attention", "fwd+bwd", shape, name, moved, make(4), calls, 7 * product)
