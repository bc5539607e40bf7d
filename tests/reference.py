# Over budget: parameters: the ops' own signatures.
"""Each op once, in plain torch and float64: written from the formula, not from a kernel.

Autograd of these is the reference for every gradient.
"""

import torch


def attention(qkv, excluded, scale=None, sink=None, softcap=None):
    """[batch, length, heads, head_dim]; excluded: bool [queries, keys], or with batch and head."""
    q, k, v = qkv
    group = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(group, 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return torch.einsum("bhij,bjhd->bihd", softmax(scores, excluded, 1.0, sink), v)


def cross_entropy(logits, targets, label_smoothing=0.0, z_loss=0.0, logit_softcap=None):
    """Per row, with no row ignored."""
    x = logits if logit_softcap is None else logit_softcap * torch.tanh(logits / logit_softcap)
    lse = torch.logsumexp(x, -1)
    picked = x.gather(-1, targets[..., None])[..., 0]
    smooth = label_smoothing * x.mean(-1) if label_smoothing else 0.0
    return lse - (1 - label_smoothing) * picked - smooth + z_loss * lse.square()


def embedding(tokens, weight, padding_idx=None):
    y = weight[tokens]
    keep = torch.ones_like(tokens) if padding_idx is None else tokens != padding_idx
    return torch.where(keep.bool()[..., None], y, y.detach())


def linear(x, weight, bias=None):
    y = x @ weight.T
    return y if bias is None else y + bias


def rms_norm(x, weight=None, epsilon=1e-5, zero_centered=False):
    y = x / torch.sqrt(x.square().mean(-1, keepdim=True) + epsilon)
    return y if weight is None else y * (weight + 1 if zero_centered else weight)


def layer_norm(x, weight=None, bias=None, epsilon=1e-5, zero_centered=False):
    centered = x - x.mean(-1, keepdim=True)
    y = centered / torch.sqrt(centered.square().mean(-1, keepdim=True) + epsilon)
    if weight is not None:
        y = y * (weight + 1 if zero_centered else weight)
    return y if bias is None else y + bias


def softmax(scores, excluded, scale=1.0, sink=None):
    """excluded: bool, broadcast to scores; rows without a key give zeros."""
    x = (scores * scale).masked_fill(excluded, float("-inf"))
    top = x.detach().amax(-1, keepdim=True).clamp_min(0.0)
    weights = torch.exp(x - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink[:, None, None] - top)
    return torch.where(total == 0, 0.0, weights / torch.where(total == 0, 1.0, total))


def rotary(x, cos, sin, positions, interleaved=False):
    """x: [tokens, heads, head_dim]; positions: [tokens]."""
    angle_cos, angle_sin = cos[positions][:, None], sin[positions][:, None]
    turned, rest = x.split([2 * cos.shape[1], x.shape[-1] - 2 * cos.shape[1]], -1)
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    pairs = (a * angle_cos - b * angle_sin, b * angle_cos + a * angle_sin)
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned, rest], -1)


_ACTIVATIONS = {
    "gelu": lambda x: x / 2 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: x / 2 * torch.special.erfc(-x / 2**0.5),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": lambda x: x * torch.sigmoid(x),
    "relu": torch.relu,
    "squared_relu": lambda x: torch.relu(x).square(),
}
_GATES = {"swiglu": "silu", "geglu": "gelu", "reglu": "relu", "quick_geglu": "quick_gelu"}


def activation(x, bias=None, kind="gelu"):
    return _ACTIVATIONS[kind](x if bias is None else x + bias)


def gated_activation(
    x, kind="swiglu", bias=None, row_scale=None, limit=7.0, alpha=1.702, linear_offset=1.0
):
    a, b = (x if bias is None else x + bias).chunk(2, -1)
    if kind == "clamped_swiglu":
        a, b = a.clamp(max=limit), b.clamp(-limit, limit) + linear_offset
        y = a * torch.sigmoid(alpha * a) * b
    else:
        y = _ACTIVATIONS[_GATES[kind]](a) * b
    return y if row_scale is None else y * row_scale[..., None]


def bias_dropout_add(x, bias, residual, keep, probability):
    """keep: the mask of the elements that stay."""
    x = x if bias is None else x + bias
    return residual + x * keep / (1 - probability)


def philox(seed, offset, counters):
    """The 32-bit words [counters, 4] of Philox 4x32-10, counted as redline/core/philox.h says."""
    low = 0xFFFFFFFF
    counter = torch.arange(counters)
    c = [torch.full_like(counter, offset // 4 & low), torch.full_like(counter, offset // 4 >> 32)]
    c += [counter & low, counter >> 32]
    k0, k1 = seed & low, seed >> 32 & low
    for _ in range(10):
        p0, p1 = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(p1 >> 32 & low) ^ c[1] ^ k0, p1 & low, (p0 >> 32 & low) ^ c[3] ^ k1, p0 & low]
        k0, k1 = k0 + 0x9E3779B9 & low, k1 + 0xBB67AE85 & low
    return torch.stack(c, -1)


def dropout_mask(seed, offset, count, probability):
    """True where an element stays: its 16-bit number is not below the probability's share."""
    words = philox(seed, offset, (count + 7) // 8)
    numbers = torch.stack((words & 0xFFFF, words >> 16), -1).flatten()[:count]
    return numbers >= int(probability * 2**16 + 0.5)


def adamw_step(state, gradient, t, lr, beta1=0.9, beta2=0.999, epsilon=1e-8, weight_decay=0.01):
    """(p, m, v) after step t."""
    p, m, v = state
    m = beta1 * m + (1 - beta1) * gradient
    v = beta2 * v + (1 - beta2) * gradient.square()
    update = m / (1 - beta1**t) / (torch.sqrt(v / (1 - beta2**t)) + epsilon)
    return p - lr * (update + weight_decay * p), m, v


def gradient_norm(*gradients):
    return torch.cat([gradient.flatten() for gradient in gradients]).norm()
