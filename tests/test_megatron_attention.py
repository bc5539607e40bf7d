"""What Megatron's attention may be told, on Redline, beside its local spec or beside itself."""

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import MLATransformerConfig

from cases import DEVICES
from megatron_world import (
    BATCH,
    GPT2,
    LLAMA,
    SEQUENCE,
    TE,
    VOCABULARY,
    Trainer,
    batch_of,
    build,
    largest,
    pair,
    world,
)

OPTIONS = {
    "window": {"window_size": (8, 0)},
    "window on every second layer": {"window_size": (8, 0), "window_attn_skip_freq": 2},
    "sink of 0": {"softmax_type": "off-by-one"},
    "learnt sinks": {"softmax_type": "learnable"},
    "float32 residual": {"fp32_residual_connection": True},
}


@pytest.fixture(params=DEVICES)
def device(request):
    with world(request.param):
        yield request.param


def moved(model, seed):
    """Half of the weights one rounding larger."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            chosen = torch.rand(parameter.shape, generator=generator) < 0.5
            parameter.mul_(1 + 1.2e-7 * chosen.to(parameter))
    return model


@pytest.mark.parametrize("name", OPTIONS)
def test_option_trains_as_the_local_spec_does(name, device):
    """The losses of three steps; on CUDA, whose sums are in another order, no further apart than
    four times the local spec's own when its weights move by a rounding, or 5e-4: with sinks that
    is up to 1.0e-3, of one seed in four (an H100)."""
    options = LLAMA | OPTIONS[name]
    ours, theirs = (Trainer(model, device).train(3) for model in pair(device, options))
    bound = 2e-5
    if device == "cuda":
        others = (moved(pair(device, options)[1], seed) for seed in range(6))
        bound = max(
            5e-4, 4 * max(largest(Trainer(model, device).train(3), theirs) for model in others)
        )
    assert largest(ours, theirs) < bound


def test_largest_logits_are_kept(device):
    model = build(TE, device, **LLAMA, log_max_attention_logit=True)
    tokens, positions, mask, labels = batch_of(0, device)
    model(tokens, positions, mask, labels=labels)
    for layer in model.decoder.layers:
        logits = layer.self_attention.core_attention.current_max_attn_logits
        assert logits.shape == (4,)
        assert logits.isfinite().all()


@pytest.mark.parametrize("fused", [False, True], ids=["rope", "fused-rope"])
def test_packed_sequences_are_their_batch(fused, device):
    model = build(TE, device, **LLAMA, apply_rope_fusion=fused)
    tokens, positions, mask, labels = batch_of(0, device)
    bounds = torch.arange(BATCH + 1, dtype=torch.int32, device=device) * SEQUENCE
    packing = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=bounds,
        cu_seqlens_kv=bounds,
        max_seqlen_q=SEQUENCE,
        max_seqlen_kv=SEQUENCE,
    )
    expected = model(tokens, positions, mask, labels=labels)
    flat = [tensor.reshape(1, -1) for tensor in (tokens, positions, labels)]
    packed = model(flat[0], flat[1], None, labels=flat[2], packed_seq_params=packing)
    torch.testing.assert_close(packed.view_as(expected), expected, rtol=1e-4, atol=1e-4)


def test_recomputes_with_the_same_dropout(device):
    options = GPT2 | {"hidden_dropout": 0.1, "attention_dropout": 0.1}
    again = {"recompute_granularity": "full", "recompute_method": "uniform"}
    losses = []
    for more in ({}, again | {"recompute_num_layers": 1}):
        model = build(TE, device, **options, **more)
        torch.manual_seed(3)
        losses.append(Trainer(model, device).train(2))
    assert losses[0] == losses[1]


def test_latent_attention_trains(device):
    """Queries and keys of another size than values, and linears that are duplicated over ranks."""
    torch.manual_seed(0)
    config = MLATransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=device == "cpu",
        multi_latent_attention=True,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_head_dim=16,
        qk_pos_emb_head_dim=8,
        v_head_dim=16,
        rope_type="rope",
        normalization="RMSNorm",
        qk_layernorm=True,
    )
    spec = get_gpt_layer_with_transformer_engine_spec(
        multi_latent_attention=True, qk_layernorm=True
    )
    model = GPTModel(config, spec, VOCABULARY, SEQUENCE, position_embedding_type="rope")
    losses = Trainer(model.to(device), device).train(4)
    assert losses[-1] < losses[0] - 0.3
