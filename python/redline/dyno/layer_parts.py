"""The parts that hold weights: the layers, from the same weights, and the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from . import stock as stock_parts
from .measure import relative_error
from .part import Case, Cost, Part, Setting, tuned_name
from .stock import Shape, tuned_state

ADAMW = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def make_adamw(
    variant: str,
    parameters: Iterable[Tensor],
    lr: float = 1e-3,
    state_dtype: torch.dtype | None = None,
) -> torch.optim.Optimizer:
    """torch's AdamW in its fastest form (`fused`), whose states have the parameters' dtype, or
    Redline's, whose states are float32 unless `state_dtype` says otherwise."""
    if variant == "tuned":
        options = {"lr": lr, "state_dtype": state_dtype, **ADAMW}
        return tuned_name("optim", "AdamW")(list(parameters), **options)
    return torch.optim.AdamW(parameters, lr=lr, fused=True, **ADAMW)


def worst_error(values: Iterable[Tensor], truths: Iterable[Tensor]) -> float:
    return relative_error((v.detach() for v in values), (t.detach() for t in truths))


def _shape(setting: Setting) -> Shape:
    hidden = setting.layer_hidden
    heads = hidden // (64 if hidden < 4096 else 128)
    return Shape(
        hidden=hidden,
        ffn=hidden * 11 // 4,
        heads=heads,
        kv_heads=max(heads // 4, 1),
        sequence=setting.layer_sequence,
        batch=setting.layer_batch,
    )


def _case(setting: Setting, stock: nn.Module, tuned: nn.Module, flops: float) -> Case:
    """Two modules of one weight over [batch, sequence, hidden]; `flops` are the forward's."""
    shape = _shape(setting)
    dims = (shape.batch, shape.sequence, shape.hidden)
    move = {"device": setting.device, "dtype": setting.dtype}
    return Case(
        shape=" x ".join(map(str, dims)) + f", ffn {shape.ffn}",
        inputs=lambda: (torch.randn(*dims, **move).requires_grad_(True),),
        stock=stock.to(**move),
        tuned=tuned.to(**move),
        cost=Cost(forward_flops=flops, backward_flops=2 * flops),
    )


def _load(tuned: nn.Module, stock: nn.Module, prefixes: tuple[str, str], shape: Shape) -> None:
    """Gives `tuned` the weights of `stock`; the prefixes are where each stands in a whole layer."""
    state = tuned_state({prefixes[0] + k: v for k, v in stock.state_dict().items()}, shape)
    state = {k.removeprefix(prefixes[1]): v for k, v in state.items()}
    missing, unexpected = tuned.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= set(dict(tuned.named_buffers())), missing


def _mlp_flops(shape: Shape) -> float:
    return 2 * shape.tokens * 3 * shape.hidden * shape.ffn


def _attention_flops(shape: Shape) -> float:
    widths = 2 * shape.hidden + 2 * shape.kv_heads * shape.head_dim
    products = 2 * shape.tokens * shape.hidden * widths
    return products + 2 * shape.tokens * shape.sequence * shape.hidden


def linear(setting: Setting) -> Case:
    shape = _shape(setting)
    stock = nn.Linear(shape.hidden, shape.ffn, bias=False)
    tuned = tuned_name("layers", "Linear")(shape.hidden, shape.ffn, bias=False)
    tuned.load_state_dict(stock.state_dict())
    return _case(setting, stock, tuned, 2 * shape.tokens * shape.hidden * shape.ffn)


def layer_norm_linear(setting: Setting) -> Case:
    shape = _shape(setting)
    norm = nn.RMSNorm(shape.hidden, eps=shape.epsilon)
    stock = nn.Sequential(norm, nn.Linear(shape.hidden, shape.ffn, bias=False))
    layer = tuned_name("layers", "LayerNormLinear")
    tuned = layer(shape.hidden, shape.ffn, bias=False, eps=shape.epsilon)
    with torch.no_grad():
        tuned.layer_norm_weight.copy_(stock[0].weight)
        tuned.weight.copy_(stock[1].weight)
    return _case(setting, stock, tuned, 2 * shape.tokens * shape.hidden * shape.ffn)


def layer_norm_mlp(setting: Setting) -> Case:
    shape = _shape(setting)
    stock = stock_parts.MLP(shape)
    layer = tuned_name("layers", "LayerNormMLP")
    tuned = layer(shape.hidden, shape.ffn, bias=False, eps=shape.epsilon)
    _load(tuned, stock, ("mlp.", "layernorm_mlp."), shape)
    return _case(setting, stock, tuned, _mlp_flops(shape))


def attention_layer(setting: Setting) -> Case:
    shape = _shape(setting)
    stock = stock_parts.Attention(shape)
    layer = tuned_name("layers", "Attention")
    tuned = layer(shape.hidden, shape.heads, shape.kv_heads, eps=shape.epsilon)
    _load(tuned, stock, ("attention.", "self_attention."), shape)
    return _case(setting, stock, tuned, _attention_flops(shape))


def transformer_layer(setting: Setting) -> Case:
    shape = _shape(setting)
    stock = stock_parts.TransformerLayer(shape)
    layer = tuned_name("layers", "TransformerLayer")
    tuned = layer(shape.hidden, shape.ffn, shape.heads, shape.kv_heads, eps=shape.epsilon)
    _load(tuned, stock, ("", ""), shape)
    return _case(setting, stock, tuned, _mlp_flops(shape) + _attention_flops(shape))


LAYERS: dict[str, Callable[[Setting], Case]] = {
    "Linear": linear,
    "LayerNormLinear": layer_norm_linear,
    "LayerNormMLP": layer_norm_mlp,
    "Attention": attention_layer,
    "TransformerLayer": transformer_layer,
}
CATALOGUE = [Part(name, make) for name, make in LAYERS.items()]
