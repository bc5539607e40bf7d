"""A Llama transformer layer, forward and backward, and what a call costs the host.

"block": as large as a Llama-3-8B layer; its floor is the sum of its parts' own best times in the
same run: the twelve products by torch.mm, attention by torch's fastest kernel, and a copy of the
bytes that the rest must move. "block graphed": few tokens, by calls: ours through redline.graphed
("ungraphed" without). "host": tiny tensors, until the call returns; the floor of norm + linear is
an autograd node that does nothing and the launches alone.
"""

import copy
import functools
import importlib

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import redline
import rivals
from bench import Case
from redline import layers
from redline.dyno import stock
from redline.dyno.measure import saved_bytes

LLAMA = {"hidden": 4096, "ffn": 14336, "heads": 32, "kv_heads": 8}
TINY = {"hidden": 256, "ffn": 512, "heads": 4, "kv_heads": 2}
# (batch, sequence, sizes, clock)
SIZES = [(4, 4096, LLAMA, "graph"), (1, 512, LLAMA, "calls"), (1, 16, TINY, "host")]
SIZES_CPU = [
    (4, 256, {"hidden": 512, "ffn": 1408, "heads": 8, "kv_heads": 2}, "graph"),
    (1, 16, TINY, "host"),
]
TINY_LINEAR = (16, 64, 64)  # rows, in, out
EPSILON = 1e-5


def both(layer, parameters=None):
    """Forward and backward of a layer: the gradients of its input and its weights. `parameters`:
    of a function of x and these, in place of a layer's own."""
    given = parameters or []
    parameters = parameters or list(layer.parameters())

    def call(x, y_grad):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(layer(x, *given), (x, *parameters), y_grad)

    return call


def block_both(layer):
    """`both`, whose gradient of the QKV weight is not given: its rows are grouped in ours alone."""
    call = both(layer)

    def without_qkv(x, y_grad):
        x_grad, norm, _, *rest = call(x, y_grad)
        return x_grad, norm, *rest

    return without_qkv


def with_attention(layer, backend):
    def call(x):
        with sdpa_kernel(backend):
            return layer(x)

    call.parameters = layer.parameters
    return call


def products_of(layer):
    """The twelve products of a layer, on tensors of their shapes."""
    weights = [p.detach() for p in layer.parameters() if p.dim() == 2]
    drawn = {}  # of each width: products of zeros run faster

    @torch.no_grad()
    def call(x, y_grad):
        tokens = y_grad.flatten(0, 1)
        for weight in weights:
            key = len(tokens), weight.shape[1]
            if key not in drawn:  # in the warm-up
                drawn[key] = torch.randn(*key, dtype=tokens.dtype, device=tokens.device)
            narrow = drawn[key]
            wide = narrow @ weight.t()
            wide @ weight, wide.t() @ narrow
        return ()

    return call


def attention_of(shape, factory):
    """Attention's forward and backward alone, on contiguous heads, by the kernel torch chooses."""
    leaves = [
        torch.randn(shape.batch, heads, shape.sequence, shape.head_dim, **factory)
        for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
    ]
    y_grad = torch.randn_like(leaves[0])

    def call(*_):
        q, k, v = (tensor.detach().requires_grad_() for tensor in leaves)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return torch.autograd.grad(y, (q, k, v), y_grad)

    return call


def rest_bytes(shape, itemsize):
    """What norms, rotary, activation and sums read and write, forward and backward, and what
    backward must read again; nothing that is only rebuilt."""
    qkv = shape.hidden + 2 * shape.kv_heads * shape.head_dim
    per_token = 17 * shape.hidden + 4 * qkv + 8 * shape.ffn
    return shape.tokens * per_token * itemsize


@rivals.maker("te", "block")
def _(shape, state):
    te = importlib.import_module("transformer_engine.pytorch")
    layer = te.TransformerLayer(
        shape.hidden, shape.ffn, shape.heads, num_gqa_groups=shape.kv_heads,
        layernorm_epsilon=shape.epsilon, hidden_dropout=0.0, attention_dropout=0.0, bias=False,
        normalization="RMSNorm", activation="swiglu", attn_input_format="bshd",
        self_attn_mask_type="causal", fuse_qkv_params=True, params_dtype=torch.bfloat16,
    )  # fmt: skip
    missing, _ = layer.load_state_dict(state, strict=False)
    assert not [name for name in missing if not name.endswith("_extra_state")], missing
    angles = torch.atan2(*stock.rotary_tables(shape.sequence, shape.head_dim, "cuda")[::-1])
    angles = torch.cat((angles, angles), -1)[:, None, None]
    parameters = dict(layer.named_parameters())
    with_angles = functools.partial(layer, rotary_pos_emb=angles)
    with_angles.parameters = lambda: [parameters[name] for name in state]
    return block_both(with_angles)


