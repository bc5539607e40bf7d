"""What kernels write lies inside the tensors that the op asked for."""

import sys
from pathlib import Path

import pytest
import torch

from cases import DEVICES

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import every_op

MARK = 0xA5


class Bytes:
    """Device memory by its address, for torch.as_tensor."""

    def __init__(self, address, count):
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


def bytes_at(address, count):
    return torch.as_tensor(Bytes(address, count), device="cuda")


def segments(pool):
    """(address, bytes) of the pool's memory."""
    return [
        (segment["address"], segment["total_size"])
        for segment in torch.cuda.memory_snapshot(pool.id)
    ]


def filled_pool():
    """Cached memory of both kinds, small and large blocks, every byte of it marked."""
    pool = torch.cuda.MemPool()
    with torch.cuda.use_mem_pool(pool):
        held = [torch.empty(2**20, dtype=torch.uint8, device="cuda") for _ in range(16)]
        held.append(torch.empty(512 * 2**20, dtype=torch.uint8, device="cuda"))
        del held
    for address, count in segments(pool):
        bytes_at(address, count).fill_(MARK)
    return pool


def allocations(run):
    """(address, bytes) of every block that torch's allocator gave out during run()."""
    torch.cuda.memory._record_memory_history("all", context=None, stacks="python")
    try:
        run()
        torch.cuda.synchronize()
        traces = torch.cuda.memory._snapshot()["device_traces"]
    finally:
        torch.cuda.memory._record_memory_history(None)
    return [(e["addr"], e["size"]) for trace in traces for e in trace if e["action"] == "alloc"]


def bytes_written_outside(run):
    """How many bytes changed of the pool's that no tensor of run() had; how many it could see."""
    pool = filled_pool()
    before = segments(pool)

    def in_pool():
        with torch.cuda.use_mem_pool(pool):
            run()

    given = allocations(in_pool)
    written = watched = 0
    for start, count in before:
        free = torch.ones(count, dtype=torch.bool, device="cuda")
        for address, size in given:
            if start <= address < start + count:
                free[address - start : address - start + size] = False
        written += int(((bytes_at(start, count) != MARK) & free).sum())
        watched += count - int(free.sum())
    return written, watched


RUNS = {
    "norms": every_op.norms,
    "rows": every_op.rows,
    "heads": lambda width, dtype: every_op.heads(dtype),
    "optimiser": lambda width, dtype: every_op.optimiser(dtype),
}
CASES = [(kind, width) for kind in ("norms", "rows") for width in (16, 129, 256, 1000, 4096, 40000)]
CASES += [("heads", 0), ("optimiser", 0)]


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "f32"])
@pytest.mark.parametrize(("kind", "width"), CASES)
def test_kernels_write_nothing_but_their_tensors(kind, width, dtype, device):
    written, watched = bytes_written_outside(lambda: RUNS[kind](width, dtype))
    assert watched > 1000, "the op's tensors were not in the pool"
    assert written == 0


@pytest.mark.parametrize("device", DEVICES[1:])
def test_a_write_behind_a_tensor_is_seen(device):
    def run():
        tensor = torch.zeros(100, device="cuda")
        bytes_at(tensor.data_ptr() + 400, 8).fill_(1)

    assert bytes_written_outside(run)[0] == 8
