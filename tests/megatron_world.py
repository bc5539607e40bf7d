"""Megatron-Core over the stand-in, as one rank: small GPTs, their training, their checkpoints.

conftest.py has installed the stand-in before anything imports megatron.core.
"""

import os
import socket
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from inspect import isfunction

import pytest
import torch
import torch.nn.functional as F

from megatron_on_cpu import without_gpu

if find_spec("megatron") is None:
    pytest.skip("megatron-core is not here: requirements/test.txt", allow_module_level=True)

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

VOCABULARY, SEQUENCE, BATCH = 64, 24, 2
TE, LOCAL = "transformer_engine", "local"

LLAMA = dict(
    normalization="RMSNorm",
    gated_linear_unit=True,
    activation_func=F.silu,
    add_bias_linear=False,
    num_query_groups=2,
)
GPT2 = dict(normalization="LayerNorm", tied=True, positions="learned_absolute")
QWEN = LLAMA | dict(qk_layernorm=True, add_qkv_bias=True)
MOE = LLAMA | dict(
    num_moe_experts=4,
    moe_router_topk=2,
    moe_ffn_hidden_size=48,
    moe_aux_loss_coeff=0.01,
    moe_token_dispatcher_type="alltoall",
)


def _join(device):
    """One rank of one; the backend is the device's."""
    if torch.distributed.is_initialized():
        return
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    backend = "nccl" if device == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


@contextmanager
def world(device):
    """A process of one rank on the device, seeded."""
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("with a GPU at hand Megatron runs on it alone")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with without_gpu() if device == "cpu" else nullcontext():
        _join(device)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def config_of(device, dtype=torch.float32, **options):
    defaults = dict(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        ffn_hidden_size=96,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        use_cpu_initialization=device == "cpu",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    return TransformerConfig(**(defaults | options))


def spec_of(kind, config, **options):
    """The layer of Megatron's own specs, transformer_engine or local, or a spec as it is given."""
    if not isinstance(kind, str):
        return kind(config) if isfunction(kind) else kind
    options |= dict(num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm)
    options["moe_grouped_gemm"] = config.moe_grouped_gemm
    if kind == LOCAL:
        return get_gpt_layer_local_spec(normalization=config.normalization, **options)
    return get_gpt_layer_with_transformer_engine_spec(**options)


def build(kind, device, dtype=torch.float32, spec_options=(), **options):
    """GPTModel on the device, from one seed."""
    tied, positions = options.pop("tied", False), options.pop("positions", "rope")
    model_options = options.pop("model_options", {})
    torch.manual_seed(0)
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)  # GPU weights and dropout
    config = config_of(device, dtype, **options)
    model = GPTModel(
        config,
        spec_of(kind, config, **dict(spec_options)),
        vocab_size=VOCABULARY,
        max_sequence_length=SEQUENCE,
        position_embedding_type=positions,
        share_embeddings_and_output_weights=tied,
        **model_options,
    ).to(device)
    return Float16Module(config, model) if dtype == torch.bfloat16 else model


def tensors_of(model):
    """The state dict's tensors without extra state, under the names that the specs share."""
    renamed = {
        "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
        "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    }
    if "moe_layer" in str(type(model)) or any("experts" in name for name in model.state_dict()):
        renamed.pop("pre_mlp_layernorm.")
    tensors = {}
    for name, tensor in model.state_dict().items():
        for old, new in renamed.items():
            name = name.replace(old, new)
        if "_extra_state" not in name:
            tensors[_indexed(name)] = tensor
    return tensors


def _indexed(name):
    """experts.linear_fc1.weight3 of grouped experts as experts.local_experts.3.linear_fc1.weight"""
    for layer in ("linear_fc1", "linear_fc2"):
        head, found, tail = name.partition(f"experts.{layer}.weight")
        if found and tail.isdigit():
            return f"{head}experts.local_experts.{tail}.{layer}.weight"
    return name


@torch.no_grad()
def copy_weights(source, target):
    sources, targets = tensors_of(source), tensors_of(target)
    assert sources.keys() == targets.keys()
    for name, tensor in targets.items():
        tensor.copy_(sources[name])


def pair(device, options, dtype=torch.float32):
    """The model on Redline and the model on the local spec, from the same weights."""
    ours = build(TE, device, dtype, **options)
    theirs = build(LOCAL, device, dtype, **(options | {"moe_grouped_gemm": False}))
    copy_weights(ours, theirs)
    return ours, theirs


def largest(first, second):
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def batch_of(step, device):
    """Tokens that follow a fixed table with noise, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    tokens = torch.randint(VOCABULARY, (BATCH, SEQUENCE + 1), generator=generator)
    noise = torch.rand(BATCH, SEQUENCE, generator=generator) < 0.1
    for place in range(SEQUENCE):
        follows = table[tokens[:, place]]
        tokens[:, place + 1] = torch.where(noise[:, place], tokens[:, place + 1], follows)
    positions = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    return [x.to(device) for x in (tokens[:, :-1], positions, mask, tokens[:, 1:])]


class Trainer:
    """Megatron's own data parallelism and optimiser around a model."""

    learning_rate = 1e-2

    def __init__(self, model, device, distributed_optimizer=False, micro_batches=2, overlap=False):
        self.device, self.micro_batches = device, micro_batches
        config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=distributed_optimizer,
            overlap_grad_reduce=overlap,
        )
        core = model.module if isinstance(model, Float16Module) else model
        self.model = DistributedDataParallel(core.config, config, model)
        options = OptimizerConfig(
            optimizer="adam",
            lr=self.learning_rate,
            clip_grad=1.0,
            use_distributed_optimizer=distributed_optimizer,
            params_dtype=core.config.params_dtype,
            bf16=core.config.bf16,
        )
        self.optimizer = get_megatron_optimizer(options, [self.model])
        self.done = 0

    def step(self):
        """The losses of one step's micro-batches."""
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        losses = []
        for index in range(self.micro_batches):
            last = index == self.micro_batches - 1
            tokens, positions, mask, labels = batch_of(self.done * 97 + index, self.device)
            with nullcontext() if last else self.model.no_sync():
                loss = self.model(tokens, positions, mask, labels=labels).mean()
                (loss / self.micro_batches).backward()
            losses.append(loss.item())
        finalize_model_grads([self.model])
        assert self.optimizer.step()[0]
        self.done += 1
        return losses

    def train(self, steps):
        return [loss for _ in range(steps) for loss in self.step()]

    def gradients(self):
        return {name: p.main_grad.clone() for name, p in self.model.named_parameters()}

    def state(self, loading=False):
        """The sharded state of model and optimiser, for Megatron's dist_checkpointing."""
        model = self.model.module.sharded_state_dict()
        kind = {"distrib_optim_sharding_type": "fully_reshardable"}
        optimizer = self.optimizer.sharded_state_dict(model, is_loading=loading, metadata=kind)
        return {"model": model, "optimizer": optimizer}

    def restore(self, folder, done):
        state = load(self.state(loading=True), folder)
        self.model.module.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.done = done


def save(state, folder):
    folder.mkdir()
    dist_checkpointing.save(state, str(folder))


def load(state, folder, strict="assume_ok_unexpected"):
    return dist_checkpointing.load(state, str(folder), strict=strict)
