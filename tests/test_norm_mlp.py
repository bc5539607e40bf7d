"""norm_mlp: the bits of its ops one by one, what it keeps, and the laws."""

import pytest
import torch

import contract
import reference
from cases import DEVICES, DTYPES, randn, strided, wide
from redline import ops
from tolerance import assert_close

pytestmark = pytest.mark.parametrize("device", DEVICES)

GATED = ["swiglu", "geglu", "reglu", "quick_geglu", "clamped_swiglu"]
PLAIN = ["gelu", "gelu_erf", "quick_gelu", "silu", "relu", "squared_relu"]
NORMS = ["rms_norm", "layer_norm"]
NAMES = (
    "x",
    "residual",
    "norm_weight",
    "norm_bias",
    "fc1_weight",
    "fc1_bias",
    "fc2_weight",
    "fc2_bias",
)
# (x's leading dimensions, in, ffn, out): one, odd, a vector, empty, over a tile.
CASES = [((1,), 1, 1, 1), ((3, 5), 7, 9, 4), ((), 8, 3, 8), ((0, 2), 4, 5, 4), ((2, 65), 70, 65, 9)]

cases = pytest.mark.parametrize(
    "case", CASES, ids=lambda c: f"{'x'.join(map(str, c[0])) or '1d'}-{c[1]}-{c[2]}-{c[3]}"
)
dtypes = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
norms = pytest.mark.parametrize("norm", NORMS)
kinds = pytest.mark.parametrize("kind", GATED + PLAIN)


def inputs(case, dtype, device, kind="swiglu", absent=("residual", "norm_bias")):
    """The tensors of NAMES; None for what is absent."""
    leading, cols, ffn, out = case
    rows = 2 * ffn if kind in GATED else ffn
    shapes = [(*leading, cols)] * 2 + [(cols,)] * 2 + [(rows, cols), (rows,), (out, ffn), (out,)]
    each = zip(NAMES, shapes, strict=True)
    return [
        None if name in absent else randn(*shape, dtype=dtype, device=device, seed=i)
        for i, (name, shape) in enumerate(each)
    ]


def fused(kind="swiglu", norm="rms_norm", **options):
    """norm_mlp with every tensor by place, and always a tuple."""

    def call(x, residual, *parameters):
        out = ops.norm_mlp(x, *parameters, residual=residual, activation=kind, norm=norm, **options)
        return out if isinstance(out, tuple) else (out,)

    return call


def composed(kind="swiglu", norm="rms_norm", zero_centered=False, dropout=0.0):
    """The same by the ops one by one."""

    def call(x, residual, *given):
        norm_weight, norm_bias, fc1_weight, fc1_bias, fc2_weight, fc2_bias = given
        parameters = [norm_weight] if norm == "rms_norm" else [norm_weight, norm_bias]
        options = {"zero_centered": zero_centered}
        if residual is None:
            normed, total = getattr(ops, norm)(x, *parameters, **options), ()
        else:
            op = getattr(ops, f"bias_dropout_residual_{norm}")
            normed, *total = op(x, None, residual, dropout, *parameters, **options)
        up = ops.linear(normed, fc1_weight)
        if kind in GATED:
            activated = ops.gated_activation(up, kind=kind, bias=fc1_bias)
        else:
            activated = ops.activation(up, fc1_bias, kind)
        return (ops.linear(activated, fc2_weight, fc2_bias), *total)

    return call


def hold_to_the_composition(given, *which, **options):
    first = contract.gradients(contract.seeded(fused(*which, **options)), given)
    second = contract.gradients(contract.seeded(composed(*which, **options)), given, first[2])
    contract.equal_bits(first[0] + first[1], second[0] + second[1])


@kinds
@dtypes
@cases
def test_bits_of_the_composition(case, dtype, kind, device):
    hold_to_the_composition(inputs(case, dtype, device, kind), kind)


@norms
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
@pytest.mark.parametrize(
    "absent",
    [(), ("residual",), ("norm_weight", "norm_bias"), ("fc1_bias",), ("fc2_bias", "residual")],
    ids=lambda names: " ".join(names) or "all",
)
def test_bits_with_and_without_each_part(absent, kind, norm, device):
    if norm == "rms_norm":
        absent = (*absent, "norm_bias")
    given = inputs(((6,), 40, 24, 16), torch.bfloat16, device, kind, absent)
    hold_to_the_composition(given, kind, norm)
    hold_to_the_composition(given, kind, norm, zero_centered=True)
    if "residual" not in absent:
        hold_to_the_composition(given, kind, norm, dropout=0.3)


