"""``python -m benchmarks.gpu_check``: the GPU tests, a memory check and a benchmark on the GPU at hand.

Builds nothing. Prints a table and writes one JSON, results/gpu-<name>.json. Exit code 0 if all is well, 1 if a test
fails or a GPU backend is missing, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import lstm_fast
from benchmarks.compare import MODES, task
from benchmarks.environment import describe

ROOT = Path(__file__).parents[1]
PARTS = ("tests", "sanitizer", "bench")
BACKENDS = ("cuda", "triton")
SHAPES = [(64, 16, 256), (64, 16, 512), (64, 64, 512), (25, 32, 1024), (1024, 16, 768)]  # T B H
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
PAIRS = 20

# Odd and vectorised sizes, both directions, two layers.
SMALL_CASE = """
import sys, torch, lstm_fast
for dtype in (torch.float32, torch.bfloat16):
    for hidden in (33, 64):
        module = lstm_fast.LSTM(5, hidden, 2, bidirectional=True, device="cuda", dtype=dtype, backend=sys.argv[1])
        module(torch.randn(4, 3, 5, device="cuda", dtype=dtype))[0].sum().backward()
torch.cuda.synchronize()
"""


def run_tests() -> dict[str, Any]:
    """The tests marked gpu, in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--tb=short", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    if done.returncode != 0:
        print("\n".join(lines[-60:]))
    return {"ok": done.returncode == 0, "summary": lines[-1] if lines else "", "failed": failed}


def run_sanitizer() -> dict[str, Any]:
    """compute-sanitizer's memcheck over a small case of each backend, where it is installed."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if tool is None:
        return {"ok": True, "summary": "skipped: compute-sanitizer is not installed"}
    for backend in BACKENDS:
        command = [tool, "--error-exitcode=9", "--report-api-errors=no", sys.executable, "-c", SMALL_CASE, backend]
        # each tensor in an allocation of its own, so that memcheck sees its ends
        environ = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environ)
        if done.returncode != 0:
            return {"ok": False, "summary": f"{backend}: {(done.stdout + done.stderr)[-2000:]}"}
    return {"ok": True, "summary": "no memory errors"}


def measure(ours: Callable[[], torch.Tensor], theirs: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Milliseconds and the ratio theirs/ours by CUDA events, medians of interleaved pairs."""

    def elapsed(call: Callable[[], torch.Tensor]) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end))

    for call in (ours, theirs) * 3:
        call()
    torch.cuda.synchronize()
    pairs = [(elapsed(ours), elapsed(theirs)) for _ in range(PAIRS)]
    ratios = statistics.quantiles([b / a for a, b in pairs], n=10)
    return {
        "ours_ms": statistics.median(a for a, _ in pairs),
        "theirs_ms": statistics.median(b for _, b in pairs),
        "ratio": ratios[4],
        "ratio_p20": ratios[1],
        "ratio_p80": ratios[7],
        "pairs": PAIRS,
    }


def run_bench() -> list[dict[str, Any]]:
    """A row for each backend, dtype, shape and mode; a result that disagrees with nn.LSTM's stops it."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # fp32 means fp32 on both sides
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        for T, B, H in SHAPES:
            torch.manual_seed(0)
            theirs = nn.LSTM(H, H, device="cuda", dtype=dtype)
            x = torch.randn(T, B, H, device="cuda", dtype=dtype)
            for backend in BACKENDS:
                ours = lstm_fast.LSTM(H, H, device="cuda", dtype=dtype, backend=backend)
                ours.load_state_dict(theirs.state_dict())
                for mode in MODES:
                    mine, rival = task(ours, x, mode), task(theirs, x, mode)
                    torch.testing.assert_close(mine(), rival(), rtol=tolerance, atol=tolerance)
                    row = {"backend": backend, "dtype": str(dtype)[6:], "T": T, "B": B, "H": H, "mode": mode}
                    rows.append({**row, **measure(mine, rival)})
                    print(table(rows[-1:]), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a row: what ran, both medians in ms, theirs/ours with its p20 and p80."""
    return "\n".join(
        f"{r['backend']:7} {r['dtype']:9} T{r['T']:<5} B{r['B']:<4} H{r['H']:<5} {r['mode']:17}"
        f"{r['ours_ms']:9.3f} ms  nn.LSTM {r['theirs_ms']:9.3f} ms  "
        f"{r['ratio']:.2f}x ({r['ratio_p20']:.2f}..{r['ratio_p80']:.2f})"
        for r in rows
    )


def environment() -> dict[str, Any]:
    """``describe()`` with the driver's and Triton's versions."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = None
    if shutil.which(query[0]):
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split("\n")[0].strip()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = None
    return {**describe(), "driver": driver, "triton": triton}


def write(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def parts(text: str) -> list[str]:
    """A comma-separated choice of PARTS."""
    found = text.split(",")
    unknown = [part for part in found if part not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"parts should be among {', '.join(PARTS)}, got: {', '.join(unknown)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", type=parts, default=list(PARTS), help=f"default: {','.join(PARTS)}")
    parser.add_argument("--output", type=Path, help="where to write the JSON")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"gpu-check needs an NVIDIA GPU, and torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    status = lstm_fast.backends()
    record: dict[str, Any] = {**environment(), "backends": {name: status[name].detail for name in BACKENDS}}
    missing = {name: status[name].detail for name in BACKENDS if not status[name].available}
    for name, detail in missing.items():
        print(f"{name} is missing: {detail}")
    ok = not missing
    for part, run in (("tests", run_tests), ("sanitizer", run_sanitizer)):
        if part in args.parts:
            record[part] = run()
            ok = ok and record[part]["ok"]
            print(f"{part}: {record[part]['summary']}", flush=True)
    if "bench" in args.parts and not missing:
        record["bench"] = run_bench()
    slug = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    path = args.output or ROOT / "benchmarks" / "results" / f"gpu-{slug}.json"
    write(path, record)
    print(path)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
