"""bench/bytes_moved.py: what it runs, and what it reads from the profiler's pages."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

root = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(root / "bench"))

import bench_norm  # noqa: E402
import bytes_moved  # noqa: E402
import targets  # noqa: E402

LOG = """\
==PROF== Connected to process 7
"ID","Process ID","Kernel Name","dram__bytes_read.sum","dram__bytes_write.sum",\
"launch__registers_per_thread","smsp__inst_executed.sum"
"","","","byte","Mbyte","register/thread","inst"
"0","7","void backward_kernel<float, (int)4>(Args)","1,000","0.002","64","3,000"
"1","7","sum_kernel(Args)","500","0","40","7"
"2","7","at::cuda::<unnamed>::spin_kernel(long)","0","0","16","1"
"3","7","forward_kernel(Args)","100","0.0001","32","5"
"4","7","at::cuda::<unnamed>::spin_kernel(long)","0","0","16","1"
==PROF== Disconnected
"""
CELLS = [["norm", "bwd", "4 x 8", "bf16", 3000], ["norm", "fwd", "4 x 8", "bf16", 200]]


def test_a_cells_kernels_are_summed():
    backward, forward = bytes_moved.rows_of(CELLS, bytes_moved.kernels_in(LOG))
    assert (backward["bytes_read"], backward["bytes_written"]) == (1500, 2000)
    assert (backward["kernels"], backward["registers"], backward["instructions"]) == (2, 64, 3007)
    assert (forward["kernels"], forward["bytes_written"]) == (1, 100)


def test_counters_of_other_cells_than_were_run_are_refused(capsys):
    with pytest.raises(SystemExit):
        list(bytes_moved.rows_of(CELLS[:1], bytes_moved.kernels_in(LOG)))
    assert "ncu counted 2 cells of 1" in capsys.readouterr().err


def test_the_table_has_what_cannot_be_avoided_beside_what_moved():
    machine = dict.fromkeys(("gpu", "command", "commit", "torch", "driver", "date"), "x")
    rows = [*bytes_moved.rows_of(CELLS, bytes_moved.kernels_in(LOG))]
    text = bytes_moved.markdown(
        {**machine, "rows": rows, "left_out": [["rope", "fwd", "1", "", 8]]}
    )
    assert "| norm | bwd | 4 x 8 | bf16 | 0.0 | 0.0 | 0.0 | 1.167 | 2 | 64 | 0.0 |" in text
    assert "Left out for want of time: rope fwd 1." in text


@pytest.mark.parametrize(("seconds", "ran"), [(600, 4), (-1, 0)])
def test_each_cell_is_run_once_under_the_profiler(seconds, ran, monkeypatch, tmp_path):
    cell = ("norm", ("rms_norm", "layer_norm"), ("fwd", "bwd"), ("32 x 64",), 1.0)
    memory = [targets.Target(*cell, dtypes=("f32",))]
    monkeypatch.setattr(targets, "TABLES", {"Memory-bound parts": memory})
    monkeypatch.setattr(bench_norm, "SIZES_CPU", [(32, 64)])
    monkeypatch.setattr(bytes_moved, "OPS", ("norm",))
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: events.append("marker"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: events.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: events.append("stop"))
    bytes_moved.run_cells(re.compile("_norm"), seconds, tmp_path / "cells.json", device="cpu")
    found = json.loads((tmp_path / "cells.json").read_text())
    assert events == ["start", "marker", "stop"] * ran
    assert [len(found["cells"]), len(found["left_out"])] == [ran, 4 - ran]


def test_every_op_of_the_memory_bound_targets_is_run():
    """An op is a file of bench/, and its rows begin with its name but for these."""
    of = {"rms": "norm", "layer": "norm", "residual": "norm", "qkv": "rotary", "clip": "adamw"}
    named = {cell[0].split(" ")[0] for cell in bytes_moved.wanted_cells()}
    ops = {of.get(name.split("_")[0], name) for name in named}
    ops -= {"gated_activation_pair", "dropout_add", "adamw_step"}
    assert ops <= {*bytes_moved.OPS}
