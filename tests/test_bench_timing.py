"""The clock: rounds are interleaved, and those that others disturbed are told apart."""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lstm_fast.bench import timing
from lstm_fast.bench.timing import FEWEST_OF_A_PASS


def test_rounds_are_interleaved_and_every_call_is_in_each() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("ours", "torch", "reference")}
    rounds = timing.interleave(calls, "cpu", 0.0)
    assert [each.keys() for each in rounds.quiet] == [calls.keys()] * FEWEST_OF_A_PASS and not rounds.disturbed
    changes = sum(a != b for a, b in pairwise(called))
    assert changes >= 3 * FEWEST_OF_A_PASS / 2


class Neighbour:
    """A machine that at ``busy`` milliseconds is ten times as slow: 1 ms takes 10. A look takes a quarter."""

    def __init__(self, busy: Callable[[float], bool], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.rounds = 0.0, 0
        self.busy = busy
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now / 1e3)
        monkeypatch.setattr(timing, "timer", lambda device, call: call)

    def ours(self) -> float:
        took = 10.0 if self.busy(self.now) else 1.0
        self.now, self.rounds = self.now + took, self.rounds + 1
        return took

    def disturbed(self) -> bool:
        self.now += 0.25
        return self.busy(self.now)


def test_rounds_wait_until_the_machine_rests_and_count_if_it_rested_all_the_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine: Any = Neighbour(lambda now: now % 200 >= 100, monkeypatch)
    found = timing.interleave({"ours": machine.ours}, "cpu", 0.29, witness=machine, patience=1.0)
    quiet, disturbed = len(found.quiet), len(found.disturbed)
    assert found == ([{"ours": 1.0}] * quiet, [{"ours": 1.0}] * disturbed)  # none began in a busy time
    assert disturbed in (2, 3) and quiet + disturbed == machine.rounds  # where one ends, once in 200 ms
    assert machine.now > 400 and quiet > 190  # of 1.5 ms with its looks


def test_what_took_little_longer_than_the_shortest_counts() -> None:
    """Also where a witness saw somebody for a moment; and if it saw nobody where somebody was, not that. All count
    where it never saw anybody, or there is none, as on a GPU."""
    usual, slow, slower = ({"ours": ms, "torch": 20.0} for ms in (10.0, 14.0, 15.0))
    rounds = timing.Rounds([usual, slower], [slow, slower])
    assert rounds.times() == {"ours": [10.0, 14.0], "torch": [20.0, 20.0]} and rounds.rested()
    assert timing.Rounds([usual, slower], []).counted() == [usual, slower]
    assert not timing.Rounds([slower], [usual]).rested() and not timing.Rounds([], [usual]).rested()
    assert not timing.Rounds([], []).counted() and not timing.Rounds([], []).rested()


def test_a_round_is_quiet_if_the_machine_is_before_within_and_after_it() -> None:
    said = iter([True, False, False, False, True, False, False, False, True, False, False, False, True])
    witness: Any = mock.Mock(disturbed=lambda: next(said))
    calls = {"ours": lambda: None, "torch": lambda: None}
    rounds = timing.interleave(calls, "cpu", 10.0, fewest=4, witness=witness)
    assert len(rounds.disturbed) == 3 and [each.keys() for each in rounds.quiet] == [calls.keys()]


def test_a_machine_that_never_rests_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, fewest in (0.0, 3), (0.2, 3), (0.2, 0):
        machine: Any = Neighbour(lambda now: True, monkeypatch)
        found = timing.interleave({"ours": machine.ours}, "cpu", seconds, fewest, machine, patience=0.5)
        assert found == ([], [{"ours": 10.0}] * fewest) and machine.now == pytest.approx(500 + 10.5 * fewest, abs=1)


def test_nor_does_one_that_rests_too_shortly_take_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Neighbour(lambda now: now % 11 >= 0.5, monkeypatch)
    found = timing.interleave({"ours": machine.ours}, "cpu", 0.0, witness=machine, patience=10.0)
    assert not found.quiet and len(found.disturbed) == 2 * FEWEST_OF_A_PASS


@pytest.mark.parametrize("has_registers", [True, False])
def test_a_witness_knows_a_slower_machine(has_registers: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    now, slower = 0.0, dict.fromkeys((torch.float32, torch.bfloat16), 1.0)
    takes = {torch.float32: 50e-6, torch.bfloat16: 20e-6 if has_registers else 4e-3}

    def product(a: Tensor, b: Tensor) -> None:
        nonlocal now
        now += takes[a.dtype] * slower[a.dtype]

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "mm", product)
    witness = timing.Witness(0.1)
    for dtype in slower:
        for factor, disturbed in (1.0, False), (1.3, has_registers or dtype == torch.float32), (1.05, False):
            slower[dtype] = factor
            assert witness.disturbed() == disturbed
        slower[dtype] = 1.0


def test_short_calls_are_timed_in_a_row_even_if_the_first_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now, calls = 0.0, 0

    def call() -> None:
        nonlocal now, calls
        now, calls = now + (1e-5 if calls > 0 else 1e-2), calls + 1

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    timed = timing.timer("cpu", call)
    before = calls
    assert timed() == pytest.approx(1e-2) and calls - before in (99, 100)


def test_a_long_case_is_over_after_one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_LONG_SECONDS", 0.0)
    rounds = timing.interleave({"ours": lambda: None, "torch": lambda: None}, "cpu", 0.0)
    assert len(rounds.quiet) == 1
    assert timing.compared([2.0], [3.0]) == {
        **dict.fromkeys(("ms", "p20", "p80"), 3.0),
        **dict.fromkeys(("ratio", "ratio_p20", "ratio_p80", "ratio_low", "ratio_high"), 1.5),
    }


def test_ratios_are_of_pairs_with_a_distribution_free_interval() -> None:
    ours = [1.0] * 100
    theirs = [float(i) for i in range(100)]  # the ratios themselves
    found = timing.compared(ours, theirs)
    assert found["ratio"] == found["ms"] == 49.5
    # order statistics 40 and 61, counted from 1
    assert (found["ratio_low"], found["ratio_high"]) == (39, 60)
    assert found["ratio_p20"] < found["ratio_low"] and found["ratio_high"] < found["ratio_p80"]


@pytest.mark.parametrize(
    ("n", "rank"), [(6, 1), (8, 1), (9, 2), (12, 3), (15, 4), (20, 6), (25, 8), (30, 10), (50, 18)]
)
def test_the_intervals_ranks_are_those_of_the_binomial(n: int, rank: int) -> None:
    """Of the sign test's tables (Conover 1999, table A3)."""
    found = timing.compared([1.0] * n, [float(i) for i in range(n)])
    assert (found["ratio_low"], found["ratio_high"]) == (rank - 1, n - rank)
    fewer = sum(math.comb(n, k) for k in range(rank))
    assert 1 - 2 * fewer / 2**n >= 0.95 > 1 - 2 * (fewer + math.comb(n, rank)) / 2**n


@pytest.mark.parametrize("n", [1, 2, 5])
def test_fewer_than_six_rounds_have_the_least_and_the_most(n: int) -> None:
    found = timing.compared([1.0] * n, [float(i) for i in range(n)])
    assert (found["ratio_low"], found["ratio_high"]) == (0, n - 1)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_spreads_of_few_rounds_lie_among_them(n: int) -> None:
    found = timing.spread([1.0, *range(4, 3 + n)])
    assert 1 <= found["p20"] <= found["ms"] <= found["p80"] <= 2 + n
