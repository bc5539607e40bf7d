"""linear: against float64, the weight's gradient in its three places, and what the laws ask."""

import copy
import pickle

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from redline.layers import LayerNormLinear, Linear
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (x's leading dimensions, in, out): one, odd, a vector, empty in each place, over a tile.
CASES = [((1,), 1, 1), ((3, 5), 7, 9), ((), 8, 3), ((0, 2), 4, 5), ((4,), 0, 3), ((2, 65), 130, 67)]
BUFFERS = {"f32": torch.float32, "bf16": torch.bfloat16}

cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0])) or '1d'}-{case[1]}-{case[2]}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def inputs(case, dtype, device):
    leading, cols, out = case
    shapes = ((*leading, cols), (out, cols), (out,))
    return [randn(*shape, dtype=dtype, device=device, seed=i) for i, shape in enumerate(shapes)]


@cases
@dtypes
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no_bias"])
def test_forward_and_backward(case, dtype, with_bias, device):
    given = inputs(case, dtype, device)[: 3 if with_bias else 2]
    (y,), grads, (upstream,) = contract.gradients(ops.linear, given)
    assert y.dtype == dtype
    truth = wide(*given)
    y64 = reference.linear(*truth)
    grads64 = torch.autograd.grad(y64, truth, upstream.cpu().double())
    (y_stock,), stock, _ = contract.gradients(torch.nn.functional.linear, given, [upstream])
    # Sums of up to 130 products; the bias is added before the one rounding, or after it.
    assert_close(y.cpu(), y64, dtype, roundings=2, sums=16, stock=y_stock.cpu())
    for index, (grad, grad64, theirs) in enumerate(zip(grads, grads64, stock, strict=True)):
        assert grad.dtype == dtype
        what = ("x_grad", "weight_grad", "bias_grad")[index]
        assert_close(grad.cpu(), grad64, dtype, sums=16, stock=theirs.cpu(), what=what)


@dtypes
def test_strided_inputs(dtype, device):
    x, weight, bias = inputs(((6, 4), 10, 12), dtype, device)
    others = (strided(x), weight.t().contiguous().t(), bias)
    upstream = randn(6, 4, 12, dtype=dtype, device=device).transpose(0, 1).contiguous()
    ours = contract.gradients(ops.linear, others, [upstream.transpose(0, 1)])
    (y,), grads, _ = contract.gradients(ops.linear, [x, weight, bias], [upstream.transpose(0, 1)])
    assert_close(ours[0][0].cpu(), y.double().cpu(), dtype, sums=16)
    for grad, expected in zip(ours[1], grads, strict=True):
        assert_close(grad.cpu(), expected.double().cpu(), dtype, sums=16)


@dtypes
@pytest.mark.parametrize("out", [1, 67])
def test_same_bits(dtype, out, device):
    x, weight, bias = inputs(((2, 700), 130, out), dtype, device)
    first = contract.gradients(ops.linear, [x, weight, bias])
    again = contract.gradients(ops.linear, [x, weight, bias], first[2])
    # For one number of threads: MKL splits rows over those it has.
    for ours, theirs in zip(first[0] + first[1], again[0] + again[1], strict=True):
        assert torch.equal(ours, theirs)


def trained(case, dtype, device):
    x, weight, bias = (tensor.requires_grad_() for tensor in inputs(case, dtype, device))
    return x, weight, bias


def test_the_derivative_has_one(device):
    """A gradient penalty, as stock gives it."""
    x, weight, bias = trained(((5,), 4, 3), torch.float32, device)

    def penalty(linear):
        grads = torch.autograd.grad(linear(x, weight, bias).square().sum(), x, create_graph=True)
        return torch.autograd.grad(grads[0].square().sum(), (x, weight, bias))

    for ours, stock in zip(penalty(ops.linear), penalty(torch.nn.functional.linear), strict=True):
        assert_close(ours, stock.double(), roundings=2, sums=32)


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "x weight"])
def test_frozen_inputs_keep_and_compute_nothing(frozen, device):
    leaves = dict(zip(("x", "weight", "bias"), trained(((5,), 4, 3), torch.float32, device)))
    for name in frozen.split():
        leaves[name].requires_grad_(False)
    kept = []

    def keep(tensor):
        kept.extend(name for name, leaf in leaves.items() if leaf.data_ptr() == tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = ops.linear(*leaves.values())
    needed = {"x": "weight" not in frozen, "weight": "x" not in frozen, "bias": False}
    assert kept == [name for name, keeps in needed.items() if keeps]
    y.sum().backward()
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)


