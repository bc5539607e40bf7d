"""docs/memory.md: what a layer keeps for backward is what its formula says, byte for byte."""

import functools
import re
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from cases import DEVICES
from redline import layers

DOCUMENT = Path(__file__).parent.parent / "docs" / "memory.md"
HIDDEN, FFN, HEADS, FEWER, HEAD_DIM, TOKENS = 128, 192, 8, 2, 16, 64
LAYERS, VOCABULARY = 2, 31


def freeze(layer, *names):
    for name, parameter in layer.named_parameters():
        if name in names:
            parameter.requires_grad_(False)
    return layer


linear = functools.partial(layers.LayerNormLinear, HIDDEN, 96)
mlp = functools.partial(layers.LayerNormMLP, HIDDEN, FFN)
block = functools.partial(layers.TransformerLayer, HIDDEN, FFN, HEADS)
gpt = functools.partial(layers.GPT, VOCABULARY, HIDDEN, FFN, LAYERS, HEADS)
NORM = ("layer_norm_weight",)
# The rows of the document: how the layer is made.
ROWS = {
    "`RMSNorm`": lambda: layers.RMSNorm(HIDDEN),
    "`LayerNorm`": lambda: layers.LayerNorm(HIDDEN),
    "`Linear`": lambda: layers.Linear(HIDDEN, 96),
    "`Linear`, accumulate_main_grad": lambda: layers.Linear(HIDDEN, 96, accumulate_main_grad=True),
    "`Linear`, delay_weight_grad": lambda: layers.Linear(HIDDEN, 96, delay_weight_grad=True),
    "`GroupedLinear`": lambda: layers.GroupedLinear(2, HIDDEN, 96),
    "`Embedding`": lambda: layers.Embedding(VOCABULARY, HIDDEN),
    "`LayerNormLinear`": linear,
    "`LayerNormLinear`, LayerNorm": lambda: linear(normalization="LayerNorm"),
    "`LayerNormLinear`, keep_normalized": lambda: linear(keep_normalized=True),
    "`LayerNormLinear`, frozen weight": lambda: freeze(linear(), "weight"),
    "`LayerNormLinear`, frozen norm and x": lambda: freeze(linear(), *NORM),
    "`LayerNormMLP`, swiglu": mlp,
    "`LayerNormMLP`, gelu": lambda: mlp(activation="gelu"),
    "`LayerNormMLP`, LayerNorm": lambda: mlp(normalization="LayerNorm"),
    "`Attention`": lambda: layers.Attention(HIDDEN, HEADS),
    "`Attention`, fewer kv_heads": lambda: layers.Attention(HIDDEN, HEADS, FEWER),
    "`TransformerLayer`": block,
    "`TransformerLayer`, dropout": lambda: block(dropout=0.1),
    "`TransformerLayer`, recompute selective": lambda: block(recompute="selective"),
    "`TransformerLayer`, recompute full": lambda: block(recompute="full"),
    "`GPT`, its loss": gpt,
    "`GPT`, its loss, fused_loss recompute": lambda: gpt(fused_loss="recompute"),
}


def formulas():
    """The document's table: row -> expression."""
    rows = re.findall(r"^\| (`\w+`.*?) \| `(.*?)` \|$", DOCUMENT.read_text(), re.MULTILINE)
    return dict(rows)


def made(row, dtype, device):
    """The row's layer, and what it is called with: TOKENS of them."""
    layer = ROWS[row]().to(device, dtype)
    if "main_grad" in row:
        layer.weight.main_grad = torch.zeros_like(layer.weight, dtype=torch.float32)
    tokens = torch.randint(VOCABULARY, (2, TOKENS // 2), device=device)
    if "GPT" in row:
        return layer, (tokens, tokens.clone())
    if "Embedding" in row:
        return layer, (tokens,)
    x = torch.randn(2, TOKENS // 2, HIDDEN, device=device, dtype=dtype)
    x.requires_grad_("frozen norm" not in row)
    return layer, ((x.flatten(0, 1), [24, TOKENS - 24]) if "Grouped" in row else (x,))


def kept_bytes(layer, *inputs):
    """Of the storages that autograd keeps, without those of parameters and tables."""
    owned = {t.untyped_storage().data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(*inputs)
    return sum(kept.values())


class Storages(TorchDispatchMode):
    """Those that ops have made, by weak references: checkpoint()'s inputs pass by autograd's."""

    def __init__(self):
        super().__init__()
        self.made = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.made[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        return result


def living_bytes(layer, x):
    """Of x and of what forward has made that lives on, without the result and the parameters."""
    with Storages() as storages:
        y = layer(x)
    uncounted = {t.untyped_storage()._cdata for t in (y, *layer.parameters(), *layer.buffers())}
    living = (size for cdata, (ref, size) in storages.made.items()
              if cdata not in uncounted and not ref.expired())  # fmt: skip
    return x.nbytes + sum(living)


def test_window_keeps_its_scores_unless_they_are_recomputed():
    x = torch.randn(1, TOKENS, HIDDEN, requires_grad=True)
    kept, again = (
        living_bytes(block(window=(8, 0), recompute=r), x) for r in ("none", "selective")
    )
    scores = TOKENS * TOKENS * HEADS * x.itemsize
    assert kept - again >= scores
    assert again == living_bytes(block(recompute="selective"), x)


def test_every_row_is_measured():
    assert list(formulas()) == list(ROWS)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("row", ROWS)
def test_kept_bytes_are_the_formula(row, dtype, device):
    layer, inputs = made(row, dtype, device)
    key_heads = FEWER if "fewer" in row else HEADS
    sizes = {"h": HIDDEN, "f": FFN, "q": HEADS * HEAD_DIM, "k": key_heads * HEAD_DIM, "n": HEADS}
    sizes |= {"l": LAYERS, "v": VOCABULARY, "t": TOKENS}
    formula = formulas()[row]
    if device == "cuda" and "fewer" in row and dtype == torch.float32:
        formula = re.search(r"in float32 on CUDA.*?`(.*?)`", DOCUMENT.read_text(), re.DOTALL)[1]
    expected = round(TOKENS * eval(formula, {"e": dtype.itemsize, **sizes}))
    # torch's attention on CUDA keeps the state of its random numbers too: 32 bytes or less.
    attends = any(name in row for name in ("Attention", "Transformer", "GPT"))
    more = 64 if device == "cuda" and attends else 0
    checkpoints = "TransformerLayer`, recompute" in row
    measured = living_bytes(layer, *inputs) if checkpoints else kept_bytes(layer, *inputs)
    assert expected <= measured <= expected + more
