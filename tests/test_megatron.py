"""install(), and what Megatron-Core finds after it."""

import importlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import redline.megatron
from megatron_world import batch_of, build, config_of, world
from redline import layers

ROOT = Path(__file__).parents[1]
STAND_IN = "redline.megatron.transformer_engine"


@pytest.fixture(scope="module")
def extension():
    with world("cuda" if torch.cuda.is_available() else "cpu"):
        yield importlib.import_module("megatron.core.extensions.transformer_engine")


def test_megatron_finds_transformer_engine(extension):
    assert extension.HAVE_TE
    assert str(extension.get_te_version()) == "2.13.0"
    assert redline.megatron.is_installed()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("TELinear", layers.Linear),
        ("TEColumnParallelLinear", layers.Linear),
        ("TERowParallelLinear", layers.Linear),
        ("TELayerNormColumnParallelLinear", layers.LayerNormLinear),
        ("TEGroupedLinear", layers.GroupedLinear),
        ("TEFusedResidualRMSNorm", layers.RMSNorm),
    ],
)
def test_megatrons_classes_are_subclasses_of_ours(extension, name, layer):
    if not hasattr(extension, name):
        pytest.skip(f"this megatron-core has no {name}")
    assert issubclass(getattr(extension, name), layer)


@pytest.mark.parametrize(
    "name",
    [
        "SplitAlongDim",
        "Fp8Padding",
        "Fp8Unpadding",
        "fused_permute_with_probs",
        "fused_unpermute",
        "fused_sort_chunks_by_index",
        "fused_apply_rotary_pos_emb",
        "fused_apply_rotary_pos_emb_thd",
        "fused_topk_with_score_function",
        "fused_moe_aux_loss",
        "te_general_gemm",
        "te_parallel_cross_entropy",
        "te_checkpoint",
        "get_cpu_offload_context",
    ],
)
def test_megatron_has_no_name_left_out(extension, name):
    assert getattr(extension, name) is not None


@pytest.mark.parametrize("kind", ["LayerNorm", "RMSNorm"])
def test_norms(extension, kind):
    norm = extension.TENorm(config_of("cpu", normalization=kind), hidden_size=8)
    assert isinstance(norm, getattr(layers, kind))


def test_every_module_is_one_under_both_names():
    names = [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]
    assert len(names) > 20
    for name in names:
        ours = STAND_IN + name.removeprefix("transformer_engine")
        assert importlib.import_module(name) is sys.modules[ours]


def test_pickles_of_either_address_are_found():
    delayed = importlib.import_module("transformer_engine.common.recipe").DelayedScaling
    ours = pickle.dumps(delayed, protocol=0)
    theirs = ours.replace(STAND_IN.encode(), b"transformer_engine")
    assert ours != theirs
    assert pickle.loads(theirs) is pickle.loads(ours) is delayed


def test_a_second_call_does_nothing():
    before = sys.modules["transformer_engine"]
    redline.megatron.install()
    assert sys.modules["transformer_engine"] is before


def last_line(program, *folders):
    """What a fresh process says last, to either side."""
    path = os.pathsep.join([*map(str, folders), str(ROOT / "python"), os.getenv("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    return (ran.stdout + ran.stderr).strip().splitlines()[-1]


INSTALL = "import redline.megatron; redline.megatron.install()"


def test_refuses_the_real_one(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = '2.9.0'")
    assert last_line(f"import transformer_engine; {INSTALL}", tmp_path) == (
        "RuntimeError: redline.megatron.install: Transformer Engine is already imported from "
        f"{package / '__init__.py'}: call install() before, or leave it out"
    )


def test_takes_the_place_of_one_that_is_not_imported(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('no libcuda')")
    program = f"{INSTALL}; import transformer_engine as te; print(te.__name__)"
    assert last_line(program, tmp_path) == STAND_IN


def test_refuses_after_megatron():
    assert last_line(f"import megatron.core; {INSTALL}") == (
        "RuntimeError: redline.megatron.install: megatron.core is already imported and has looked "
        "for Transformer Engine: call install() before"
    )


def test_refuses_another_copys(tmp_path):
    other = f"""
import sys, types
other = types.ModuleType({STAND_IN!r})
other.__file__ = '/other/redline/megatron/transformer_engine/__init__.py'
sys.modules['transformer_engine'] = other
{INSTALL}
"""
    assert last_line(other) == (
        "RuntimeError: redline.megatron.install: two copies of Redline are in this process: "
        "transformer_engine is /other/redline/megatron/transformer_engine/__init__.py, this one is "
        f"{ROOT / 'python' / 'redline' / '__init__.py'}: keep one of them"
    )


def test_importing_it_imports_nothing():
    program = "import sys, redline.megatron; print('transformer_engine' in sys.modules)"
    assert last_line(program) == "False"


def test_quantised_training_is_refused_in_a_sentence():
    options = {"fp8": "hybrid", "fp8_recipe": "delayed", "positions": "learned_absolute"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with world(device):
        model = build("transformer_engine", device, **options)
        tokens, positions, _, labels = batch_of(0, device)
        with pytest.raises(NotImplementedError) as caught:
            model(tokens, positions, None, labels=labels)
    assert "Redline has no FP8 or FP4 compute" in str(caught.value)


def other_python():
    """A Python of 3.12 or newer beside the running one with megatron-core in it, or None."""
    names = [ROOT / f".venv-3.{minor}/bin/python" for minor in (12, 13)]
    asking = "import sys, torch, megatron.core; print(sys.version_info >= (3, 12))"
    for name in names:
        if not name.exists() or sys.version_info >= (3, 12):
            continue
        ran = subprocess.run([name, "-W", "ignore", "-c", asking], capture_output=True, text=True)
        if ran.stdout.strip() == "True":
            return name
    return None


@pytest.mark.timeout(900)
def test_the_newest_megatron_passes_too():
    """megatron-core 0.19 needs Python 3.12: it is tested where one stands in .venv-3.12."""
    python = other_python()
    if python is None:
        pytest.skip("needs .venv-3.12 or .venv-3.13 with torch, megatron-core 0.19 and pytest")
    command = [python, "-m", "pytest", "-q", "tests/test_megatron.py", "tests/test_megatron_gpt.py"]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:]
