"""The layers: float64 truth composed from reference.py, the manners of nn.Module, C++'s bits."""

import copy
import functools
import subprocess

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import cases
from layer_cases import FFN, GPTS, HEADS, HIDDEN, LAYERS, agree, seeded
from megatron_config import configuration
from redline import ops
from redline.extensions import transformer_engine as te
from redline.layers import (
    Attention,
    Embedding,
    LayerNorm,
    LayerNormLinear,
    LayerNormMLP,
    Linear,
    RMSNorm,
    TransformerLayer,
)
from reference_layers import truth
from tolerance import assert_close

NAMES = {
    "RMSNorm": ["weight"],
    "LayerNorm": ["weight", "bias"],
    "Linear": ["weight", "bias"],
    "LayerNormLinear": ["layer_norm_weight", "layer_norm_bias", "weight", "bias"],
    "LayerNormMLP": ["layer_norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"],
    "LayerNormMLP-gelu": ["layer_norm_weight", "fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias"],
    "Attention": [
        "layernorm_qkv.layer_norm_weight",
        "layernorm_qkv.weight",
        "layernorm_qkv.bias",
        "proj.weight",
        "proj.bias",
    ],
    "Attention-qk_norm": [
        "layernorm_qkv.layer_norm_weight",
        "layernorm_qkv.weight",
        "q_norm.weight",
        "k_norm.weight",
        "proj.weight",
    ],
    "TransformerLayer": [
        "self_attention.layernorm_qkv.layer_norm_weight",
        "self_attention.layernorm_qkv.weight",
        "self_attention.proj.weight",
        "layernorm_mlp.layer_norm_weight",
        "layernorm_mlp.fc1_weight",
        "layernorm_mlp.fc2_weight",
    ],
}
NAMES |= {
    f"TransformerLayer-{policy}": NAMES["TransformerLayer"] for policy in ("selective", "full")
}


@pytest.fixture(params=cases.DEVICES)
def device(request):
    return request.param


layers = pytest.mark.parametrize("name", LAYERS)


@layers
def test_forward_and_backward(name, device):
    layer, x = seeded(LAYERS[name], device)
    y = layer(x)
    upstream = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], upstream)
    p = {k: v.detach().cpu().double().requires_grad_() for k, v in layer.named_parameters()}
    wide = x.detach().cpu().double().requires_grad_()
    expected = truth(layer, wide, p)
    # Stored between x and y: at most ten; each product adds a sum of HIDDEN to 2 FFN terms.
    assert_close(y.cpu(), expected, roundings=10, sums=16)
    theirs = torch.autograd.grad(expected, [wide, *p.values()], upstream.cpu().double())
    for what, grad, true in zip(["x", *p], ours, theirs, strict=True):
        assert_close(grad.cpu(), true, roundings=20, sums=32, what=f"{what}_grad")


@layers
def test_parameter_names(name):
    layer = LAYERS[name]()
    assert list(layer.state_dict()) == NAMES[name]
    assert [n for n, _ in layer.named_parameters()] == NAMES[name]


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


WEIGHTS = {"Linear": "weight", "LayerNormLinear": "layer_norm_weight", "LayerNormMLP": "fc1_weight"}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_replaced_parameter_is_read(name, device):
    layer, x = seeded(LAYERS[name], device)
    parameter, plain = WEIGHTS[name], copy.deepcopy(layer)
    doubled = 2 * getattr(layer, parameter).detach()
    expected = torch.func.functional_call(layer, {parameter: doubled}, x)
    assert not torch.equal(expected, layer(x))
    delattr(plain, parameter)
    setattr(plain, parameter, doubled)
    assert torch.equal(plain(x), expected)
    torch.nn.utils.parametrize.register_parametrization(layer, parameter, Doubled())
    assert torch.equal(layer(x), expected)


def test_torch_subclasses():
    assert isinstance(RMSNorm(4), torch.nn.RMSNorm)
    assert isinstance(LayerNorm(4), torch.nn.LayerNorm)
    assert isinstance(Linear(4, 4), torch.nn.Linear)
    assert isinstance(Embedding(4, 4), torch.nn.Embedding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6,), (3, 2)])
