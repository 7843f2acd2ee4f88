"""The benchmark of the persistent kernels, as far as it goes without a GPU."""

from __future__ import annotations

import json
import math
from unittest import mock

import pytest
import torch

from benchmarks import gpu_bench
from lstm_fast.bench import runner
from tests.gpu_case import FULL_ROW, KERNELS, MODULES, ROW


def test_a_table_row_names_case_and_figures():
    line = gpu_bench.table([FULL_ROW]).splitlines()[0]
    parts = (
        "bf16",
        "persistent",
        "T64",
        "B16",
        "H512",
        "1.500",
        "23.40",
        "3.000",
        "2.00x",
        "10 and 12 MiB",
        "130 launches",
    )
    assert all(part in line for part in parts)
    assert "? launches" in gpu_bench.table([{**FULL_ROW, "nn_lstm": {"failed": "no profiler"}}])
    without = {name: value for name, value in FULL_ROW.items() if name != "nn_lstm"}
    assert "? launches" in gpu_bench.table([without])
    lines = gpu_bench.table([FULL_ROW, {**ROW, "refused": "no cluster holds it"}]).splitlines()
    assert "refused: no cluster holds it" in lines[1] and "over 1 rows, 1 without a ratio" in lines[2]


def test_the_bench_covers_every_group_and_begins_with_the_aim():
    shapes = list(gpu_bench.shapes())
    assert {shape.group for shape in shapes} == set(gpu_bench.GROUPS)
    assert shapes[0] == ("bf16", 1024, 16, 512, "persistent") and len(set(shapes)) == len(shapes)


@pytest.mark.parametrize("group", ["bf16", "packed", "bidirectional", "tf32"])
def test_errors_are_of_both_against_fp64(group):
    """On a CPU, where both modules exist too; a module that is off by some percent shows."""
    x, theirs, ours = gpu_bench.build(gpu_bench.Shape(group, 6, 3, 8, "cpu"), device="cpu")
    error, allowed = gpu_bench.errors(x, theirs, ours)
    eps = torch.finfo(theirs.weight_hh_l0.dtype).eps
    assert 0 < allowed < 20 * eps and 0 < error <= 2 * allowed + eps
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(1.05)
    assert gpu_bench.errors(x, theirs, ours)[0] > 2 * allowed + eps
    with torch.no_grad():
        ours.weight_ih_l0[0, 0] = float("nan")
    assert math.isnan(gpu_bench.errors(x, theirs, ours)[0])


@pytest.fixture
def bench(monkeypatch, tmp_path):
    """Runs the bench's main with a row as the test says, over one file: returns exit code and records."""
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(gpu_bench, "run_kernels", lambda: KERNELS)
    monkeypatch.setattr(gpu_bench, "run_modules", lambda: MODULES)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)  # main's own setting, undone afterwards

    def run(run_row, seconds: float = 60, lost: bool = False) -> tuple[int, list[dict]]:
        monkeypatch.setattr(gpu_bench, "run_row", run_row)
        monkeypatch.setattr(gpu_bench, "lost", lambda: lost)
        code = gpu_bench.main(["--output", str(output), "--seconds", str(seconds)])
        return code, gpu_bench.read(output)

    return run


def well_measured(shape):
    return {**FULL_ROW, **shape._asdict()}


def fp16_fails(shape):
    if shape.group == "fp16":
        raise RuntimeError("out of memory")
    return well_measured(shape)


def test_a_row_that_fails_leaves_the_others(bench):
    code, records = bench(fp16_fails)
    rows = [record["row"] for record in records if "row" in record]
    assert code == 1 and records[:2] == [{"kernels": KERNELS}, {"modules": MODULES}]
    assert len(rows) == len(list(gpu_bench.shapes())) and rows[0]["ratio"] == 2.0
    assert rows[1]["failed"] == "RuntimeError: out of memory" and rows[1]["group"] == "fp16"