@pytest.mark.parametrize("kind", ["swiglu", "gelu_erf"])
def test_bits_at_a_models_width(kind, device):
    given = inputs(((300,), 512, 1408, 512), torch.bfloat16, device, kind)
    hold_to_the_composition(given, kind)


def test_bits_of_strided_inputs(device):
    given = inputs(((6,), 40, 24, 16), torch.bfloat16, device, absent=("norm_bias",))
    apart = [None if tensor is None else strided(tensor) for tensor in given]
    ours = contract.gradients(fused(), apart)
    contract.equal_bits(ours[0], contract.gradients(fused(), given, ours[2])[0])


@dtypes
@kinds
def test_against_float64(kind, dtype, device):
    given = inputs(((4, 8), 30, 24, 16), dtype, device, kind)
    (y,), grads, (upstream,) = contract.gradients(fused(kind), given)
    truth = wide(*given)
    x, _, norm_weight, _, fc1_weight, fc1_bias, fc2_weight, fc2_bias = truth
    up = reference.linear(reference.rms_norm(x, norm_weight), fc1_weight) + fc1_bias
    if kind in GATED:
        activated = reference.gated_activation(up, kind)
    else:
        activated = reference.activation(up, kind=kind)
    y64 = reference.linear(activated, fc2_weight, fc2_bias)
    # Rounded on the way: norm(x), the product, the activation, y, and y before its bias.
    assert_close(y.cpu(), y64, dtype, roundings=6, sums=64)
    leaves = [leaf for leaf in truth if leaf is not None]
    expected = torch.autograd.grad(y64, leaves, upstream.cpu().double())
    for index, (grad, grad64) in enumerate(zip(grads, expected, strict=True)):
        assert grad.dtype == dtype
        assert_close(grad.cpu(), grad64, dtype, roundings=12, sums=128, what=f"gradient {index}")


@dtypes
def test_same_bits(dtype, device):
    given = inputs(((2, 300), 130, 67, 40), dtype, device, absent=("norm_bias",))
    first = contract.gradients(fused(), given)
    again = contract.gradients(fused(), given, first[2])
    # For one number of threads: the products are ATen's.
    contract.equal_bits(first[0] + first[1], again[0] + again[1])


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_gradcheck(kind, device):
    if device != "cpu":
        pytest.skip("float64 runs on the CPU alone")
    given = inputs(((2, 3), 5, 4, 6), torch.float64, device, kind, absent=())
    leaves = [tensor.requires_grad_() for tensor in given]
    torch.autograd.gradcheck(fused(kind, "layer_norm"), leaves, fast_mode=True)


# --- what is kept and computed --------------------------------------------------------------------


def leaves_of(case, dtype, device, kind="swiglu"):
    given = zip(NAMES, inputs(case, dtype, device, kind), strict=True)
    return {name: tensor.requires_grad_() for name, tensor in given if tensor is not None}


def call(leaves, **options):
    return ops.norm_mlp(**{"norm_bias": None, **leaves}, **options)


def kept_by(leaves, **options):
    """Names of the leaves that the node keeps, the bytes of all else that it does, its result."""
    names, others = [], {}

    def keep(tensor):
        found = [n for n, leaf in leaves.items() if leaf.data_ptr() == tensor.data_ptr()]
        names.extend(found)
        if not found:
            others[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = call(leaves, **options)
    return set(names), sum(others.values()), y


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_keeps_x_the_statistics_and_the_pre_activation(kind, device):
    rows, cols, ffn = 64, 128, 96
    leaves = leaves_of(((rows,), cols, ffn, cols), torch.bfloat16, device, kind)
    names, others, _ = kept_by(leaves, activation=kind)
    assert names == leaves.keys() - {"fc2_bias"}
    assert others == 4 * rows + 2 * rows * ffn * (2 if kind == "swiglu" else 1)


@pytest.mark.parametrize(
    ("trained", "products", "keeps_up"),
    [
        ("x", 2, True),
        ("norm_weight", 2, True),
        ("fc1_weight", 2, True),
        ("fc1_bias", 1, True),
        ("fc2_weight", 1, True),
        ("fc2_bias", 0, False),
        ("fc1_weight fc2_weight", 3, True),
        ("x fc2_weight", 3, True),
    ],
)
@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_frozen_parameters_keep_and_compute_nothing(kind, trained, products, keeps_up, device):
    leaves = leaves_of(((5,), 4, 3, 6), torch.float32, device, kind)
    for name, leaf in leaves.items():
        leaf.requires_grad_(name in trained.split())
    _, others, y = kept_by(leaves, activation=kind)
    assert (others > 0) == keeps_up
    calls = []
    with contract.seen_calls(calls):
        y.sum().backward()
    assert sum(name in contract.PRODUCTS for name in calls) == products
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in trained.split())
    whole = leaves_of(((5,), 4, 3, 6), torch.float32, device, kind)
    call(whole, activation=kind).sum().backward()
    for name in trained.split():
        assert torch.equal(leaves[name].grad, whole[name].grad)


