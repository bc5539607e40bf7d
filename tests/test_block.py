"""A Llama block, forward and backward: its kernels, none of which copies or casts."""

import re

import pytest
import torch

from cases import randn
from redline.dyno import stock
from redline.dyno.block import spans_of
from redline.layers import TransformerLayer

CPU = torch.device("cpu")
MOVES = {"aten::copy_", "aten::_to_copy", "aten::clone", "aten::cat", "aten::contiguous"}
CUDA_MOVES = re.compile(r"Memcpy|direct_copy|_copy_kernel|CatArray")
needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.ops.redline.has_cuda()),
    reason="needs a GPU and a build with CUDA, whose kernels it counts",
)


def both(layer, x):
    """Forward and backward of a layer that has run twice: its tables and plans are made."""
    x = x.requires_grad_()
    upstream = torch.randn_like(x)

    def call():
        return torch.autograd.grad(layer(x), [x, *layer.parameters()], upstream)

    for _ in range(2):
        call()
    return call


def names_of(call, device):
    return [span.name for span in spans_of(call, torch.device(device))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_ops_of_a_block(kv_heads, dtype):
    layer = TransformerLayer(64, 96, 4, kv_heads, dtype=dtype)
    x = randn(2, 16, 64, dtype=dtype, device="cpu")
    names = names_of(both(layer, x), "cpu")
    assert not MOVES & {*names}, names
    # Twelve products; forward: two norms, rotary, attention, activation, the last sum; backward
    # theirs, the two inputs built again, and the sum of x's two gradients.
    assert len(names) <= 12 + 6 + 5 + 2 + 1, names
    assert sum(name in ("aten::mm", "aten::addmm") for name in names) == 12


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_ops_of_a_residual_stream(dropout):
    """Between layers dropout and sum are the next norm's: no op of theirs, forward or backward."""
    layer = TransformerLayer(64, 96, 4, 2, dropout=dropout)
    x, residual = (randn(2, 16, 64, dtype=torch.float32, device="cpu", seed=i) for i in (1, 2))
    x.requires_grad_()
    residual.requires_grad_()

    def call():
        out = layer.forward_residual(x, residual, dropout)[:2]
        torch.autograd.grad(out, [x, residual, *layer.parameters()], [torch.ones_like(x)] * 2)

    call()
    names = [name for name in names_of(call, "cpu") if name != "aten::ones_like"]
    assert not {*MOVES, "aten::add", "aten::add_"} & {*names}
    assert not [name for name in names if "bias_dropout_add" in name]
    fused = [f"redline::bias_dropout_residual_norm_{way}" for way in ("forward", "backward")]
    assert [names.count(name) for name in fused] == [2 * (dropout > 0)] * 2


def test_stock_copies():
    """What is looked for is found where it is."""
    shape = stock.Shape(hidden=64, ffn=96, heads=4, kv_heads=2, sequence=16, batch=2)
    x = randn(2, 16, 64, dtype=torch.float32, device="cpu")
    names = names_of(both(stock.TransformerLayer(shape), x), "cpu")
    assert {"aten::copy_", "aten::cat"} <= {*names}


@needs_gpu
@pytest.mark.parametrize(("batch", "sequence"), [(1, 512), (2, 2048)])
def test_kernels_of_a_block(batch, sequence):
    """A Llama-3-8B layer; cuBLAS's split-K reductions count, and whatever attention launches.

    What cuBLAS sets to zero before a product, 4 bytes for the order of its blocks, is no kernel.
    """
    factory = {"dtype": torch.bfloat16, "device": "cuda"}
    layer = TransformerLayer(4096, 14336, heads=32, kv_heads=8, **factory)
    x = randn(batch, sequence, 4096, **factory)
    torch.use_deterministic_algorithms(False)  # it fills what is allocated, by kernels of its own
    torch.utils.deterministic.fill_uninitialized_memory = False
    names = names_of(both(layer, x), "cuda")
    assert not [name for name in names if CUDA_MOVES.search(name)], names
    kernels = [name for name in names if not name.startswith("Memset")]
    assert 0 < len(kernels) <= 32, kernels