def test_out_of_time_no_row_begins(bench):
    assert bench(well_measured, seconds=-1) == (0, [{"kernels": KERNELS}, {"modules": MODULES}])
    assert gpu_bench.left_out([]) == list(gpu_bench.shapes())


def test_a_lost_card_ends_the_process_and_the_next_goes_on(bench):
    code, records = bench(fp16_fails, lost=True)
    assert code == gpu_bench.LOST and len(records) == 4 and "failed" in records[-1]["row"]
    code, records = bench(well_measured)
    assert code == 1 and len(records) == 2 + len(list(gpu_bench.shapes()))  # the failed row isn't forgotten
    assert [tuple(r["row"][name] for name in gpu_bench.Shape._fields) for r in records[2:]] == list(gpu_bench.shapes())


def test_launches_are_counted_when_all_rows_are_timed(bench, monkeypatch):
    """A profiler that is barred costs no timings."""

    def timed(shape):
        return {name: value for name, value in well_measured(shape).items() if name != "nn_lstm"}

    def count(shape):
        if shape.group == "fp16":
            raise RuntimeError("no permission")
        return {"launches": shape.B}

    monkeypatch.setattr(gpu_bench, "launches", count)
    code, records = bench(timed)
    shapes = list(gpu_bench.shapes())
    assert code == 0 and all("row" in record for record in records[2 : 2 + len(shapes)])
    rows = gpu_bench.rows_of(records)
    assert [row["group"] for row in rows] == [shape.group for shape in shapes]
    assert rows[0]["nn_lstm"] == {"launches": 16} and rows[1]["nn_lstm"] == {"failed": "RuntimeError: no permission"}


def test_lost_is_what_the_card_says(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert not gpu_bench.lost()

    def gone():
        raise RuntimeError("CUDA error: unspecified launch failure")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    monkeypatch.setattr(torch.cuda, "empty_cache", gone)
    assert gpu_bench.lost() and "unspecified launch failure" in gpu_bench.attempt(gone)["failed"]


@pytest.mark.parametrize("group, found", [("bf16", {"error": float("nan")}), ("tf32", {"error": 1.0})])
def test_wrong_results_are_never_timed(monkeypatch, group, found):
    monkeypatch.setattr(gpu_bench.persistent, "unavailable", lambda: None)
    monkeypatch.setattr(gpu_bench.persistent, "refuses", lambda *_: None)
    monkeypatch.setattr(gpu_bench.persistent, "plans", lambda *_: [])
    monkeypatch.setattr(gpu_bench, "build", lambda shape: (None, None, None))
    monkeypatch.setattr(gpu_bench, "errors", lambda *_: (found["error"], 1e-3))
    row = gpu_bench.run_row(gpu_bench.Shape(group, 8, 2, 4))
    assert "wrong" in row and "ratio" not in row


@pytest.fixture
def clock(monkeypatch):
    """A card's clock and memory, which a CPU hasn't: calls run; the first timer's take 2 ms, the next one's 4 ms."""
    calls, timers = [], []

    def timer(device, call):
        assert device == "cuda"
        timers.append(call)
        milliseconds = 2.0 * len(timers)

        def timed():
            call()
            calls.append(call)
            return milliseconds

        return timed

    monkeypatch.setattr(gpu_bench.timing, "timer", timer)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 2**20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    return calls


def on_cpu(monkeypatch):
    """The bench's modules on a CPU, ours with the backend that is there."""
    build = gpu_bench.build
    monkeypatch.setattr(gpu_bench, "build", lambda shape: build(shape._replace(backend="cpu"), device="cpu"))


@pytest.mark.parametrize("group", ["bf16", "tf32", "packed", "bidirectional", "inference", "grid"])
def test_a_row_is_measured(monkeypatch, clock, group):
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu_bench.persistent, "unavailable", lambda: None)
    monkeypatch.setattr(gpu_bench.persistent, "refuses", lambda *_: None)
    monkeypatch.setattr(gpu_bench.persistent, "plans", lambda *asked: [asked[2:], gpu_bench.persistent._clusters])
    row = gpu_bench.run_row(gpu_bench.Shape(group, 6, 4, 8))
    assert row["plans"] == [(8, 4, 2 if group == "bidirectional" else 1), group != "grid"]
    assert len(clock) == 2 * gpu_bench.PAIRS == 2 * row["pairs"]
    assert (row["ours_ms"], row["theirs_ms"], row["ratio_low"], row["ratio"], row["ratio_p80"]) == (2, 4, 2, 2, 2)
    assert row["us_per_step"] == 1e3 * row["ours_ms"] / 6
    assert row["mode"] == ("inference" if group == "inference" else "forward+backward")
    assert row["peak_mib"] == row["nn_lstm_peak_mib"] == 2.0
    assert group in gpu_bench.table([row])
    json.dumps(row)


