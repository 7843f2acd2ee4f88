"""The clock: interleaved rounds, and what is said of their times."""

from __future__ import annotations

import bisect
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

FEWEST_OF_A_PASS = 3  # rounds
_LONG_SECONDS = 10.0  # rounds that take so long are over before there are the fewest
_LONGER = 1.15  # times the shortest round may another be that counts
_ROUNDS_AT_MOST = 2  # times the fewest, where rounds that begin in quiet are disturbed
_CALL_SECONDS = 1e-3  # shorter calls follow each other for so long: what another left in the caches is not theirs


def timer(device: str, call: Callable[[], Any]) -> Callable[[], float]:
    """What measures the milliseconds of one call of ``call``, which it warms up: by events on a GPU, by the clock on a
    CPU, there of as many in a row as take a millisecond."""
    if device == "cuda":
        for _ in range(3):
            call()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

        def on_gpu() -> float:
            start.record()
            call()
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end))

        return on_gpu
    calls = 1

    def on_cpu() -> float:
        begin = time.perf_counter()
        for _ in range(calls):
            call()
        return 1e3 * (time.perf_counter() - begin) / calls

    calls = max(1, int(1e3 * _CALL_SECONDS / min(on_cpu() for _ in range(2))))  # the first comes with cold caches
    return on_cpu


class Witness:
    """Whether others slow this machine down, as a neighbour on the same core does or on a cloud's next one: a small
    product of torch's own takes longer than it does there at best. In fp32, and in bf16 too where that has registers of
    its own, as AMX, which a neighbour slows down more."""

    _TIMES, _SLOWER, _BEST = 4, 1.15, 0.05  # it is the best 5 % that are compared with

    def __init__(self, seconds: float) -> None:
        """Looks for so long how fast it is."""
        begin = time.perf_counter()
        single, half = torch.ones(128, 128), torch.ones(256, 256, dtype=torch.bfloat16)
        fast = self._seconds(half) < 4 * self._seconds(single)  # for eight times the work
        self._matrices = [single, half] if fast else [single]
        self._seen: list[list[float]] = [[] for _ in self._matrices]  # of each, in order
        self.disturbed()
        while time.perf_counter() < begin + seconds:
            self.disturbed()

    def disturbed(self) -> bool:
        slower = [self._slower(*each) for each in zip(self._matrices, self._seen, strict=True)]
        return any(slower)

    def _slower(self, matrix: Tensor, seen: list[float]) -> bool:
        took = self._seconds(matrix)
        bisect.insort(seen, took)
        return took > self._SLOWER * seen[int(self._BEST * len(seen))]

    def _seconds(self, matrix: Tensor) -> float:
        """Of a product, the least of some."""
        torch.mm(matrix, matrix)  # wakes threads, and fills the caches with it
        times = []
        for _ in range(self._TIMES):
            begin = time.perf_counter()
            torch.mm(matrix, matrix)
            times.append(time.perf_counter() - begin)
        return min(times)


class Rounds(NamedTuple):
    """Milliseconds of each call, round by round: of rounds in which nobody was seen to slow the machine down, and of
    those that a witness called disturbed."""

    quiet: list[dict[str, float]]
    disturbed: list[dict[str, float]]

    def every(self) -> list[dict[str, float]]:
        return [*self.quiet, *self.disturbed]

    def counted(self) -> list[dict[str, float]]:
        """All where nobody was seen; else those that took all calls together at most 15 % longer than the shortest, as
        a witness sees a moment."""
        most = self._most()
        return [each for each in self.every() if sum(each.values()) <= most]

    def rested(self) -> bool:
        """Whether one of those was quiet: else the shortest may have been disturbed as well."""
        most = self._most()
        return any(sum(each.values()) <= most for each in self.quiet)

    def times(self) -> dict[str, list[float]]:
        """By call, in counted rounds."""
        rounds = self.counted()
        return {name: [each[name] for each in rounds] for name in rounds[0]}

    def _most(self) -> float:
        if not self.disturbed:
            return math.inf
        return _LONGER * min(sum(each.values()) for each in self.every())


def interleave(
    calls: dict[str, Callable[[], Any]],
    device: str,
    seconds: float,
    fewest: int = FEWEST_OF_A_PASS,
    witness: Witness | None = None,
    patience: float = 0.0,
) -> Rounds:
    """In each round every call once, in an order drawn anew.

    Rounds go on for ``seconds``, and until there are ``fewest`` quiet ones, twice as many of any kind, or ten seconds
    are over. A round is disturbed if ``witness`` says so of the machine before it, within or after it. One that would
    begin so waits for quiet, all together for ``patience`` seconds; after that ``fewest`` of any kind are enough.
    """
    timers = {name: timer(device, call) for name, call in calls.items()}
    rounds = Rounds([], [])
    order, drawn = list(calls), random.Random(0)
    begin, waited = time.perf_counter(), 0.0

    def enough() -> bool:
        worked, done = time.perf_counter() - begin - waited, len(rounds.every())
        if worked >= _LONG_SECONDS:
            return worked >= seconds and done > 0
        return worked >= seconds and (len(rounds.quiet) >= fewest or done >= _ROUNDS_AT_MOST * fewest)

    def disturbed() -> bool:
        return witness is not None and witness.disturbed()

    while not enough():
        drawn.shuffle(order)
        asked, noisy = time.perf_counter(), disturbed()
        while noisy and waited + time.perf_counter() - asked < patience:
            noisy = disturbed()  # after a nap the next look would always find it slow
        waited += time.perf_counter() - asked
        if noisy and len(rounds.every()) >= fewest:
            break
        found = {}
        for name in order:
            found[name] = timers[name]()
            noisy = disturbed() or noisy
        (rounds.disturbed if noisy else rounds.quiet).append(found)
    return rounds


def spread(times: Sequence[float]) -> dict[str, float]:
    """Median, p20 and p80 in ms."""
    tenths = _tenths(times)
    return {"ms": statistics.median(times), "p20": tenths[1], "p80": tenths[7]}


def compared(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """theirs/ours round by round: median, p20, p80, and the median's 95 % confidence interval.

    The interval is the order statistics' (distribution-free; of fewer than six rounds, which have none, it is the least
    and the most).
    """
    ratios = sorted(b / a for a, b in zip(ours, theirs, strict=True))
    tenths, rank = _tenths(ratios), _rank(len(ratios))
    return {
        **spread(theirs),
        "ratio": statistics.median(ratios),
        "ratio_p20": tenths[1],
        "ratio_p80": tenths[7],
        "ratio_low": ratios[rank - 1],
        "ratio_high": ratios[-rank],
    }


def _rank(n: int) -> int:
    """The largest k for which the median lies between the k-th smallest and the k-th largest of n values with 95 %: so
    often are k heads or more, and k tails, among n coins. 1 if there is none."""
    k, ways, fewer = 0, 1, 1  # to have k heads, and k or fewer
    while 40 * fewer <= 2**n:
        ways = ways * (n - k) // (k + 1)
        k, fewer = k + 1, fewer + ways
    return max(1, k)


def _tenths(values: Sequence[float]) -> list[float]:
    """The nine that part ``values``, of which there may be one, and lie among them."""
    return statistics.quantiles(values if len(values) > 1 else [*values, *values], n=10, method="inclusive")
