"""redline.graphed: the eager layer's bits, and one sentence for what a graph cannot hold."""

import copy

import pytest
import torch

import redline
from cases import randn
from contract import equal_bits
from redline.layers import LayerNormLinear, LayerNormMLP, Linear, TransformerLayer

needs_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.ops.redline.has_cuda()),
    reason="needs a GPU and a build with CUDA",
)


def results(layer, x, upstream):
    x = x.detach().requires_grad_()
    y = layer(x)
    return [y.detach().clone(), *torch.autograd.grad(y, (x, *layer.parameters()), upstream)]


@needs_gpu
@pytest.mark.parametrize(
    "make",
    [
        lambda **factory: LayerNormLinear(256, 384, **factory),
        lambda **factory: LayerNormMLP(256, 512, activation="gelu", **factory),
        lambda **factory: LayerNormMLP(256, 512, normalization="LayerNorm", **factory),
    ],
    ids=["LayerNormLinear", "LayerNormMLP-gelu", "LayerNormMLP-LayerNorm"],
)
def test_has_the_eager_layers_bits(make):
    layer = make(device="cuda", dtype=torch.bfloat16)
    stock = copy.deepcopy(layer)
    x = randn(64, 256, dtype=torch.bfloat16, device="cuda")
    graphed = redline.graphed(layer, x.clone().requires_grad_())
    assert graphed is layer
    for seed in range(3):
        x = randn(64, 256, dtype=torch.bfloat16, device="cuda", seed=seed)
        upstream = torch.randn_like(layer(x)) + seed
        equal_bits(results(graphed, x, upstream), results(stock, x, upstream))


@needs_gpu
def test_captures_a_block():
    layer = TransformerLayer(256, 512, heads=4, device="cuda", dtype=torch.bfloat16)
    x = randn(1, 64, 256, dtype=torch.bfloat16, device="cuda")
    expected = layer(x).detach().clone()
    graphed = redline.graphed(layer, x.clone().requires_grad_())
    torch.testing.assert_close(graphed(x), expected)
    graphed(x).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


@needs_gpu
def test_inputs_that_do_not_fit_are_refused():
    layer = Linear(8, 4, device="cuda")
    graphed = redline.graphed(layer, torch.randn(6, 8, device="cuda", requires_grad=True))
    message = r"inputs: expected torch.float32 \[6, 8\] on cuda:0, not torch.float32 \[1, 8\]"
    with pytest.raises(ValueError, match=message):
        graphed(torch.randn(1, 8, device="cuda"))
    assert graphed.eval()(torch.randn(1, 8, device="cuda")).shape == (1, 4)


def test_refuses_the_cpu():
    message = r"graphed: sample\[0\]: expected a tensor on a CUDA device, not on cpu"
    with pytest.raises(ValueError, match=message):
        redline.graphed(Linear(8, 4), torch.randn(6, 8))
    with pytest.raises(TypeError, match=r"sample\[0\]: expected a tensor, not int"):
        redline.graphed(Linear(8, 4), (3,))


@pytest.mark.parametrize("option", ["accumulate_main_grad", "delay_weight_grad"])
def test_refuses_gradients_that_leave_autograd(option):
    layer = Linear(8, 4, **{option: True})
    for named, name in ((layer, "layer"), (torch.nn.Sequential(layer), "0")):
        message = rf"graphed: {name}\.{option}: expected False, not True"
        with pytest.raises(NotImplementedError, match=message):
            redline.graphed(named, torch.randn(6, 8))


@pytest.mark.parametrize("policy", ["selective", "full"])
def test_refuses_a_layer_that_computes_again(policy):
    layer = TransformerLayer(16, 24, heads=2, recompute=policy)
    with pytest.raises(NotImplementedError, match=f"recompute: expected none, not {policy}"):
        redline.graphed(layer, torch.randn(1, 6, 16))


@needs_gpu
def test_refuses_a_layer_on_the_cpu():
    with pytest.raises(ValueError, match="graphed: weight: expected a tensor on a CUDA device"):
        redline.graphed(Linear(8, 4), torch.randn(6, 8, device="cuda"))
