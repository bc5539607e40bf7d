"""GPT models of an unmodified Megatron-Core: its Transformer Engine spec on Redline.

The reference is the same model on Megatron's local spec. Without a GPU the CPU answers where
Megatron asks for CUDA: megatron_on_cpu.py lists the lines.
"""

import pytest
import torch

from cases import DEVICES
from megatron_world import (
    GPT2,
    LLAMA,
    LOCAL,
    MOE,
    QWEN,
    TE,
    Trainer,
    TransformerConfig,
    batch_of,
    build,
    largest,
    load,
    pair,
    save,
    tensors_of,
    world,
)

MODELS = {
    "rms-swiglu-gqa": LLAMA,
    "layernorm-gelu-tied": GPT2,
    "qk-norm-qkv-bias": QWEN,
    "moe-sequential": MOE,
    "moe-grouped": MOE | {"moe_grouped_gemm": True},
}
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 5e-2}  # docs/numerics.md, of a lap


@pytest.fixture(params=DEVICES)
def device(request):
    with world(request.param):
        yield request.param


def test_trains_where_nothing_is_answered():
    """On the CPU as it is: what is left out is what asks for CUDA (rotary, data parallel, Adam)."""
    if torch.cuda.is_available():
        pytest.skip("the other tests run on the GPU at hand")
    with world("cpu"):
        model = build(TE, "cpu", **(LLAMA | {"positions": "learned_absolute"}))
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for step in range(5):
        tokens, positions, _, labels = batch_of(step, "cpu")
        losses.append(model(tokens, positions, None, labels=labels).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", MODELS)
def test_trains_as_the_local_spec_does(name, device):
    ours, theirs = (Trainer(model, device) for model in pair(device, MODELS[name]))
    losses = ours.train(6)
    assert largest(losses, theirs.train(6)) < (2e-5 if device == "cpu" else 5e-4)
    assert losses[-1] < losses[0] - 0.3


class Patient(Trainer):
    """At ten times the rate a rounding grows past the bounds in 200 steps."""

    learning_rate = 1e-3


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["f32", "bf16"])
def test_two_hundred_steps(dtype, name, device):
    if device == "cpu" and name != "rms-swiglu-gqa":
        pytest.skip("takes too long on the CPU; test_trains_as_the_local_spec_does takes 6 steps")
    torch.use_deterministic_algorithms(False)  # so that attention runs on torch's best kernel
    ours, theirs = (Patient(model, device) for model in pair(device, MODELS[name], dtype))
    losses = ours.train(200)
    assert largest(losses, theirs.train(200)) < BOUNDS[dtype]
    assert losses[-1] < losses[0] / 3


@pytest.mark.parametrize("overlap", [False, True], ids=["at-the-end", "overlapped"])
@pytest.mark.parametrize("name", ["rms-swiglu-gqa", "moe-grouped"])
def test_gradients_are_added_in_main_grad(name, overlap, device):
    """gradient_accumulation_fusion: the same gradients, and autograd is given a dummy.

    Reduction that overlaps with backward counts on the dummy.
    """
    plain = Trainer(build(TE, device, **MODELS[name]), device, micro_batches=3)
    options = MODELS[name] | {"gradient_accumulation_fusion": True}
    fused = Trainer(build(TE, device, **options), device, micro_batches=3, overlap=overlap)
    assert largest(plain.train(3), fused.train(3)) < 1e-5
    for (key, ours), theirs in zip(fused.gradients().items(), plain.gradients().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=key)
    weights = [p for name, p in fused.model.named_parameters() if "linear_fc1.weight" in name]
    assert weights and all(weight.grad_added_to_main_grad for weight in weights)


def test_main_grad_of_bfloat16_is_float32(device):
    """Each micro-batch is added without a rounding to bfloat16; autograd's are rounded first."""
    options = MODELS["rms-swiglu-gqa"]
    weights = []
    for fused in (True, False):
        model = build(TE, device, torch.bfloat16, **options, gradient_accumulation_fusion=fused)
        trainer = Trainer(model, device, micro_batches=4)
        trainer.step()
        gradients = trainer.gradients()
        weights.append([grad for name, grad in gradients.items() if "linear_fc1.weight" in name])
    for ours, rounded in zip(*weights, strict=True):
        assert ours.dtype == torch.float32
        error = (ours - rounded).norm() / ours.norm()
        assert 0 < error < 2**-7


