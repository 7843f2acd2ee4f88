"""make gpu-check, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from benchmarks import gpu_bench, gpu_check
from lstm_fast.bench import process, runner

ROW = {"group": "bf16", "backend": "persistent", "T": 64, "B": 16, "H": 512, "mode": "inference", "us_per_step": 23.4}
TIMES = {"ours_ms": 1.5, "theirs_ms": 3.0, "ratio": 2.0, "ratio_p20": 1.9, "ratio_p80": 2.1, "pairs": 20}
MEMORY = {"peak_mib": 10.0, "nn_lstm_peak_mib": 12.0, "nn_lstm": {"launches": 130, "commonest": []}}
FULL_ROW = {**ROW, **TIMES, **MEMORY}
SIZES = {"T": 1000, "B": 16, "H": 512, "dtype": "bf16"}
KERNELS = {**SIZES, "inference": {"us_per_step": 0.91}}
MODULES = {**SIZES, "backward": {**TIMES, "us_per_step": 1.5}}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so_in_one_sentence(capsys, tmp_path):
    output = tmp_path / "result.json"
    assert gpu_check.main(["--output", str(output)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and "needs an NVIDIA GPU" in said.err
    assert not output.exists()


def test_unknown_parts_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        gpu_check.main(["--parts", "tests,speed"])
    assert error.value.code == 2
    assert "among exchange, tests, sanitizer, bench, suite, got: speed" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that isn't there, and parts that do as they are told: called with them, returns exit code and record."""
    monkeypatch.setattr(gpu_check.persistent, "refuses", lambda *_: None)
    output = tmp_path / "new" / "result.json"

    def check(backends_ok: bool = True, **parts):
        status = gpu_check.lstm_fast.dispatch.Status(backends_ok, "as the test says")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
        monkeypatch.setattr(gpu_check, "describe", lambda _: {"gpu": "NVIDIA Test 1", "driver": "1.2"})
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(gpu_check.lstm_fast, "backends", lambda: dict.fromkeys(gpu_check.BACKENDS, status))
        for name, part in parts.items():
            monkeypatch.setitem(gpu_check.PARTS, name, part)
        code = gpu_check.main(["--parts", ",".join(parts), "--output", str(output)])
        return code, json.loads(output.read_text())

    before = signal.getsignal(signal.SIGTERM)
    yield check
    signal.signal(signal.SIGTERM, before)


def well(summary: str = "3 tests"):
    return lambda _: {"ok": True, "summary": summary}


def test_the_record_holds_every_part_that_ran(pretended):
    code, record = pretended(exchange=well("a"), tests=well("b"))
    assert code == 0 and record["driver"] == "1.2"
    assert record["exchange"]["summary"] == "a" and record["tests"]["summary"] == "b" and "bench" not in record


def test_failures_and_missing_backends_show_in_the_exit_code(pretended):
    assert pretended(tests=lambda _: {"ok": False, "summary": "1 failed"})[0] == 1
    assert pretended(tests=well(), backends_ok=False)[0] == 1


def test_a_card_that_holds_nothing_is_no_success(pretended, monkeypatch, capsys):
    """Its tests would all be skipped, and its rows refused."""
    monkeypatch.setattr(gpu_check.persistent, "refuses", lambda device, dtype, hidden: f"no room for {hidden}")
    assert pretended(tests=well())[0] == 1
    assert "persistent is missing: no room for 512" in capsys.readouterr().out

    def lost(*_):
        raise RuntimeError("unspecified launch failure")

    monkeypatch.setattr(gpu_check.persistent, "refuses", lost)
    assert pretended(tests=well())[0] == 1
    assert "persistent is missing: unspecified launch failure" in capsys.readouterr().out


def test_a_part_that_breaks_leaves_the_others(pretended):
    def broken(_):
        raise RuntimeError("the card fell off the bus")

    code, record = pretended(exchange=well(), tests=broken, sanitizer=well())
    assert code == 1 and record["tests"] == {"ok": False, "summary": "RuntimeError: the card fell off the bus"}
    assert record["exchange"]["ok"] and record["sanitizer"]["ok"]


