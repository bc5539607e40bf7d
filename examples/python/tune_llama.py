#!/usr/bin/env python3
"""Trains a Llama of transformers before and after `redline.tune`, from the same seed.

python examples/python/tune_llama.py
python examples/python/tune_llama.py --device cuda --dtype bfloat16 --hidden 2048 --ffn 5632 \
    --layers 8 --heads 16 --kv-heads 4 --sequence 2048 --vocabulary 32768
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import transformers

import redline
from redline.dyno.measure import DynoError, profiled
from redline.dyno.text import Batches, learn, read_text

WARM = 3  # steps before the clock counts
MODEL = {"vocabulary": 4096, "layers": 4, "hidden": 256, "ffn": 704, "heads": 4, "kv-heads": 2}
NUMBERS = MODEL | {"steps": 20, "batch": 4, "sequence": 128, "seed": 1}


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, help="a text or a folder; Python's own source without")
    for name, default in NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    return parser.parse_args()


def build(args):
    torch.manual_seed(args.seed)
    config = transformers.LlamaConfig(
        vocab_size=args.vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        max_position_embeddings=args.sequence,
        use_cache=False,
    )
    model = transformers.LlamaForCausalLM(config)
    return model.to(device=args.device, dtype=getattr(torch, args.dtype)).train()


def train(model, batches, args):
    """(losses, seconds of each step, peak bytes of one step beyond the model's own)."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate)

    def step(number):
        tokens, _ = batches[number]
        tokens = tokens.to(args.device)
        loss = model(input_ids=tokens, labels=tokens).loss  # shifted by the model
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    losses, seconds = [], []
    for number in range(args.steps):
        start = time.perf_counter()
        losses.append(step(number))  # item() waits for the device
        seconds.append(time.perf_counter() - start)
    peak = profiled(lambda: step(args.steps), torch.device(args.device)).peak_bytes
    return losses, seconds[WARM:], peak


def report(name, losses, seconds, peak, args):
    speed = args.batch * args.sequence / statistics.median(seconds)
    print(f"{name:6} {speed:12,.0f} tokens/s {peak / 1e6:10,.1f} MB   last loss {losses[-1]:.4f}")


def main():
    args = parse_arguments()
    if args.steps <= WARM:
        sys.exit(f"tune_llama: --steps: expected more than {WARM}, not {args.steps}")
    try:
        corpus = learn(*read_text(args.text), args.vocabulary)
        batches = Batches(corpus, args.batch, args.sequence, args.seed)
    except DynoError as fault:
        sys.exit(f"tune_llama: {fault}")
    redline.tune(build(args), dry_run=True)
    stock = train(build(args), batches, args)
    report("stock", *stock, args)
    tuned = train(redline.tune(build(args)), batches, args)
    report("tuned", *tuned, args)
    difference = max(abs(a - b) for a, b in zip(stock[0], tuned[0]))
    print(f"largest difference of a loss {difference:.1e}")


if __name__ == "__main__":
    main()
