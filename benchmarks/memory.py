"""Peak memory of one forward and backward pass, each side in a process of its own; on Linux.

``python -m benchmarks.memory '[T, B, H, P, packed, dtype]' ours|theirs`` prints the megabytes that the process's peak
grew by, from after a first small pass to after the third pass of the shape.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any


def peak_memory(case: Any) -> dict[str, float]:
    """Megabytes of ours and of theirs, for a ``compare.Case``."""
    found = {}
    for side in ("ours", "theirs"):
        command = [sys.executable, "-m", "benchmarks.memory", json.dumps(list(case)), side]
        root = Path(__file__).parent.parent
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
        found[f"{side}_mb"] = float(done.stdout)
    return found


def _peak_mb() -> float:
    """Of this process since it began; getrusage would count its parent too."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def main() -> None:
    import torch

    from benchmarks.compare import Case, build, task

    torch.set_num_threads(1)
    case, ours = Case(*json.loads(sys.argv[1])), sys.argv[2] == "ours"

    def passes(case: Case, count: int) -> None:
        x, theirs, mine = build(case)
        run = task(mine if ours else theirs, x, "forward+backward")
        for _ in range(count):
            run()

    passes(case._replace(T=2, B=2, H=16, P=8 if case.P else 0), 1)
    before = _peak_mb()
    passes(case, 3)
    print(_peak_mb() - before)


if __name__ == "__main__":
    main()
