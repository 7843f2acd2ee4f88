"""``pytest benchmarks/``: the quick grid by pytest-benchmark, each implementation a line of its own.

Its groups put ours beside torch's for one shape and mode, each timed on its own: where something else runs on the
machine, one side may have it all the while. ``lstm-fast bench`` interleaves, looks out for others and gives ratios.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from lstm_fast.bench import rivals, runner
from lstm_fast.bench.cases import GRIDS, Case

CASES = [case for group in GRIDS["quick"].values() for case in group]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("mode", ["inference", "forward+backward"])
@pytest.mark.parametrize("case", CASES, ids=Case.label)
@pytest.mark.parametrize("name", ["ours", *rivals.DEFAULT])
def test_speed(benchmark: BenchmarkFixture, name: str, case: Case, mode: str) -> None:
    oracle, x = rivals.oracle(case, DEVICE), rivals.make_input(case, DEVICE)
    module: nn.Module = rivals.ours(case, oracle)
    if name != "ours":
        why_not = rivals.RIVALS[name].missing() or rivals.RIVALS[name].refuses(case, DEVICE)
        if why_not is not None:
            pytest.skip(why_not)
        module = rivals.RIVALS[name].build(case, oracle)
    runner.check(case, {name: module}, oracle, x)
    benchmark.group = f"{case.label()}, {mode}"
    call = rivals.task(module, x, mode)

    def finished() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(finished)
