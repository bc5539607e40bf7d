"""LayerNormLinear and LayerNormMLP: one node each, and the weights' gradients where they belong."""

import copy

import pytest
import torch

from cases import DEVICES, randn
from contract import equal_bits
from redline import ops
from redline.layers import LayerNormLinear, LayerNormMLP
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_norm_linear_is_one_node(normalization, device):
    layer = LayerNormLinear(8, 4, normalization=normalization, device=device)
    x = torch.randn(3, 8, device=device, requires_grad=True)
    y = layer(x)
    inputs = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert "NormLinear" in y.grad_fn.name() and len(inputs) == 1 + len(list(layer.parameters()))
    assert all("AccumulateGrad" in node.name() for node in inputs)


def test_norm_linear_returns_what_it_is_asked_for(device):
    layer = LayerNormLinear(8, 4, return_layernorm_output=True, keep_normalized=True, device=device)
    x, residual = (torch.randn(3, 8, device=device) for _ in range(2))
    normed = ops.rms_norm(x + residual, layer.layer_norm_weight)
    y, total, normalized = layer(x, residual)
    equal_bits(
        (y, total, normalized), (ops.linear(normed, layer.weight, layer.bias), x + residual, normed)
    )
    assert len(layer(x)) == 2


def layer_and_input(device, **options):
    torch.manual_seed(2)
    layer = LayerNormMLP(24, 8, device=device, **options)
    for weight in (layer.fc1_weight, layer.fc2_weight):
        weight.main_grad = torch.full_like(weight, float("nan"))
    return layer, randn(5, 24, dtype=torch.float32, device=device)


def weight_grads(layer, x):
    stock = copy.deepcopy(layer)
    stock.set_weight_gradient(False, False)
    return torch.autograd.grad(stock(x).sum(), [stock.fc1_weight, stock.fc2_weight])


def test_mlp_is_one_node(device):
    layer, x = layer_and_input(device)
    y = layer(x.requires_grad_())
    inputs = [node for node, _ in y.grad_fn.next_functions if node is not None]
    assert "NormMlp" in y.grad_fn.name() and len(inputs) == 1 + len(list(layer.parameters()))
    assert all("AccumulateGrad" in node.name() for node in inputs)


def test_mlp_accumulates_main_grads(device):
    layer, x = layer_and_input(device, accumulate_main_grad=True)
    expected = weight_grads(layer, x)
    for first in (True, False, None):
        layer(x, first_microbatch=first).sum().backward()
    for weight, grad in zip((layer.fc1_weight, layer.fc2_weight), expected, strict=True):
        assert_close(weight.main_grad, 3 * grad.double(), sums=16)
        assert weight.grad is None
    assert layer.fc1_bias.grad is not None
    del layer.fc1_weight.main_grad
    with pytest.raises(RuntimeError, match=r"LayerNormMLP: fc1_weight\.main_grad: expected a buf"):
        layer(x)


@pytest.mark.parametrize("into", [True, False], ids=["main_grad", "grad"])
def test_mlp_delays_the_weight_gradients(into, device):
    layer, x = layer_and_input(device, accumulate_main_grad=into, delay_weight_grad=True)
    expected = weight_grads(layer, x)
    for first in (True, False):
        layer(x, first_microbatch=first).sum().backward()
    assert layer.fc1_weight.grad is None and layer.fc2_weight.grad is None
    layer.backward_dw()
    layer.backward_dw()
    for weight, grad in zip((layer.fc1_weight, layer.fc2_weight), expected, strict=True):
        assert_close(weight.main_grad if into else weight.grad, 2 * grad.double(), sums=16)
