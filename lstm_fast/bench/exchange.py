"""The latencies that the persistent kernels' design rests on, of the card at hand: csrc/cuda/persistent_exchange.cu."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from lstm_fast.bench.process import run

SECONDS = 60  # for the process that measures: a kernel that never ends is stopped with it


def measure() -> dict[str, Any]:
    """Of torch's current GPU: ``ok``, ``summary``, and where it ran ``clusters``, how many of each size run at once,
    and ``steps``: clocks and ns of a message, of an exchange of h in a cluster and over a grid, of a product; where it
    failed, those before."""
    try:
        from lstm_fast import _C
    except ImportError as error:
        return {"ok": True, "summary": f"skipped: {error}"}
    if not _C.build_info()["clusters"]:
        return {"ok": True, "summary": "skipped: lstm_fast._C was built without clusters"}
    major, minor = torch.cuda.get_device_capability()
    if major < 9:
        return {"ok": True, "summary": f"skipped: compute capability {major}.{minor} has no clusters"}
    code, said = run([sys.executable, "-m", __name__, str(torch.cuda.current_device())], SECONDS)
    lines = said.splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    found: dict[str, Any] = {"clusters": {}, "steps": []}
    for record in records:
        found["clusters"].update(record.get("clusters", {}))
        found["steps"] += [record["step"]] if "step" in record else []
    told = summary(found)
    if code != 0:
        rest = "\n".join(line for line in lines if not line.startswith("{"))[-2000:]
        told += f"the measurement did not end within {SECONDS} s" if code is None else f"the measurement failed: {rest}"
    return {"ok": code == 0, "summary": told, **found}


def shortest_us() -> float | None:
    """Of h in a cluster of any size, what no recurrence over several blocks can beat a step; None where unmeasured."""
    steps = measure().get("steps", [])
    return min((step["ns"] / 1e3 for step in steps if step["what"] == "exchange"), default=None)


def summary(found: dict[str, Any]) -> str:
    """A line for the clusters and one for each step that was measured."""
    lines = []
    if found["clusters"]:
        at_once = ", ".join(f"{count} of {size}" for size, count in found["clusters"].items())
        lines.append(f"clusters at once: {at_once}\n")
    for step in found["steps"]:
        lines.append(
            f"{step['what']:9} size {step['size']:<5} blocks {step['blocks']:<4} "
            f"{step['clocks']:8.1f} clocks {step['ns']:8.1f} ns\n"
        )
    return "".join(lines)


def main(device: int) -> None:
    """Prints what ``measure`` reads, each line as soon as it is known."""
    from lstm_fast import _C

    def report(*values: Any) -> None:
        names = ("what", "size", "blocks", "clocks", "ns")
        print(json.dumps({"step": dict(zip(names, values, strict=True))}), flush=True)

    print(json.dumps({"clusters": dict(_C.clusters_at_once(device))}), flush=True)
    _C.measure_exchange(device, report)


if __name__ == "__main__":
    main(int(sys.argv[1]))