@pytest.mark.parametrize("name", ["rms-swiglu-gqa", "moe-grouped"])
def test_distributed_optimizer(name, device):
    plain = Trainer(build(TE, device, **MODELS[name]), device)
    spread = Trainer(build(TE, device, **MODELS[name]), device, distributed_optimizer=True)
    assert largest(plain.train(4), spread.train(4)) < 1e-5


RECOMPUTE = {
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
    "core-attention": {"recompute_modules": ["core_attn"]},
    "mlp": {"recompute_modules": ["mlp"]},
    "layernorm": {"recompute_modules": ["layernorm"]},
    "moe": {"recompute_modules": ["moe"]},
    "moe-activation": {"recompute_modules": ["moe_act", "layernorm"]},
}


@pytest.mark.parametrize("kind", RECOMPUTE)
def test_recompute_gives_the_same_bits(kind, device):
    model = MODELS["moe-grouped" if "moe" in kind else "qk-norm-qkv-bias"]
    options = {"recompute_granularity": "selective"} | RECOMPUTE[kind]
    plain = Trainer(build(TE, device, **model), device)
    again = Trainer(build(TE, device, **model, **options), device)
    assert plain.train(3) == again.train(3)


@pytest.mark.parametrize("source", [TE, LOCAL])
@pytest.mark.parametrize("name", ["rms-swiglu-gqa", "layernorm-gelu-tied", "qk-norm-qkv-bias"])
def test_checkpoint_moves_between_the_specs(name, source, device, tmp_path):
    target = LOCAL if source == TE else TE
    saved = build(source, device, **MODELS[name])
    Trainer(saved, device).train(1)
    save(saved.sharded_state_dict(), tmp_path / "checkpoint")
    loaded = build(target, device, **MODELS[name])
    # Megatron's local norms of q and k save no extra state, which the other spec looks for.
    strict = "ignore_all" if source == LOCAL and "qk" in name else "assume_ok_unexpected"
    loaded.load_state_dict(load(loaded.sharded_state_dict(), tmp_path / "checkpoint", strict))
    tokens, positions, mask, labels = batch_of(5, device)
    losses = [model(tokens, positions, mask, labels=labels).mean() for model in (saved, loaded)]
    for key, tensor in tensors_of(loaded).items():
        assert torch.equal(tensor, tensors_of(saved)[key]), key
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
@pytest.mark.parametrize("name", ["rms-swiglu-gqa", "moe-grouped"])
def test_resumes_with_the_same_bits(name, distributed, device, tmp_path):
    trainer = Trainer(build(TE, device, **MODELS[name]), device, distributed)
    trainer.train(2)
    save(trainer.state(), tmp_path / "checkpoint")
    expected = trainer.train(2)
    resumed = Trainer(build(TE, device, **MODELS[name]), device, distributed)
    resumed.restore(tmp_path / "checkpoint", done=2)
    assert resumed.train(2) == expected


def test_grouped_and_sequential_experts_share_a_checkpoint(device, tmp_path):
    grouped = build(TE, device, **MODELS["moe-grouped"])
    save(grouped.sharded_state_dict(), tmp_path / "checkpoint")
    sequential = build(TE, device, **MODELS["moe-sequential"])
    sequential.load_state_dict(load(sequential.sharded_state_dict(), tmp_path / "checkpoint"))
    for key, tensor in tensors_of(sequential).items():
        assert torch.equal(tensor, tensors_of(grouped)[key]), key


OPTIONS = {
    "rope": {"apply_rope_fusion": True},
    "qkv rope": {"apply_rope_fusion": True, "fused_single_qkv_rope": True},
    "cross entropy": {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    "residual norm": {"fused_residual_rmsnorm": True},
    "activation": {
        "use_te_activation_func": True,
        "spec_options": {"use_te_activation_func": True},
    },
    "fused mlp": {"spec_options": {"use_te_op_fuser": True}},
    "offload": {
        "cpu_offloading": True,
        "cpu_offloading_num_layers": 1,
        "cpu_offloading_weights": False,
    },
    "router": {"moe_router_fusion": True},
    "permute": {"moe_permute_fusion": True},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_option_gives_the_same_losses(name, device):
    """What Megatron hands to Transformer Engine's functions where an option asks for it."""
    if name == "residual norm" and not hasattr(TransformerConfig, "fused_residual_rmsnorm"):
        pytest.skip("this megatron-core has no fused_residual_rmsnorm")
    model = MODELS["moe-grouped" if name in ("router", "permute") else "rms-swiglu-gqa"]
    plain = Trainer(build(TE, device, **model), device)
    asked_for = Trainer(build(TE, device, **(model | OPTIONS[name])), device)
    assert largest(plain.train(3), asked_for.train(3)) < 1e-4