def test_a_process_that_hangs_is_stopped():
    """With its children, which would hold its output open."""
    begun = time.monotonic()
    code, output = process.run(["sh", "-c", "sleep 60 & echo begun; wait"], 1)
    assert code is None and output == "begun\n" and time.monotonic() - begun < 30


def test_ctrl_c_stops_the_part_too(monkeypatch):
    started = []

    class Interrupted(subprocess.Popen):
        def communicate(self, *arguments, **options):
            if not started:
                started.append(self)
                raise KeyboardInterrupt
            return super().communicate(*arguments, **options)

    monkeypatch.setattr(process.subprocess, "Popen", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        process.run(["sleep", "60"], 60)
    assert started[0].returncode == -signal.SIGKILL


def test_a_command_that_is_stopped_stops_its_part_too(pretended, monkeypatch):
    killed, killpg = [], os.killpg
    monkeypatch.setattr(process.os, "killpg", lambda *what: killed.append(what[1]) or killpg(*what))

    def stopped(_):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        process.run(["sleep", "60"], 60)

    with pytest.raises(KeyboardInterrupt):
        pretended(exchange=well(), tests=stopped)
    assert killed == [signal.SIGKILL]


def test_a_process_that_a_kill_does_not_end_is_left_behind(monkeypatch):
    """As one that waits inside the driver: here nothing is killed at all."""
    monkeypatch.setattr(process.os, "killpg", lambda *_: None)
    monkeypatch.setattr(process, "STUCK", 0.5)
    assert process.run(["sh", "-c", "echo begun; sleep 3; echo later"], 0.5) == (None, "begun\n")


def fake_bench(monkeypatch, result: Path, *ends: tuple[int | None, list[dict]]):
    """What gpu-check makes of bench processes, each of which ends with a code after it wrote some records."""
    waiting = list(ends)

    def run(command, *_, **__):
        code, records = waiting.pop(0)
        with Path(command[command.index("--output") + 1]).open("a") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records))
        return code, "what it said"

    monkeypatch.setattr(gpu_check, "run", run)
    found = gpu_check.run_bench(result)
    assert not waiting and not list(result.parent.iterdir())
    return found


def test_the_bench_keeps_what_a_stopped_run_had_measured(monkeypatch, tmp_path):
    rows = [{**FULL_ROW, **shape._asdict()} for shape in gpu_bench.shapes()]
    records = [{"kernels": KERNELS}, {"modules": MODULES}, {"row": rows[0]}]
    found = fake_bench(monkeypatch, tmp_path / "result.json", (0, records))
    left_out = [shape._asdict() for shape in gpu_bench.shapes()][1:]
    assert found["ok"] and found["rows"] == rows[:1] and found["left_out"] == left_out
    summary = found["summary"]
    assert "0.91 us/step" in summary and "2.00x over 1 rows (floor 2.0, aim 5.0)" in summary
    assert "1.50 us/step, nn.LSTM 3.00, 2.00x (floor 3.0, aim 1.2)" in summary and "tf32 256 16 512 persist" in summary
    assert (
        "left out"
        not in fake_bench(monkeypatch, tmp_path / "result.json", (0, [{"row": row} for row in rows]))["summary"]
    )
    stopped = fake_bench(monkeypatch, tmp_path / "result.json", (None, records))
    assert not stopped["ok"] and stopped["rows"] == rows[:1]
    assert "stopped at its limit of 120 s; the last it said: what it said" in stopped["summary"]


def test_a_bench_that_lost_the_card_is_taken_up_again(monkeypatch, tmp_path):
    found = fake_bench(
        monkeypatch, tmp_path / "result.json", (gpu_bench.LOST, [{"row": FULL_ROW}]), (1, [{"kernels": KERNELS}])
    )
    assert not found["ok"] and found["rows"] == [FULL_ROW] and found["kernels"] == KERNELS
    monkeypatch.setitem(gpu_check.SECONDS, "bench", 0.01)
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (time.sleep(0.02), (gpu_bench.LOST, "lost"))[1])
    assert "lost" in gpu_check.run_bench(tmp_path / "result.json")["summary"]


