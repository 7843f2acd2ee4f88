"""How fast this machine could be at best, measured in the run that is compared with it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from lstm_fast.bench import exchange
from lstm_fast.bench.cases import Case
from lstm_fast.bench.timing import timer

# Bytes. On a CPU half as much again as the weights of 64, 128, .. 1024 hidden units, and as the largest of those with
# their gradients, so that a call's size lies near the next one, in the same cache.
_SIZES = {"cpu": (*(3 * 2**k for k in (16, 18, 20, 22, 24, 25)), 2**29), "cuda": (2**25, 2**31)}
_SQUARE = 8192  # of the products whose rate stands for a GPU's


class Limits(NamedTuple):
    """What bounds any LSTM here.

    ``gflops`` by dtype name. ``bandwidth``: so many bytes at most are moved at so many 1e9 bytes a second, as caches
    are faster than memory. ``exchange_us``: those who share a step meet in that; None where nothing measures it.
    """

    gflops: dict[str, float]
    bandwidth: list[tuple[int, float]]
    exchange_us: float | None

    def best(self, other: Limits) -> Limits:
        """The better of each, of two measurements of one machine."""
        return Limits(
            {name: max(rate, other.gflops[name]) for name, rate in self.gflops.items()},
            [(size, max(a, b)) for (size, a), (_, b) in zip(self.bandwidth, other.bandwidth, strict=True)],
            None if self.exchange_us is None or other.exchange_us is None else min(self.exchange_us, other.exchange_us),
        )

    def of(self, case: Case, rows: int, mode: str) -> tuple[float, str]:
        """The least milliseconds for ``case`` with ``rows`` rows over all steps, and by which limit.

        The largest of flops over rate, bytes over bandwidth (each byte once), and T times the exchange.
        """
        moved = case.bytes(rows, mode)
        touched = moved * 2 // 3 if mode == "forward+backward" else moved  # a backward pass reads again
        rate = next((rate for size, rate in self.bandwidth if touched <= size), self.bandwidth[-1][1])
        found = {"bytes": moved / rate / 1e6}
        if case.dtype in self.gflops:
            found["flops"] = case.flops(rows, mode) / self.gflops[case.dtype] / 1e6
        if self.exchange_us is not None:
            meetings = case.T * case.layers * (2 if mode == "forward+backward" else 1)
            found["exchange"] = meetings * self.exchange_us / 1e3
        what = max(found, key=lambda name: found[name])
        return found[what], what


def measure(device: str, known: Limits | None = None) -> Limits:
    """Of ``device``, "cpu" or "cuda", with the threads torch has now. A GPU's exchange, which takes a process of its
    own and doesn't vary, is the one that is ``known``."""
    if device == "cuda":
        rates, meeting = _gpu_rates(), exchange.shortest_us() if known is None else known.exchange_us
    else:
        rates, meeting = _cpu_rates()
    bandwidth = []
    for size in _SIZES[device]:
        values = torch.ones(size // 4, device=device)
        source, target = values.chunk(2)
        seconds = min(_seconds(device, call) for call in (partial(target.copy_, source), partial(values.dot, values)))
        bandwidth.append((size, size / seconds / 1e9))  # of copying or of reading alone: LSTMs mostly read
    return Limits(rates, bandwidth, meeting)


def gflops(measured: dict[str, float], instruction_set: str) -> dict[str, float]:
    """Of the rates measured in registers: AMX takes eight products of digits for floats, each at twice bf16's rate."""
    if instruction_set != "amx":
        return measured
    return {**measured, "float32": max(measured["float32"], 2 * measured["bfloat16"] / 8)}


def _seconds(device: str, call: Callable[[], Any]) -> float:
    """The shortest of several calls."""
    timed = timer(device, call)
    return min(timed() for _ in range(5)) / 1e3


def _cpu_rates() -> tuple[dict[str, float], float | None]:
    try:
        from lstm_fast import _C
    except ImportError:
        return {}, None
    threads, best = torch.get_num_threads(), len(_C.CPU_INSTRUCTION_SETS) - 1
    rates = {name: _C.cpu_peak_rate(code, best, threads) / 1e9 for name, code in _C.DTYPES.items()}
    return gflops(rates, _C.CPU_INSTRUCTION_SETS[best]), 1e6 * _C.cpu_meeting_seconds(threads)


def _gpu_rates() -> dict[str, float]:
    """Of large products, fp32 as torch.backends.cudnn.allow_tf32 has it in an LSTM."""
    rates, allowed = {}, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32
    try:
        for name in ("float32", "bfloat16", "float16"):
            a = torch.randn(_SQUARE, _SQUARE, device="cuda", dtype=getattr(torch, name))
            rates[name] = 2 * _SQUARE**3 / _seconds("cuda", partial(torch.mm, a, a)) / 1e9
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return rates
