"""The stand-in for Transformer Engine by itself: layers, refusals, optimiser, lists of tensors."""

import pickle

import pytest
import torch

from cases import DEVICES, randn
from redline import layers
from redline.megatron import transformer_engine as te
from redline.megatron.fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32
from redline.megatron.transformer_engine.common import recipe
from redline.megatron.transformer_engine.pytorch import attention, fp8, module, optimizers
from redline.megatron.transformer_engine_torch import thd_get_partitioned_indices

pytorch = te.pytorch


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("return_bias", [False, True])
@pytest.mark.parametrize("mode", [None, "column", "row"])
def test_linear(mode, return_bias, device):
    layer = pytorch.Linear(6, 4, parallel_mode=mode, return_bias=return_bias, device=device)
    torch.nn.init.ones_(layer.bias)
    x = randn(3, 2, 6, dtype=torch.float32, device=device)
    out = layer(x)
    product = torch.nn.functional.linear(x, layer.weight)
    if return_bias:
        assert out[1] is layer.bias
    torch.testing.assert_close(out[0] if return_bias else out, product + (not return_bias))
    assert isinstance(layer, layers.Linear)
    assert layer.weight.tensor_model_parallel
    assert layer.weight.partition_dim == (1 if mode == "row" else 0)
    assert layer.bias.tensor_model_parallel == (mode == "column")


@pytest.mark.parametrize("device", DEVICES)
def test_norm_linear_gives_the_norm_too(device):
    returned = dict(return_bias=True, return_layernorm_output=True)
    layer = pytorch.LayerNormLinear(8, 4, **returned, zero_centered_gamma=True, device=device)
    assert not layer.layer_norm_weight.any()
    x = randn(5, 8, dtype=torch.float32, device=device)
    y, bias, normed = layer(x)
    torch.testing.assert_close(normed, torch.nn.functional.layer_norm(x, (8,)))
    torch.testing.assert_close(y, normed @ layer.weight.T)
    assert bias is layer.bias


@pytest.mark.parametrize("device", DEVICES)
def test_norms_compute_in_the_weights_type(device):
    for norm in (pytorch.RMSNorm, pytorch.LayerNorm):
        layer = norm(8, params_dtype=torch.bfloat16, sequence_parallel=True, device=device)
        assert layer(torch.randn(2, 8, device=device)).dtype == torch.bfloat16
        assert layer.weight.sequence_parallel


@pytest.mark.parametrize("device", DEVICES)
def test_grouped_linear_takes_experts_without_rows(device):
    layer = pytorch.GroupedLinear(3, 4, 2, device=device)
    x = randn(5, 4, dtype=torch.float32, device=device)
    y = layer(x, torch.tensor([2, 0, 3], device=device))
    torch.testing.assert_close(y[:2], x[:2] @ layer.weight0.T)
    torch.testing.assert_close(y[2:], x[2:] @ layer.weight2.T)
    y.sum().backward()
    assert not layer.weight1.grad.any()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["Linear", "LayerNormLinear", "GroupedLinear"])
def test_delayed_weight_gradients_call_their_hooks(kind, device):
    sizes = (2, 4, 4) if kind == "GroupedLinear" else (4, 4)
    splits = ([2, 3],) if kind == "GroupedLinear" else ()
    torch.manual_seed(0)
    later = getattr(pytorch, kind)(*sizes, delay_wgrad_compute=True, device=device)
    at_once = getattr(pytorch, kind)(*sizes, device=device)
    at_once.load_state_dict(later.state_dict())
    x = randn(5, 4, dtype=torch.float32, device=device)
    called = []
    later.register_wgrad_accumulation_and_reduce_hooks(lambda: called.append(True))
    for layer in (later, at_once):
        layer(x, *splits).square().sum().backward()
    weights = {n: p for n, p in later.named_parameters() if n.startswith("weight")}
    assert later.need_backward_dw() and not at_once.need_backward_dw()
    assert all(w.grad is None and w.skip_backward_post_hook for w in weights.values())
    assert not called
    later.backward_dw()
    assert called == [True]
    for name, weight in weights.items():
        torch.testing.assert_close(weight.grad, at_once.get_parameter(name).grad)


def test_extra_state_is_empty_accepted_and_not_missed():
    layer = pytorch.Linear(4, 4, device="cpu")
    state = layer.state_dict()
    assert state["_extra_state"].numel() == 0
    assert set(pytorch.RMSNorm(4, device="cpu").state_dict()) == {"weight", "_extra_state"}
    state["_extra_state"] = torch.arange(9, dtype=torch.uint8)
    layer.load_state_dict(state)
    del state["_extra_state"]
    layer.load_state_dict(state)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["vanilla", "off-by-one", "learnable"])
