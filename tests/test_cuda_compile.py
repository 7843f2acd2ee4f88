"""What the GPU compilers make of the kernels; needs no GPU and no driver. No spills, no stack, 16-byte accesses."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
ARCHS = ["80", "90a", "100"]


def tool(name: str) -> str:
    """CUDA's tool from PATH, or the copy that Triton brings; skips if there is neither."""
    found = shutil.which(name)
    if found is None:
        triton = pytest.importorskip(
            "triton", reason=f"{name} is not on PATH, and triton, which has one, isn't installed"
        )
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)
        if not os.access(found, os.X_OK):
            pytest.skip(f"{name} is neither on PATH nor in triton")
    return found


def resources(cubin: Path) -> dict[str, dict[str, int]]:
    """Of each kernel of a cubin: REG, STACK (local memory's frame, spills included), SHARED, LOCAL."""
    command = [tool("cuobjdump"), "-res-usage", str(cubin)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*(.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


def accesses(cubin: Path) -> dict[str, dict[str, list[int]]]:
    """Of each kernel of a cubin: the bits of its global loads, stores, and of its accesses to local memory."""
    text = subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for part in text.split("Function : ")[1:]:
        kinds = {}
        for kind in ("LDG", "STG", "LDL", "STL"):
            found = re.findall(rf"\b{kind}((?:\.\w+)*)", part)
            sizes = [re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", suffixes) for suffixes in found]
            kinds[kind] = [32 if size is None else int(size[1]) for size in sizes]
        kernels[part.split()[0]] = kinds
    return kernels


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_cuda_source(tmp_path, source, arch):
    nvcc = shutil.which("nvcc") or pytest.skip("nvcc is not on PATH")
    cubin = tmp_path / "kernel.cubin"
    command = [nvcc, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", "-Xptxas", "-v", "-o", str(cubin), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(spills) == 8, "4 dtypes, vectorised and not"
    assert set(spills) == {("0", "0", "0")}, done.stderr
    kernels = accesses(cubin)
    vectorised = [kinds for name, kinds in kernels.items() if "Li1E" not in name]
    assert len(kernels) == 8 and len(vectorised) == 4
    for kinds in kernels.values():
        assert kinds["LDL"] == kinds["STL"] == []
    for kinds in vectorised:
        assert len(kinds["LDG"]) >= 9 and set(kinds["LDG"]) == {128}
        assert len(kinds["STG"]) >= 5 and set(kinds["STG"]) == {128}


COMPILE_TRITON = """
import json, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from lstm_fast.kernels import triton_kernels
from lstm_fast.kernels.triton_gates import _tiling

NAMES = {"fp32": 4, "bf16": 2, "fp16": 2}
POINTERS = {
    "forward": {"gates": "T", "product": "A", "c_state": "A", "h_state": "T", "y": "T", "cells": "A"},
    "backward": {"gates": "T", "cells": "A", "c0": "T", "dy": "T", "dh_state": "A", "dc_state": "A", "dgates": "T"},
}
for name, pointers in POINTERS.items():
    kernel = getattr(triton_kernels, name)
    for dtype, size in NAMES.items():
        units, _, warps = _tiling(512, size)
        signature = {}
        for argument in kernel.arg_names:
            kind = {"T": "*" + dtype, "A": "*fp32"}.get(pointers.get(argument), "i32")
            signature[argument] = "constexpr" if argument == "BLOCK" else kind
        of_16 = [(i,) for i, argument in enumerate(kernel.arg_names) if argument in pointers or argument == "hidden"]
        source = ASTSource(
            fn=kernel,
            signature=signature,
            constexprs={"BLOCK": units},
            attrs={place: [["tt.divisibility", 16]] for place in of_16},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
        path = f"{sys.argv[1]}/{name}-{dtype}.cubin"
        open(path, "wb").write(compiled.asm["cubin"])
        print(path)
"""


def test_triton_kernels(tmp_path):
    """Ahead of time for sm_90, in a process of its own: in this one they may be interpreted."""
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", COMPILE_TRITON, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    cubins = [Path(line) for line in done.stdout.split()]
    assert len(cubins) == 6
    for cubin in cubins:
        for usage in resources(cubin).values():
            assert usage["STACK"] == usage["LOCAL"] == 0, f"{cubin.name}: {usage}"
        for kinds in accesses(cubin).values():
            assert kinds["LDL"] == kinds["STL"] == []
            assert len(kinds["LDG"]) >= 9 and set(kinds["LDG"]) == {128}, cubin.name
            assert len(kinds["STG"]) >= 5 and set(kinds["STG"]) == {128}, cubin.name