def test_norm_means_what_torch_means(dtype, shape, device):
    x = torch.randn(5, *shape, dtype=dtype, device=device) * 1e-3
    for ours, stock in ((RMSNorm, torch.nn.RMSNorm), (LayerNorm, torch.nn.LayerNorm)):
        options = {"eps": 1e-5, "device": device}
        truth = stock(shape, dtype=torch.float64, **options)(x.double())
        assert_close(ours(shape, dtype=dtype, **options)(x), truth, roundings=2)
    epsilon = torch.finfo(torch.float32).eps  # RMSNorm's own, in float32
    truth = torch.nn.RMSNorm(shape, epsilon, dtype=torch.float64, device=device)(x.double())
    assert_close(RMSNorm(shape, dtype=dtype, device=device)(x), truth, roundings=2)


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "LayerNormLinear", "TransformerLayer"])
def test_dropout_without_a_residual_is_refused(name, device):
    layer, x = seeded(LAYERS[name], device)
    given = (x, None, 0.5) if name == "TransformerLayer" else (x,)
    call = layer.forward_residual if name == "TransformerLayer" else layer
    with pytest.raises(RuntimeError, match=r"dropout: expected 0 without a residual, not 0\.5"):
        call(*given, **({} if name == "TransformerLayer" else {"dropout": 0.5}))


@pytest.mark.parametrize("name", ["RMSNorm", "LayerNorm", "LayerNormLinear", "LayerNormMLP"])
def test_residual_is_the_sum_first(name, device):
    layer, x = seeded(LAYERS[name], device)
    residual = torch.randn_like(x)
    y, total = layer(x, residual)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, layer(x + residual))


def test_residual_crosses_the_layer_boundary(device):
    first, x = seeded(LAYERS["TransformerLayer"], device)
    second = LAYERS["TransformerLayer"]().to(device)
    y, residual, dropout = second.forward_residual(*first.forward_residual(x))
    assert dropout == 0 and torch.equal(y + residual, second(first(x)))


def test_dropout_crosses_the_layer_boundary(device):
    """What a layer leaves to the next norm has the bits of what it does itself."""
    make = functools.partial(TransformerLayer, HIDDEN, FFN, HEADS, dropout=0.5)
    first, x = seeded(make, device)
    second = make().to(device)
    torch.manual_seed(3)
    y, residual, dropout = second.forward_residual(*first.forward_residual(x))
    ours = ops.bias_dropout_add(y, None, residual, dropout)
    torch.manual_seed(3)
    assert dropout == 0.5 and torch.equal(ours, second(first(x)))
    assert second.eval().forward_residual(x)[2] == 0


@layers
def test_deepcopy(name, device):
    layer, x = seeded(LAYERS[name], device)
    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        next(twin.parameters()).add_(1.0)
    assert not torch.equal(next(twin.parameters()), next(layer.parameters()))


@layers
def test_to_bfloat16_and_back(name):
    layer, x = seeded(LAYERS[name])
    assert layer.to(torch.bfloat16) is layer
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    assert all(buffer.dtype == torch.float32 for buffer in layer.buffers())
    assert layer.double()(x.double()).dtype == torch.float64


@layers
def test_hooks_and_state_dict(name, device):
    layer, x = seeded(LAYERS[name], device)
    seen = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer.register_full_backward_hook(lambda *_: seen.append("backward"))
    layer(x).sum().backward()
    assert seen == ["before", "after", "backward"]
    other = LAYERS[name]().to(device)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), layer(x))


@layers
@pytest.mark.parametrize("assign", [True, False])
def test_meta(name, assign):
    layer, x = seeded(LAYERS[name])
    with torch.device("meta"):
        empty = LAYERS[name]()
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert empty(x.to("meta")).shape == layer(x).shape
    if not assign:
        empty.to_empty(device="cpu")
    empty.load_state_dict(layer.state_dict(), assign=assign)
    assert torch.equal(empty(x), layer(x))


@layers
def test_compile(name, device):
    layer, x = seeded(LAYERS[name], device)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    agree([compiled(x)], [layer(x)])
    agree(*(torch.autograd.grad(call(x).sum(), [x]) for call in (compiled, layer)))


@layers
def test_checkpointing(name, device):
    layer, x = seeded(LAYERS[name], device)
    plain = torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])
    again = checkpoint(layer, x, use_reentrant=False)
    agree(plain, torch.autograd.grad(again.sum(), [x, *layer.parameters()]))


def test_dropout_is_the_same_when_checkpointed(device):
    layer, x = seeded(lambda: TransformerLayer(HIDDEN, FFN, HEADS, dropout=0.5), device)
    grads = []
    for call in (layer, lambda x: checkpoint(layer, x, use_reentrant=False)):
        torch.manual_seed(2)
        y = call(x)
        grads.append(torch.autograd.grad(y.sum(), [x]))
    agree(*grads)
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer.eval()(x), layer(x))