def test_attention_sinks(kind, device):
    layer = attention.DotProductAttention(2, 8, softmax_type=kind).to(device)
    q, k, v = (randn(6, 1, 2, 8, dtype=torch.float32, device=device, seed=i) for i in range(3))
    out = layer(q, k, v, attn_mask_type="no_mask")
    scores = torch.einsum("qbhd,kbhd->bhqk", q, k) / 8**0.5
    weights = scores.exp() / (scores.exp().sum(-1, keepdim=True) + (kind != "vanilla"))
    expected = torch.einsum("bhqk,kbhd->qbhd", weights, v).flatten(-2)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in layer.named_parameters()] == ["softmax_offset"] * (
        kind == "learnable"
    )


@pytest.mark.parametrize("device", DEVICES)
def test_attention_recomputes_with_the_same_dropout(device):
    layer = attention.DotProductAttention(2, 8, attention_dropout=0.5)
    grads = []
    for again in (False, True):
        torch.manual_seed(0)
        q, k, v = (
            randn(6, 1, 2, 8, dtype=torch.float32, device=device, seed=i).requires_grad_()
            for i in range(3)
        )
        out = layer(q, k, v, checkpoint_core_attention=again)
        grads.append(torch.autograd.grad(out.square().sum(), (q, k, v)))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def te_linear(**options):
    return pytorch.Linear(4, 4, device="cpu", **options)


def attend(**options):
    q = torch.zeros(2, 1, 2, 8)
    return attention.DotProductAttention(2, 8)(q, q, q, **options)


ENABLED = (
    "enabled: expected False: Redline has no FP8 or FP4 compute; "
    "leave config.fp8, fp4 and quant_recipe unset and train in bf16"
)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: fp8.fp8_autocast(enabled=True), f"fp8_autocast: {ENABLED}"),
        (lambda: fp8.autocast(), f"autocast: {ENABLED}"),
        (lambda: fp8.fp8_model_init(), f"fp8_model_init: {ENABLED}"),
        (lambda: fp8.quantized_model_init(), f"quantized_model_init: {ENABLED}"),
        (
            lambda: te_linear(ub_overlap_ag=True),
            "Linear: ub_overlap_ag: expected False, not True: overlapped communication is not "
            "built",
        ),
        (
            lambda: te_linear(parameters_split=("q", "k")),
            "Linear: parameters_split: expected None, not ('q', 'k'): one weight is built",
        ),
        (
            lambda: pytorch.LayerNormLinear(4, 4, parallel_mode="row"),
            "LayerNormLinear: parallel_mode: expected column, not row: a norm reads whole rows",
        ),
        (
            lambda: attend(num_splits=4),
            "DotProductAttention: num_splits: expected 1, not 4: it is not built",
        ),
        (
            lambda: attend(core_attention_bias_type="alibi"),
            "DotProductAttention: core_attention_bias_type: expected no_bias or post_scale_bias, "
            "not alibi: give a bias of the scores",
        ),
        (
            lambda: module.base.initialize_ub(),
            "initialize_ub: tp_comm_overlap: expected False, not True: leave it off",
        ),
        (
            lambda: pytorch.ops.SwiGLU(cache_quantized_input=True),
            "ops.SwiGLU: cache_quantized_input: expected False, not True: the input is kept as it "
            "is",
        ),
    ],
)
def test_refuses(call, sentence):
    with pytest.raises(NotImplementedError) as caught:
        call()
    assert str(caught.value) == f"transformer_engine.pytorch.{sentence}"


def test_refuses_more_ranks():
    with pytest.raises(NotImplementedError) as caught:
        te_linear(tp_size=2, parallel_mode="column")
    assert str(caught.value).startswith("Linear: tp_group: expected one rank, not 2")


def test_disabled_contexts_do_nothing():
    with fp8.fp8_autocast(enabled=False), fp8.fp8_model_init(enabled=False):
        assert not fp8.FP8GlobalStateManager.is_fp8_enabled()


