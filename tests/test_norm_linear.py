"""norm_linear: the bits of the norm and the product one by one, what it keeps, and the laws."""

import pytest
import torch
import torch.nn.functional as F

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

# (x's leading dimensions, in, out): one, odd, a vector, empty in each place, over a tile.
CASES = [((1,), 1, 1), ((3, 5), 7, 9), ((), 8, 3), ((0, 2), 4, 5), ((2, 65), 130, 67)]
NORMS = ["rms_norm", "layer_norm"]

cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{'x'.join(map(str, case[0])) or '1d'}-{case[1]}-{case[2]}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
norms = pytest.mark.parametrize("norm", NORMS)
residuals = pytest.mark.parametrize("with_residual", [False, True], ids=["alone", "residual"])


def inputs(case, dtype, device, norm="rms_norm", residual=None):
    """x, residual (of dtype `residual`), norm_weight, norm_bias, weight, bias; None for absent."""
    leading, cols, out = case
    dtypes = [dtype, residual, dtype, dtype if norm == "layer_norm" else None, dtype, dtype]
    shapes = [(*leading, cols), (*leading, cols), (cols,), (cols,), (out, cols), (out,)]
    return [
        None if kind is None else randn(*shape, dtype=kind, device=device, seed=i)
        for i, (shape, kind) in enumerate(zip(shapes, dtypes, strict=True))
    ]


def fused(norm, **options):
    """norm_linear with every tensor by place, and always a tuple."""

    def call(x, residual, *parameters):
        out = ops.norm_linear(x, *parameters, residual=residual, norm=norm, **options)
        return out if isinstance(out, tuple) else (out,)

    return call


def composed(norm, return_norm_output=False, zero_centered=False, dropout=0.0):
    """The same by the ops one by one."""

    def call(x, residual, *parameters):
        norm_weight, norm_bias, weight, bias = parameters
        gain = [norm_weight] if norm == "rms_norm" else [norm_weight, norm_bias]
        options = {"zero_centered": zero_centered}
        if residual is None:
            normed, *total = (getattr(ops, norm)(x, *gain, **options),)
        else:
            op = getattr(ops, f"bias_dropout_residual_{norm}")
            normed, *total = op(x, None, residual, dropout, *gain, **options)
        return (ops.linear(normed, weight, bias), *total, *[normed] * return_norm_output)

    return call


def hold_to_the_composition(given, norm, ours=None, **options):
    """The same bits of every output and gradient."""
    first = contract.gradients(contract.seeded(fused(norm, **options, **(ours or {}))), given)
    second = contract.gradients(contract.seeded(composed(norm, **options)), given, first[2])
    contract.equal_bits(first[0] + first[1], second[0] + second[1])


@cases
@dtypes
@norms
@residuals
def test_bits_of_the_composition(case, dtype, norm, with_residual, device):
    given = inputs(case, dtype, device, norm, dtype if with_residual else None)
    hold_to_the_composition(given, norm)
    hold_to_the_composition(given, norm, ours={"keep_normalized": True})


@norms
@residuals
@pytest.mark.parametrize("keep", [False, True], ids=["rebuilt", "kept"])
def test_bits_of_the_options(norm, with_residual, keep, device):
    residual = torch.bfloat16 if with_residual else None
    given = inputs(((6,), 40, 24), torch.bfloat16, device, norm, residual)
    both = {"return_norm_output": True, "zero_centered": True}
    for dropout in (0.0, 0.3 * with_residual):
        hold_to_the_composition(given, norm, {"keep_normalized": keep}, dropout=dropout, **both)


@pytest.mark.parametrize("cols", [64, 1000, 4096, 20000, 140001])
@norms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
def test_bits_at_every_width(cols, norm, dtype, device):
    """Rows within a warp, a block, a cluster, and beyond one."""
    hold_to_the_composition(inputs(((5,), cols, 8), dtype, device, norm), norm)


@norms
def test_bits_of_strided_inputs(norm, device):
    given = inputs(((6,), 40, 24), torch.bfloat16, device, norm, torch.bfloat16)
    apart = [None if tensor is None else strided(tensor) for tensor in given]
    ours = contract.gradients(fused(norm), apart)
    contract.equal_bits(ours[0], contract.gradients(fused(norm), given, ours[2])[0])


