"""What the build puts out, what it needs, and what it says when something is missing."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from lstm_fast import _C

ROOT = Path(__file__).resolve().parents[1]
SYSTEM_LIBRARIES = ("libstdc++.", "libm.", "libgcc_s.", "libc.", "libdl.", "librt.", "libpthread.", "ld-linux")

in_a_checkout = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def run(command: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def source_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("source") / "copy"
    ignore = shutil.ignore_patterns(".*", "build", "dist", "runs", "demo", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=ignore)
    return copy


@in_a_checkout
def test_what_make_installs_serves_the_oldest_python_promised() -> None:
    promised = re.search(r'requires-python = ">=(3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    assert promised is not None
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    here, oldest = {}, {"python_version": promised[1]}
    pins = [
        pin
        for pin in map(Requirement, filter(None, lines))
        if str(pin.specifier).startswith("==") and all(not pin.marker or pin.marker.evaluate(e) for e in (here, oldest))
    ]
    assert "pytest" in [pin.name for pin in pins]
    needs = {pin.name: metadata(pin.name).get("Requires-Python") or "" for pin in pins}
    assert not {name: which for name, which in needs.items() if f"{promised[1]}.9" not in SpecifierSet(which)}


@in_a_checkout
def test_sdist_holds_all_that_a_build_needs(source_copy: Path, tmp_path: Path) -> None:
    done = run([sys.executable, "setup.py", "-q", "sdist", "-d", str(tmp_path)], source_copy)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    sources |= {str(path.relative_to(ROOT)) for path in (ROOT / "lstm_fast/translate/data").glob("*")}
    sources |= set(re.findall(r"\]\((docs/[\w./-]+)\)", (ROOT / "README.md").read_text()))
    assert {"csrc/lstm_math.h", "docs/cpu.md"} <= sources
    assert sources | {"setup.py", "pyproject.toml", "LICENSE", "README.md", "lstm_fast/py.typed"} <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


@in_a_checkout
def test_package_data_is_installed(source_copy: Path, tmp_path: Path) -> None:
    done = run([sys.executable, "setup.py", "-q", "build_py", "-d", str(tmp_path)], source_copy)
    assert done.returncode == 0, done.stderr
    installed = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    data = {str(path.relative_to(ROOT)) for path in (ROOT / "lstm_fast/translate/data").glob("*")}
    assert {"lstm_fast/py.typed", "lstm_fast/_C.pyi", "lstm_fast/kernels/cpu.py"} | data <= installed


@in_a_checkout
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("source", sorted(path.name for path in (ROOT / "csrc" / "cpu").glob("*.cpp")))
def test_processors_other_than_x86_find_what_they_compile(source: str) -> None:
    options = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-Wno-psabi"]
    done = run(["g++", *options, "-DLSTM_FAST_WITHOUT_X86", source], ROOT / "csrc" / "cpu")
    assert done.returncode == 0, done.stderr


WITHOUT_NVCC = """
import runpy, shutil, sys
which = shutil.which
shutil.which = lambda name, *args, **kwargs: None if name == "nvcc" else which(name, *args, **kwargs)
sys.argv = ["setup.py", "-q", "build_ext", "-b", "out", "-t", "temp"]
runpy.run_path("setup.py", run_name="__main__")
"""


@in_a_checkout
@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"LSTM_FAST_CUDA": "1"}, "error: LSTM_FAST_CUDA=1 needs nvcc, which is neither in CUDA_HOME/bin nor on PATH"),
        ({"LSTM_FAST_CUDA": "yes"}, "error: LSTM_FAST_CUDA should be 0 or 1, got: 'yes'"),
        ({"CXX": "no-such-c++"}, "error: lstm_fast needs a C++17 compiler, and no-such-c++ was not found"),
    ],
)
def test_a_failed_build_says_what_is_missing(source_copy: Path, environment: dict[str, str], sentence: str) -> None:
    done = run([sys.executable, "-c", WITHOUT_NVCC], source_copy, **environment)
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == sentence
    assert "Traceback" not in done.stderr


@in_a_checkout
@pytest.mark.parametrize(
    "version, sentence",
    [
        ("10.2.1", "lstm_fast needs GCC 11 or newer, and {} is 10.2.1"),
        pytest.param(
            "Debian clang version 14.0.6",
            "lstm_fast's kernels for x86 need GCC 11 or newer, and {} is clang",
            marks=pytest.mark.skipif(platform.machine() != "x86_64", reason="elsewhere clang serves"),
        ),
    ],
)
def test_a_compiler_that_will_not_do_is_named(source_copy: Path, tmp_path: Path, version: str, sentence: str) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\necho {version}\n")
    compiler.chmod(0o755)
    done = run([sys.executable, "-c", WITHOUT_NVCC], source_copy, CXX=str(compiler))
    assert done.returncode != 0 and "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == f"error: {sentence.format(compiler)}"


def test_build_info() -> None:
    info = _C.build_info()
    assert set(info) == {"cuda", "cuda_archs", "nvcc", "clusters", "compiler", "openmp"}
    assert info["cuda"] == bool(info["cuda_archs"]) == (info["nvcc"] is not None)
    newer = info["cuda"] and tuple(map(int, info["nvcc"].split("."))) >= (12, 8)
    assert info["clusters"] == (newer and any(int(arch.rstrip("af")) >= 90 for arch in info["cuda_archs"]))
    assert info["compiler"]
    assert sorted(_C.DTYPES) == ["bfloat16", "float16", "float32", "float64"]
    assert sorted(_C.DTYPES.values()) == [0, 1, 2, 3]


@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs readelf")
def test_nothing_but_system_libraries_is_linked() -> None:
    """No CUDA driver or runtime: it loads where there is none. No OpenMP runtime: torch brings one."""
    dynamic = subprocess.run(["readelf", "-d", _C.__file__], capture_output=True, text=True, check=True).stdout
    needed = [line.rpartition("[")[2].rstrip("]") for line in dynamic.splitlines() if "(NEEDED)" in line]
    assert any(name.startswith("libc.") for name in needed)
    assert [name for name in needed if not name.startswith(SYSTEM_LIBRARIES)] == []


ONE_OPENMP = """
import os, torch
import lstm_fast

threads = lambda: len(os.listdir("/proc/self/task"))
layer, x = lstm_fast.LSTM(64, 128, backend="cpu"), torch.randn(20, 32, 64)
torch.set_num_threads(1)
with torch.no_grad():
    layer(x)
    alone = threads()
    layer(x)
    assert threads() == alone, "a thread was started under torch.set_num_threads(1)"
    torch.set_num_threads(3)
    torch.randn(4_000_000).exp_()
    pool = threads()
    assert pool > alone
    layer(x)
    assert threads() == pool, "the kernel started threads of its own"
maps = {line.split()[-1] for line in open("/proc/self/maps") if "/" in line}
names = ("libgomp", "libomp", "libiomp")
runtimes = {os.path.realpath(path) for path in maps if os.path.basename(path).startswith(names)}
assert len(runtimes) == 1, runtimes
"""


@pytest.mark.skipif(not _C.build_info()["openmp"], reason="built without OpenMP")
def test_one_openmp_runtime_and_one_pool_of_threads(tmp_path: Path) -> None:
    environment = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    done = run([sys.executable, "-c", ONE_OPENMP], tmp_path, **environment)
    assert done.returncode == 0, done.stderr