@pytest.mark.parametrize(
    ("ended", "ok", "told"),
    [
        ((0, "a table"), True, "a table\n"),
        ((1, "a row failed"), False, "a row failed\n"),
        ((None, "T512"), False, "stopped at its limit of 240 s; the last it said: T512\n"),
        ((2, "This command needs typer: pip install it\n"), True, "skipped: This command needs typer: pip install it"),
        ((2, "Usage: something else"), False, "Usage: something else\n"),
    ],
)
def test_the_suite_runs_as_users_run_it(monkeypatch, tmp_path, ended, ok, told):
    commands = []
    monkeypatch.setattr(gpu_check, "run", lambda command, *_: commands.append(command) or ended)
    found = gpu_check.run_suite(tmp_path / "gpu.json")
    assert found["ok"] is ok and found["summary"].count(told) == 3
    assert (ended[0] is None) == ("Stopped before anything was measured." in found["summary"])
    for command, name in zip(commands, ("tune", "flashrnn", "train"), strict=True):
        assert command[:4] == [sys.executable, "-m", "lstm_fast.cli", "bench"] and any(name in word for word in command)
        assert command[-2:] == ["--out", str(tmp_path / f"gpu-{name}.json")]


def test_the_readmes_table_comes_from_a_record(tmp_path):
    about = {"gpu": "NVIDIA H1", "torch": "2.1", "driver": "5.8", "commit": "abcdef0123456789"}
    modules = {**SIZES, **{name: {**TIMES, "us_per_step": 1.5} for name in ("inference", "forward", "backward")}}
    refused, grid = {**ROW, "refused": "no"}, {**FULL_ROW, "group": "grid"}
    rows = [FULL_ROW, {**FULL_ROW, "ratio": 8.0}, refused, grid]
    record, readme = tmp_path / "gpu.json", tmp_path / "README.md"
    record.write_text(json.dumps({**about, "bench": {"rows": rows, "modules": modules}}))
    readme.write_text("above\n{}\nold\n{}\nbelow\n".format(*gpu_check.MARKERS))
    assert gpu_check.main(["--readme", str(readme), "--output", str(record)]) == 0
    text = readme.read_text()
    assert text.startswith("above\n") and text.endswith("below\n") and "old" not in text
    assert "NVIDIA H1, torch 2.1, driver 5.8, commit abcdef012. A step at T = 1000, B = 16, H = 512, bf16" in text
    assert "forward 1.50 µs (2.0×)" in text
    table = [line for line in text.splitlines() if line.startswith("| bf16")]
    assert table == ["| bf16 against nn.LSTM in bf16, forward+backward | 4.00× (2.00..8.00) |"]


def test_a_readmes_table_needs_a_record(capsys, tmp_path):
    with pytest.raises(SystemExit):
        gpu_check.main(["--readme", str(tmp_path / "README.md")])
    assert "--readme needs --output, the JSON of a run" in capsys.readouterr().err


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


# ---- The tests and the sanitizer, as told by processes that are only pretended -------------------------------------


@pytest.mark.parametrize(
    "code, said, ok, told",
    [
        (0, "", True, "no errors"),
        (9, "Invalid __global__ write", False, "Invalid __global__ write"),
        (None, "", True, "unfinished after 60 s"),
        (1, "Device not supported", True, "doesn't support this device"),
    ],
)
def test_the_sanitizer_runs_each_check(monkeypatch, code, said, ok, told):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "compute-sanitizer")
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (code, said))
    found = gpu_check.run_sanitizer(Path("result.json"))
    assert found["ok"] == ok and found["summary"].count(told) == 8
    assert all(f"memcheck of {backend}" in found["summary"] for backend in gpu_check.BACKENDS)
    for check in ("memcheck", "synccheck", "racecheck"):
        assert f"{check} of persistent:" in found["summary"]
        assert f"{check} of {gpu_check.OVER_THE_GRID}:" in found["summary"]


