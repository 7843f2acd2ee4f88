"""What the GPU compilers made of the kernels; needs no GPU and no driver. No spills, no stack, 16-byte accesses."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from lstm_fast import _C

ROOT = Path(__file__).parents[1]
ARCHS = ["80", "90a", "100"]
CLUSTER_ARCHS = ["90a", "100"]
SHARED_LIMIT = 227 * 1024  # bytes of a block, compute capability 9.0 and 10.0


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


def resources(binary: Path, *options: str) -> dict[str, dict[str, int]]:
    """Of each kernel of a cubin or library: REG, STACK (local memory's frame, spills included), SHARED, LOCAL."""
    command = [tool("cuobjdump"), "-res-usage", *options, str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"Function (\S+):\s*(.*)", text)
    return {name: {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage)} for name, usage in found}


def sass(binary: Path, *options: str) -> dict[str, str]:
    """The machine code of each kernel of a cubin or library."""
    command = [tool("cuobjdump"), "-sass", *options, str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {part.split()[0]: part for part in text.split("Function : ")[1:]}


def accesses(code: dict[str, str]) -> dict[str, dict[str, list[int]]]:
    """Of each kernel: the bits of its global loads, stores, and of its accesses to local memory."""
    kernels = {}
    for name, part in code.items():
        kinds = {}
        for kind in ("LDG", "STG", "LDL", "STL"):
            found = re.findall(rf"\b{kind}((?:\.\w+)*)", part)
            sizes = [re.search(r"\.[US]?(8|16|64|128|256)(?:\.|$)", suffixes) for suffixes in found]
            kinds[kind] = [32 if size is None else int(size[1]) for size in sizes]
        kernels[name] = kinds
    return kernels


@cache
def built(arch: str) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Resources and machine code of each kernel as lstm_fast._C holds it."""
    if arch not in _C.build_info()["cuda_archs"]:
        pytest.skip(f"lstm_fast._C was built without sm_{arch}")
    library, options = Path(_C.__file__), ("-arch", f"sm_{arch}")
    return resources(library, *options), sass(library, *options)


def kernels_of(arch: str, pattern: str) -> tuple[dict[str, dict[str, int]], dict[str, str]]:
    """Of those whose mangled name has the pattern; none of them may keep anything in local memory."""
    usage, code = ({k: v for k, v in found.items() if re.search(pattern, k)} for found in built(arch))
    assert usage.keys() == code.keys()
    for kernel, use in usage.items():
        assert use["STACK"] == use["LOCAL"] == 0, kernel
        assert not re.search(r"\b(LDL|STL)\b", code[kernel]), kernel
    return usage, code


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("step", ["ForwardStep", "BackwardStep"])
def test_gate_kernels(step, arch):
    _, code = kernels_of(arch, f"gate_kernel.*{step}")
    kernels = accesses(code)
    vectorised = [kinds for name, kinds in kernels.items() if "Li1E" not in name]
    assert len(kernels) == 8 and len(vectorised) == 4, "4 dtypes, vectorised and not"
    for kinds in vectorised:
        assert len(kinds["LDG"]) >= 9 and set(kinds["LDG"]) == {128}
        assert len(kinds["STG"]) >= 5 and set(kinds["STG"]) == {128}


def multiplies(kernel: str) -> str:
    """The instruction of its products."""
    return "HMMA.16816.F32" if "__half" in kernel or "bfloat" in kernel else "HMMA.1688.F32.TF32"


@pytest.mark.parametrize("arch", CLUSTER_ARCHS)
@pytest.mark.parametrize("walk", ["Forward", "Backward"])
def test_persistent_kernels(walk, arch):
    """Weights in registers: a block's threads fit; products, loads and messages of the widest kind."""
    usage, code = kernels_of(arch, rf"persistent_kernel.*{walk}Kernel.*Lb[01]ELi\dELb0E")
    assert len(usage) == 9, "bf16 and fp16 for 4, 6, 8 groups of two warps; TF32 for 4 and 6, fp32 for 4"
    for kernel, use in usage.items():
        groups = int(re.search(r"Lb[01]ELi(\d)E", kernel)[1])
        assert use["REG"] * 64 * groups <= 65536, kernel
        assert use["SHARED"] == 1024, "the system's own: the rest is dynamic, and the plan counts it"
        for instruction in (multiplies(kernel), "LDS.128", "STAS.128", "SYNCS.PHASECHK"):
            assert instruction in code[kernel], f"{kernel} has no {instruction}"
        loop = code[kernel][code[kernel].index("SYNCS.PHASECHK") :]
        assert loop.count("CCTL.IVALL") <= 1, "the L1 cache is emptied within the loop, not only by the last barrier"


def waiting_for_gates(code: str) -> list[str]:
    """Instructions from the load of an item's gates to the block's barrier that wait for it, by their control bits:
    each load counts up one of six counters, and an instruction names those that it needs at zero."""
    lines = re.findall(r"/\*\w+\*/\s+(.*?);\s+/\* 0x\w+ \*/\s+/\* 0x(\w+) \*/", code)
    control = [(text, int(word, 16) >> 41) for text, word in lines]
    first = max(k for k, (text, _) in enumerate(control) if re.search(r"LDG\.E\.64\b", text))  # one before the loop
    counter = control[first][1] >> 5 & 7
    last = next(k for k in range(first, len(control)) if "BAR.SYNC" in control[k][0])
    return [text for text, bits in control[first + 1 : last] if bits >> 11 >> counter & 1]


@pytest.mark.parametrize("walk", ["Forward", "Backward"])
@pytest.mark.parametrize("dtype", ["13__nv_bfloat16", "6__half"])
def test_nothing_waits_for_the_gates_of_the_next_item(dtype, walk):
    """Else each step takes as long as a load from memory, whatever else is true."""
    _, code = kernels_of("90a", rf"persistent_kernel.*{walk}Kernel.*{dtype}Lb0ELi4ELb0E")
    (kernel,) = code.values()
    assert waiting_for_gates(kernel) == []


@pytest.mark.parametrize("arch", CLUSTER_ARCHS)
def test_sums_are_read_right_behind_the_barrier(arch):
    """Forward, no address or condition is computed between the block's barrier and the reads of the products' sums."""
    _, code = kernels_of(arch, r"persistent_kernel.*ForwardKernel.*Lb[01]ELi\dELb0E")
    for kernel, part in code.items():
        lines = re.findall(r"/\*\w+\*/\s+(.*?);", part)
        product = max(k for k, text in enumerate(lines) if "HMMA" in text)
        barrier = next(k for k in range(product, len(lines)) if "BAR.SYNC" in lines[k])
        read = next(k for k in range(barrier, len(lines)) if "LDS.128" in lines[k])
        assert read - barrier <= 10, kernel


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("walk", ["Forward", "Backward"])
def test_persistent_kernels_over_the_grid(walk, arch):
    """On every architecture, weights in registers; words travel 16 bytes at a time, past the L1 cache."""
    usage, code = kernels_of(arch, rf"persistent_kernel.*{walk}Kernel.*Lb[01]ELi\dELb1E")
    assert len(usage) == 4, "bf16, fp16, TF32, fp32, each for up to 4 groups of two warps"
    collected = "LDGSTS.E.BYPASS.128" if walk == "Forward" else "LDG.E.STRONG.GPU"
    for kernel, use in usage.items():
        assert use["REG"] * 256 <= 65536, kernel
        for instruction in (multiplies(kernel), "LDS.128", "STG.E.128", ".E.ADD.STRONG.GPU", collected):
            assert instruction in code[kernel], f"{kernel} has no {instruction}"
        assert not re.search(r"\b(STAS|SYNCS|UCGABAR)", code[kernel])


@pytest.mark.parametrize("kind", range(4), ids=["bf16", "fp16", "tf32", "fp32"])
def test_a_plan_never_asks_for_more_than_a_block_has(kind):
    """Every plan for every H, with all sizes of cluster granted or only the portable ones, or none but a grid."""
    planned = set()
    for hidden in [*range(1, 1100, 7), 256, 512, 768, 1024, 1920, 2048]:
        for batch, directions, largest in itertools.product((1, 17, 300), (1, 2), (0, 8, 16)):
            for backward in (False, True):
                plan = _C.persistent_plan(
                    kind=kind,
                    backward=backward,
                    hidden=hidden,
                    batch=batch,
                    directions=directions,
                    granted=lambda grid, cluster, threads, shared, most=largest: (
                        132 * (most == 0) if grid else 128 // cluster if cluster <= most else 0
                    ),
                )
                if plan is None:
                    continue
                cluster, groups, splits, tiles, columns, clusters, shared, grid, at_a_time, clocks = plan
                assert grid == (largest == 0) and groups <= (4 if grid else (8, 8, 6, 4)[kind])
                assert splits == 2 or (grid and not backward and splits * groups <= 8)
                assert cluster * at_a_time * clusters <= 132 if grid else cluster <= largest
                assert cluster * groups * 8 >= hidden and 1 <= columns <= 8
                assert tiles * clusters * columns >= batch > columns * (clusters - 1)
                assert at_a_time == directions or (grid and at_a_time == 1)
                assert shared <= SHARED_LIMIT and clocks > 0
                planned.add((hidden, largest))
    widest = {largest: max(h for h, granted in planned if granted == largest) for largest in (0, 8, 16)}
    assert widest[0] >= (2048 if kind < 2 else 1024)
    assert widest[16] >= (768 if kind < 2 else 512)
    assert widest[8] >= (512 if kind < 2 else 256)


@pytest.mark.parametrize(
    "multiprocessors, kib, largest, widest",
    [(132, 227, 16, [2048, 1056]), (108, 163, 0, [1536, 864]), (128, 99, 0, [1024, 832])],
    ids=["H100", "A100", "RTX 4090"],
)
def test_the_widest_layers(multiprocessors, kib, largest, widest):
    """Of 16 bits and of fp32, as docs/persistent.md and the README have them."""

    def granted(grid: bool, cluster: int, threads: int, shared: int) -> int:
        if shared > kib * 1024:
            return 0
        return multiprocessors if grid else multiprocessors // cluster * (cluster <= largest)

    def fits(kind: int, hidden: int) -> bool:
        asked = {"kind": kind, "hidden": hidden, "batch": 1, "directions": 1, "granted": granted}
        return all(_C.persistent_plan(backward=backward, **asked) is not None for backward in (False, True))

    for kind in range(4):
        limit = widest[kind // 2]
        assert [fits(kind, hidden) for hidden in (limit, limit + 1)] == [True, False]


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
        for kinds in accesses(sass(cubin)).values():
            assert kinds["LDL"] == kinds["STL"] == []
            assert len(kinds["LDG"]) >= 9 and set(kinds["LDG"]) == {128}, cubin.name
            assert len(kinds["STG"]) >= 5 and set(kinds["STG"]) == {128}, cubin.name
