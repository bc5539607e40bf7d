"""The layers in float64, composed from reference.py: truth(layer, x, parameters by name)."""

import torch

import reference
from redline.layers import Attention, LayerNorm, LayerNormLinear, LayerNormMLP, Linear, RMSNorm
from redline.layers.rotary import rotary_tables
from reference import linear


def norm_of(layer, x, weight, bias=None):
    if getattr(layer, "normalization", "RMSNorm") == "LayerNorm" or isinstance(layer, LayerNorm):
        return reference.layer_norm(x, weight, bias, layer.eps, layer.zero_centered)
    return reference.rms_norm(x, weight, layer.eps, layer.zero_centered)


def mlp(layer, x, p):
    normed = norm_of(layer, x, p["layer_norm_weight"], p.get("layer_norm_bias"))
    up = linear(normed, p["fc1_weight"], p.get("fc1_bias"))
    gated = layer.activation == "swiglu"
    act = reference.gated_activation if gated else reference.activation
    return linear(act(up, kind=layer.activation), p["fc2_weight"], p.get("fc2_bias"))


def turn(x, layer):
    """Rotary on [batch, sequence, heads, head_dim]."""
    if layer.rotary is None:
        return x
    batch, sequence = x.shape[:2]
    positions = torch.arange(sequence).repeat(batch)
    tables = rotary_tables(*layer.rotary.shape, layer.rotary.base)
    cos, sin = (table.double() for table in tables)
    return reference.rotary(x.flatten(0, 1), cos, sin, positions).view(x.shape)


def inside(p, prefix):
    return {k.removeprefix(prefix): v for k, v in p.items() if k.startswith(prefix)}


def attention(layer, x, p):
    inner = inside(p, "layernorm_qkv.")
    normed = norm_of(layer.layernorm_qkv, x, inner["layer_norm_weight"])
    qkv = linear(normed, inner["weight"], inner.get("bias"))
    group = layer.heads // layer.kv_heads
    packed = qkv.unflatten(-1, (layer.kv_heads, group + 2, layer.head_dim))
    q, k, v = packed[..., :group, :].flatten(2, 3), packed[..., group, :], packed[..., -1, :]
    if layer.q_norm is not None:
        q = norm_of(layer.q_norm, q, p["q_norm.weight"])
        k = norm_of(layer.k_norm, k, p["k_norm.weight"])
    q, k = turn(q, layer), turn(k, layer)
    k, v = (t.repeat_interleave(group, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    later = torch.ones(scores.shape[-2:]).triu(1).bool()
    probabilities = reference.softmax(scores, later, layer.head_dim**-0.5)
    context = torch.einsum("bhqk,bkhd->bqhd", probabilities, v).flatten(2)
    return linear(context, p["proj.weight"], p.get("proj.bias"))


def truth(layer, x, p):
    if isinstance(layer, (RMSNorm, LayerNorm)):
        return norm_of(layer, x, **p)
    if isinstance(layer, Linear):
        return linear(x, **p)
    if isinstance(layer, LayerNormLinear):
        normed = norm_of(layer, x, p["layer_norm_weight"], p.get("layer_norm_bias"))
        return linear(normed, p["weight"], p["bias"])
    if isinstance(layer, LayerNormMLP):
        return mlp(layer, x, p)
    if isinstance(layer, Attention):
        return attention(layer, x, p)
    x = x + attention(layer.self_attention, x, inside(p, "self_attention."))
    return x + mlp(layer.layernorm_mlp, x, inside(p, "layernorm_mlp."))
