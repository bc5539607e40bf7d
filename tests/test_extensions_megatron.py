"""The new address under the real Megatron-Core: its configuration and distributed checkpoints."""

import pytest
import torch

from megatron_config import make_column, make_norm_linear, make_row
from redline.extensions import transformer_engine as te

core = pytest.importorskip("megatron.core", reason="needs megatron-core")


@pytest.fixture(scope="module")
def metadata():
    """One rank over gloo, as Megatron sets it up, and what it passes to sharded_state_dict."""
    from megatron.core import parallel_state

    store = torch.distributed.HashStore()
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def configuration(**changes):
    from megatron.core.transformer.transformer_config import TransformerConfig

    given = {"num_layers": 2, "hidden_size": 8, "num_attention_heads": 2}
    return TransformerConfig(use_cpu_initialization=True, **(given | changes))


def stock(kind, **changes):
    """Megatron's own layer of the same sizes."""
    from megatron.core.tensor_parallel import layers

    config = configuration()
    given = {"config": config, "init_method": config.init_method, "bias": True}
    given |= {"skip_bias_add": False, "is_expert": False}
    return getattr(layers, kind)(8, 6, **(given | changes))


LAYERS = {
    "column": (make_column, "ColumnParallelLinear", {"gather_output": False}),
    "row": (make_row, "RowParallelLinear", {"input_is_parallel": True}),
}


def described(sharded):
    return {
        key: (type(part).__name__, part.key, part.global_shape, part.global_offset, part.replica_id)
        for key, part in sharded.items()
    }


def save_and_load(source, target, metadata, folder):
    """Through a distributed checkpoint on disk."""
    from megatron.core import dist_checkpointing

    folder.mkdir()
    dist_checkpointing.save(source.sharded_state_dict("layer.", (), metadata), str(folder))
    state = dist_checkpointing.load(target.sharded_state_dict("layer.", (), metadata), str(folder))
    target.load_state_dict({key.removeprefix("layer."): value for key, value in state.items()})


@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_name_and_split_what_megatrons_own_layers_do(name, metadata):
    make, kind, options = LAYERS[name]
    ours, theirs = (
        layer.sharded_state_dict("layer.", (), metadata)
        for layer in (make(configuration()), stock(kind, **options))
    )
    assert described(ours) == described(theirs)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="Megatron's checkpoint on disk waits for a CUDA device"
)
@pytest.mark.parametrize("name", LAYERS)
def test_checkpoints_go_to_megatrons_own_layers_and_back(name, metadata, tmp_path):
    make, kind, options = LAYERS[name]
    ours, theirs, again = make(configuration()), stock(kind, **options), make(configuration())
    save_and_load(ours, theirs, metadata, tmp_path / "to")
    assert torch.equal(theirs.weight, ours.weight)
    save_and_load(theirs, again, metadata, tmp_path / "back")
    assert torch.equal(again.weight, ours.weight)


def test_norm_linear_is_sharded_along_its_outputs(metadata):
    sharded = make_norm_linear(configuration(normalization="LayerNorm")).sharded_state_dict(
        "qkv.", ((0, 1, 4),), metadata
    )
    shapes = {key: getattr(part, "global_shape", None) for key, part in sharded.items()}
    assert shapes == {
        "qkv.layer_norm_weight": (4, 8),
        "qkv.layer_norm_bias": (4, 8),
        "qkv.weight": (4, 6, 8),
        "qkv.bias": (4, 6),
        "qkv._extra_state": (4,),
    }


@pytest.mark.parametrize("singles", [False, True], ids=["stacked", "singles"])
def test_experts_have_an_entry_each(singles, metadata):
    config = configuration(num_moe_experts=2)
    layer = te.TERowParallelGroupedLinear(
        2, 8, 6, config=config, init_method=config.init_method, bias=True, skip_bias_add=True,
        is_expert=True,
    )  # fmt: skip
    given = metadata | {"singleton_local_shards": singles}
    sharded = layer.sharded_state_dict("experts.", (), given)
    keys = [f"experts.{n}{i}" for i in range(2) for n in ("weight", "bias")]
    assert set(sharded) == {*keys, "experts._extra_state", "experts._extra_state1"}
    for index in range(2):
        part = sharded[f"experts.weight{index}"]
        if singles:
            assert (part.key, part.global_shape) == (f"{index}.experts.weight", (6, 8))
        else:
            assert (part.key, part.global_shape) == ("experts.weight", (2, 6, 8))
            assert part.global_offset == (index, 0, 0)


@pytest.mark.parametrize("kind", ["vanilla", "learnable"])
def test_attention_keeps_its_sinks_alone(kind, metadata):
    layer = te.TEDotProductAttention(configuration(softmax_type=kind), 1, None, "self")
    sharded = layer.sharded_state_dict("core.", (), metadata)
    assert list(sharded) == (["core.softmax_offset"] if kind == "learnable" else [])


def test_gated_mlp_is_sharded_by_halves(metadata):
    from types import SimpleNamespace

    silu = torch.nn.functional.silu
    config = configuration(gated_linear_unit=True, activation_func=silu)
    parts = SimpleNamespace(
        linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear
    )
    sharded = te.TEFusedMLP(config, parts).sharded_state_dict("mlp.", (), metadata)
    assert type(sharded["mlp.linear_fc1.weight"]).__name__ == "ShardedTensorFactory"
    assert sharded["mlp.linear_fc2.weight"].global_shape == (8, 32)


def layer_of(config, mlp):
    """Megatron's own transformer layer out of the new address's parts."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.transformer import attention, spec_utils, transformer_layer
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.mlp import MLP, MLPSubmodules

    heads = attention.SelfAttentionSubmodules(
        linear_qkv=te.TELayerNormColumnParallelLinear,
        core_attention=te.TEDotProductAttention,
        linear_proj=te.TERowParallelLinear,
        q_layernorm=te.TENorm,
        k_layernorm=te.TENorm,
    )
    parts = MLPSubmodules(
        linear_fc1=te.TELayerNormColumnParallelLinear, linear_fc2=te.TERowParallelLinear
    )
    spec = spec_utils.ModuleSpec(
        module=transformer_layer.TransformerLayer,
        submodules=transformer_layer.TransformerLayerSubmodules(
            self_attention=spec_utils.ModuleSpec(
                module=attention.SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=heads,
            ),
            self_attn_bda=get_bias_dropout_add,
            mlp=spec_utils.ModuleSpec(module=mlp or MLP, submodules=parts),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return spec_utils.build_module(spec, config=config, layer_number=1)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
def test_megatrons_layer_trains_on_these_parts(normalization, metadata):
    config = configuration(
        num_query_groups=1,
        normalization=normalization,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=False,
        qk_layernorm=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
    )
    layer, fused = layer_of(config, None), layer_of(config, te.TEFusedMLP)
    fused.load_state_dict(layer.state_dict())
    x, outputs = torch.randn(7, 2, 8), []
    for each in (layer, fused):
        y, _ = each(x, attention_mask=None)
        y.square().sum().backward()
        outputs.append([y, *(parameter.grad for parameter in each.parameters())])
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b)
    earlier = layer(x[:4], attention_mask=None)[0]
    torch.testing.assert_close(earlier, outputs[0][0][:4])  # causal