@cases
@dtypes
@norms
def test_against_float64(case, dtype, norm, device):
    gains = NORMS.index(norm) + 1

    def stock_op(x, _, *rest):
        return F.linear(getattr(F, norm)(x, x.shape[-1:], *rest[:gains], eps=1e-5), *rest[2:])

    given = inputs(case, dtype, device, norm)
    (y,), grads, (upstream,) = contract.gradients(fused(norm), given)
    truth = wide(*given)
    x64, _, *parameters, weight64, bias64 = truth
    normed = getattr(reference, norm)(x64, *parameters[:gains])
    y64 = reference.linear(normed, weight64, bias64)
    (y_stock,), stock, _ = contract.gradients(stock_op, given, [upstream])
    # norm(x) is rounded, and then y, before or after its bias.
    assert_close(y.cpu(), y64, dtype, roundings=3, sums=32, stock=y_stock.cpu())
    if case[1] == 1:  # the gradient of x is zero but for rounding
        return
    leaves = [leaf for leaf in truth if leaf is not None]
    expected = torch.autograd.grad(y64, leaves, upstream.cpu().double())
    for index, (grad, grad64, theirs) in enumerate(zip(grads, expected, stock, strict=True)):
        assert grad.dtype == dtype
        assert_close(grad.cpu(), grad64, roundings=4, sums=64, stock=theirs.cpu(), what=f"{index}")


def test_float32_residual_under_bfloat16(device):
    """The sum is float32; norm(x) is rebuilt from it with the bits of the forward pass."""
    for norm in NORMS:
        for cols in (40, 4096):
            given = inputs(((6,), cols, 8), torch.bfloat16, device, norm, torch.float32)
            hold_to_the_composition(given, norm)


def test_float32_x_beside_a_16_bit_weight(device):
    x, _, norm_weight, _, _, _ = inputs(((6,), 40, 24), torch.float32, device)
    weight = randn(24, 40, dtype=torch.bfloat16, device=device)
    leaves = [tensor.requires_grad_() for tensor in (x, norm_weight, weight)]
    y = ops.norm_linear(x, norm_weight, None, weight)
    assert torch.equal(y, ops.linear(ops.rms_norm(x, norm_weight).bfloat16(), weight))
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32, torch.bfloat16]


@dtypes
def test_same_bits(dtype, device):
    given = inputs(((2, 700), 130, 67), dtype, device, "layer_norm", dtype)
    first = contract.gradients(fused("layer_norm"), given)
    again = contract.gradients(fused("layer_norm"), given, first[2])
    # For one number of threads: the products are ATen's.
    contract.equal_bits(first[0] + first[1], again[0] + again[1])


def test_gradcheck(device):
    if device != "cpu":
        pytest.skip("float64 runs on the CPU alone")
    for norm in NORMS:
        given = inputs(((2, 3), 5, 4), torch.float64, device, norm, torch.float64)
        leaves = [None if tensor is None else tensor.requires_grad_() for tensor in given]
        torch.autograd.gradcheck(fused(norm, return_norm_output=True), leaves, fast_mode=True)


# --- what is kept and computed --------------------------------------------------------------------