def test_packed_sequences_match_separate_ones(device):
    layer, x = seeded(LAYERS["Attention"], device)
    separate = torch.cat([layer(x[:1, :3])[0], layer(x[1:])[0]])
    packed = torch.cat([x[0, :3], x[1]])
    cu_seqlens = torch.tensor([0, 3, 10], dtype=torch.int32, device=device)
    ours = layer(packed, cu_seqlens=cu_seqlens, max_seqlen=7)
    torch.testing.assert_close(ours, separate)


def test_window_sees_its_keys_alone(device):
    layer, x = seeded(lambda: Attention(HIDDEN, HEADS, window=(2, 0)), device)
    x = x.detach()[:1]
    far = x.clone()
    far[:, 0] += 1.0
    change = (layer(x) - layer(far)).abs().amax(-1)[0]
    assert (change[:3] > 0).all()
    assert (change[3:] == 0).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Attention(16, 4, 3), "kv_heads: expected a divisor of 4, not 3"),
        (lambda: Attention(16, 0), "heads: expected 1 or more, not 0"),
        (lambda: Attention(16, 4, -2), "kv_heads: expected a divisor of 4, not -2"),
        (lambda: Attention(16, 4, rotary_dim=3), "rotary_dim: expected an even .* 4, not 3"),
        (lambda: Attention(16, 4, rotary_dim=6), "rotary_dim: expected an even .* 4, not 6"),
        (lambda: Attention(16, 4, rotary_dim=-2), "rotary_dim: expected an even .* 4, not -2"),
        (lambda: Attention(12, 4), "rotary_dim: expected an even number up to .* 3, not 3"),
        (lambda: Attention(18, 4), "heads: expected a divisor of hidden_size 18, not 4"),
        (lambda: LayerNormMLP(4, 4, activation="swish"), "activation: expected .* not swish"),
        (lambda: LayerNormLinear(4, 4, normalization="L2"), "normalization: expected .* not L2"),
        (lambda: Embedding(4, 4, sparse=True), "sparse: expected False, not True"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def recorded(name, make):
    """What tests/cpp/layer_outputs.cpp records under `name`, by the Python layer."""
    torch.manual_seed(1)
    layer = make()
    if name.startswith("GPT"):
        tokens = torch.randint(31, (2, 9))
        y = layer(tokens[:, :8], tokens[:, 1:])
        y.backward()
        out = {"y": y}
    else:
        x = torch.randn(2, 7, HIDDEN, requires_grad=True)
        y = layer(x)
        y.backward(torch.randn_like(y))
        out = {"y": y, "x_grad": x.grad}
    out |= {f"parameter/{n}": p for n, p in layer.named_parameters()}
    return out | {f"grad/{n}": p.grad for n, p in layer.named_parameters()}


@pytest.fixture(scope="module")
def cpp_outputs(tmp_path_factory):
    safetensors = pytest.importorskip("safetensors.torch")
    program = cases.built_program("layer_outputs")
    path = tmp_path_factory.mktemp("cpp") / "outputs.safetensors"
    subprocess.run([program, path], check=True)
    return safetensors.load_file(path)


@pytest.mark.parametrize("name", [*LAYERS, *GPTS])
def test_cpp_gives_the_same_bits(name, cpp_outputs):
    ours = {f"{name}/{k}": v.detach() for k, v in recorded(name, (LAYERS | GPTS)[name]).items()}
    theirs = {k: v for k, v in cpp_outputs.items() if k.split("/")[0] == name}
    assert sorted(ours) == sorted(theirs)
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_cpp_accumulates_the_same_main_grad(cpp_outputs):
    torch.manual_seed(1)
    layer = te.TELayerNormColumnParallelLinear(
        HIDDEN,
        5,
        config=configuration(
            normalization="LayerNorm", gradient_accumulation_fusion=True, delay_wgrad_compute=True
        ),
        init_method=lambda weight: torch.nn.init.normal_(weight, 0.0, 0.023),
        gather_output=False,
        bias=True,
        skip_bias_add=False,
        is_expert=False,
    )
    layer.weight.main_grad = torch.full_like(layer.weight, float("nan"))
    x = torch.randn(2, 7, HIDDEN)
    for _ in range(2):
        layer(x)[0].sum().backward()
    for _ in range(2):
        layer.backward_dw()
    assert torch.equal(cpp_outputs["main_grad/main_grad"], layer.weight.main_grad)
    assert torch.equal(cpp_outputs["main_grad/bias"], layer.bias.grad)
