"""`redline run` is `python`, with Redline in Transformer Engine's place, and a list at the end."""

import sys
import zipfile

import pytest

import light
from light import plant

OLD = "megatron.core.transformer.custom_layers.transformer_engine"
NEW = "megatron.core.extensions.transformer_engine"

# In the place of redline.megatron: what is under test calls it, and loads no torch.
MEGATRON = """
import os, sys, types
from redline.megatron.old_address import restore_old_address

def install():
    if "REFUSE" in os.environ:
        raise RuntimeError("the real Transformer Engine is already imported")
    sys.modules["transformer_engine"] = types.ModuleType("transformer_engine")
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder for PYTHONPATH: Redline without torch, and a Megatron without its old address."""
    root = tmp_path_factory.mktemp("light")
    modules = ("__init__", "__main__", "cli", "run", "signpost", "megatron.old_address")
    light.copy(root, *(f"redline.{module}" for module in modules))
    plant(root, "redline/megatron/__init__.py", MEGATRON)
    for package in ("", "/transformer", "/transformer/custom_layers", "/extensions"):
        plant(root, f"megatron/core{package}/__init__.py", "")
    plant(root, f"{NEW.replace('.', '/')}.py", "TENorm = 'norm'\n")
    return root


@pytest.fixture
def start(root, tmp_path):
    """Runs `python …` in a folder of its own."""

    def started(*words, **variables):
        return light.start(sys.executable, [root], *words, cwd=tmp_path, variables=variables)

    return started


PROBE = """
import atexit, pickle, sys

class Named:
    pass

def tell(when):
    main = sys.modules["__main__"]
    print(when, main.__dict__ is globals(), pickle.loads(pickle.dumps(Named)) is Named)

print(sys.argv, sys.path[0], __name__, __file__, __package__, __doc__, __cached__)
print(__spec__ and __spec__.name, type(__loader__).__name__)
tell("now")
atexit.register(tell, "at exit")
"""


@pytest.mark.parametrize(
    "program",
    [
        ["probe.py", "a", "--help", "--", "-m", "b"],
        ["folder/probe.py", "-x"],
        ["link.py"],
        ["folder", "a"],
        ["archive.zip"],
        ["-m", "probe", "a", "--help", "--", "-m"],
        ["-mprobe"],
        ["-m", "package.probe", "--version"],
        ["-m", "package"],
    ],
)
def test_a_program_finds_what_python_leaves_it(start, tmp_path, program):
    for name in ("probe.py", "folder/probe.py", "folder/__main__.py", "package/__main__.py"):
        plant(tmp_path, name, PROBE)
    plant(tmp_path, "package/__init__.py", "")
    plant(tmp_path, "package/probe.py", PROBE)
    (tmp_path / "link.py").symlink_to("folder/probe.py")
    with zipfile.ZipFile(tmp_path / "archive.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    plain, ours = start(*program), start("-m", "redline", "run", *program)
    assert plain.stdout.count("True True") == 2
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, "", 0)


def test_two_dashes_may_stand_before_the_program(start, tmp_path):
    plant(tmp_path, "a.py", "import sys\nprint(sys.argv[1:])")
    for program in (["a.py"], ["-m", "a"]):
        ran = start("-m", "redline", "run", "--", *program, "--", "-x")
        assert ran.stdout == "['--', '-x']\n"


@pytest.mark.parametrize(
    "ending",
    [
        "sys.exit()",
        "sys.exit(3)",
        "sys.exit('words')",
        "def f():\n    1 / 0\nf()",
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError(1) from error",
        "raise KeyboardInterrupt",
        "def f(:",
        "import nowhere_at_all",
        "import os; os._exit(4)",
        "import threading\nthreading.Timer(0.1, lambda: print('late')).start()",
    ],
)
def test_a_program_ends_as_in_python(start, tmp_path, ending):
    plant(tmp_path, "a.py", f"import sys\nprint('begun', flush=True)\n{ending}\n")
    plain, ours = start("a.py"), start("-m", "redline", "run", "a.py")
    assert (ours.returncode, ours.stdout, ours.stderr) == (
        plain.returncode,
        plain.stdout,
        plain.stderr,
    )
    plain, ours = start("-m", "a"), start("-m", "redline", "run", "-m", "a")
    assert (ours.returncode, ours.stdout) == (plain.returncode, plain.stdout)
    frames = [line for line in plain.stderr.splitlines() if "<frozen runpy>" not in line]
    assert ours.stderr.splitlines() == frames


