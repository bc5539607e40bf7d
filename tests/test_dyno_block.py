"""The dyno's picture of one block: which ops and kernels it counts, and of which kind they are."""

import pytest
import torch

from redline.dyno import block, measure, quiet
from redline.dyno.part import Setting

CPU = torch.device("cpu")


def test_block_counts_the_ops_that_compute():
    x = torch.randn(8, 8, requires_grad=True)

    def call():
        ((x @ x).t().reshape(64) * 2).sum().backward()

    spans = block.spans_of(call, CPU)
    names = [span.name for span in spans]
    forward = ["aten::mm", "aten::copy_", "aten::mul", "aten::sum"]
    assert names == [*forward, "aten::ones_like", "aten::mul", "aten::mm", "aten::mm", "aten::add_"]
    starts = [span.start_us for span in spans]
    assert starts[0] == 0.0 and starts == sorted(starts)


def test_block_of_stock_and_tuned(monkeypatch):
    runs, verdicts = [], [0, 1, 1, 0, 1, 1, 1]  # one turn of six was loud
    setting = Setting(CPU, torch.float32, layer_hidden=128, layer_sequence=16, layer_batch=1)
    monkeypatch.setattr(quiet.Watch, "was_quiet", lambda self: bool(verdicts.pop()))
    found = block.measure_block(setting, lambda: runs.append(1))
    assert len(runs) == block.RUNS and found.unit == "ops" and not found.disturbed
    assert verdicts == [0]
    ours, theirs = found.sides["tuned"], found.sides["stock"]
    assert 0 < ours.forward < len(ours.spans) < len(theirs.spans)
    assert 0 < ours.forward_us < ours.time_us and ours.saved_bytes < theirs.saved_bytes
    assert {span.kind for span in ours.spans} == set(measure.KINDS)
    assert sum(span.kind == "gemm" for span in ours.spans) == 4 * 3


def test_block_is_disturbed_where_no_run_was_quiet(monkeypatch):
    setting = Setting(CPU, torch.float32, layer_hidden=64, layer_sequence=4, layer_batch=1)
    monkeypatch.setattr(quiet.Watch, "was_quiet", lambda self: False)
    monkeypatch.setattr(block, "MAX_SECONDS", 0.0)
    found = block.measure_block(setting, lambda: pytest.fail("a loud turn counts for none"))
    assert found.disturbed and found.sides["tuned"].time_us > 0


# Kernels as torch's profiler names them on an H100.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("nvjet_sm90_tst_128x256_64x4_1x2_h_bz_coopA_NNT", "gemm"),
        ("sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_cublas", "gemm"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float>", "gemm"),
        ("void pytorch_flash::flash_fwd_kernel<Flash_fwd<cutlass::bfloat16_t>>", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7", "attention"),
        ("void redline::cuda::rows_kernel<__nv_bfloat16>", "rest"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::MulFunctor>", "rest"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert measure.kind_of(name) == kind