@cases
@dtypes
@pytest.mark.parametrize("buffer_dtype", BUFFERS.values(), ids=BUFFERS)
@pytest.mark.parametrize("accumulate", [True, False], ids=["adds", "overwrites"])
def test_main_grad(case, dtype, buffer_dtype, accumulate, device):
    x, weight, bias = trained(case, dtype, device)
    before = randn(*weight.shape, dtype=buffer_dtype, device=device, seed=9)
    main_grad = before.clone() if accumulate else torch.full_like(before, float("nan"))
    version = main_grad._version
    y = ops.linear(x, weight, bias, main_grad=main_grad, accumulate=accumulate)
    upstream = randn(*y.shape, dtype=dtype, device=device, seed=5)
    y.backward(upstream)
    assert weight.grad is None and x.grad is not None and bias.grad is not None
    assert main_grad._version > version
    x64, weight64, bias64 = wide(x, weight, bias)
    y64 = reference.linear(x64, weight64, bias64)
    (truth,) = torch.autograd.grad(y64, weight64, upstream.double().cpu())
    truth = truth + before.double().cpu() if accumulate else truth
    # Rounded once, to the buffer's type.
    assert_close(main_grad.cpu(), truth, buffer_dtype, sums=16, what="main_grad")


@pytest.mark.parametrize("dummy", ["none", "empty", "zeros"])
def test_main_grad_gives_autograd_a_dummy(dummy, device):
    x, weight, _ = trained(((5,), 4, 3), torch.bfloat16, device)
    main_grad = torch.zeros(3, 4, device=device)
    ops.linear(x, weight, main_grad=main_grad, dummy_grad=dummy).sum().backward()
    assert main_grad.abs().sum() > 0
    if dummy == "none":
        assert weight.grad is None
        return
    assert weight.grad.shape == weight.shape and weight.grad.dtype == weight.dtype
    assert dummy == "empty" or not weight.grad.any()


def test_main_grad_sums_two_uses_of_one_weight(device):
    x, weight, _ = trained(((5,), 4, 4), torch.float32, device)
    main_grad = torch.zeros(4, 4, device=device)
    ops.linear(
        ops.linear(x, weight, main_grad=main_grad), weight, main_grad=main_grad
    ).sum().backward()
    stock = torch.nn.functional.linear(torch.nn.functional.linear(x, weight), weight).sum()
    assert_close(main_grad, torch.autograd.grad(stock, weight)[0].double(), sums=16)


@pytest.mark.parametrize("into", [True, False], ids=["main_grad", "returned"])
def test_delayed_gradients_come_first_in_first_out(into, device):
    queue, expected, buffers = ops.WeightGradientQueue(), [], []
    for seed in range(3):
        x, weight, bias = trained(((5,), 4, 3), torch.float32, device)
        main_grad = torch.zeros(3, 4, device=device) if into else None
        ops.linear(x + seed, weight, bias, main_grad=main_grad, delayed=queue).sum().backward()
        assert weight.grad is None and bias.grad is not None
        assert not into or not main_grad.any()
        buffers.append(main_grad)
        stock = torch.nn.functional.linear(x + seed, weight).sum()
        expected.append(torch.autograd.grad(stock, weight)[0])
    assert len(queue) == 3
    for buffer, grad in zip(buffers, expected, strict=True):
        popped = queue.pop()
        assert (popped is None) == into
        assert_close(buffer if into else popped, grad.double(), sums=16)
    with pytest.raises(RuntimeError, match="expected a gradient from a backward before, not none"):
        queue.pop()


def test_copies_of_a_queue_are_empty(device):
    x, weight, _ = trained(((5,), 4, 3), torch.float32, device)
    queue = ops.WeightGradientQueue()
    ops.linear(x, weight, delayed=queue).sum().backward()
    assert [len(copy.deepcopy(queue)), len(pickle.loads(pickle.dumps(queue))), len(queue)] == [
        0,
        0,
        1,
    ]
    queue.clear()
    assert len(queue) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (3, 5)}, r"linear: x: expected a last dimension of 4, not 5"),
        ({"weight": (4,)}, r"linear: weight: expected \[out, in\], not a rank of 1"),
        ({"bias": (4,)}, r"linear: bias: expected \[3\], not \[4\]"),
        ({"main_grad": (4, 3)}, r"linear: main_grad: expected \[3, 4\], not \[4, 3\]"),
        ({"dummy_grad": "ones"}, r"linear: dummy_grad: expected none, empty or zeros, not ones"),
        ({"tp_group": "tp"}, r"linear: tp_group: expected none, not tp; products over more ranks"),
        ({"sequence_parallel": True}, r"linear: sequence_parallel: expected false; products over"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message, device):
    shapes = {"x": (2, 4), "weight": (3, 4), "bias": (3,)} | change
    given = {
        name: torch.zeros(shape, device=device) if isinstance(shape, tuple) else shape
        for name, shape in shapes.items()
    }
    with pytest.raises(RuntimeError, match=message):
        ops.linear(**given)