def test_recipes_are_values():
    delayed = recipe.DelayedScaling(margin=1, override_linear_precision=(False,) * 3, device=0)
    assert (delayed.margin, delayed.amax_history_len) == (1, 1024)
    assert recipe.MXFP8BlockScaling().mxfp8() and not delayed.mxfp8()
    assert recipe.Float8BlockScaling().fp8_format is recipe.Format.E4M3
    assert vars(pickle.loads(pickle.dumps(delayed))) == vars(delayed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("decoupled", [True, False], ids=["adamw", "adam"])
def test_adam(decoupled, device):
    stock = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours, theirs = (
        [torch.nn.Parameter(randn(7, 3, dtype=torch.float32, device=device)) for _ in range(2)]
        for _ in range(2)
    )
    fused = optimizers.FusedAdam(ours, lr=0.01, weight_decay=0.1, adam_w_mode=decoupled)
    reference = stock(theirs, lr=0.01, weight_decay=0.1)
    for step in range(4):
        for params in (ours, theirs):
            for index, param in enumerate(params):
                seed = 10 * step + index
                param.grad = randn(7, 3, dtype=torch.float32, device=device, seed=seed)
        fused.step()
        reference.step()
    assert fused.param_groups[0]["step"] == 4
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_adam_with_masters_resumes_with_the_same_bits(device):
    options = dict(master_weights=True, use_decoupled_grad=True)
    options |= dict(exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)

    def stepped(param, optimizer, seeds):
        for seed in seeds:
            param.decoupled_grad = randn(5, 3, dtype=torch.float32, device=device, seed=seed)
            optimizer.step()

    param = torch.nn.Parameter(randn(5, 3, dtype=torch.bfloat16, device=device))
    optimizer = optimizers.FusedAdam([param], lr=1e-4, **options)
    stepped(param, optimizer, range(3))
    assert torch.equal(optimizer.get_unscaled_state(param, "master_param").bfloat16(), param)
    copy = torch.nn.Parameter(param.detach().clone())
    resumed = optimizers.FusedAdam([copy], lr=1e-4, **options)
    resumed.load_state_dict(pickle.loads(pickle.dumps(optimizer.state_dict())))
    assert resumed.state[copy]["exp_avg"].dtype == torch.bfloat16
    stepped(param, optimizer, range(3, 6))
    stepped(copy, resumed, range(3, 6))
    for name, state in optimizer.state[param].items():
        assert torch.equal(state, resumed.state[copy][name]), name


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"amsgrad": True}, "amsgrad: expected False, not True"),
        ({"capturable": True}, "capturable: expected False, not True"),
        (
            {"exp_avg_dtype": torch.uint8},
            "exp_avg_dtype: expected torch.float32 or torch.bfloat16, not torch.uint8",
        ),
        (
            {"exp_avg_dtype": torch.bfloat16},
            "exp_avg_sq_dtype: expected torch.bfloat16, not torch.float32",
        ),
    ],
)
def test_adam_refuses(options, sentence):
    with pytest.raises(NotImplementedError) as caught:
        optimizers.FusedAdam([torch.nn.Parameter(torch.zeros(1))], **options)
    assert str(caught.value) == f"transformer_engine.pytorch.FusedAdam: {sentence}"


@pytest.mark.parametrize("device", DEVICES)
def test_lists_of_tensors(device):
    tensors = [torch.full((2, 2), 3.0, device=device), torch.full((3,), 4.0, device=device)]
    flag = torch.zeros(1, dtype=torch.int, device=device)
    apply = optimizers.multi_tensor_applier
    norm, each = apply(optimizers.multi_tensor_l2norm, flag, [tensors], True)
    torch.testing.assert_close(norm, torch.tensor([84.0], device=device).sqrt())
    torch.testing.assert_close(each, torch.tensor([36.0, 48.0], device=device).sqrt())
    halves = [torch.empty_like(tensor) for tensor in tensors]
    apply(optimizers.multi_tensor_scale, flag, [tensors, halves], 0.5)
    assert (halves[0] == 1.5).all() and (tensors[0] == 3).all()
    apply(optimizers.multi_tensor_scale, flag, [tensors, tensors], 2.0)
    assert (tensors[0] == 6).all()
    scale = torch.tensor([0.25], device=device)
    apply(optimizers.multi_tensor_scale_tensor, flag, [tensors, halves], scale)
    assert (halves[1] == 2).all() and (tensors[1] == 8).all()


@pytest.mark.parametrize("device", DEVICES)
def test_weight_gradients_are_added(device):
    main_grad = torch.ones(3, 2, device=device)
    x, y_grad = torch.ones(4, 2, device=device), torch.ones(4, 3, device=device)
    wgrad_gemm_accum_fp32(x, y_grad, main_grad)
    assert (main_grad == 5).all()


def test_dummy_gradients_share_one_buffer():
    first = module.base.get_dummy_wgrad([3, 2], torch.float32, zero=True)
    assert not first.any()
    again = module.base.get_dummy_wgrad([3, 2], torch.float32)
    assert again.data_ptr() == first.data_ptr()


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_packed_tokens_are_shared_out(ranks):
    bounds = torch.tensor([0, 8, 24], dtype=torch.int32)
    parts = [thd_get_partitioned_indices(bounds, 24, ranks, rank) for rank in range(ranks)]
    assert torch.cat(parts).sort().values.tolist() == list(range(24))
    assert all(len(part) == 24 // ranks for part in parts)
    if ranks == 2:
        assert parts[0].tolist() == [0, 1, 6, 7, 8, 9, 10, 11, 20, 21, 22, 23]


def test_layernorm_mlp_is_a_name_alone():
    assert not isinstance(torch.nn.Linear(1, 1), te.pytorch.LayerNormMLP)
    with pytest.raises(NotImplementedError) as refusal:
        te.pytorch.LayerNormMLP(8, 16)
    assert str(refusal.value) == (
        "LayerNormMLP: not in the stand-in for Transformer Engine; "
        "redline.layers.LayerNormMLP has its parameters"
    )