def test_hazards_that_messages_may_only_seem_to_have_are_told_and_not_judged(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: "compute-sanitizer")
    for where, ok in (("persistent", True), (gpu_check.OVER_THE_GRID, False)):
        monkeypatch.setattr(
            gpu_check,
            "run",
            lambda command, *_, where=where, **__: (
                (9, "a hazard") if "--tool=racecheck" in command and command[-1] == where else (0, "")
            ),
        )
        found = gpu_check.run_sanitizer(Path("result.json"))
        assert found["ok"] is ok and f"racecheck of {where}: a hazard" in found["summary"]


def test_without_a_sanitizer_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    assert gpu_check.run_sanitizer(Path("result.json")) == {
        "ok": True,
        "summary": "skipped: compute-sanitizer is not installed",
    }


def test_failed_and_skipped_tests_are_named(monkeypatch, tmp_path):
    lines = ["SKIPPED [1] tests/test_gpu.py:99: there is one GPU", "FAILED tests/test_x.py::test_y", "1 failed"]
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (1, "\n".join(lines)))
    found = gpu_check.run_tests(tmp_path / "result.json")
    assert not found["ok"] and found["skipped"] == lines[:1] and found["failed"] == lines[1:2]
    assert found["summary"] == "1 failed" and found["output"].endswith("1 failed")
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (None, "..."))
    assert "stopped at its limit of 200 s" in gpu_check.run_tests(tmp_path / "result.json")["summary"]

    def stopped(command, *_, **__):
        (to,) = (Path(part.partition("=")[2]) for part in command if part.startswith("--failures-to="))
        to.write_text("test_y: what was wrong")
        return None, "..F"

    monkeypatch.setattr(gpu_check, "run", stopped)
    assert gpu_check.run_tests(tmp_path / "result.json")["failures"] == "test_y: what was wrong"
    assert not list(tmp_path.iterdir())
    commands = []
    monkeypatch.setattr(gpu_check, "run", lambda command, *_, **__: (commands.append(command), (0, "3 passed"))[1])
    assert gpu_check.run_tests(tmp_path / "result.json") == {
        "ok": True,
        "summary": "3 passed",
        "failed": [],
        "skipped": [],
    }
    names = [Path(part).name for part in commands[0] if part.endswith(".py")]
    assert set(names[:3]) == {"test_gpu.py", "test_gpu_check.py", "test_gpu_persistent.py"} and len(set(names)) > 20


FAULTY = """
import pytest, torch

lost = []

def synchronize():
    if lost:
        raise RuntimeError("unspecified launch failure")

torch.cuda.is_available, torch.cuda.synchronize = lambda: True, synchronize

@pytest.mark.gpu
def test_loses_the_card():
    lost.append(True)
    assert not "what was wrong"

@pytest.mark.gpu
@pytest.mark.parametrize("n", range(20))
def test_after_it(n):
    assert not lost
"""


def test_a_fault_on_the_card_costs_one_test_and_is_told_at_once(tmp_path):
    """With the workers of gpu-check's tests, each of which pretends to have a GPU."""
    test, failures = tmp_path / "test_faulty.py", tmp_path / "failures.txt"
    test.write_text(FAULTY)
    pretends = tmp_path / "pretends.py"
    pretends.write_text("import torch\ntorch.cuda.is_available = lambda: True\n")
    command = [sys.executable, "-m", "pytest", "-p", "pretends", "-p", "tests.conftest", "-n", "1", "-m", "gpu"]
    command += [f"--rootdir={tmp_path}", f"--failures-to={failures}", "-p", "no:cacheprovider", str(test)]
    code, said = process.run(command, 120, gpu_check.ROOT, PYTHONPATH=f"{tmp_path}:{gpu_check.ROOT}")
    assert code == 1 and "20 passed" in said, said
    assert "what was wrong" in failures.read_text()


def test_a_record_names_driver_clocks_and_triton(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\ncase $1 in *driver*) echo 580.1;; *) echo 1980 MHz, 2619 MHz;; esac\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    found = gpu_check.describe("cuda")
    assert found["capability"] == "9.0"
    assert (found["gpu"], found["driver"], found["clocks"]) == ("NVIDIA Test 1", "580.1", ["1980 MHz", "2619 MHz"])
    assert found["triton"] == importlib.metadata.version("triton")
