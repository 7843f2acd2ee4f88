"""Builds and runs exchange.cu: the latencies that the persistent kernels' design rests on, of the card at hand."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("exchange.cu")
SECONDS = 30  # for the build, and for the run


def measure() -> dict[str, Any]:
    """``ok``, ``summary``, and where it ran its ``steps``: clocks and ns of a message, an exchange, a grid step."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    search = os.pathsep.join([*(f"{home}/bin" for home in homes), os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    nvcc = shutil.which("nvcc", path=search)  # where setup.py finds it
    if nvcc is None:
        return {"ok": True, "summary": "skipped: nvcc is not installed"}
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return {"ok": True, "summary": f"skipped: compute capability {major}.{minor} has no clusters"}
    suffix = "a" if major == 9 else ""
    target = f"-gencode=arch=compute_{major}{minor}{suffix},code=sm_{major}{minor}{suffix}"
    with tempfile.TemporaryDirectory() as folder:
        program = f"{folder}/exchange"
        for command in ([nvcc, "-std=c++17", "-O3", target, "-o", program, str(SOURCE)], [program]):
            try:
                done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
            except subprocess.TimeoutExpired:
                return {"ok": False, "summary": f"{Path(command[0]).name} did not end within {SECONDS} s"}
            if done.returncode != 0:
                return {"ok": False, "summary": f"{Path(command[0]).name} failed: {done.stderr.strip()[-2000:]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return {"ok": True, "summary": summary(found), **found}


def summary(found: dict[str, Any]) -> str:
    """One line a step that was measured."""
    lines = [f"clusters at once: {', '.join(f'{count} of {size}' for size, count in found['clusters'].items())}"]
    for step in found["steps"]:
        lines.append(
            f"{step['what']:9} size {step['size']:<5} blocks {step['blocks']:<4} "
            f"{step['clocks']:8.1f} clocks {step['ns']:8.1f} ns"
        )
    return "\n".join(lines)
