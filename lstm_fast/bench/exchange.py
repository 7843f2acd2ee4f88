"""The latencies that the persistent kernels' design rests on, of the card at hand: csrc/cuda/persistent_exchange.cu."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import torch

SECONDS = 60  # for the process that measures: a kernel that never ends is stopped with it


def measure() -> dict[str, Any]:
    """Of torch's current GPU: ``ok``, ``summary``, and where it ran ``clusters``, how many of each size run at once,
    and ``steps``: clocks and ns of a message, of an exchange of h in a cluster and over a grid, of a product."""
    try:
        from lstm_fast import _C
    except ImportError as error:
        return {"ok": True, "summary": f"skipped: {error}"}
    if not _C.build_info()["clusters"]:
        return {"ok": True, "summary": "skipped: lstm_fast._C was built without clusters"}
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return {"ok": True, "summary": f"skipped: compute capability {major}.{minor} has no clusters"}
    command = [sys.executable, "-m", __name__, str(torch.cuda.current_device())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {"ok": False, "summary": f"the measurement did not end within {SECONDS} s"}
    if done.returncode != 0:
        return {"ok": False, "summary": f"the measurement failed: {done.stderr.strip()[-2000:]}"}
    found: dict[str, Any] = json.loads(done.stdout)
    return {"ok": True, "summary": summary(found), **found}


def shortest_us() -> float | None:
    """Of h in a cluster of any size, what no recurrence over several blocks can beat a step; None where unmeasured."""
    steps = measure().get("steps", [])
    return min((step["ns"] / 1e3 for step in steps if step["what"] == "exchange"), default=None)


def summary(found: dict[str, Any]) -> str:
    """One line a step that was measured."""
    lines = [f"clusters at once: {', '.join(f'{count} of {size}' for size, count in found['clusters'].items())}"]
    for step in found["steps"]:
        lines.append(
            f"{step['what']:9} size {step['size']:<5} blocks {step['blocks']:<4} "
            f"{step['clocks']:8.1f} clocks {step['ns']:8.1f} ns"
        )
    return "\n".join(lines)


def main(device: int) -> None:
    """Prints what ``measure`` reads."""
    from lstm_fast import _C

    clusters, steps = _C.measure_exchange(device)
    names = ("what", "size", "blocks", "clocks", "ns")
    print(json.dumps({"clusters": dict(clusters), "steps": [dict(zip(names, step, strict=True)) for step in steps]}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
