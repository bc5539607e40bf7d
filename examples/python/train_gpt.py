#!/usr/bin/env python3
"""Trains a GPT on a file's bytes or tokens; examples/cpp/train_gpt.cpp gives the same losses.

python examples/python/train_gpt.py --text book.txt --steps 100 --checkpoint book.safetensors
"""

import argparse
import math
import os
import re
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
NUMBERS = {  # default and least
    "steps": (100, 0),
    "batch": (4, 1),
    "sequence": (128, 1),
    "vocabulary": (256, 1),
    "layers": (2, 1),
    "hidden": (128, 1),
    "ffn": (352, 1),
    "heads": (4, 1),
    "kv-heads": (2, 1),
    "seed": (1, 0),
}


class Fault(Exception):
    """What the user can mend: printed as one line."""


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise Fault(message)


def whole_number(name, text, least):
    if not (text.isascii() and text.isdigit() and least <= int(text) < 2**63):
        raise Fault(f"--{name}: expected a whole number of {least} or more, not {text}")
    return int(text)


def positive_number(name, text):
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise Fault(f"--{name}: expected a positive number, not {text}")
    return value


def device_of(text):
    found = re.fullmatch(r"cpu|cuda(?::(\d+))?", text)
    if found is None:
        raise Fault(f"--device: expected cpu, cuda or cuda:N, not {text}")
    gpus = torch.cuda.device_count()
    if text != "cpu" and int(found[1] or 0) >= gpus:
        raise Fault(f"--device: {text}: torch sees {gpus} GPUs here")
    return torch.device(text)


def parse_arguments():
    parser = Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--text", type=Path, help="any file: each byte is a token")
    parser.add_argument("--tokens", type=Path, help="little-endian uint16 tokens")
    for name, (default, _) in NUMBERS.items():
        parser.add_argument(f"--{name}", default=str(default))
    parser.add_argument("--learning-rate", default="1e-3")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--checkpoint", type=Path, help="resumed from if there, saved at the end")
    args = parser.parse_args()
    for name, (_, least) in NUMBERS.items():
        key = name.replace("-", "_")
        setattr(args, key, whole_number(name, getattr(args, key), least))
    args.learning_rate = positive_number("learning-rate", args.learning_rate)
    args.device = device_of(args.device)
    if (args.text is None) == (args.tokens is None):
        raise Fault("expected one of --text FILE and --tokens FILE")
    return args


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
        with safetensors.safe_open(path, "pt", device=str(args.device)) as file:
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


def build(args):
    torch.manual_seed(args.seed)
    sizes = args.vocabulary, args.hidden, args.ffn, args.layers, args.heads, args.kv_heads
    try:
        return GPT(*sizes, max_positions=args.sequence).to(args.device)
    except ValueError as error:  # heads that do not divide
        raise Fault(str(error)) from None


def train(args):
    tokens = read_tokens(args)
    model = build(args)
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
