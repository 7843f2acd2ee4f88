"""The clock: rounds are interleaved, and those that others disturbed are told apart."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from lstm_fast.bench import timing


def test_rounds_are_interleaved_and_every_call_is_in_each() -> None:
    called: list[str] = []
    calls = {name: lambda name=name: called.append(name) for name in ("ours", "torch", "reference")}
    times = timing.interleave(calls, "cpu", 0.0).times()
    assert [len(each) for each in times.values()] == [timing.FEWEST_ROUNDS] * 3
    changes = sum(a != b for a, b in pairwise(called))
    assert changes >= 3 * timing.FEWEST_ROUNDS / 2


class Neighbour:
    """A machine on which ``busy`` rounds, counted from 0, take ten times as long."""

    def __init__(self, busy: Callable[[int], bool], monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.round = 0.0, 0
        self.busy = busy
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing, "timer", lambda device, call: call)

    def ours(self) -> float:
        took = 10.0 if self.busy(self.round) else 1.0
        self.now, self.round = self.now + took / 1e3, self.round + 1
        return took

    def disturbed(self) -> bool:
        return self.round > 0 and self.busy(self.round - 1)


def test_rounds_in_which_the_machine_is_slowed_down_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    machine: Any = Neighbour(lambda n: n // 4 % 2 > 0, monkeypatch)
    rounds = timing.interleave({"ours": machine.ours}, "cpu", 0.31, witness=machine)
    times = rounds.times()["ours"]
    assert set(times) == {1.0} and len(times) >= timing.FEWEST_ROUNDS
    assert len(rounds.disturbed) > 0 and len(times) + len(rounds.disturbed) == machine.round


def test_a_round_counts_if_it_is_quiet_before_within_and_after() -> None:
    said = iter([True, False, False, False, True, False, False, False, True, False, False, False])
    witness: Any = mock.Mock(disturbed=lambda: next(said))
    calls = {"ours": lambda: None, "torch": lambda: None}
    rounds = timing.interleave(calls, "cpu", 0.0, fewest=2, witness=witness)
    assert len(rounds.disturbed) == 3 and [each.keys() for each in rounds.quiet] == [calls.keys()]


def test_a_machine_that_never_rests_is_measured_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds, rounds in (0.0, timing._PATIENCE * timing.FEWEST_ROUNDS), (0.2, 40):
        machine: Any = Neighbour(lambda n: True, monkeypatch)
        found = timing.interleave({"ours": machine.ours}, "cpu", seconds, witness=machine)
        assert found.times() == {"ours": [10.0] * rounds} and not found.quiet


def test_a_witness_knows_a_slower_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    now, speed = 0.0, 1.0

    def product(a: Tensor, b: Tensor) -> None:
        nonlocal now
        now += 50e-6 / speed

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    monkeypatch.setattr(torch, "mm", product)
    witness = timing.Witness(0.1)
    assert not witness.disturbed()
    speed = 0.75
    assert witness.disturbed()
    speed = 0.95
    assert not witness.disturbed()


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
    # 95 % for n = 100 by the binomial: order statistics 40 and 61, counted from 1 (Conover 1999, table A3)
    assert 39 <= found["ratio_low"] <= 40 and 59 <= found["ratio_high"] <= 60
    assert found["ratio_p20"] < found["ratio_low"] and found["ratio_high"] < found["ratio_p80"]