def test_only_the_sum_is_used(device):
    x, residual, *rest = inputs(((3,), 4, 5, 4), torch.float32, device, absent=("norm_bias",))
    leaves = [x.requires_grad_(), residual.requires_grad_()]
    _, total = fused()(*leaves, *rest)
    for grad in torch.autograd.grad(total.sum(), leaves):
        assert torch.equal(grad, torch.ones_like(x))


def test_main_grads(device):
    leaves = leaves_of(((16,), 24, 8, 24), torch.bfloat16, device)
    first = {n: torch.ones_like(leaves[f"{n}_weight"], dtype=torch.float32) for n in ("fc1", "fc2")}
    second = {name: buffer.clone() for name, buffer in first.items()}
    options = {f"{name}_main_grad": buffer for name, buffer in first.items()}
    y = call(leaves, **options, fc1_accumulate=False, fc2_dummy_grad="zeros")
    upstream = torch.randn_like(y)
    y.backward(upstream)
    assert leaves["fc1_weight"].grad is None and not leaves["fc2_weight"].grad.any()
    assert leaves["x"].grad is not None
    normed = ops.rms_norm(leaves["x"], leaves["norm_weight"])
    up = ops.linear(normed, leaves["fc1_weight"], main_grad=second["fc1"], accumulate=False)
    activated = ops.gated_activation(up, bias=leaves["fc1_bias"])
    ops.linear(activated, leaves["fc2_weight"], main_grad=second["fc2"]).backward(upstream)
    for name in first:
        assert torch.equal(first[name], second[name]), name


def test_delayed_gradients(device):
    leaves = leaves_of(((16,), 24, 8, 24), torch.float32, device)
    expected = torch.autograd.grad(call(leaves).sum(), [leaves["fc1_weight"], leaves["fc2_weight"]])
    queues = [ops.WeightGradientQueue(), ops.WeightGradientQueue()]
    call(leaves, fc1_delayed=queues[0], fc2_delayed=queues[1]).sum().backward()
    assert leaves["fc1_weight"].grad is None and leaves["fc2_weight"].grad is None
    for queue, gradient in zip(queues, expected, strict=True):
        assert torch.equal(queue.pop(), gradient)


