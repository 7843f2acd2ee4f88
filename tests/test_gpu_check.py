"""make gpu-check, as far as it goes without a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_bench, gpu_check
from lstm_fast.bench import process
from tests.gpu_case import FULL_ROW, KERNELS, MODULES, ROW, SIZES, TIMES


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


def test_a_command_that_is_stopped_stops_its_part_too(pretended, monkeypatch):
    killed, killpg = [], os.killpg
    monkeypatch.setattr(process.os, "killpg", lambda *what: killed.append(what[1]) or killpg(*what))

    def stopped(_):
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        process.run(["sleep", "60"], 60)

    with pytest.raises(KeyboardInterrupt):
        pretended(exchange=well(), tests=stopped)
    assert killed == [signal.SIGKILL]


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
