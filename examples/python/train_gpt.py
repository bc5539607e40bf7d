#!/usr/bin/env python3
"""Trains a GPT on a file's bytes or tokens; examples/cpp/train_gpt.cpp gives the same losses.

python examples/python/train_gpt.py --text book.txt --steps 100 --checkpoint book.safetensors
"""

import argparse
import os
import sys
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from redline.layers import GPT
from redline.optim import AdamW, clip_grad_norm

FORMAT = "redline.train_gpt"
STATE = ("step", "exp_avg", "exp_avg_sq")
SIZES = ("vocabulary", "layers", "hidden", "ffn", "heads", "kv_heads")


class Fault(Exception):
    """What the user can mend: printed as one line."""


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", type=Path, help="any file: each byte is a token")
    source.add_argument("--tokens", type=Path, help="little-endian uint16 tokens")
    for name, default in (
        ("steps", 100),
        ("batch", 4),
        ("sequence", 128),
        ("vocabulary", 256),
        ("layers", 2),
        ("hidden", 128),
        ("ffn", 352),
        ("heads", 4),
        ("kv-heads", 2),
        ("seed", 1),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", type=Path, help="resumed from if there, saved at the end")
    return parser.parse_args()


def read_tokens(args):
    path = args.text or args.tokens
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Fault(f"{path}: {error.strerror}") from None
    if args.tokens and len(data) % 2:
        raise Fault(f"{path}: expected two bytes per token, not {len(data)} bytes")
    if len(data) // (2 if args.tokens else 1) <= args.sequence:
        raise Fault(f"{path}: expected more than {args.sequence} tokens (--sequence)")
    tokens = torch.frombuffer(bytearray(data), dtype=torch.uint16 if args.tokens else torch.uint8)
    tokens = tokens.to(torch.int64)
    if (largest := tokens.max().item()) >= args.vocabulary:
        raise Fault(f"{path}: expected tokens below {args.vocabulary}, not {largest}")
    return tokens


def mix(x):
    """splitmix64's output function: 64 bits from 64 bits, the same in every language."""
    mask = 2**64 - 1
    x = (x + 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def batch_of(tokens, step, args):
    """Inputs and targets [batch, sequence] of a step: of its number and the seed alone."""
    first = (mix(args.seed) + step * args.batch) % 2**64
    starts = [mix((first + row) % 2**64) for row in range(args.batch)]
    starts = [start % (len(tokens) - args.sequence) for start in starts]
    rows = torch.stack([tokens[start : start + args.sequence + 1] for start in starts])
    rows = rows.to(args.device)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def shape_of(args):
    return " ".join(f"{name}={getattr(args, name)}" for name in SIZES)


def save_checkpoint(path, step, model, optimizer, args):
    """Written aside, flushed to the disk, then renamed: the file is whole or as it was."""
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{name}.{key}"] = value
    metadata = {"format": FORMAT, "step": str(step), "shape": shape_of(args)}
    aside = path.with_name(path.name + ".part")
    try:
        with open(aside, "wb") as file:
            file.write(safetensors.torch.save(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise Fault(f"{path}: {error.strerror}") from None


def load_checkpoint(path, model, optimizer, args):
    """The number of steps taken; model and optimizer as they were then."""
    try:
        with safetensors.safe_open(path, "pt", device=args.device) as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError) as error:
        raise Fault(f"{path}: not a whole safetensors file: {error}") from None
    if metadata.get("format") != FORMAT:
        raise Fault(
            f"{path}: not a checkpoint of train_gpt: its format is {metadata.get('format')}"
        )
    if metadata.get("shape") != shape_of(args):
        raise Fault(f"{path}: expected {shape_of(args)}, not {metadata.get('shape')}")
    state = {}
    try:
        for index, (name, parameter) in enumerate(model.named_parameters()):
            prefix = f"optimizer.{name}."
            state[index] = {key: tensors[prefix + key] for key in STATE}
            with torch.no_grad():
                parameter.copy_(tensors[f"model.{name}"])
        step = int(metadata["step"])
    except (KeyError, RuntimeError, ValueError) as error:
        raise Fault(f"{path}: not a checkpoint of this model: {error}") from None
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return step


def train(args):
    tokens = read_tokens(args)
    torch.manual_seed(args.seed)
    model = GPT(
        args.vocabulary,
        args.hidden,
        args.ffn,
        args.layers,
        args.heads,
        kv_heads=args.kv_heads,
        max_positions=args.sequence,
    ).to(args.device)
    optimizer = AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.1)
    step = 0
    if args.checkpoint and args.checkpoint.exists():
        step = load_checkpoint(args.checkpoint, model, optimizer, args)
    while step < args.steps:
        inputs, targets = batch_of(tokens, step, args)
        loss = model(inputs, targets)
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm(model.parameters(), 1.0, optimizer)
        optimizer.step()
        step += 1
        print(f"step {step} loss {loss.item():.9g}", flush=True)
    if args.checkpoint:
        save_checkpoint(args.checkpoint, step, model, optimizer, args)


def main():
    try:
        train(parse_arguments())
    except Fault as fault:
        sys.exit(f"train_gpt: {fault}")


if __name__ == "__main__":
    main()