def kept_by(call, leaves):
    """Names of the leaves that the node keeps, and the bytes of all else that it does."""
    names, others = [], {}

    def keep(tensor):
        found = [n for n, leaf in leaves.items() if leaf.data_ptr() == tensor.data_ptr()]
        names.extend(found)
        if not found:
            others[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    return sorted(names), sum(others.values()), out


def leaves_of(case, dtype, device, norm="rms_norm"):
    names = ("x", "residual", "norm_weight", "norm_bias", "weight", "bias")
    given = zip(names, inputs(case, dtype, device, norm), strict=True)
    return {n: tensor.requires_grad_() for n, tensor in given if tensor is not None}


@norms
def test_keeps_x_and_the_statistics(norm, device):
    leaves = leaves_of(((64,), 128, 32), torch.bfloat16, device, norm)
    statistics = 4 * 64 * (1 if norm == "rms_norm" else 2)
    for keep, more in ((False, 0), (True, 2 * 64 * 128)):
        names, others, _ = kept_by(
            lambda keep=keep: ops.norm_linear(**leaves_to(leaves), norm=norm, keep_normalized=keep),
            leaves,
        )
        assert names == sorted(leaves.keys() - {"bias"})
        assert others == statistics + more


def leaves_to(leaves):
    return {"norm_bias": None, **leaves}


@pytest.mark.parametrize(
    ("frozen", "kept"),
    [
        ("weight", ["norm_weight", "weight", "x"]),
        ("x norm_weight", ["norm_weight", "x"]),
        ("x norm_weight weight", []),
        ("bias", ["norm_weight", "weight", "x"]),
    ],
)
def test_frozen_parameters_keep_and_compute_nothing(frozen, kept, device):
    leaves = leaves_of(((5,), 4, 3), torch.float32, device)
    frozen = frozen.split()
    for name in frozen:
        leaves[name].requires_grad_(False)
    names, _, y = kept_by(lambda: ops.norm_linear(**leaves_to(leaves)), leaves)
    assert names == kept
    calls = []
    with contract.seen_calls(calls):
        y.sum().backward()
    products = [name for name in calls if name in contract.PRODUCTS]
    assert len(products) == ("weight" not in frozen) + ("x" not in frozen)
    for name, leaf in leaves.items():
        assert (leaf.grad is None) == (name in frozen)


def test_only_the_sum_is_used(device):
    for norm in NORMS:
        x, residual, *rest = inputs(((3,), 4, 5), torch.float32, device, norm, torch.float32)
        leaves = [x.requires_grad_(), residual.requires_grad_()]
        _, total = fused(norm)(*leaves, *rest)
        for grad in torch.autograd.grad(total.sum(), leaves):
            assert torch.equal(grad, torch.ones_like(x))


@pytest.mark.parametrize("dummy", ["none", "empty", "zeros"])
@pytest.mark.parametrize("accumulate", [True, False], ids=["adds", "overwrites"])
def test_main_grad(dummy, accumulate, device):
    leaves = leaves_of(((16,), 24, 8), torch.bfloat16, device)
    buffers = [torch.ones(8, 24, device=device) for _ in range(2)]
    options = {"accumulate": accumulate, "dummy_grad": dummy}
    y = ops.norm_linear(**leaves_to(leaves), main_grad=buffers[0], **options)
    y.sum().backward()
    dummy_grad = leaves["weight"].grad
    assert (dummy_grad is None) == (dummy == "none")
    normed = ops.rms_norm(leaves["x"], leaves["norm_weight"])
    y = ops.linear(normed, leaves["weight"], main_grad=buffers[1], **options)
    y.sum().backward()
    assert torch.equal(*buffers)


def test_delayed_gradient(device):
    leaves = leaves_of(((16,), 24, 8), torch.float32, device)
    queue = ops.WeightGradientQueue()
    normed = ops.rms_norm(leaves["x"], leaves["norm_weight"]).detach()
    ops.norm_linear(**leaves_to(leaves), delayed=queue).sum().backward()
    assert leaves["weight"].grad is None and len(queue) == 1
    expected = torch.autograd.grad(ops.linear(normed, leaves["weight"]).sum(), leaves["weight"])[0]
    assert torch.equal(queue.pop(), expected)


# --- refusals and the laws ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (3, 5)}, r"x: expected a last dimension of 4, not 5"),
        ({"norm_bias": (4,)}, r"norm_bias: expected none beside rms_norm"),
        ({"norm_bias": (3,), "norm": "layer_norm"}, r"norm_bias: expected \[4\], not \[3\]"),
        ({"weight": (4,)}, r"weight: expected \[out, in\], not a rank of 1"),
        ({"weight": (3, 5)}, r"x: expected a last dimension of 5, not 4"),
        ({"bias": (4,)}, r"bias: expected \[3\], not \[4\]"),
        ({"residual": (3, 4)}, r"residual: expected \[2, 4\], not \[3, 4\]"),
        ({"norm": "l2"}, r"norm: expected rms_norm or layer_norm, not l2"),
        ({"epsilon": -1.0}, r"epsilon: expected 0 or more, not -1"),
        ({"main_grad": (4, 3)}, r"main_grad: expected \[3, 4\], not \[4, 3\]"),
        ({"dummy_grad": "ones"}, r"dummy_grad: expected none, empty or zeros, not ones"),
        ({"tp_group": "tp"}, r"tp_group: expected none, not tp; products over more ranks"),
        ({"sequence_parallel": True}, r"sequence_parallel: expected false; products over"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals(change, message, device):
    given = {"x": (2, 4), "norm_weight": (4,), "norm_bias": None, "weight": (3, 4)} | change
    given = {
        name: torch.zeros(value, device=device) if isinstance(value, tuple) else value
        for name, value in given.items()
    }
    with pytest.raises(RuntimeError, match="norm_linear: " + message):
        ops.norm_linear(**given)


def test_refuses_other_dtypes_and_devices(device):
    x, weight = torch.zeros(2, 4, device=device), torch.zeros(3, 4, device=device)
    call = torch.ops.redline.norm_linear
    with pytest.raises(RuntimeError, match="weight: expected Half as x has, not BFloat16"):
        call(x.half(), None, None, weight.bfloat16())
    with pytest.raises(RuntimeError, match="bias: expected Float as weight has, not BFloat16"):
        call(x, None, None, weight, torch.zeros(3, device=device).bfloat16())
    with pytest.raises(RuntimeError, match=r"norm_weight: expected Float as x has.* not Half"):
        call(x, torch.zeros(4, device=device).half(), None, weight)
    with pytest.raises(RuntimeError, match=r"weight: expected a tensor on .*, not on meta"):
        call(x, None, None, weight.to("meta"))
    message = "norm_linear: main_grad: expected a floating dtype, not Long"
    with pytest.raises(RuntimeError, match=message):
        ops.norm_linear(x, None, None, weight, main_grad=weight.long())


def test_autocast_is_the_stock_rule(device):
    for norm in NORMS:
        given = inputs(((5,), 4, 3), torch.float32, device, norm)
        contract.autocasts_as(fused(norm), composed(norm), given, device)


def test_meta_and_inference_mode(device):
    given = inputs(((2, 5), 4, 3), torch.float32, device, "layer_norm", torch.float32)
    on_meta = fused("layer_norm")(*(tensor.to("meta") for tensor in given))
    assert [out.shape for out in on_meta] == [(2, 5, 3), (2, 5, 4)]
    contract.runs_in_inference_mode(fused("layer_norm"), given)


def test_opcheck(device):
    x, residual, *parameters = (
        tensor.requires_grad_()
        for tensor in inputs(((2, 5), 4, 3), torch.float32, device, "layer_norm", torch.float32)
    )
    op = torch.ops.redline.norm_linear.default
    contract.passes_opcheck(op, (x, *parameters), {"norm": "layer_norm"})
    everything = {"norm": "layer_norm", "residual": residual, "return_norm_output": True}
    contract.passes_opcheck(op, (x, *parameters), everything)
    statistics = torch.rand(2, 5, device=device)
    rebuild = torch.ops.redline.norm_rebuild.default
    args = (x.detach(), None, None, statistics, statistics, False, torch.bfloat16)
    contract.passes_opcheck(rebuild, args, inner=True)
    both = torch.ops.redline.norm_backward_rebuild.default
    x = x.detach()
    weight = x[0, 0].clone()
    args = (x.clone(), x, weight, weight, statistics, statistics, x.clone(), True, True, True)
    contract.passes_opcheck(both, args, inner=True)


@pytest.mark.parametrize("norm", NORMS)
def test_compiles_and_exports(norm, device):
    given = inputs(((3, 5), 4, 6), torch.float32, device, norm, torch.float32)
    x, residual, *rest = given

    def call(x, residual):
        return fused(norm, return_norm_output=True)(x, residual, *rest)

    contract.compiles(call, [x, residual])
    contract.compiles_dynamic(call, [x, residual])
    contract.exports(call, [x, residual])
    contract.refuses_double_backward(call, [x, residual])
    contract.refuses_a_tangent_in_backward(call, [x, residual])
    if norm == "layer_norm":
        plain = [x, *rest]
        contract.runs_under_compiled_autograd(
            lambda x, *given: ops.norm_linear(x, *given, norm=norm), plain
        )
    with pytest.raises(RuntimeError, match="vmap is not built"):
        torch.vmap(lambda x: ops.norm_linear(x, None, None, rest[2]))(torch.stack([x, x]))


def test_a_compiled_backward_rebuilds(device):
    """The traced graph keeps x, and rebuilds norm(x) in its backward half."""
    leaves = leaves_of(((64,), 128, 32), torch.float32, device)
    torch._dynamo.reset()
    compiled = torch.compile(ops.norm_linear, fullgraph=True, backend="aot_eager")
    calls = []
    y = compiled(**leaves_to(leaves))
    with contract.seen_calls(calls):
        y.sum().backward()
    assert calls.count("redline::norm_backward_rebuild") == 1
    assert calls.count("redline::rms_norm_forward") == calls.count("redline::norm_rebuild") == 0


def test_captures(device):
    if device != "cuda":
        pytest.skip("CUDA graphs")
    given = inputs(((64,), 256, 128), torch.bfloat16, device)
    tensors = [tensor for tensor in given if tensor is not None]

    def call(x, norm_weight, weight, bias):
        return ops.norm_linear(x, norm_weight, None, weight, bias)

    contract.captures(call, tensors)
    contract.agrees_on_side_stream(call, tensors)
