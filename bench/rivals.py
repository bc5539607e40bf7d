"""Also time Liger-Kernel, QuACK, Transformer Engine and Apex, where they are installed.

`load()` imports what there is. `calls("rms_norm", weight, bias)` gives, for each library that has
the op, a call that takes the tensors which ours takes and gives what ours gives; without `load()`,
none. Written against Liger-Kernel 0.8, QuACK 0.6, Transformer Engine 2.20 and Apex of 2026; one
that has moved on fails when it is checked, and the results say so.
"""

import functools
import importlib
import importlib.metadata

import torch

LIBRARIES = {  # name in the results: what is imported, its distribution
    "liger": ("liger_kernel.ops", "liger-kernel"),
    "quack": ("quack.rmsnorm", "quack-kernels"),
    "te": ("transformer_engine.pytorch", "transformer-engine"),
    "apex": ("apex.normalization", "apex"),
}
NAMES = ("eager", "eager_cudnn", "compile", *LIBRARIES, "index_add")
# What is timed beside ours and is no rival: steps of a floor, which give no result of their own,
# and other forms of ours.
STEPS = ("products", "attention", "node", "launches", "empty")
PARTS = (*STEPS, "apart", "argmax", "kept", "two ops", "ungraphed")
# Reads the device in forward, which no CUDA graph takes.
NOT_CAPTURED = {("liger", "cross_entropy"), ("liger", "cross_entropy promised")}
EPSILON = 1e-5  # our ops' default

_loaded = {}
_makers = {}  # (library, op): what makes the call from the op's other arguments


def short(error):
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:120]


