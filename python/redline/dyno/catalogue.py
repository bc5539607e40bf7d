"""Every part that is measured: its stock form, its tuned form, the work it cannot avoid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import layer_parts
from .part import Case, Cost, Part, Setting, op
from .stock import full_precision, rotary_tables, rotate

EPSILON = 1e-5
PROBABILITY = 0.1


def _random(setting: Setting, *shape: int, grad: bool = True) -> Tensor:
    value = torch.randn(*shape, device=setting.device, dtype=setting.dtype)
    return value.requires_grad_(grad)


def _rows(setting: Setting, stock: Callable, tuned: Callable, **what) -> Case:
    """A part over [rows, cols]: `full` inputs of that shape, then `vectors` of [cols]."""
    full, vectors = what.get("full", 1), what.get("vectors", 0)
    rows, cols = setting.rows, what.get("cols", setting.cols)
    forward, backward = what["passes"]  # over rows x cols elements, reads and writes together
    size = rows * cols * setting.itemsize

    def inputs():
        xs = [_random(setting, rows, cols) for _ in range(full)]
        return (*xs, *(_random(setting, cols) for _ in range(vectors)))

    return Case(
        shape=f"{rows} x {cols}",
        inputs=inputs,
        stock=stock,
        tuned=tuned,
        cost=Cost(forward_bytes=forward * size, backward_bytes=backward * size),
        weights=tuple(range(full, full + vectors)),
        checked=what.get("checked"),
    )


def rms_norm(setting: Setting) -> Case:
    tuned = op("rms_norm")
    return _rows(
        setting,
        lambda x, w: F.rms_norm(x, w.shape, w, EPSILON),
        lambda x, w: tuned(x, w, EPSILON),
        vectors=1,
        passes=(2, 3),
    )


def layer_norm(setting: Setting) -> Case:
    tuned = op("layer_norm")
    return _rows(
        setting,
        lambda x, w, b: F.layer_norm(x, w.shape, w, b, EPSILON),
        lambda x, w, b: tuned(x, w, b, EPSILON),
        vectors=2,
        passes=(2, 3),
    )


def residual_rms_norm(setting: Setting) -> Case:
    tuned = op("residual_rms_norm")

    def stock(x, residual, w):
        total = x + residual
        return F.rms_norm(total, w.shape, w, EPSILON), total

    return _rows(
        setting, stock, lambda x, r, w: tuned(x, r, w, EPSILON), full=2, vectors=1, passes=(4, 4)
    )


def residual_layer_norm(setting: Setting) -> Case:
    tuned = op("residual_layer_norm")

    def stock(x, residual, w, b):
        total = x + residual
        return F.layer_norm(total, w.shape, w, b, EPSILON), total

    return _rows(
        setting,
        stock,
        lambda x, r, w, b: tuned(x, r, w, b, EPSILON),
        full=2,
        vectors=2,
        passes=(4, 4),
    )


def _dropped(setting: Setting, norm: Callable, name: str, vectors: int) -> Case:
    tuned = op(name)

    def stock(x, residual, *parameters, probability=PROBABILITY):
        total = residual + F.dropout(x, probability)
        return norm(total, *parameters), total

    def fused(x, residual, *parameters, probability=PROBABILITY, bias=None):
        return tuned(x, bias, residual, probability, *parameters, EPSILON)

    # Two random masks cannot be compared: the error is that of probability 0, with a bias of zeros,
    # or it would be the plain norm's.
    checked = {
        "stock": lambda *t: stock(*t, probability=0.0),
        "tuned": lambda x, *t: fused(x, *t, probability=0.0, bias=x.new_zeros(x.shape[-1])),
    }
    return _rows(setting, stock, fused, full=2, vectors=vectors, passes=(4, 5), checked=checked)


def bias_dropout_residual_rms_norm(setting: Setting) -> Case:
    def norm(x, w):
        return F.rms_norm(x, w.shape, w, EPSILON)

    return _dropped(setting, norm, "bias_dropout_residual_rms_norm", vectors=1)


def bias_dropout_residual_layer_norm(setting: Setting) -> Case:
    def norm(x, w, b):
        return F.layer_norm(x, w.shape, w, b, EPSILON)

    return _dropped(setting, norm, "bias_dropout_residual_layer_norm", vectors=2)


def activation(setting: Setting) -> Case:
    tuned = op("activation")
    return _rows(
        setting,
        lambda x, b: F.gelu(x + b, approximate="tanh"),
        lambda x, b: tuned(x, b, "gelu"),
        vectors=1,
        passes=(2, 3),
    )


def gated_activation(setting: Setting) -> Case:
    tuned = op("gated_activation")

    def stock(x):
        gate, linear = x.chunk(2, dim=-1)
        return F.silu(gate) * linear

    return _rows(
        setting,
        stock,
        lambda x: tuned(x, kind="swiglu"),
        cols=2 * setting.cols,
        passes=(1.5, 2.5),
    )


def gated_activation_pair(setting: Setting) -> Case:
    tuned = op("gated_activation_pair")
    return _rows(
        setting,
        lambda gate, linear: F.silu(gate) * linear,
        lambda gate, linear: tuned(gate, linear, kind="swiglu"),
        full=2,
        passes=(3, 5),
    )


def bias_dropout_add(setting: Setting) -> Case:
    tuned = op("bias_dropout_add")

    def stock(x, residual, b, probability=PROBABILITY):
        return residual + F.dropout(x + b, probability)

    def fused(x, residual, b, probability=PROBABILITY):
        return tuned(x, b, residual, probability)

    # Two random masks cannot be compared: the error is that of probability 0.
    checked = {"stock": lambda *t: stock(*t, 0.0), "tuned": lambda *t: fused(*t, 0.0)}
    return _rows(setting, stock, fused, full=2, vectors=1, passes=(3, 2), checked=checked)


def rotary(setting: Setting) -> Case:
    tuned = op("rotary")
    batch, sequence, heads, dim = setting.heads_shape
    cos, sin = rotary_tables(sequence, dim, setting.device)
    nbytes = batch * sequence * heads * dim * setting.itemsize
    return Case(
        shape=f"{batch} x {sequence} x {heads} x {dim}",
        inputs=lambda: (_random(setting, batch, sequence, heads, dim), cos, sin),
        stock=rotate,
        tuned=tuned,
        cost=Cost(forward_bytes=2 * nbytes, backward_bytes=2 * nbytes),
    )


def qkv_rotary(setting: Setting) -> Case:
    tuned = op("qkv_rotary")
    batch, sequence, heads, dim = setting.heads_shape
    kv_heads = heads // 4
    group = heads // kv_heads
    cos, sin = rotary_tables(sequence, dim, setting.device)

    def stock(qkv, cos, sin):
        packed = qkv.view(batch, sequence, kv_heads, group + 2, dim)
        q, k, v = packed.split([group, 1, 1], dim=3)
        q, k = (rotate(t.flatten(2, 3), cos, sin).view(t.shape) for t in (q, k))
        return torch.cat((q, k, v), dim=3).view(qkv.shape)

    width = kv_heads * (group + 2) * dim
    nbytes = batch * sequence * width * setting.itemsize
    return Case(
        shape=f"{batch} x {sequence} x ({heads} + 2 x {kv_heads}) x {dim}",
        inputs=lambda: (_random(setting, batch, sequence, width), cos, sin),
        stock=stock,
        tuned=lambda qkv, cos, sin: tuned(qkv, cos, sin, heads, kv_heads),
        cost=Cost(forward_bytes=2 * nbytes, backward_bytes=2 * nbytes),
    )


def cross_entropy(setting: Setting) -> Case:
    tuned = op("cross_entropy")
    rows, vocabulary = setting.rows, setting.vocabulary
    nbytes = rows * vocabulary * setting.itemsize

    def inputs():
        targets = torch.randint(vocabulary, (rows,), device=setting.device)
        return _random(setting, rows, vocabulary), targets

    return Case(
        shape=f"{rows} x {vocabulary}",
        inputs=inputs,
        stock=lambda logits, targets: F.cross_entropy(full_precision(logits), targets),
        tuned=tuned,
        cost=Cost(forward_bytes=nbytes, backward_bytes=2 * nbytes),
    )


def fused_linear_cross_entropy(setting: Setting) -> Case:
    tuned = op("fused_linear_cross_entropy")
    tokens, hidden = setting.layer_batch * setting.layer_sequence, setting.layer_hidden
    vocabulary = setting.vocabulary
    flops = 2 * tokens * hidden * vocabulary

    def inputs():
        x, weight = _random(setting, tokens, hidden), _random(setting, vocabulary, hidden)
        with torch.no_grad():
            weight.mul_(hidden**-0.5)  # logits of a model's size
        return x, weight, torch.randint(vocabulary, (tokens,), device=setting.device)

    def stock(x, weight, targets):
        return F.cross_entropy(full_precision(F.linear(x, weight)), targets)

    return Case(
        shape=f"{tokens} x {hidden} x {vocabulary}",
        inputs=inputs,
        stock=stock,
        tuned=lambda x, weight, targets: tuned(x, weight, targets, loss_scale=1.0),
        cost=Cost(forward_flops=flops, backward_flops=2 * flops),
        weights=(1,),
    )


def embedding(setting: Setting) -> Case:
    tuned = op("embedding")
    rows, cols, vocabulary = setting.rows, setting.cols, setting.vocabulary
    nbytes = rows * cols * setting.itemsize

    def inputs():
        tokens = torch.randint(vocabulary, (rows,), device=setting.device)
        return tokens, _random(setting, vocabulary, cols)

    return Case(
        shape=f"{rows} of {vocabulary} x {cols}",
        inputs=inputs,
        stock=F.embedding,
        tuned=tuned,
        cost=Cost(
            forward_bytes=2 * nbytes,
            backward_bytes=nbytes + vocabulary * cols * setting.itemsize,
        ),
        weights=(1,),
    )


def softmax(setting: Setting) -> Case:
    tuned = op("softmax")
    batch, sequence, heads, dim = setting.scores_shape
    mask = torch.ones(sequence, sequence, device=setting.device, dtype=torch.bool).triu(1)
    scale = dim**-0.5
    nbytes = batch * heads * sequence * sequence * setting.itemsize

    def stock(scores):
        return (scores * scale).masked_fill(mask, float("-inf")).softmax(dim=-1)

    return Case(
        shape=f"{batch} x {heads} x {sequence} x {sequence}",
        inputs=lambda: (_random(setting, batch, heads, sequence, sequence),),
        stock=stock,
        tuned=lambda scores: tuned(scores, None, scale, True),
        # Causal: half of every square is read, all of what comes out is written.
        cost=Cost(forward_bytes=1.5 * nbytes, backward_bytes=2 * nbytes),
    )


def attention(setting: Setting) -> Case:
    tuned = op("attention")
    batch, sequence, heads, dim = setting.scores_shape
    kv_heads = max(heads // 4, 1)

    def stock(q, k, v):
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2)

    def inputs():
        q = _random(setting, batch, sequence, heads, dim)
        return q, *(_random(setting, batch, sequence, kv_heads, dim) for _ in range(2))

    flops = 2 * batch * heads * sequence * sequence * dim  # two products, half of each square
    return Case(
        shape=f"{batch} x {sequence} x {heads} ({kv_heads}) x {dim}",
        inputs=inputs,
        stock=stock,
        tuned=lambda q, k, v: tuned(q, k, v, causal=True),
        cost=Cost(forward_flops=flops, backward_flops=2.5 * flops),
    )


@dataclass
class _AdamW:
    """One step of stock and of tuned from the same parameters and gradients."""

    setting: Setting
    count: int
    tensors: int = 8

    def parameters(self) -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        made = []
        for _ in range(self.tensors):
            draw = torch.randn(2, self.count // self.tensors, generator=generator)
            draw = draw.to(self.setting.device, self.setting.dtype)
            made.append(draw[0].clone().requires_grad_(True))
            made[-1].grad = draw[1].clone()
        return made

    def check(self, calls: dict[str, Callable]) -> dict[str, tuple[float, float]]:
        exact = [p.detach().double().requires_grad_(True) for p in self.parameters()]
        for p, original in zip(exact, self.parameters(), strict=True):
            p.grad = original.grad.double()
        torch.optim.AdamW(exact, lr=1e-3, **layer_parts.ADAMW).step()
        found = {}
        for name in calls:
            values = self.parameters()
            layer_parts.make_adamw(name, values, state_dtype=self.setting.dtype).step()
            error = layer_parts.worst_error(values, exact)
            found[name] = (error, error)
        return found


def adamw_step(setting: Setting) -> Case:
    work = _AdamW(setting, count=8 * setting.rows * setting.cols // 2)
    stock = layer_parts.make_adamw("stock", work.parameters())
    tuned = layer_parts.make_adamw("tuned", work.parameters(), state_dtype=setting.dtype)
    return Case(
        shape=f"{work.tensors} x {work.count // work.tensors}",
        inputs=tuple,
        stock=stock.step,
        tuned=tuned.step,
        cost=Cost(forward_bytes=7 * work.count * setting.itemsize),
        differentiable=False,
        errors=work.check,
    )


CATALOGUE = [
    Part("rms_norm", rms_norm, compiled=True),
    Part("layer_norm", layer_norm, compiled=True),
    Part("residual_rms_norm", residual_rms_norm, compiled=True),
    Part("residual_layer_norm", residual_layer_norm),
    Part("activation", activation),
    Part("gated_activation", gated_activation, compiled=True),
    Part("gated_activation_pair", gated_activation_pair),
    Part("rotary", rotary, compiled=True),
    Part("qkv_rotary", qkv_rotary),
    Part("cross_entropy", cross_entropy, compiled=True),
    Part("fused_linear_cross_entropy", fused_linear_cross_entropy),
    Part("bias_dropout_add", bias_dropout_add),
    Part("bias_dropout_residual_rms_norm", bias_dropout_residual_rms_norm),
    Part("bias_dropout_residual_layer_norm", bias_dropout_residual_layer_norm),
    Part("embedding", embedding),
    Part("softmax", softmax),
    Part("attention", attention),
    Part("adamw_step", adamw_step, directions=("step",)),
    *layer_parts.CATALOGUE,
]
