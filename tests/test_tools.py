"""The checks of tools/ find the faults that are planted for them, and nothing in a clean tree."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from files import plant

tools = Path(__file__).resolve().parent.parent / "tools"
sys.path.insert(0, str(tools))

import check_dyno  # noqa: E402
import check_includes  # noqa: E402
import check_sizes  # noqa: E402
import check_spills  # noqa: E402
import check_weak_symbols  # noqa: E402
import cpp_functions  # noqa: E402
import setup_environment  # noqa: E402

# --- includes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "include", "complaint"),
    [
        ("core/check.h", "<ATen/core/Tensor.h>", "core/ knows nothing about torch"),
        ("kernels/norm.cpp", "<torch/all.h>", "kernels/ knows nothing about torch"),
        ("kernels/norm.cpp", '"redline/ops/norm.h"', "not allowed in kernels/"),
        ("core/check.h", '"redline/kernels/norm.h"', "not allowed in core/"),
        ("layers/linear.h", '"redline/kernels/norm.h"', "not allowed in layers/"),
        ("transformer/custom_layers/x.h", '"redline/layers/linear.h"', "not allowed in transf"),
        ("kernels/cuda/device/tma.cuh", '"redline/core/check.h"', "device/ includes device/ only"),
        ("kernels/cpu/norm.cpp", "<cuda_runtime.h>", "cpu/ knows nothing about CUDA"),
    ],
)
def test_an_include_through_a_wall_is_found(tmp_path, name, include, complaint):
    plant(tmp_path, f"redline/{name}", f"#pragma once\n#include {include}\n")
    (fault,) = check_includes.check(tmp_path)
    assert complaint in fault
    assert f"{name}:2:" in fault


def test_a_folder_without_a_rule_is_found(tmp_path):
    plant(tmp_path, "redline/utils/x.h", "")
    assert "has no rule" in check_includes.check(tmp_path)[0]


def test_includes_down_the_ladder_pass(tmp_path):
    plant(
        tmp_path, "redline/ops/norm.cpp", '#include <torch/library.h>\n#include "redline/core/x.h"'
    )
    plant(
        tmp_path, "redline/kernels/cuda/device/a.cuh", '#include "redline/kernels/cuda/device/b.h"'
    )
    assert check_includes.check(tmp_path) == []


# --- sizes ----------------------------------------------------------------------------------------


def lines(count: int, text: str = "  x += 1;") -> str:
    return "\n".join([text] * count)


def nest(depth: int) -> str:
    return "void f() {" + "if (a) {" * depth + "}" * depth + "}\n"


cpp_faults = [
    (lines(401, "// x"), "401 lines, at most 400"),
    ("// " + "x" * 98 + "\n", "101 columns, at most 100"),
    ("void f() {\n" + lines(49) + "\n}\n", "f: 51 lines, at most 50"),
    ("__device__ void f() {\n" + lines(79) + "\n}\n", "f: 81 lines, at most 80"),
    (
        "__global__ void __launch_bounds__(256, 2)\n    f() {\n" + lines(118) + "\n}\n",
        "f: 121 lines",
    ),
    (
        "int f(int a, int b, int c, int d, int e, int g) { return a; }\n",
        "f: 6 parameters, at most 5",
    ),
    (
        "template <int A, int B, int C, int D, int E>\nstruct S;\n",
        "5 template parameters, at most 4",
    ),
    (nest(4), "f: 4 levels of nesting, at most 3"),
]


@pytest.mark.parametrize(("text", "complaint"), cpp_faults)
def test_a_cpp_budget_exceeded_is_found(tmp_path, text, complaint):
    (fault,) = check_sizes.check_file(plant(tmp_path, "x.cu", text))
    assert complaint in fault


def test_a_cpp_file_at_its_budgets_passes(tmp_path):
    text = (
        "template <int A, int B, int C, typename D>\n"
        "int f(int a, std::pair<int, int> b, int c, int d, int e) {\n"
        + lines(46)
        + "\n}\n"
        + nest(3)
    )
    assert check_sizes.check_file(plant(tmp_path, "x.cpp", text)) == []


python_faults = [
    ("def f():\n" + lines(50, "    x = 1"), "f: 51 lines, at most 50"),
    ("def f(a, b, c, d, e, g):\n    pass\n", "f: 6 parameters, at most 5"),
    ("def f():\n    for a in b:\n        if a:\n            while a:\n                if a:\n"
     "                    pass\n", "f: 4 levels of nesting, at most 3"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "complaint"), python_faults)
def test_a_python_budget_exceeded_is_found(tmp_path, text, complaint):
    (fault,) = check_sizes.check_file(plant(tmp_path, "x.py", text))
    assert complaint in fault


@pytest.mark.parametrize(
    "text",
    [
        "class A:\n    def f(self, a, b, c, d, e, *, g, h):\n        pass\n",
        'def f():\n    """' + lines(60, "words") + '"""\n    return 1\n',
        "def f():\n    if a:\n        pass\n" + lines(6, "    elif b:\n        pass"),
    ],
)
def test_python_within_budget_passes(tmp_path, text):
    assert check_sizes.check_file(plant(tmp_path, "x.py", text)) == []


def test_a_reason_in_the_head_excuses_its_own_kind_alone(tmp_path):
    head = "// Over budget: parameters: the dispatcher's schema fixes the signature.\n"
    fault = "int f(int a, int b, int c, int d, int e, int g) { return a; }\n"
    assert check_sizes.check_file(plant(tmp_path, "a.cpp", head + fault)) == []
    assert check_sizes.check_file(plant(tmp_path, "b.cpp", head + nest(4))) != []
    late = lines(30, "// x") + "\n" + head + fault
    assert check_sizes.check_file(plant(tmp_path, "c.cpp", late)) != []
    without_reason = "// Over budget: parameters:\n"
    assert check_sizes.check_file(plant(tmp_path, "d.cpp", without_reason + fault)) != []


def test_cpp_functions_are_told_from_what_looks_like_them():
    code = r"""
        namespace redline { namespace {
        struct Plan { int rows; };
        const int table[] = {1, 2, 3};
        enum class Kind { a, b };
        extern "C" { void g(); }
        // void comment() { }
        const char* text = "void string() { }";
        #define BODY() { }
        class Box {
         public:
          Box(int a, int b) : a_{a}, b_(b) { c(); }
          int operator()(int x) const noexcept { return x; }
          bool operator==(const Box& other) const { return true; }
         private:
          int a_, b_;
        };
        auto lambda = [](int a) { return a; };
        template <typename T> requires std::integral<T>
        T twice(T x) { return 2 * x; }
        }}
    """
    names = [function.name for function in cpp_functions.functions_of(code)]
    assert names == ["Box", "operator()", "operator==", "twice"]


# --- weak symbols ---------------------------------------------------------------------------------

needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") and shutil.which("nm")), reason="needs g++ and nm"
)
object_folder = "CMakeFiles/cpu_avx2.dir/redline/kernels/cpu"


def compile_object(root: Path, text: str) -> None:
    source = plant(root, "x.cpp", text)
    target = root / object_folder / "x.cpp.o"
    target.parent.mkdir(parents=True)
    subprocess.run(["g++", "-O2", "-c", source, "-o", target], check=True)


@needs_compiler
def test_a_weak_function_is_found(tmp_path):
    text = "template <class T> __attribute__((noinline)) T f(T x) { return x + x; }\n"
    compile_object(tmp_path, text + "int g(int x) { return f(x); }\n")
    (fault,) = check_weak_symbols.check(tmp_path)
    assert "weak function int f<int>(int)" in fault


@needs_compiler
def test_an_object_without_weak_functions_passes(tmp_path):
    compile_object(
        tmp_path, "namespace { int f(int x) { return x; } } int g(int x) { return f(x); }"
    )
    assert check_weak_symbols.check(tmp_path) == []


def test_a_build_without_objects_is_no_pass(tmp_path):
    assert "build the library first" in check_weak_symbols.check(tmp_path)[0]


# --- spills ---------------------------------------------------------------------------------------

ptxas_log = """\
ptxas info    : Compiling entry function '_Z4calmPf' for 'sm_90a'
ptxas info    : Function properties for _Z4calmPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function '_Z6crowdPf' for 'sm_90a'
ptxas info    : Function properties for _Z6crowdPf
    64 bytes stack frame, 16 bytes spill stores, 24 bytes spill loads
