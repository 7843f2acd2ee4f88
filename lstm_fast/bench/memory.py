"""Peak memory and first calls, each measured in a process of its own.

``python -m lstm_fast.bench.memory '[T, B, ...]' ours|torch cpu|cuda BACKEND THREADS`` prints the megabytes that the
process's peak grew by, from after a first small pass to after the third forward and backward pass of the case.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

from lstm_fast.bench import rivals
from lstm_fast.bench.cases import Case

SIDES = ("ours", "torch")
_PROCESSES = 3
_STARTUP = """
import sys, time
start = time.perf_counter()
import torch
torch_ready = time.perf_counter()
import lstm_fast
ready = time.perf_counter()
torch.set_num_threads(int(sys.argv[2]))
device, times = torch.device(sys.argv[1]), []
x = torch.ones(16, 4, 128, device=device) @ torch.ones(128, 128, device=device)  # whoever comes first
for module in (lstm_fast.LSTM(128, 128, device=device), torch.nn.LSTM(128, 128, device=device)):
    begin = time.perf_counter()
    module(x)[0].sum().backward()
    next(module.parameters()).grad.sum().item()
    times.append(time.perf_counter() - begin)
print(torch_ready - start, ready - torch_ready, *times)
"""


def startup(device: str, threads: int) -> dict[str, float]:
    """Milliseconds of ``import torch``, of ``import lstm_fast`` after it, and of the first forward and backward pass of
    each side's module on ``device`` where torch has multiplied before; medians of three processes."""
    runs = []
    for _ in range(_PROCESSES):
        command = [sys.executable, "-c", _STARTUP, device, str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([1e3 * float(value) for value in done.stdout.split()])
    names = ("import_torch_ms", "import_lstm_fast_ms", "first_call_ms", "first_call_torch_ms")
    return dict(zip(names, (statistics.median(values) for values in zip(*runs, strict=True)), strict=True))


def peak(case: Case, device: str, backend: str, threads: int) -> dict[str, float]:
    """Megabytes that a forward and backward pass takes at most, of either side, ours by ``backend``; on a CPU medians
    of three processes, as its allocator finds room for a gradient where the last one was, or not."""
    found: dict[str, list[float]] = {side: [] for side in SIDES}
    for side in SIDES * (_PROCESSES if device == "cpu" else 1):
        arguments = [json.dumps(list(case)), side, device, backend, str(threads)]
        command = [sys.executable, "-m", "lstm_fast.bench.memory", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[side].append(float(done.stdout))
    return {side: statistics.median(peaks) for side, peaks in found.items()}


def _peak_mb(device: str) -> float:
    """Since the process began; getrusage would count its parent too."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _module(case: Case, side: str, device: str, backend: str) -> nn.Module:
    """One side's module alone: whose weights ours has taken is gone."""
    oracle = rivals.oracle(case, device)
    return rivals.ours(case, oracle, backend) if side == "ours" else oracle


def main() -> None:
    shape, side, device, backend, threads = sys.argv[1:]
    case = Case(*json.loads(shape))
    torch.set_num_threads(int(threads))

    def passes(case: Case, count: int) -> None:
        module, x = _module(case, side, device, backend), rivals.make_input(case, device)
        call = rivals.task(module, x, "forward+backward", case.last)
        for _ in range(count):
            call()

    passes(case._replace(T=min(case.T, 2), B=2, H=16, P=8 if case.P else 0), 1)
    before = _peak_mb(device)
    passes(case, 3)
    print(_peak_mb(device) - before)


if __name__ == "__main__":
    main()