def version_of(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "of no version"


def load():
    """Imports what is installed and says in a line what is not; the versions that were found."""
    absent = []
    for name, (module, distribution) in LIBRARIES.items():
        try:
            importlib.import_module(module)
            _loaded[name] = version_of(distribution)
        except Exception as error:  # a library may fail in its own way where its device is missing
            absent.append(f"{name} ({short(error)})")
    found = ", ".join(f"{name} {version}" for name, version in _loaded.items())
    print(f"rivals: {found or 'none'}" + (f"; absent: {', '.join(absent)}" if absent else ""))
    return dict(_loaded)


def calls(op, *args):
    makers = {name: _makers[name, op] for name in _loaded if (name, op) in _makers}
    return {name: _made(make, args) for name, make in makers.items()}


def _made(make, args):
    """The call, made when it is first used: a missing name then is a reason not to time it."""
    made = functools.cache(lambda: make(*args))
    return lambda *inputs: made()(*inputs)


def maker(library, *ops):
    def register(make):
        _makers.update({(library, op): make for op in ops})
        return make

    return register


class Pair(torch.autograd.Function):
    """A library's forward and backward kernels as one differentiable call, whose graph may be
    walked again: `forward(*tensors)` gives y and what is kept, `backward(y_grad, *kept)` the
    gradients of the tensors."""

    @staticmethod
    def forward(ctx, forward, backward, *tensors):
        y, kept = forward(*tensors)
        ctx.save_for_backward(*kept)
        ctx.kernel = backward
        return y

    @staticmethod
    def backward(ctx, y_grad):
        return None, None, *ctx.kernel(y_grad, *ctx.saved_tensors)


def pair(forward, backward, *parameters):
    return lambda *inputs: Pair.apply(forward, backward, *inputs, *parameters)


# --- Liger-Kernel: autograd functions; in place where it is by default ----------------------------


def liger(name):
    return getattr(importlib.import_module("liger_kernel.ops"), name).apply


@maker("liger", "rms_norm")
def _(weight):
    norm = liger("LigerRMSNormFunction")
    return lambda x: norm(x, weight, EPSILON)


@maker("liger", "layer_norm")
def _(weight, bias):
    norm = liger("LigerLayerNormFunction")
    return lambda x: norm(x, weight, bias, EPSILON)


@maker("liger", "residual_rms_norm")
def _(weight):
    norm = liger("LigerFusedAddRMSNormFunction")
    return lambda x, residual: norm(x, residual, weight, EPSILON)


@maker("liger", "gated_activation swiglu")
def _():
    return liger("LigerFusedGateUpSiLUMulFunction")


@maker("liger", "gated_activation_pair swiglu")
def _():
    return liger("LigerSiLUMulFunction")


@maker("liger", "gated_activation_pair geglu")
def _():
    return liger("LigerGELUMulFunction")


@maker("liger", "activation squared_relu")
def _():
    return liger("LigerReLUSquaredFunction")


@maker("liger", "rotary q, k")
def _(cos, sin):
    """Takes [batch, heads, seq, head_dim] over memory in our order, tables as wide as a head."""
    rope = liger("LigerRopeFunction")
    wide = [torch.cat((table, table), -1)[None] for table in (cos, sin)]

    def call(q, k):
        q, k = rope(q.transpose(1, 2), k.transpose(1, 2), *(x.to(q.dtype) for x in wide))
        return q.transpose(1, 2), k.transpose(1, 2)

    return call


@maker("liger", "softmax")
def _():
    return liger("LigerSoftmaxFunction")


@maker("liger", "cross_entropy")
def _():
    """Makes the gradient in forward, over the logits, where they require one."""
    function = liger("LigerCrossEntropyFunction")
    return lambda logits, targets: function(logits, targets, None)[0]


# --- QuACK: functions of matrices -----------------------------------------------------------------


def quack(module, name):
    return getattr(importlib.import_module(f"quack.{module}"), name)


@maker("quack", "rms_norm")
def _(weight):
    norm = quack("rmsnorm", "rmsnorm")
    return lambda x: norm(x, weight, eps=EPSILON)


@maker("quack", "residual_rms_norm")
def _(weight):
    norm = quack("rmsnorm", "rmsnorm")
    return lambda x, residual: norm(x, weight, residual=residual, eps=EPSILON, prenorm=True)


@maker("quack", "layer_norm")
def _(weight, bias):
    """Takes float32 parameters alone; two kernels without a derivative between them."""
    forward, backward = quack("rmsnorm", "layernorm_fwd"), quack("rmsnorm", "layernorm_bwd")
    wide = [parameter.detach().float() for parameter in (weight, bias)]

    def run(x, *_):
        y, inverse_std, mean = forward(x, *wide, EPSILON, return_rstd=True, return_mean=True)
        return y, (x, inverse_std, mean)

    return pair(run, lambda g, x, *kept: backward(x, wide[0], g, *kept), weight, bias)


@maker("quack", "softmax")
def _():
    softmax = quack("softmax", "softmax")
    return lambda x: softmax(x.flatten(0, -2)).view_as(x)


@maker("quack", "cross_entropy")
def _():
    loss = quack("cross_entropy", "cross_entropy")
    return lambda logits, targets: loss(logits, targets, inplace_backward=True)


@maker("quack", "norm_mlp swiglu")
def _(*_):
    """Products with the activation in their epilogue, tuned at the first call; the norm apart."""
    norm, mlp = quack("rmsnorm", "rmsnorm"), quack("mlp", "mlp_func")

    def forward(x, norm_weight, fc1_weight, fc2_weight):
        normalized = norm(x, norm_weight, eps=EPSILON)
        return mlp(normalized, fc1_weight, fc2_weight, activation="swiglu", concat_layout=True)

    return forward


# --- Transformer Engine: its modules free what they kept, so their kernels are called -------------


def te(name):
    return getattr(importlib.import_module("transformer_engine_torch"), name)


def te_dtype(tensor):
    return importlib.import_module("transformer_engine.pytorch.constants").TE_DType[tensor.dtype]


@maker("te", "rms_norm")
def _(weight):
    forward, backward = te("rmsnorm_fwd"), te("rmsnorm_bwd")

    def run(x, w):
        y, _, inverse_rms = forward(x, w, EPSILON, None, None, te_dtype(x), 0, False)
        return y, (x, inverse_rms, w)

    return pair(run, lambda g, *kept: backward(g, *kept, 0, False), weight)


@maker("te", "layer_norm")
def _(weight, bias):
    forward, backward = te("layernorm_fwd"), te("layernorm_bwd")

    def run(x, w, b):
        y, mean, inverse_std = forward(x, w, b, EPSILON, None, None, te_dtype(x), 0, False)
        return y, (x, mean, inverse_std, w)

    return pair(run, lambda g, *kept: backward(g, *kept, 0, False), weight, bias)


def te_activation(forward, backward):
    def make():
        run, turn = te(forward), te(backward)
        return pair(lambda x: (run(x, None), (x,)), lambda g, x: (turn(g, x, None),))

    return make


for op, names in {
    "activation gelu": ("gelu", "dgelu"),
    "activation quick_gelu": ("qgelu", "dqgelu"),
    "activation silu": ("silu", "dsilu"),
    "activation relu": ("relu", "drelu"),
    "activation squared_relu": ("srelu", "dsrelu"),
    "gated_activation swiglu": ("swiglu", "dswiglu"),
    "gated_activation geglu": ("geglu", "dgeglu"),
    "gated_activation reglu": ("reglu", "dreglu"),
    "gated_activation quick_geglu": ("qgeglu", "dqgeglu"),
    "gated_activation clamped_swiglu": ("clamped_swiglu", "clamped_dswiglu"),
}.items():
    maker("te", op)(te_activation(*names))


@maker("te", "rotary q, k")
def _(cos, sin):
    """One launch for q and one for k, as its attention does; angles in place of their tables."""
    rope = importlib.import_module("transformer_engine.pytorch.attention.rope").apply_rotary_pos_emb
    angles = torch.atan2(sin, cos)
    angles = torch.cat((angles, angles), -1)[:, None, None]
    return lambda q, k: tuple(rope(x, angles, tensor_format="bshd", fused=True) for x in (q, k))


@maker("te", "cross_entropy")
def _():
    module = importlib.import_module("transformer_engine.pytorch.cross_entropy")
    loss = functools.partial(module.parallel_cross_entropy, reduce_loss=True)

    # Forward copies the logits unless backward may write over them.
    return lambda logits, targets: loss(logits[None], targets[None], overwrite_input=True).view(())


@maker("te", "norm_linear")
def _(cols, out):
    return te_layer("LayerNormLinear", cols, out)


@maker("te", "norm_mlp swiglu")
def _(cols, ffn):
    return te_layer("LayerNormMLP", cols, ffn, activation="swiglu")


def te_layer(name, *sizes, **options):
    """Forward of a layer without biases as a function of x and its parameters, in its order: they
    take the place of its own, which is part of the host's time."""
    module = importlib.import_module("transformer_engine.pytorch")
    layer = getattr(module, name)(
        *sizes, eps=EPSILON, bias=False, normalization="RMSNorm", params_dtype=torch.bfloat16,
        **options,
    )  # fmt: skip
    names = [name for name, _ in layer.named_parameters()]

    def forward(x, *parameters):
        for name, parameter in zip(names, parameters, strict=True):
            owner, _, last = name.rpartition(".")
            layer.get_submodule(owner)._parameters[last] = parameter
        return layer(x)

    return forward


# --- Apex: functions ------------------------------------------------------------------------------


def apex(name):
    return getattr(importlib.import_module("apex.normalization.fused_layer_norm"), name)


@maker("apex", "rms_norm")
def _(weight):
    norm = apex("fused_rms_norm_affine")
    return lambda x: norm(x, weight, list(weight.shape), EPSILON)


@maker("apex", "layer_norm")
def _(weight, bias):
    norm = apex("fused_layer_norm_affine")
    return lambda x: norm(x, weight, bias, list(weight.shape), EPSILON)
