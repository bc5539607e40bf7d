"""Megatron-Core's old address, restored on real Megatron-Cores and on every Python at hand."""

import subprocess
import sys

import pytest

import light
import pythons
from redline.signpost import notice

OLD = "megatron.core.transformer.custom_layers.transformer_engine"
NEW = "megatron.core.extensions.transformer_engine"
RESTORE = "from redline.megatron.old_address import restore_old_address\nrestore_old_address()\n"
# A new address writes itself with what it imports, as Megatron's does; `_inner` is not public.
ADDRESS = "import os\n\nclass TENorm: pass\n\nclass TELinear: pass\n\n_inner = 1\n"

USE = f"""
import pickle, {NEW} as new
restored = [new.TENorm, new.TELinear]
from {OLD} import TENorm, TELinear
assert [TENorm, TELinear] == restored
import {OLD} as old
public = [name for name in vars(new) if not name.startswith("_")]
assert all(getattr(old, name) is getattr(new, name) for name in public)
assert dir(old) == dir(new)
taken = {{}}
exec("from {OLD} import *", taken)
assert set(public) <= set(taken)
assert pickle.loads(b"c{OLD}\\nTENorm\\n.") is new.TENorm
print(len(public), "names")
"""
WARNING = ["-W", "ignore", "-W", "default::DeprecationWarning:__main__"]


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "light"
    light.copy(root, "redline.signpost", "redline.megatron.old_address")
    return root


def warned(ran) -> list[str]:
    """The notices that a program printed, each as its line and its text."""
    found = [line.partition(": DeprecationWarning: ") for line in ran.stderr.splitlines()]
    return [f"{place.rpartition(':')[2]} {text}" for place, _, text in found if text]


# --- every Python, a small Megatron ---------------------------------------------------------------


@pytest.fixture
def megatron(root):
    for package in ("", "/transformer", "/transformer/custom_layers", "/extensions"):
        light.plant(root, f"megatron/core{package}/__init__.py", "")
    light.plant(root, f"{NEW.replace('.', '/')}.py", ADDRESS)
    return root


@pytest.mark.parametrize("version", pythons.at_hand)
@pytest.mark.parametrize("has_package", [True, False])
def test_the_address_is_restored(version, has_package, megatron, tmp_path):
    if not has_package:
        (megatron / "megatron/core/transformer/custom_layers/__init__.py").unlink()
        (megatron / "megatron/core/transformer/custom_layers").rmdir()
    program = light.plant(tmp_path, "a.py", RESTORE + USE)
    ran = light.start(pythons.at_hand[version], [megatron], *WARNING, program)
    assert (ran.returncode, ran.stdout) == (0, "3 names\n"), ran.stderr
    assert warned(ran) == [f"{line} {notice(OLD)}" for line in (6, 10, 15)]


def test_without_it_the_address_is_gone(megatron):
    ran = light.start(sys.executable, [megatron], "-c", f"import {OLD}")
    assert ran.stderr.endswith(f"No module named '{OLD}'\n")


@pytest.mark.parametrize("version", pythons.at_hand)
def test_it_stands_aside_where_megatron_ships_the_address(version, megatron):
    path = light.plant(megatron, f"{OLD.replace('.', '/')}.py", f"from {NEW} import *\n")
    asked = f"{RESTORE}import {OLD} as old; print(old.__file__, old.TENorm.__name__)"
    ran = light.start(pythons.at_hand[version], [megatron], "-W", "error", "-c", asked)
    assert ran.stdout == f"{path} TENorm\n", ran.stderr


def test_a_second_call_changes_nothing_and_nothing_is_imported(root):
    asked = f"import sys\n{RESTORE}{RESTORE}"
    asked += "print(len(sys.meta_path), [name for name in sys.modules if 'megatron.core' in name])"
    plain = light.start(sys.executable, [root], "-c", "import sys; print(len(sys.meta_path))")
    ran = light.start(sys.executable, [root], "-c", asked)
    assert ran.stdout == f"{int(plain.stdout) + 1} []\n"


def test_without_megatron_the_import_says_so(root):
    ran = light.start(sys.executable, [root], "-S", "-c", f"{RESTORE}import {OLD}")
    assert ran.stderr.endswith("ModuleNotFoundError: No module named 'megatron'\n")


# --- the real Megatron-Cores ----------------------------------------------------------------------

SHIPPING = ["0.12.0", "0.16.1"]
NEWEST = "0.19.2"  # asks for Python 3.12, and its sources run on 3.11


@pytest.fixture(scope="module")
def installed(request):
    """Puts a megatron-core, without what it depends on, into a folder that outlasts the run."""

    def install(version: str) -> str:
        folder = request.config.cache.mkdir(f"megatron-core-{version}")
        done = folder / "installed"
        if not done.exists():
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade"]
            wheel = ["--only-binary", ":all:", "--target", folder, f"megatron-core=={version}"]
            wheel += ["--python-version", "3.12"] if version == NEWEST else []
            ran = subprocess.run([*pip, *wheel], capture_output=True, text=True)
            if ran.returncode:
                pytest.skip(f"pip could not fetch megatron-core {version}: {ran.stderr[-200:]}")
            done.touch()
        return folder

    return install


def origin(version: str, roots: list, folder) -> str:
    """Where an import of the old address is found, in a Megatron whose packages stay hollow:
    what they import, torch first of all, has no part in it."""
    hollow = f"""
import importlib.util, sys, types
for name in ("megatron", "megatron.core", "megatron.core.transformer"):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [{str(folder)!r} + "/" + name.replace(".", "/")]
print(importlib.util.find_spec({OLD!r}).origin)
"""
    ran = light.start(pythons.at_hand[version], roots, "-c", RESTORE + hollow)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("version", pythons.at_hand)
@pytest.mark.parametrize("megatron", SHIPPING)
def test_a_megatron_that_ships_the_address_keeps_its_own(version, megatron, installed, root):
    folder = installed(megatron)
    path = folder / f"{OLD.replace('.', '/')}.py"
    assert origin(version, [root, folder], folder) == str(path)


@pytest.mark.parametrize("version", pythons.at_hand)
def test_the_newest_megatron_finds_the_address_again(version, installed, root):
    folder = installed(NEWEST)
    assert origin(version, [root, folder], folder) == "redline.megatron.old_address"


@pytest.mark.parametrize(
    "version",
    [v for v in pythons.at_hand if v == pythons.ours or int(v.partition(".")[2]) >= 12],
)
def test_the_newest_megatron_forwards_all_that_it_has(version, installed, root, tmp_path):
    asking = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    if light.start(pythons.at_hand[version], [], "-c", asking).returncode:
        pytest.skip(f"Python {version} has no torch: not tested with megatron-core {NEWEST}")
    program = light.plant(tmp_path, "a.py", RESTORE + USE)
    roots = [root, installed(NEWEST)]
    ran = light.start(pythons.at_hand[version], roots, *WARNING, program)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout.split()[-2]) > 50
    assert warned(ran) == [f"{line} {notice(OLD)}" for line in (6, 10, 15)]