def layers_of(shape, factory):
    """Stock's layer and ours of the same weights, and these by our names."""
    theirs = stock.TransformerLayer(shape).to(**factory)
    ours = layers.TransformerLayer(
        shape.hidden, shape.ffn, shape.heads, shape.kv_heads, eps=shape.epsilon,
        max_positions=shape.sequence, **factory,
    )  # fmt: skip
    state = stock.tuned_state(theirs.state_dict(), shape)
    ours.load_state_dict(state)
    return theirs, ours, state


def kept_by(layer, shape, factory):
    """Bytes that a layer keeps for backward, the tensors that live anyway left out."""
    x = torch.randn(shape.batch, shape.sequence, shape.hidden, **factory, requires_grad=True)
    return saved_bytes(lambda: layer(x), [*layer.parameters(), *layer.buffers()])


def block(shape, clock, factory):
    theirs, ours, state = layers_of(shape, factory)
    compiled = torch.compile(theirs, dynamic=False)
    named = {"redline": ours, "eager": theirs, "compile": compiled}
    calls = {name: block_both(layer) for name, layer in named.items()}
    calls |= rivals.calls("block", shape, state)
    kept = {}
    if clock == "graph":
        calls |= {"products": products_of(ours), "attention": attention_of(shape, factory)}
        count = functools.partial(kept_by, shape=shape, factory=factory)
        kept = {name: functools.partial(count, layer) for name, layer in named.items()}
    if clock == "graph" and factory["device"] == "cuda":
        cudnn = with_attention(theirs, SDPBackend.CUDNN_ATTENTION)
        calls["eager_cudnn"] = block_both(cudnn)
    if clock == "calls":
        calls["ungraphed"] = block_both(copy.deepcopy(ours))
        x = torch.randn(shape.batch, shape.sequence, shape.hidden, **factory, requires_grad=True)
        calls["redline"] = block_both(redline.graphed(ours, x))
    return calls, kept


def blocks(factory, sizes, names):
    for batch, sequence, widths, clock in sizes:
        shape = stock.Shape(**widths, vocabulary=0, layers=1, sequence=sequence, batch=batch)
        calls, kept = block(shape, clock, factory)
        yield Case(
            "block" + {"graph": "", "calls": " graphed", "host": " host"}[clock],
            "both",
            f"{batch} x {sequence} x {shape.hidden}, ffn {shape.ffn}",
            names[factory["dtype"]],
            rest_bytes(shape, factory["dtype"].itemsize),
            inputs((batch, sequence, shape.hidden), (batch, sequence, shape.hidden), factory),
            calls,
            shape.model_flops,
            floor=("copy", "products", "attention"),
            clock=clock,
            kept=kept,
        )


def inputs(x, y_grad, factory):
    return lambda: tuple(torch.randn(*shape, **factory) for shape in (x, y_grad))


def launches(layer):
    """What LayerNormLinear runs, forward and backward, op by op and without autograd."""
    inner, norm_weight, weight = torch.ops.redline, layer.layer_norm_weight, layer.weight

    @torch.no_grad()
    def call(x, y_grad):
        normalized, _, inverse_rms = inner.rms_norm_forward(
            x, None, norm_weight, EPSILON, False, None
        )
        normalized @ weight.t()
        *grads, again = inner.norm_backward_rebuild(
            y_grad @ weight, x, norm_weight, None, None, inverse_rms, None, False, True, False
        )
        y_grad.t() @ again
        return grads

    return call


def node(x, _):
    """One of autograd's own nodes, whose work is a view."""
    x = x.detach().requires_grad_()
    return torch.autograd.grad(x.view_as(x), x, x.detach())


def host(factory, names):
    rows, cols, out = TINY_LINEAR
    text, name = f"{rows} x {cols} to {out}", names[factory["dtype"]]
    make = inputs((rows, cols), (rows, out), factory)
    plain = torch.nn.Linear(cols, out, bias=False, **factory)
    ours = layers.Linear(cols, out, bias=False, **factory)
    ours.load_state_dict(plain.state_dict())
    calls = {"redline": both(ours), "eager": both(plain)}
    yield Case("linear host", "both", text, name, 1, make, calls, clock="host")
    norm = torch.nn.RMSNorm(cols, eps=EPSILON, **factory)
    theirs = torch.nn.Sequential(norm, plain)
    ours = layers.LayerNormLinear(cols, out, bias=False, eps=EPSILON, **factory)
    ours.load_state_dict({"layer_norm_weight": norm.weight, "weight": plain.weight})
    calls = {"redline": both(ours), "eager": both(theirs)}
    calls |= {"compile": both(torch.compile(theirs, dynamic=False))}
    parameters = [norm.weight, plain.weight]
    others = rivals.calls("norm_linear", cols, out)
    calls |= {name: both(forward, parameters) for name, forward in others.items()}
    calls |= {"node": node, "launches": launches(ours)}
    floor = ("node", "launches")
    yield Case("norm_linear host", "both", text, name, 1, make, calls, floor=floor, clock="host")


def cases(device):
    names = {torch.bfloat16: "bf16", torch.float32: "f32"}
    cuda = device == "cuda"
    factory = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}
    yield from blocks(factory, SIZES if cuda else SIZES_CPU, names)
    yield from host(factory, names)
