#!/usr/bin/env python3
"""Trains a Megatron-Core GPT on its local spec, and on its Transformer Engine spec over Redline.

python examples/megatron/train_gpt.py --steps 100

Needs megatron-core (pip install redline-layers[megatron,dyno]) and no Transformer Engine. Prints
tokens per second, peak memory and the largest difference between the two curves of losses; with
--noise also how far the local spec parts from itself when its weights move by a rounding.
"""
# ruff: noqa: E402  (install() comes before what imports megatron.core)

import argparse
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR

import redline.megatron

redline.megatron.install()

from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig

from redline.dyno import text
from redline.optim import AdamW, clip_grad_norm

WARM_UP = 3  # steps before the clock counts
RISE = 10  # steps in which the learning rate rises: Adam's first ones overshoot without
# Of the local spec's names, those that the other has for the same tensors.
SHARED_NAMES = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
}


@dataclass
class Run:
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    peak_bytes: int | None = None  # of the GPU's memory


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("steps", 50),
        ("batch", 4),
        ("sequence", 256),
        ("vocabulary", 4096),
        ("layers", 4),
        ("hidden", 512),
        ("ffn", 1408),
        ("heads", 8),
        ("kv-heads", 4),
        ("seed", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--text", type=Path, help="a text file or a folder of them")
    parser.add_argument("--noise", action="store_true", help="train the local spec a second time")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def join(device, seed):
    """One rank of one, as Megatron wants it."""
    backend = "nccl" if device == "cuda" else "gloo"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    if device == "cuda":
        model_parallel_cuda_manual_seed(seed)


def build(spec, args):
    on_gpu = args.device == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    config = TransformerConfig(
        num_layers=args.layers,
        hidden_size=args.hidden,
        ffn_hidden_size=args.ffn,
        num_attention_heads=args.heads,
        num_query_groups=args.kv_heads,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        bf16=on_gpu,
        use_cpu_initialization=not on_gpu,
    )
    torch.manual_seed(args.seed)
    # Megatron's rotary embedding asks for CUDA (models/common/embeddings/rotary_pos_embedding.py).
    positions = "rope" if on_gpu else "learned_absolute"
    model = GPTModel(
        config, spec, args.vocabulary, args.sequence, position_embedding_type=positions
    )
    return model.to(args.device)


def tensors_of(model):
    """The weights on the CPU, by the names of the Transformer Engine spec."""
    state = model.state_dict().items()
    return {name: tensor.to("cpu", copy=True) for name, tensor in state if tensor is not None}


def moved(tensors):
    """Each weight by less than a rounding of its dtype: about half of them change."""

    def move(tensor):
        if not tensor.is_floating_point():
            return tensor
        noise = torch.rand(tensor.shape) - 0.5
        return (tensor.float() * (1 + noise * torch.finfo(tensor.dtype).eps)).to(tensor.dtype)

    return {name: move(tensor) for name, tensor in tensors.items()}


@torch.no_grad()
def copy_weights(tensors, model):
    for name, tensor in model.state_dict().items():
        for local, shared in SHARED_NAMES.items():
            name = name.replace(local, shared)
        if tensor is not None and "_extra_state" not in name:
            tensor.copy_(tensors[name])


def train(model, batches, args):
    on_gpu = args.device == "cuda"
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1, master=True)
    rising = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / RISE))
    position = torch.arange(args.sequence, device=args.device).expand(args.batch, -1)
    mask = torch.ones(1, 1, args.sequence, args.sequence, dtype=torch.bool, device=args.device)
    mask = mask.triu(1)
    result = Run()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for step in range(args.steps):
        if step == min(WARM_UP, args.steps - 1):
            began = now(on_gpu)
        tokens, targets = (x.to(args.device) for x in batches[step])
        loss = model(tokens, position, mask, labels=targets).float().mean()
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0, optimizer)
        optimizer.step()
        rising.step()
        result.losses.append(loss.detach())
    result.seconds = now(on_gpu) - began
    result.losses = torch.stack(result.losses).tolist()
    if on_gpu:
        result.peak_bytes = torch.cuda.max_memory_allocated()
    return result


def now(on_gpu):
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def tell(runs, args):
    timed = max(args.steps - WARM_UP, 1) * args.batch * args.sequence
    print(f"{'spec':32} {'tokens/s':>10} {'peak MiB':>10} {'first loss':>11} {'last loss':>10}")
    for name, run in runs.items():
        peak = "-" if run.peak_bytes is None else f"{run.peak_bytes / 2**20:.0f}"
        speed = f"{timed / run.seconds:.0f}"
        losses = f"{run.losses[0]:11.4f} {run.losses[-1]:10.4f}"
        print(f"{name:32} {speed:>10} {peak:>10} {losses}")
    local = runs.get("local")
    for name, run in runs.items():
        if local and run is not local:
            largest = max(abs(a - b) for a, b in zip(local.losses, run.losses, strict=True))
            print(f"largest loss difference: {largest:.2e} in {args.steps} steps, {name}")


def main():
    args = parse_arguments()
    corpus = text.learn(*text.read_text(args.text), args.vocabulary)
    batches = text.Batches(corpus, args.batch, args.sequence, args.seed)
    join(args.device, args.seed)
    specs = {
        "local": get_gpt_layer_local_spec(normalization="RMSNorm"),
        "transformer_engine on Redline": get_gpt_layer_with_transformer_engine_spec(),
    }
    if args.device != "cuda":
        print("local spec: not trained: Megatron's own attention asks for CUDA", file=sys.stderr)
        del specs["local"]
    weights = tensors_of(build(get_gpt_layer_with_transformer_engine_spec(), args))
    starts = {name: (spec, weights) for name, spec in specs.items()}
    if args.noise and "local" in specs:
        starts["local, moved by a rounding"] = (specs["local"], moved(weights))
    runs = {}
    for name, (spec, start) in starts.items():
        model = build(spec, args)
        copy_weights(start, model)
        runs[name] = train(model, batches, args)
        del model
    tell(runs, args)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