"""


def test_a_spill_is_found_and_named():
    assert check_spills.spills(ptxas_log) == ["_Z6crowdPf: 16 bytes spilled, 24 bytes read back"]


def test_hopper_kernels_are_for_hopper():
    path = Path("redline/kernels/cuda/attention/sm90.cu")
    assert check_spills.is_for(path, "sm_90a")
    assert not check_spills.is_for(path, "sm_80")
    assert check_spills.is_for(Path("redline/kernels/cuda/norm.cu"), "sm_80")


def test_a_file_of_one_element_type_is_compiled_for_each(tmp_path):
    path = plant(tmp_path, "row.cu", "template void run<REDLINE_ELEMENT>();")
    found = [option.removeprefix("-DREDLINE_ELEMENT=") for (option,) in check_spills.parts_of(path)]
    assert (
        f"foreach(element {' '.join(found)})" in (tools.parent / "cmake/kernels.cmake").read_text()
    )
    assert check_spills.parts_of(plant(tmp_path, "whole.cu", "void run();")) == [[]]


@pytest.mark.skipif(check_spills.find_nvcc() is None, reason="needs nvcc")
def test_a_kernel_that_spills_or_does_not_compile_is_found(tmp_path):
    crowd = """
        __global__ void __launch_bounds__(1024, 2) crowd(float* p) {
          float a[64];
          for (int i = 0; i < 64; ++i) a[i] = p[i * 32 + threadIdx.x];
          __syncthreads();
          for (int i = 0; i < 64; ++i) p[i * 32 + threadIdx.x] = a[63 - i] * a[i];
        }"""
    (fault,) = check_spills.compile_one(
        check_spills.find_nvcc(), plant(tmp_path, "crowd.cu", crowd), "sm_90a"
    )
    assert "bytes spilled" in fault
    broken = plant(tmp_path, "broken.cu", "__global__ void f() { nothing(); }")
    (fault,) = check_spills.compile_one(check_spills.find_nvcc(), broken, "sm_90a")
    assert "does not compile for sm_90a" in fault


# --- dyno.json ------------------------------------------------------------------------------------


def whole_report() -> dict:
    part = {
        "name": "rms_norm", "direction": "forward", "shape": [4096, 1024], "dtype": "float32",
        "stock_us": 900.0, "compiled_us": None, "tuned_us": 500.0, "spread": 0.02,
        "stock_saved_bytes": 1, "compiled_saved_bytes": None, "tuned_saved_bytes": 1,
        "stock_error": 1e-7, "compiled_error": None, "tuned_error": 1e-7, "of_redline": 0.8,
    }  # fmt: skip
    run = {"losses": [9.0, 8.0], "tokens_per_second": 1000.0, "peak_bytes": 10}
    run["flop_utilisation"] = 0.5
    lap = {"stock": run, "tuned": dict(run), "max_loss_difference": 0.0, "bound": 1e-3}
    block = {"time_us": 5.0, "kernels": 26, "saved_bytes": 1000}
    block = {"stock": block, "tuned": dict(block)}
    measured = {"parts": [part], "lap": lap, "block": block}
    return {"machine": {}, "versions": {}, "ceilings": {}, **measured}


def test_a_whole_report_passes(tmp_path):
    path = plant(tmp_path, "dyno.json", json.dumps(whole_report()))
    assert check_dyno.check(path, steps=2) == []


def spoil(report: dict, path: str, value) -> dict:
    *outer, last = path.split(".")
    inner = report
    for key in outer:
        inner = inner[int(key) if key.isdigit() else key]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return report


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("machine", None, "machine: missing"),
        ("parts", [], "parts: empty"),
        ("parts.0.tuned_us", None, "parts[0].tuned_us: missing"),
        ("parts.0.tuned_us", -1.0, "parts[0].tuned_us: expected a number above 0"),
        ("parts.0.stock_error", "small", "parts[0].stock_error: expected a number"),
        ("lap.bound", None, "lap.bound: missing"),
        ("lap.tuned.losses", [1.0], "lap.tuned.losses: expected 2"),
        ("lap.tuned.losses", [1.0, float("nan")], "lap.tuned.losses: not finite"),
        ("lap.max_loss_difference", 1.0, "lap.max_loss_difference: expected at most"),
        ("lap.stock.flop_utilisation", 0, "lap.stock.flop_utilisation: expected a number above 0"),
        ("block.tuned.kernels", 0, "block.tuned.kernels: expected a number above 0, not 0"),
        ("block.stock.time_us", None, "block.stock.time_us: expected a number above 0"),
    ],
)
def test_a_spoilt_report_is_found(tmp_path, path, value, complaint):
    spoilt = plant(tmp_path, "dyno.json", json.dumps(spoil(whole_report(), path, value)))
    faults = check_dyno.check(spoilt, steps=2)
    assert any(complaint in fault for fault in faults), faults


# --- set-up ---------------------------------------------------------------------------------------


@pytest.fixture
def sandbox(tmp_path, monkeypatch):
    """A tree of its own for the set-up tool, with small requirements."""
    for group in setup_environment.modules:
        plant(tmp_path, f"requirements/{group}.txt", f"# {group}\n")
    plant(tmp_path, "requirements/constraints.txt", "")
    monkeypatch.setattr(setup_environment, "root", tmp_path)
    monkeypatch.setattr(setup_environment, "environment", tmp_path / ".venv")
    monkeypatch.setattr(setup_environment, "stamps", tmp_path / ".venv" / "redline-setup")
    return tmp_path


def test_a_group_is_complete_only_with_the_stamp_of_its_pins(sandbox):
    assert not setup_environment.is_complete("build")
    stamp = plant(sandbox, ".venv/redline-setup/build", setup_environment.digest("build") + "\n")
    assert setup_environment.is_complete("build")
    stamp.write_text("half")
    assert not setup_environment.is_complete("build")
    stamp.write_text(setup_environment.digest("build") + "\n")
    plant(sandbox, "requirements/build.txt", "ninja==1\n")
    assert not setup_environment.is_complete("build")


def test_an_interrupted_install_is_not_trusted(sandbox, monkeypatch):
    plant(sandbox, ".venv/redline-setup/build", setup_environment.digest("build") + "\n")

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(setup_environment, "follow", interrupt)
    with pytest.raises(KeyboardInterrupt):
        setup_environment.install(["build"])
    assert not setup_environment.is_complete("build")


def test_a_strangers_environment_is_left_alone(sandbox):
    plant(sandbox, ".venv/pyvenv.cfg", "home = /somewhere\n")
    with pytest.raises(SystemExit, match="was not made by make"):
        setup_environment.make_environment()
    assert (sandbox / ".venv/pyvenv.cfg").exists()


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setitem(setup_environment.modules, "build", ["torch", "no_such_module"])
    with pytest.raises(SystemExit, match=r"has no no_such_module; install with: .* -m pip install"):
        setup_environment.check(["build"])