# --- refusals and the laws ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation": "swish"}, r"activation: expected one of swiglu, .* gelu, .*, not swish"),
        ({"fc1_weight": (5, 4)}, r"fc1_weight: expected 2 x 3 rows for swiglu .*, not 5"),
        ({"activation": "gelu"}, r"fc1_weight: expected 3 rows for gelu and fc2_weight .* not 6"),
        ({"fc1_weight": (6,)}, r"fc1_weight: expected \[out, in\], not a rank of 1"),
        ({"fc2_weight": (6,)}, r"fc2_weight: expected \[out, in\], not a rank of 1"),
        ({"x": (2, 5)}, r"x: expected a last dimension of 4, not 5"),
        ({"fc1_weight": (6, 5)}, r"x: expected a last dimension of 5, not 4"),
        ({"fc1_bias": (3,)}, r"fc1_bias: expected \[6\], not \[3\]"),
        ({"fc2_bias": (3,)}, r"fc2_bias: expected \[4\], not \[3\]"),
        ({"norm_weight": (3,)}, r"norm_weight: expected \[4\], not \[3\]"),
        ({"residual": (3, 4)}, r"residual: expected \[2, 4\], not \[3, 4\]"),
        ({"norm": "l2"}, r"norm: expected rms_norm or layer_norm, not l2"),
        ({"fc1_main_grad": (4, 6)}, r"fc1_main_grad: expected \[6, 4\], not \[4, 6\]"),
        ({"fc2_main_grad": (3, 4)}, r"fc2_main_grad: expected \[4, 3\], not \[3, 4\]"),
        ({"fc2_dummy_grad": "ones"}, r"fc2_dummy_grad: expected none, empty or zeros, not ones"),
        ({"tp_group": "tp"}, r"tp_group: expected none, not tp; products over more ranks"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refusals(change, message, device):
    given = {"x": (2, 4), "norm_weight": None, "norm_bias": None, "fc1_weight": (6, 4)}
    given |= {"fc1_bias": None, "fc2_weight": (4, 3)} | change
    given = {
        name: torch.zeros(value, device=device) if isinstance(value, tuple) else value
        for name, value in given.items()
    }
    with pytest.raises(RuntimeError, match="norm_mlp: " + message):
        ops.norm_mlp(**given)


def test_refuses_other_dtypes(device):
    x, fc1, fc2 = (torch.zeros(s, device=device) for s in ((2, 4), (6, 4), (4, 3)))
    with pytest.raises(RuntimeError, match="fc2_weight: expected Float as x has, not BFloat16"):
        ops.norm_mlp(x, None, None, fc1, None, fc2.bfloat16())
    with pytest.raises(RuntimeError, match="fc1_bias: expected Float or Float, not Half"):
        ops.norm_mlp(x, None, None, fc1, torch.zeros(6, device=device).half(), fc2)
    for name, buffer in (("fc1_main_grad", fc1.long()), ("fc2_main_grad", fc2.int())):
        message = f"norm_mlp: {name}: expected a floating dtype, not {buffer.type().split('.')[-1]}"
        with pytest.raises(RuntimeError, match=message.removesuffix("Tensor")):
            ops.norm_mlp(x, None, None, fc1, None, fc2, **{name: buffer})


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_autocast_is_the_stock_rule(kind, device):
    given = inputs(((5,), 4, 3, 6), torch.float32, device, kind)
    contract.autocasts_as(fused(kind), composed(kind), given, device)


def test_meta_and_inference_mode(device):
    given = inputs(((2, 5), 4, 3, 6), torch.float32, device, absent=())
    outs = fused(norm="layer_norm")(*(tensor.to("meta") for tensor in given))
    assert [out.shape for out in outs] == [(2, 5, 6), (2, 5, 4)]
    contract.runs_in_inference_mode(fused(norm="layer_norm"), given)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_opcheck(kind, device):
    x, residual, *parameters = (
        tensor.requires_grad_()
        for tensor in inputs(((2, 5), 4, 3, 6), torch.float32, device, kind, absent=())
    )
    options = {"norm": "layer_norm", "activation": kind}
    op = torch.ops.redline.norm_mlp.default
    contract.passes_opcheck(op, (x, *parameters), options)
    contract.passes_opcheck(op, (x, *parameters), options | {"residual": residual})
    up = torch.randn(5, 6, device=device)
    family = "gated_activation" if kind == "swiglu" else "activation"
    rebuild = getattr(torch.ops.redline, f"{family}_backward_rebuild").default
    y_grad = torch.randn(5, 3 if kind == "swiglu" else 6, device=device)
    contract.passes_opcheck(rebuild, (y_grad, up, up[0].clone(), kind, True), inner=True)


@pytest.mark.parametrize("kind", ["swiglu", "gelu"])
def test_compiles_and_exports(kind, device):
    # Sizes that differ: a dynamic trace takes equal ones for the same.
    x, residual, *rest = inputs(((3, 5), 4, 7, 6), torch.float32, device, kind, ("norm_bias",))

    def step(x, residual):
        return fused(kind)(x, residual, *rest)

    contract.compiles(step, [x, residual])
    contract.compiles_dynamic(step, [x, residual])
    contract.exports(step, [x, residual])
    contract.refuses_double_backward(step, [x, residual])
    contract.refuses_a_tangent_in_backward(step, [x, residual])
    plain = [x, *(tensor for tensor in rest if tensor is not None)]
    contract.runs_under_compiled_autograd(
        lambda x, g, *given: ops.norm_mlp(x, g, None, *given, activation=kind), plain
    )
    with pytest.raises(RuntimeError, match="vmap is not built"):
        torch.vmap(lambda x: ops.norm_mlp(x, *rest, activation=kind))(torch.stack([x, x]))


def test_a_compiled_backward_rebuilds(device):
    """The traced graph keeps x and the pre-activation, and rebuilds the rest in its backward."""
    leaves = leaves_of(((64,), 128, 32, 16), torch.float32, device)
    torch._dynamo.reset()
    y = torch.compile(call, fullgraph=True, backend="aot_eager")(leaves)
    calls = []
    with contract.seen_calls(calls):
        y.sum().backward()
    ours = [n for n in calls if n.startswith("redline::") and n != "redline::gemm"]
    assert sorted(ours) == [
        "redline::gated_activation_backward_rebuild",
        "redline::norm_backward_rebuild",
    ]


def test_captures(device):
    if device != "cuda":
        pytest.skip("CUDA graphs")
    given = [t for t in inputs(((64,), 256, 128, 256), torch.bfloat16, device) if t is not None]

    def step(x, norm_weight, *rest):
        return ops.norm_mlp(x, norm_weight, None, *rest)

    contract.captures(step, given)
    contract.agrees_on_side_stream(step, given)
