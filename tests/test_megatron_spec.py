"""redline.megatron.spec: Megatron's layers out of the extension address."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases import DEVICES
from megatron_world import GPT2, LLAMA, MOE, QWEN, Trainer, build, world
from redline.megatron import spec

MODELS = {
    "gpt_layer": LLAMA,
    "gpt_layer_qk_norm": QWEN,
    "moe_layer": MOE | {"moe_grouped_gemm": True},
}


@pytest.fixture(params=DEVICES)
def device(request):
    with world(request.param):
        yield request.param


@pytest.mark.parametrize("name", MODELS)
def test_layer_trains_as_megatrons_own(name, device):
    theirs = Trainer(build("transformer_engine", device, **MODELS[name]), device)
    ours = Trainer(build(getattr(spec, name), device, **MODELS[name]), device)
    assert ours.train(3) == pytest.approx(theirs.train(3), abs=1e-5)


def test_sequential_experts(device):
    layer = spec.gpt_layer_spec(num_experts=4)
    theirs = Trainer(build("transformer_engine", device, **MOE), device)
    ours = Trainer(build(layer, device, **MOE), device)
    assert ours.train(2) == pytest.approx(theirs.train(2), abs=1e-5)


@pytest.mark.parametrize("model", [GPT2, QWEN], ids=["layernorm", "qk-norm"])
def test_block(model, device):
    theirs = Trainer(build("transformer_engine", device, **model), device)
    ours = Trainer(build(spec.gpt_block_spec, device, **model), device)
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()
    assert ours.train(2) == pytest.approx(theirs.train(2), abs=1e-5)


WITHOUT = """
import sys
sys.path[:0] = {folders!r}
from megatron_world import MOE, QWEN, Trainer, build, world
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.moe import moe_utils
from redline.megatron import spec

assert not HAVE_TE and "transformer_engine" not in sys.modules
with world("cpu"):
    losses = Trainer(build(spec.gpt_layer_qk_norm, "cpu", **QWEN), "cpu").train(2)
    if hasattr(moe_utils, "te_general_gemm"):
        experts = build(spec.moe_layer, "cpu", **MOE, moe_grouped_gemm=True)
        losses += Trainer(experts, "cpu").train(2)
print(losses)
"""


def test_works_without_transformer_engine():
    """Mixtures from 0.17 on: Megatron's router needs a name of Transformer Engine's before."""
    if torch.cuda.is_available():
        pytest.skip("with a GPU at hand Megatron runs on it alone; this is its import without one")
    folders = [str(Path(__file__).parent), str(Path(spec.__file__).parents[2])]
    program = WITHOUT.format(folders=folders)
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr
    losses = [float(loss) for loss in ran.stdout.strip().splitlines()[-1].strip("[]").split(",")]
    with world("cpu"):
        expected = Trainer(build("transformer_engine", "cpu", **QWEN), "cpu").train(2)
        if len(losses) > len(expected):
            experts = build("transformer_engine", "cpu", **MOE, moe_grouped_gemm=True)
            expected += Trainer(experts, "cpu").train(2)
    assert losses == pytest.approx(expected, abs=1e-5)
