"""The new address, in Megatron's signatures."""

from types import SimpleNamespace

import pytest
import torch

from megatron_config import AttnMaskType, configuration
from redline.extensions import transformer_engine as new


def make_linear(config=None, **changes):
    given = {
        "parallel_mode": "column",
        "config": config or configuration(),
        "init_method": torch.nn.init.ones_,
        "bias": True,
        "skip_bias_add": False,
        "skip_weight_param_allocation": False,
    }
    return new.TELinear(8, 4, **(given | changes))


def make_norm_linear(config=None, **changes):
    given = {
        "config": config or configuration(),
        "init_method": torch.nn.init.ones_,
        "gather_output": False,
        "bias": True,
        "skip_bias_add": False,
        "is_expert": False,
    }
    return new.TELayerNormColumnParallelLinear(8, 4, **(given | changes))


def make_attention(config=None, mask=AttnMaskType.causal, **changes):
    return new.TEDotProductAttention(config or configuration(), 1, mask, "self", **changes)


@pytest.mark.parametrize("kind", ["RMSNorm", "LayerNorm"])
def test_norm(kind):
    x = torch.randn(3, 2, 8)
    norm = new.TENorm(configuration(normalization=kind), hidden_size=8, eps=1e-6)
    stock = getattr(torch.nn, kind)(8, eps=1e-6)
    assert isinstance(norm, type(stock))
    torch.testing.assert_close(norm(x), stock(x))
    assert norm.returns_residual is False
    assert norm.weight.sequence_parallel is False


def test_norm_gives_the_weights_dtype():
    norm = new.TENorm(configuration(params_dtype=torch.bfloat16), hidden_size=8)
    assert norm(torch.randn(3, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("make", [make_linear, make_norm_linear])
@pytest.mark.parametrize(("bias", "skip"), [(True, True), (True, False), (False, True)])
def test_linear_returns_output_and_bias(make, bias, skip):
    layer, x = make(bias=bias, skip_bias_add=skip), torch.randn(3, 2, 8)
    if bias:
        torch.nn.init.ones_(layer.bias)
    y, returned = layer(x)
    assert (returned is layer.bias) if bias and skip else (returned is None)
    whole = y if returned is None else y + returned
    normed = x if make is make_linear else torch.nn.functional.rms_norm(x, (8,), eps=1e-5)
    torch.testing.assert_close(whole, normed.sum(-1, keepdim=True).expand(3, 2, 4) + bias)


def test_linear_marks_its_parameters():
    column, row = make_linear(), make_linear(parallel_mode="row")
    assert (column.weight.tensor_model_parallel, column.weight.partition_dim) == (True, 0)
    assert (row.weight.partition_dim, row.bias.tensor_model_parallel) == (1, False)
    assert not make_linear(parallel_mode="duplicated").weight.tensor_model_parallel
    fused = make_norm_linear(stride=2)
    assert fused.weight.partition_stride == 2
    assert fused.layer_norm_weight.tensor_model_parallel is False


def test_initialisation_follows_the_configuration():
    assert make_linear().weight.eq(1).all()
    meta = configuration(use_cpu_initialization=False, init_model_with_meta_device=True)
    assert make_linear(meta).weight.is_meta


def test_attention_matches_torch():
    q, k, v = torch.randn(5, 2, 4, 8), torch.randn(5, 2, 2, 8), torch.randn(5, 2, 2, 8)
    y = make_attention()(q, k, v, None, AttnMaskType.causal)
    stock = torch.nn.functional.scaled_dot_product_attention(
        *(t.permute(1, 2, 0, 3) for t in (q, k, v)), is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(y, stock.permute(2, 0, 1, 3).flatten(2))


def test_packed_attention_matches_its_sequences():
    q, k, v = torch.randn(7, 4, 8), torch.randn(7, 2, 8), torch.randn(7, 2, 8)
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    packed = SimpleNamespace(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=None,
        cu_seqlens_kv_padded=None,
        max_seqlen_q=4,
        max_seqlen_kv=4,
    )
    layer = make_attention(mask=AttnMaskType.padding_causal)
    ours = layer(q, k, v, None, AttnMaskType.padding_causal, packed_seq_params=packed)
    parts = [
        layer(*(t[a:b, None] for t in (q, k, v)), None, AttnMaskType.causal)
        for a, b in ((0, 3), (3, 7))
    ]
    torch.testing.assert_close(ours, torch.cat(parts)[:, 0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: new.TENorm(configuration(normalization="L2Norm"), 8),
            "TENorm: normalization: expected LayerNorm or RMSNorm, not L2Norm",
        ),
        (
            lambda: make_linear(configuration(tensor_model_parallel_size=2)),
            "TELinear: tensor_model_parallel_size: expected 1, not 2",
        ),
        (
            lambda: make_linear(skip_weight_param_allocation=True),
            "TELinear: skip_weight_param_allocation: expected False, not True",
        ),
        (lambda: make_linear(parallel_mode="rows"), "TELinear: parallel_mode: expected .* rows"),
        (
            lambda: make_norm_linear(gather_output=True),
            "TELayerNormColumnParallelLinear: gather_output: expected False, not True",
        ),
        (
            lambda: make_norm_linear(configuration(fp8="hybrid")),
            "TELayerNormColumnParallelLinear: fp8: expected None or False, not hybrid",
        ),
        (
            lambda: make_attention(configuration(softmax_type="sparse")),
            "TEDotProductAttention: softmax_type: expected vanilla or .* not sparse",
        ),
        (
            lambda: make_attention()(*torch.randn(3, 5, 2, 4, 8), None, AttnMaskType.arbitrary),
            "TEDotProductAttention: attn_mask_type: expected .* not arbitrary",
        ),
        (
            lambda: make_attention()(
                torch.randn(1, 2, 4, 8), *torch.randn(2, 5, 2, 4, 8), None, AttnMaskType.causal
            ),
            "TEDotProductAttention: attn_mask_type: expected .* not causal",
        ),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
