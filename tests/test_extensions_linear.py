"""The new address's linears: arithmetic, attributes, initialisation, refusals."""

from types import SimpleNamespace

import pytest
import torch

import reference
from cases import DEVICES, randn, wide
from megatron_config import (
    FLAVOURS,
    IN,
    OUT,
    configuration,
    make_column,
    make_linear,
    make_norm_linear,
    make_row,
    on,
    truth,
)
from redline import parallel
from redline.extensions import transformer_engine as te
from tolerance import assert_close

flavours = pytest.mark.parametrize("make", FLAVOURS.values(), ids=FLAVOURS)
devices = pytest.mark.parametrize("device", DEVICES)


@devices
@flavours
@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("skip", [False, True], ids=["adds", "returns_bias"])
def test_forward_and_backward(make, normalization, skip, device):
    layer = make(on(device, normalization=normalization), skip_bias_add=skip)
    torch.nn.init.normal_(layer.bias)
    x = randn(5, 2, IN, dtype=torch.float32, device=device).requires_grad_()
    y, bias = layer(x)
    assert (bias is layer.bias) if skip else (bias is None)
    y = y if bias is None else y + bias
    names, parameters = zip(*layer.named_parameters(), strict=True)
    x64, *parameters64 = wide(x, *parameters)
    y64 = truth(layer, x64, dict(zip(names, parameters64, strict=True)))
    assert_close(y.cpu(), y64, roundings=3, sums=16)
    upstream = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *parameters], upstream)
    grads64 = torch.autograd.grad(y64, [x64, *parameters64], upstream.cpu().double())
    for name, grad, grad64 in zip(["x", *names], grads, grads64, strict=True):
        assert_close(grad.cpu(), grad64, roundings=8, sums=32, what=f"{name}_grad")