def test_a_programs_own_hook_gets_its_own_traceback(start, tmp_path):
    hook = "sys.excepthook = lambda *error: print(error[0], error[2].tb_lineno)"
    plant(tmp_path, "a.py", f"import sys\n{hook}\n1 / 0")
    for program in (["a.py"], ["-m", "a"]):
        ran = start("-m", "redline", "run", *program)
        told = (ran.returncode, ran.stdout, ran.stderr)
        assert told == (1, "<class 'ZeroDivisionError'> 3\n", "")


def test_redline_stands_in_and_the_old_imports_are_listed(start, tmp_path):
    plant(tmp_path, "lib.py", f"\nfrom {OLD} import TENorm\n")
    program = f"import transformer_engine, lib\nimport {OLD} as te\nprint(te.TENorm, lib.TENorm)"
    path = plant(tmp_path, "a.py", program)
    ran = start("-W", "ignore", "-m", "redline", "run", "a.py")
    assert (ran.returncode, ran.stdout) == (0, "norm norm\n")
    at = [f"{tmp_path / 'lib.py'}:2", f"{path}:3"]
    told = [line for place in at for line in (f"  {place}: {OLD}", f"      import instead: {NEW}")]
    assert ran.stderr.splitlines() == [
        "redline run: 2 imports of an old address:",
        *told,
        "to rewrite them: redline move --write PATH",
    ]
    assert start("-W", "ignore", "-m", "redline", "run", "a.py", RANK="1").stderr == ""


def test_an_old_import_is_listed_where_megatron_ships_the_address(start, root, tmp_path):
    shipped = plant(root, f"{OLD.replace('.', '/')}.py", f"from {NEW} import *\n")
    try:
        plant(tmp_path, "a.py", f"from {OLD} import TENorm, __file__\nprint(__file__)")
        ran = start("-m", "redline", "run", "a.py")
    finally:
        shipped.unlink()
    assert ran.stdout == f"{shipped}\n"
    assert ran.stderr.splitlines()[:2] == [
        "redline run: 1 import of an old address:",
        f"  {tmp_path / 'a.py'}:1: {OLD}",
    ]


@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ([], 2, "expected a script, or -m and a module: redline run train.py --lr 1e-3"),
        (["-m"], 2, "expected a script, or -m and a module: redline run train.py --lr 1e-3"),
        (
            ["-c", "print()"],
            2,
            "expected a script, not -c; "
            "Python's own options: python -X dev -m redline run train.py",
        ),
        (["nowhere.py"], 2, "nowhere.py: No such file or directory"),
        (["-m", "nowhere.a"], 1, "no module named nowhere.a"),
        (["-m", "package"], 1, "no module named package.__main__"),
    ],
)
def test_a_wrong_request_is_one_sentence(start, tmp_path, words, status, sentence):
    plant(tmp_path, "package/__init__.py", "")
    ran = start("-m", "redline", "run", *words)
    assert (ran.returncode, ran.stderr) == (status, f"redline run: {sentence}\n")


def test_a_refusal_to_stand_in_is_one_sentence(start, tmp_path):
    plant(tmp_path, "a.py", "print('run')")
    ran = start("-m", "redline", "run", "a.py", REFUSE="1")
    sentence = "redline run: the real Transformer Engine is already imported\n"
    assert (ran.returncode, ran.stdout, ran.stderr) == (1, "", sentence)


def test_it_works_under_torchrun(start, tmp_path):
    # A line in one write: both ranks have the same pipe.
    line = "os.write(1, f'{os.environ[\"RANK\"]} {sys.argv}\\n'.encode())"
    plant(tmp_path, "a.py", f"import os, sys, transformer_engine\n{line}")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    ran = start(*launch, "-m", "redline", "run", "a.py", "--lr", "1")
    assert ran.returncode == 0, ran.stderr
    assert sorted(ran.stdout.splitlines()) == [f"{rank} ['a.py', '--lr', '1']" for rank in (0, 1)]


def test_it_starts_as_the_program_that_pip_makes(start, tmp_path):
    plant(tmp_path, "a.py", "import sys\nprint(sys.path[0])")
    script = "import sys\nfrom redline.cli import main\nsys.exit(main())\n"
    plant(tmp_path, "bin/redline", script)
    assert start("bin/redline", "run", "a.py").stdout == f"{tmp_path}\n"