def test_refuses_other_dtypes(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(3, 4, device=device)
    with pytest.raises(RuntimeError, match="linear: weight: expected Float as x has, not BFloat16"):
        ops.linear(x, weight.bfloat16())
    with pytest.raises(RuntimeError, match="linear: x: expected a floating dtype, not Long"):
        ops.linear(x.long(), weight.long())
    message = "linear: main_grad: expected a floating dtype, not Long"
    with pytest.raises(RuntimeError, match=message):
        ops.linear(x, weight, main_grad=weight.long())


def test_autocast_is_the_stock_rule(device):
    x, weight, bias = trained(((5,), 4, 3), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.linear(x, weight, bias)
        stock = torch.nn.functional.linear(x, weight, bias)
    assert y.dtype == stock.dtype == torch.bfloat16
    assert_close(y, stock.double(), roundings=2)
    grads = torch.autograd.grad(y.sum(), [x, weight, bias])
    assert {grad.dtype for grad in grads} == {torch.float32}


def test_meta_and_inference_mode(device):
    given = inputs(((2, 5), 4, 3), torch.float32, device)
    assert ops.linear(*(tensor.to("meta") for tensor in given)).shape == (2, 5, 3)
    contract.runs_in_inference_mode(ops.linear, given)


def test_opcheck(device):
    x, weight, bias = trained(((2, 5), 4, 3), torch.float32, device)
    linear = torch.ops.redline.linear.default
    contract.passes_opcheck(linear, (x, weight, bias))
    contract.passes_opcheck(linear, (x, weight), {"main_grad": torch.zeros(3, 4, device=device)})
    into = torch.ops.redline.linear_weight_grad_into.default
    rows = (torch.zeros(3, 4, device=device), torch.ones(5, 3, device=device), x.detach()[0])
    contract.passes_opcheck(into, rows, inner=True)


def test_compiles_and_exports(device):
    given = inputs(((2, 5), 4, 3), torch.float32, device)
    contract.compiles(ops.linear, given)
    contract.compiles_dynamic(ops.linear, given)
    contract.exports(ops.linear, given)
    contract.refuses_vmap(ops.linear, given)
    contract.runs_under_compiled_autograd(ops.linear, given)


def test_compiles_with_main_grad(device):
    x, weight, bias = trained(((5,), 4, 3), torch.float32, device)
    main_grad = torch.zeros(3, 4, device=device)
    torch._dynamo.reset()
    compiled = torch.compile(ops.linear, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        compiled(x, weight, bias, main_grad=main_grad).sum().backward()
    stock = 2 * torch.nn.functional.linear(x, weight).sum()
    assert_close(main_grad, torch.autograd.grad(stock, weight)[0].double(), sums=16)
    assert weight.grad is None


# --- the layers' options --------------------------------------------------------------------------

LAYERS = {"Linear": Linear, "LayerNormLinear": LayerNormLinear}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)


def weight_grad(layer, x):
    """By autograd, from the same layer without its options."""
    stock = copy.deepcopy(layer)
    stock.set_weight_gradient(False, False)
    return torch.autograd.grad(stock(x).sum(), stock.weight)[0]


@layers
def test_layer_accumulates_main_grad(make, device):
    layer = make(4, 3, accumulate_main_grad=True, device=device)
    layer.weight.main_grad = torch.full_like(layer.weight, float("nan"))
    x = randn(5, 4, dtype=torch.float32, device=device)
    expected = weight_grad(layer, x)
    for first in (True, False):
        layer(x, first_microbatch=first).sum().backward()
    layer(x).sum().backward()
    assert_close(layer.weight.main_grad, 3 * expected.double(), sums=16)
    assert layer.weight.grad is None and layer.bias.grad is not None


@layers
def test_layer_without_main_grad_says_so(make, device):
    layer, x = make(4, 3, accumulate_main_grad=True, device=device), torch.ones(5, 4, device=device)
    with pytest.raises(RuntimeError, match=r"Linear: weight\.main_grad: expected a buffer"):
        layer(x)
    with torch.no_grad():
        layer(x)
    layer.weight.requires_grad_(False)
    layer(x)


@layers
@pytest.mark.parametrize("into", [True, False], ids=["main_grad", "grad"])
def test_layer_delays_the_weight_gradient(make, into, device):
    layer = make(4, 3, accumulate_main_grad=into, delay_weight_grad=True, device=device)
    layer.weight.main_grad = torch.zeros_like(layer.weight)
    x = randn(5, 4, dtype=torch.float32, device=device)
    expected = weight_grad(layer, x)
    for _ in range(2):
        layer(x).sum().backward()
    assert layer.weight.grad is None and not layer.weight.main_grad.any()
    layer.backward_dw()
    layer.backward_dw()
    grad = layer.weight.main_grad if into else layer.weight.grad
    assert_close(grad, 2 * expected.double(), sums=16)
    assert len(copy.deepcopy(layer).delayed) == 0