@flavours
def test_compiles_without_a_break(make):
    layer, x = make(), torch.randn(3, IN, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grads = [
        torch.autograd.grad(call(x)[0].sum(), [x, *layer.parameters()])
        for call in (layer, compiled, compiled)
    ]
    for other in grads[1:]:
        for a, b in zip(grads[0], other, strict=True):
            assert torch.equal(a, b)


def attributes(parameter):
    names = ("tensor_model_parallel", "partition_dim", "partition_stride", "sequence_parallel")
    return tuple(getattr(parameter, name, None) for name in (*names, "allreduce"))


REPLICA = (False, None, None, False, True)


@pytest.mark.parametrize(
    ("make", "weight", "bias"),
    [
        ("plain", (True, 0, 1, False, True), REPLICA),
        ("duplicated", REPLICA, REPLICA),
        ("column", (True, 0, 1, False, True), (True, 0, 1, False, True)),
        ("row", (True, 1, 1, False, True), REPLICA),
        ("norm_column", (True, 0, 1, False, True), (True, 0, 1, False, True)),
    ],
)
def test_parameters_carry_megatrons_attributes(make, weight, bias):
    layer = FLAVOURS[make]()
    assert attributes(layer.weight) == weight
    assert attributes(layer.bias) == bias


def test_strides_and_sequence_parallel_are_marked():
    config = configuration(sequence_parallel=True, normalization="LayerNorm")
    column, row, fused = make_column(stride=2), make_row(config), make_norm_linear(config, stride=2)
    assert column.weight.partition_stride == column.bias.partition_stride == 2
    assert (row.bias.sequence_parallel, row.weight.sequence_parallel) == (True, False)
    assert fused.weight.partition_stride == 2
    assert fused.layer_norm_weight.sequence_parallel and fused.layer_norm_bias.sequence_parallel
    assert all(p.sequence_parallel for p in make_linear("duplicated", config).parameters())
    assert te.TENorm(config, IN).weight.sequence_parallel


@flavours
def test_attributes_may_be_set_before_the_constructor(make):
    kind = type(make())

    class Early(kind):
        def __init__(self, *args, **kwargs):
            self.config, self.te_return_bias, self.is_first_microbatch = kwargs["config"], 1, True
            self.expert_parallel, self.stride, self.te_quant_params = False, 1, None
            super().__init__(*args, **kwargs)

    kwargs = {"config": configuration(), "init_method": torch.nn.init.ones_, "bias": False}
    kwargs |= {"skip_bias_add": False}
    if kind is te.TELinear:
        kwargs |= {"parallel_mode": None, "skip_weight_param_allocation": False}
    else:
        kwargs |= {"is_expert": False}
        kwargs |= {"input_is_parallel": True} if kind is te.TERowParallelLinear else {}
        kwargs |= {} if kind is te.TERowParallelLinear else {"gather_output": False}
    layer = Early(IN, OUT, **kwargs)
    assert layer.stride == 1 and layer.weight.eq(1).all()
    layer(torch.ones(2, IN))


# --- initialisation ---------------------------------------------------------------------------


def test_cpu_initialisation_rounds_a_float32_weight():
    torch.manual_seed(3)
    layer = make_column(configuration(params_dtype=torch.bfloat16))
    torch.manual_seed(3)
    expected = torch.nn.init.normal_(torch.empty(OUT, IN)).bfloat16()
    assert torch.equal(layer.weight, expected) and not layer.bias.any()


@flavours
def test_initialisation_can_be_left_out_and_done_later(make):
    def never(weight):
        raise AssertionError("the weight was filled")

    make(configuration(perform_initialization=False), init_method=never)
    meta = configuration(use_cpu_initialization=False, init_model_with_meta_device=True)
    layer = make(meta, init_method=torch.nn.init.ones_)
    assert all(parameter.is_meta for parameter in layer.parameters())
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.weight.eq(1).all() and layer.bias.eq(0).all()
    assert all(not parameter.isnan().any() for parameter in layer.parameters())


@flavours
def test_initialisation_draws_once(make):
    drawn = []
    make(init_method=lambda weight: drawn.append(weight.shape))
    assert drawn == [(OUT, IN)]


@devices
@pytest.mark.parametrize("zero_centered", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_residual_norm_gives_its_input_too(dtype, zero_centered, device):
    config = on(
        device,
        fused_residual_rmsnorm=True,
        params_dtype=dtype,
        layernorm_zero_centered_gamma=zero_centered,
    )
    norm = te.TENorm(config, IN, has_residual=True)
    assert isinstance(norm, te.TEFusedResidualRMSNorm) and norm.returns_residual
    assert not te.TENorm(config, IN).returns_residual
    x = randn(3, 5, IN, dtype=dtype, device=device).requires_grad_()
    y, residual = norm(x)
    assert torch.equal(residual, x) and residual.data_ptr() == x.data_ptr()
    x64, weight64 = wide(x, norm.weight)
    y64 = reference.rms_norm(x64, weight64, zero_centered=zero_centered)
    assert_close(y.cpu(), y64, dtype, sums=4)
    upstream = [torch.randn_like(x) for _ in range(2)]
    grads = torch.autograd.grad([y, residual], [x, norm.weight], upstream)
    upstream64 = [grad.cpu().double() for grad in upstream]
    grads64 = torch.autograd.grad([y64, x64], [x64, weight64], upstream64)
    for grad, grad64 in zip(grads, grads64, strict=True):
        assert_close(grad.cpu(), grad64, dtype, sums=16)


@pytest.mark.parametrize("used", [0, 1], ids=["normed", "residual"])
def test_residual_norm_of_which_one_output_is_used(used):
    norm = te.TENorm(configuration(fused_residual_rmsnorm=True), IN, has_residual=True)
    x = torch.randn(3, IN, requires_grad=True)
    upstream = torch.randn_like(x)
    (grad,) = torch.autograd.grad(norm(x)[used], x, upstream)
    (x64,) = wide(x)
    outputs = reference.rms_norm(x64, torch.ones(IN).double()), x64
    (grad64,) = torch.autograd.grad(outputs[used], x64, upstream.double())
    assert_close(grad, grad64, roundings=4, sums=16)


def test_residual_norm_leaves_a_wider_stream_alone():
    config = configuration(fused_residual_rmsnorm=True, params_dtype=torch.bfloat16)
    x = torch.randn(3, IN, requires_grad=True)
    y, residual = te.TENorm(config, IN, has_residual=True)(x)
    assert y.dtype == torch.bfloat16 and residual is x
    (y.float().sum() + residual.sum()).backward()
    assert x.grad.dtype == torch.float32


# --- refusals -----------------------------------------------------------------------------------

QUANTISED = "quantised products are not built; bfloat16 works: leave it unset"
OVERLAP = "overlap of communication and products is not built; leave it off"
RANKS = "more ranks are not built; one rank works"


@pytest.mark.parametrize(
    ("build", "error", "sentence"),
    [
        (
            lambda: make_column(configuration(fp8="hybrid")),
            NotImplementedError,
            f"TEColumnParallelLinear: fp8: expected None or False, not hybrid; {QUANTISED}",
        ),
        (
            lambda: make_row(configuration(fp4="e2m1")),
            NotImplementedError,
            f"TERowParallelLinear: fp4: expected None or False, not e2m1; {QUANTISED}",
        ),
        (
            lambda: make_linear().finish_init("mxfp8"),
            NotImplementedError,
            f"TELinear: quantization_config: expected None, not mxfp8; {QUANTISED}",
        ),
        (
            lambda: make_row(configuration(tp_comm_overlap=True)),
            NotImplementedError,
            f"TERowParallelLinear: tp_comm_overlap: expected False, not True; {OVERLAP}",
        ),
        (
            lambda: make_norm_linear(configuration(tensor_model_parallel_size=2)),
            NotImplementedError,
            "TELayerNormColumnParallelLinear: tensor_model_parallel_size: expected 1, not 2; "
            + RANKS,
        ),
        (
            lambda: make_linear(symmetric_ar_type="two_shot"),
            NotImplementedError,
            f"TELinear: symmetric_ar_type: expected None, not two_shot; {RANKS}",
        ),
        (
            lambda: make_column(gather_output=True),
            ValueError,
            "TEColumnParallelLinear: gather_output: expected False, not True",
        ),
        (
            lambda: make_row(input_is_parallel=False),
            ValueError,
            "TERowParallelLinear: input_is_parallel: expected True, not False",
        ),
        (
            lambda: make_norm_linear(is_expert=True),
            ValueError,
            "TELayerNormColumnParallelLinear: is_expert: expected False, not True",
        ),
        (
            lambda: make_linear("duplicated", tp_group="tp"),
            ValueError,
            "TELinear: tp_group: expected None, not tp",
        ),
        (
            lambda: te.TENorm(
                configuration(normalization="LayerNorm", fused_residual_rmsnorm=True), 8, 1e-5, True
            ),
            ValueError,
            "TENorm: normalization: expected RMSNorm, not LayerNorm",
        ),
    ],
)
def test_refusals(build, error, sentence):
    with pytest.raises(error) as caught:
        build()
    assert str(caught.value) == sentence


def test_a_group_of_more_ranks_is_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: group.size)
    make_row(tp_group=SimpleNamespace(size=1))(torch.ones(2, IN))
    with pytest.raises(NotImplementedError) as caught:
        make_row(tp_group=SimpleNamespace(size=2))
    assert str(caught.value) == (
        "TERowParallelLinear: tp_group: expected one rank, not 2: tensor and sequence parallel "
        "over more ranks are not built; data parallel works"
    )
    x = torch.ones(2)
    assert parallel.column_input(x, None, False) is x is parallel.row_output(x, None, True)
    with pytest.raises(NotImplementedError, match="row_output: tp_group: expected one rank, not 4"):
        parallel.row_output(x, SimpleNamespace(size=4), True)