def test_a_refused_row_says_why(monkeypatch):
    monkeypatch.setattr(gpu_bench.persistent, "unavailable", lambda: "no code for this card")
    assert gpu_bench.run_row(gpu_bench.Shape("bf16", 6, 4, 8))["refused"] == "no code for this card"


def test_the_modules_steps_are_measured(monkeypatch, clock):
    on_cpu(monkeypatch)
    monkeypatch.setattr(gpu_bench, "STEP_SHAPE", (5, 4, 8))
    found = gpu_bench.run_modules()
    assert all(found[name]["us_per_step"] == 1e3 * found[name]["ours_ms"] / 5 for name in ("inference", "forward"))
    queued = found["forward"]["queued"]
    assert queued["us_per_step"] == 1e3 * queued["ours_ms"] / gpu_bench.QUEUED / 5
    said = gpu_bench.steps({"modules": found})
    assert said.count("nn.LSTM") == said.count("8 calls in a row") == 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there, and the kernels run on it")
def test_the_kernels_steps_are_measured(monkeypatch, clock):
    """By the kernels' own source on the host."""
    monkeypatch.setattr(gpu_bench, "STEP_SHAPE", (3, 2, 16))
    found = gpu_bench.run_kernels(device="cpu")
    assert len(clock) == 3 * (3 + gpu_bench.PAIRS) and found["backward"]["us_per_step"] > 0
    assert gpu_bench.steps({"kernels": found}).count("us/step") == 3


def test_what_nn_lstm_launches_is_counted(monkeypatch):
    kinds = torch.autograd.DeviceType
    events = [("gemm" * 30, 3, kinds.CUDA), ("rnn", 65, kinds.CUDA), ("cudaLaunchKernel", 68, kinds.CPU)]
    profile = mock.MagicMock()
    averages = [mock.Mock(key=key, count=count, device_type=kind) for key, count, kind in events]
    profile.__enter__.return_value.key_averages.return_value = averages
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = gpu_bench.launches(gpu_bench.Shape("bf16", 100, 2, 5), device="cpu")
    assert found == {"launches": 68, "commonest": ["rnn", "gemm" * 20], "weights_compact": False}


def test_launches_are_counted_over_few_steps(monkeypatch):
    profile, seen = mock.MagicMock(), []
    profile.__enter__.return_value.key_averages.return_value = []
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: profile)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for x in (torch.zeros(100, 2, 5), torch.zeros(100, 5)):  # of an LSTM, of an LSTMCell
        runner.launches(lambda x: seen.append(x.shape), x)
    assert seen == [(runner.LAUNCHES_T, 2, 5), (100, 5)]


def test_calls_in_a_row_are_that_many():
    calls = []
    gpu_bench.in_a_row(lambda: calls.append(1))()
    assert len(calls) == gpu_bench.QUEUED > 1


def test_phases_are_those_of_a_training_step():
    module = torch.nn.LSTM(3, 5)
    calls = gpu_bench.phases(module, torch.randn(4, 2, 3))
    assert not calls["inference"]().requires_grad and calls["forward"]()[0].requires_grad
    for _ in range(2):
        assert [tuple(g.shape) for g in calls["backward"]()] == [(4, 2, 3), (20, 3), (20, 5), (20,), (20,)]
