"""What bounds any LSTM: which limit holds for a case, and what is measured for it."""

import pytest
import torch

from lstm_fast._C import CPU_INSTRUCTION_SETS
from lstm_fast.bench import limits
from lstm_fast.bench.cases import Case
from lstm_fast.bench.limits import Limits

SMALL = Case(4, 3, 8)
KNOWN = Limits({"float32": 100.0}, [(2**20, 40.0), (2**30, 10.0)], 1.0)


def test_the_limit_is_the_largest() -> None:
    rows = SMALL.T * SMALL.B
    ms, what = KNOWN.of(SMALL, rows, "inference")
    assert (ms, what) == (SMALL.T * 1.0 / 1e3, "exchange")
    large = Case(2, 1000, 64)
    assert KNOWN.of(large, 2000, "inference") == (large.flops(2000, "inference") / 100e6, "flops")
    free = KNOWN._replace(exchange_us=None, gflops={})
    values = 2000 * (64 + 64) + 4 * 64 * (64 + 64)
    assert free.of(large, 2000, "forward+backward") == (3 * 4 * values / 10e6, "bytes")
    assert free.of(SMALL, rows, "inference") == (4 * (12 * 16 + 32 * 16) / 40e6, "bytes")


def test_of_two_measurements_the_better_is_the_limit() -> None:
    other = Limits({"float32": 90.0}, [(2**20, 50.0), (2**30, 9.0)], 0.5)
    better = Limits({"float32": 100.0}, [(2**20, 50.0), (2**30, 10.0)], 0.5)
    assert KNOWN.best(other) == other.best(KNOWN) == better
    assert KNOWN.best(other._replace(exchange_us=None)).exchange_us is None


def test_amx_multiplies_floats_at_a_quarter_of_its_rate() -> None:
    measured = {"float32": 180.0, "float64": 90.0, "bfloat16": 2900.0}
    assert limits.gflops(measured, "amx") == {**measured, "float32": 725.0}
    assert limits.gflops(measured, "avx512_bf16") == measured
    slow = {**measured, "bfloat16": 400.0}
    assert limits.gflops(slow, "amx") == slow


def test_bandwidth_is_that_of_copying_or_of_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((2.0, 1.0, 1.0, 4.0))  # of copying and of reading, by size
    monkeypatch.setattr(limits, "_cpu_rates", lambda: ({}, None))
    monkeypatch.setattr(limits, "_SIZES", {"cpu": (2**12, 2**14)})
    monkeypatch.setattr(limits, "_seconds", lambda device, call: (call(), next(seconds))[1])
    assert limits.measure("cpu").bandwidth == [(2**12, 2**12 / 1e9), (2**14, 2**14 / 1e9)]


@pytest.mark.parametrize("mode", ["inference", "forward+backward"])
@pytest.mark.parametrize("H", [64, 128, 256, 512, 1024])
def test_the_bandwidth_of_a_single_step_is_that_of_its_size(H: int, mode: str) -> None:
    """A rate for each size, by which it is told from the limit: the weights, or weights and gradients, lie in that."""
    case, sizes = Case(1, 1, H), limits._SIZES["cpu"]
    ms, what = Limits({}, [(size, 1e6 / size) for size in sizes], None).of(case, 1, mode)
    chosen = ms / case.bytes(1, mode) * 1e12
    touched = 4 * case.weights() * (2 if mode == "forward+backward" else 1)
    assert what == "bytes" and touched < chosen < (4 if H < 1024 else 2) * touched


def test_this_machines_limits_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    """A core of the last ten years does 8 to 128 fp32 operations a cycle at 1 to 6 GHz, in bf16 up to 8 times
    that, and with AMX about 16 times.

    Whoever else is on the machine makes each rate smaller for a while, so that the best of a few measurements count.
    """
    monkeypatch.setattr(limits, "gflops", lambda measured, _: measured)  # as measured in registers
    least, most = (8, 20) if CPU_INSTRUCTION_SETS[-1] == "amx" else (0.8, 8)

    def plausible(rates: dict[str, float]) -> bool:
        single = rates["float32"]
        return rates["float64"] < single < 8.5 * rates["float64"] and least < rates["bfloat16"] / single < most

    found = limits.measure("cpu")
    for _ in range(20):
        if not plausible(found.gflops):
            found = found.best(limits.measure("cpu"))
    assert plausible(found.gflops), found.gflops
    assert 8 < found.gflops["float32"] / torch.get_num_threads() < 800
    assert all(1 < rate < 5000 for _, rate in found.bandwidth)
    assert found.exchange_us is not None and found.exchange_us < 1000
