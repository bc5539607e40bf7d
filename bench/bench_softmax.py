"""Softmax of scaled scores. Causal: forward reads half of the scores and writes all, backward reads
two halves and writes all. A mask is read once, for all heads."""

import functools

import torch

import rivals
from bench import Case, both_directions
from redline import ops

# (batch, heads, queries, keys)
SIZES = [(2, 32, 2048, 2048), (1, 32, 4096, 4096), (8, 16, 1000, 1000)]
SIZES_CPU = [(4, 8, 512, 512), (1, 4, 1024, 4096)]
SCALE = 0.125


def stock(scores, excluded):
    return torch.softmax((scores * SCALE).masked_fill(excluded, float("-inf")), -1)


def stock_causal(scores):
    excluded = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
    return stock(scores, excluded.triu(scores.shape[-1] - scores.shape[-2] + 1))


def forwards(name, mask):
    if name == "softmax":
        plain = {"redline": ops.softmax, "eager": lambda scores: torch.softmax(scores, -1)}
        return plain | rivals.calls("softmax")
    if name == "softmax causal":
        return {"redline": lambda x: ops.softmax(x, None, SCALE, True), "eager": stock_causal}
    return {"redline": lambda x: ops.softmax(x, mask, SCALE), "eager": lambda x: stock(x, mask)}


def cases(device):
    dtype, label = (torch.bfloat16, "bf16") if device == "cuda" else (torch.float32, "f32")

    def make(size, with_gradient):
        count = 2 if with_gradient else 1
        return tuple(torch.randn(size, device=device, dtype=dtype) for _ in range(count))

    for name in ("softmax causal", "softmax masked", "softmax"):
        for size in SIZES if device == "cuda" else SIZES_CPU:
            whole = torch.Size(size).numel() * dtype.itemsize
            read = whole // 2 if name == "softmax causal" else whole
            batch, _, queries, keys = size
            mask = torch.rand(batch, 1, queries, keys, device=device) < 0.1
            mask_size = mask.numel() if name == "softmax masked" else 0
            calls = forwards(name, mask)
            calls["compile"] = torch.compile(calls["eager"], dynamic=False)
            sketch = Case(
                name=name,
                direction="",
                shape=" x ".join(map(str, size)),
                dtype=label,
                bytes=(read + whole + mask_size, 2 * read + whole),
                make=functools.partial(make, size),
                calls={},
            )
            yield from both_directions(sketch, calls)
