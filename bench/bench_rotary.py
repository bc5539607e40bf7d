"""Rotary: either direction reads x once and writes it once; the tables stay in the cache. Packed q,
k and v go through whole: v is copied."""

import functools

import torch

import rivals
from bench import Case, both_directions
from redline import ops
from settings import settings

# (batch, seq, heads, kv_heads, head_dim)
SIZES = [(4, 4096, 32, 8, 128), (4, 4096, 32, 8, 64), (8, 2048, 16, 16, 64)]
SIZES_CPU = [(4, 1024, 16, 4, 64), (1, 1024, 8, 8, 128)]
SIZES_CPU_LARGE = [(4, 4096, 16, 4, 64)]  # a q of 64 MB
SIZES_CPU_BF16 = [(4, 1024, 16, 4, 64)]


def rotate_half(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def tables(seq, head_dim, device):
    angles = torch.outer(
        torch.arange(seq, device=device).float(),
        10000.0 ** -torch.linspace(0, 1, head_dim // 2, device=device),
    )
    return angles.cos(), angles.sin()


def q_and_k(cos, sin, wide):
    return {
        "redline": lambda q, k: ops.rotary_pair(q, k, cos, sin),
        "eager": lambda q, k: (rotate_half(q, *wide), rotate_half(k, *wide)),
    }


def packed(cos, sin, wide, heads, kv_heads):
    """Per key head: its q heads, k and v."""

    def eager(qkv):
        heads_of = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, -1))
        turned, v = heads_of[..., :-1, :], heads_of[..., -1:, :]
        turned = rotate_half(turned, *(table[:, None] for table in wide))
        return torch.cat((turned, v), -2).flatten(-3)

    return {"redline": lambda qkv: ops.qkv_rotary(qkv, cos, sin, heads, kv_heads), "eager": eager}


def split(cos, sin, wide, heads, kv_heads):
    """From the packed form to q, k and v apart."""

    def eager(qkv):
        groups = qkv.unflatten(-1, (kv_heads, heads // kv_heads + 2, -1))
        q, k, v = groups.split([heads // kv_heads, 1, 1], -2)
        q, k = (rotate_half(x.flatten(2, 3), *wide) for x in (q, k))
        return q, k, v.flatten(2, 3).contiguous()

    call = ops.qkv_rotary_split
    return {"redline": lambda qkv: call(qkv, cos, sin, heads, kv_heads), "eager": eager}


def cases_of(device, sizes, dtype, label, plain):
    def make(shapes, results, with_gradient):
        drawn = [*shapes, *results] if with_gradient else shapes
        return tuple(torch.randn(size, device=device, dtype=dtype) for size in drawn)

    for batch, seq, heads, kv_heads, dim in sizes:
        cos, sin = tables(seq, dim, device)
        wide = [torch.cat((table, table), -1)[:, None].to(dtype) for table in (cos, sin)]
        q, k = ((batch, seq, count, dim) for count in (heads, kv_heads))
        qkv = (batch, seq, (heads + 2 * kv_heads) * dim)
        pair = q_and_k(cos, sin, wide) | rivals.calls("rotary q, k", cos, sin)
        rows = [
            ("rotary q, k", [q, k], [q, k], pair),
            ("qkv_rotary", [qkv], [qkv], packed(cos, sin, wide, heads, kv_heads)),
            ("qkv_rotary_split", [qkv], [q, k, k], split(cos, sin, wide, heads, kv_heads)),
        ]
        for name, shapes, results, calls in rows[:1] if plain else rows:
            calls["compile"] = torch.compile(calls["eager"], dynamic=False)
            size = 2 * sum(torch.Size(shape).numel() for shape in shapes) * dtype.itemsize
            sketch = Case(
                name=name,
                direction="",
                shape=f"{batch} x {seq} x {heads} ({kv_heads}) x {dim}",
                dtype=label,
                bytes=(size, size),
                make=functools.partial(make, shapes, results),
                calls={},
            )
            yield from both_directions(sketch, calls, outputs=len(results))


def cases(device):
    for setting in settings(device, SIZES, SIZES_CPU, SIZES_CPU_LARGE, SIZES_CPU_BF16):
        yield from cases_of(device, *setting)
