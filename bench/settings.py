"""Which sizes a bench times in which dtype."""

import torch


def settings(device, sizes, cpu, cpu_large, cpu_bf16):
    """(sizes, dtype, its label, whether an op's plain rows are enough): on a GPU all in bfloat16;
    on a CPU all in float32, and the plain rows of large tensors and in bfloat16."""
    if device == "cuda":
        return [(sizes, torch.bfloat16, "bf16", False)]
    return [
        (cpu, torch.float32, "f32", False),
        (cpu_large, torch.float32, "f32", True),
        (cpu_bf16, torch.bfloat16, "bf16", True),
    ]
