"""The new address's linears: where the weights' gradients go."""

import pytest
import torch

import reference
from cases import DEVICES, randn
from megatron_config import (
    FLAVOURS,
    IN,
    configuration,
    make_column,
    make_norm_linear,
    make_row,
    on,
    truth,
)
from tolerance import assert_close

flavours = pytest.mark.parametrize("make", FLAVOURS.values(), ids=FLAVOURS)
devices = pytest.mark.parametrize("device", DEVICES)


def fused(make, device="cpu", **changes):
    """A layer that accumulates main_grad, which starts as NaN: the first product overwrites."""
    layer = make(on(device, gradient_accumulation_fusion=True, **changes))
    layer.weight.main_grad = torch.full_like(layer.weight, float("nan"), dtype=torch.float32)
    layer.weight.grad_added_to_main_grad = False
    return layer, randn(5, IN, dtype=layer.weight.dtype, device=device)


def expected_grad(layer, x):
    """The weight's gradient of layer(x).sum() by autograd, in float64."""
    parameters = {name: p.detach().double() for name, p in layer.named_parameters()}
    weight = parameters["weight"].requires_grad_()
    return torch.autograd.grad(truth(layer, x.double(), parameters).sum(), weight)[0]


@devices
@flavours
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_first_microbatch_overwrites_and_the_rest_accumulate(make, dtype, device):
    layer, x = fused(make, device, params_dtype=dtype)
    for count in (1, 2, 3):
        layer.weight.grad_added_to_main_grad = False
        layer(x)[0].sum().backward()
        assert layer.weight.grad_added_to_main_grad is True
        expected = count * expected_grad(layer, x)
        # bf16: the normalised input is stored rounded.
        bound = {"dtype": dtype} if make is make_norm_linear else {}
        assert_close(layer.weight.main_grad, expected, sums=32, roundings=2, **bound)
    assert layer.is_first_microbatch is False


@flavours
def test_without_the_transpose_cache_every_microbatch_accumulates(make):
    layer, x = fused(make, disable_parameter_transpose_cache=True)
    layer.weight.main_grad.zero_()
    for _ in range(2):
        layer(x)[0].sum().backward()
    assert_close(layer.weight.main_grad, 2 * expected_grad(layer, x), sums=32, roundings=2)


def test_compiled_layers_keep_the_handshake():
    layer, x = fused(make_column, disable_parameter_transpose_cache=True)
    layer.weight.main_grad.zero_()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x)[0].sum().backward()
    assert layer.weight.grad_added_to_main_grad is True
    assert_close(layer.weight.main_grad, 2 * expected_grad(layer, x), sums=32)


def test_overwrite_main_grad_overwrites_every_time():
    layer, x = fused(make_column)
    layer.weight.overwrite_main_grad = True
    for _ in range(2):
        layer(x)[0].sum().backward()
    assert_close(layer.weight.main_grad, expected_grad(layer, x), sums=32)


def test_fsdp_gives_main_grad_by_a_call():
    layer, x = fused(make_column)
    buffer = layer.weight.main_grad
    del layer.weight.main_grad
    layer.weight.__fsdp_param__ = True
    layer.weight.get_main_grad = lambda: buffer
    layer(x)[0].sum().backward()
    assert_close(buffer, expected_grad(layer, x), sums=32)


@pytest.mark.parametrize("zero", [False, True], ids=["unwritten", "zeros"])
def test_dummy_gradients_arrive(zero):
    layer, x = fused(make_row)
    layer.weight.zero_out_wgrad = zero
    seen = []
    layer.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    layer(x)[0].sum().backward()
    assert seen == [layer.weight.shape]
    assert layer.weight.grad.dtype == layer.weight.dtype
    assert not zero or not layer.weight.grad.any()


def test_no_dummy_without_the_handshake():
    layer, x = fused(make_row)
    del layer.weight.grad_added_to_main_grad
    layer(x)[0].sum().backward()
    assert layer.weight.grad is None and not hasattr(layer.weight, "grad_added_to_main_grad")


def test_a_tied_embedding_adds_its_own_gradient():
    """As Megatron's hook does for zero_out_wgrad: main_grad += grad."""
    layer, _ = fused(make_column, disable_parameter_transpose_cache=True)
    layer.weight.main_grad.zero_()
    layer.weight.zero_out_wgrad = True
    tokens = torch.tensor([0, 3, 3])
    layer(torch.nn.functional.embedding(tokens, layer.weight))[0].sum().backward()
    total = layer.weight.main_grad + layer.weight.grad
    weight = layer.weight.detach().double().requires_grad_()
    stock = reference.linear(weight[tokens], weight, layer.bias.double()).sum()
    assert_close(total, torch.autograd.grad(stock, weight)[0], sums=32)


def test_frozen_weights_need_no_main_grad():
    layer = make_column(configuration(gradient_accumulation_fusion=True))
    layer.weight.requires_grad_(False)
    x = torch.randn(3, IN, requires_grad=True)
    layer(x)[0].sum().backward()
    assert x.grad is not None
    layer.weight.requires_grad_(True)
    with pytest.raises(RuntimeError) as caught:
        layer(x)
    assert str(caught.value) == (
        "TEColumnParallelLinear: weight.main_grad: expected a buffer of the weight's shape, "
        "not none; accumulate_main_grad is on"
    )


@flavours
@pytest.mark.parametrize("into", [False, True], ids=["grad", "main_grad"])
def test_delayed_weight_gradients(make, into):
    changes = {"gradient_accumulation_fusion": into, "delay_wgrad_compute": True}
    layer, fired = make(configuration(**changes)), []
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    assert layer.weight.skip_backward_post_hook and layer.need_backward_dw()
    layer.register_wgrad_accumulation_and_reduce_hooks(lambda: fired.append(len(layer.delayed)))
    x = torch.randn(5, IN)
    for _ in range(2):
        layer(x)[0].sum().backward()
    assert layer.weight.grad is None and not layer.weight.main_grad.any()
    assert layer.bias.grad is not None
    layer.backward_dw()
    layer.backward_dw()
    assert fired == [1, 0]
    grad = layer.weight.main_grad if into else layer.weight.grad
    assert_close(grad, 2 * expected_grad(layer, x), sums=32, roundings=2)


@flavours
def test_backward_dw_does_nothing_unless_asked(make):
    layer = make()
    layer(torch.randn(5, IN))[0].sum().backward()
    before = layer.weight.grad.clone()
    layer.backward_dw()
    assert torch.equal(layer.weight.grad, before) and not layer.need_backward_dw()
