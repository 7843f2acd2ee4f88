"""How fast this machine could be at best, measured in the run that is compared with it."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from lstm_fast.bench.cases import Case

_BYTES = 2**28  # of the copied tensor: more than any cache holds
_SQUARE = 8192  # of the products whose rate stands for a GPU's


class Limits(NamedTuple):
    """``gflops`` by dtype name, memory traffic in 1e9 bytes a second, and the microseconds in which those who
    share a step meet; None where nothing measures it."""

    gflops: dict[str, float]
    gbytes_per_s: float
    exchange_us: float | None

    def of(self, case: Case, rows: int, mode: str) -> tuple[float, str]:
        """The least milliseconds for ``case`` with ``rows`` rows over all steps, and by which limit.

        The largest of flops over rate, bytes over bandwidth (input, output and weights once), and T times the exchange.
        """
        passes = 3 if mode == "forward+backward" else 1  # x, y and weights, read again, and their gradients
        size = torch.empty(0, dtype=getattr(torch, case.dtype)).element_size()
        steps = case.T * case.layers * (2 if mode == "forward+backward" else 1)
        found = {"bytes": passes * size * case.values(rows) / self.gbytes_per_s / 1e6}
        if case.dtype in self.gflops:
            found["flops"] = case.flops(rows, mode) / self.gflops[case.dtype] / 1e6
        if self.exchange_us is not None:
            found["exchange"] = steps * self.exchange_us / 1e3
        what = max(found, key=lambda name: found[name])
        return found[what], what


def measure(device: str) -> Limits:
    """Of ``device``, "cpu" or "cuda", with the threads torch has now."""
    return _gpu() if device == "cuda" else _cpu()


def _cpu() -> Limits:
    threads, rates, exchange = torch.get_num_threads(), {}, None
    try:
        from lstm_fast import _C
    except ImportError:
        pass
    else:
        best = len(_C.CPU_INSTRUCTION_SETS) - 1
        rates = {name: _C.cpu_peak_rate(code, best, threads) / 1e9 for name, code in _C.DTYPES.items()}
        exchange = 1e6 * _C.cpu_meeting_seconds(threads)
    source = torch.ones(_BYTES // 4)
    target = torch.ones_like(source)

    def copy() -> float:
        start = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - start

    return Limits(rates, 2 * _BYTES / min(copy() for _ in range(5)) / 1e9, exchange)


def _gpu() -> Limits:
    def seconds(call: Any) -> float:
        call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        times = []
        for _ in range(5):
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(float(start.elapsed_time(end)) / 1e3)
        return min(times)

    rates = {}
    for name in ("float32", "bfloat16", "float16"):  # fp32 as cudnn.allow_tf32 has it in an LSTM
        a = torch.randn(_SQUARE, _SQUARE, device="cuda", dtype=getattr(torch, name))
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
        rates[name] = 2 * _SQUARE**3 / seconds(lambda a=a: torch.mm(a, a)) / 1e9
        torch.backends.cuda.matmul.allow_tf32 = before
    source = torch.ones(2**30, dtype=torch.uint8, device="cuda")
    target = torch.ones_like(source)
    return Limits(rates, 2 * 2**30 / seconds(lambda: target.copy_(source)) / 1e9, None)
