"""make gpu-check, as far as it goes without a GPU."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from benchmarks import exchange, gpu_bench, gpu_check

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
    assert "among exchange, tests, sanitizer, bench, got: speed" in capsys.readouterr().err


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that isn't there, and parts that do as they are told: called with them, returns exit code and record."""
    output = tmp_path / "new" / "result.json"

    def check(backends_ok: bool = True, **parts):
        status = gpu_check.lstm_fast.dispatch.Status(backends_ok, "as the test says")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
        monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "NVIDIA Test 1", "driver": "1.2"})
        monkeypatch.setattr(gpu_check.lstm_fast, "backends", lambda: dict.fromkeys(gpu_check.BACKENDS, status))
        for name, part in parts.items():
            monkeypatch.setitem(gpu_check.PARTS, name, part)
        code = gpu_check.main(["--parts", ",".join(parts), "--output", str(output)])
        return code, json.loads(output.read_text())

    return check


def well(summary: str = "3 tests"):
    return lambda: {"ok": True, "summary": summary}


def test_the_record_holds_every_part_that_ran(pretended):
    code, record = pretended(exchange=well("a"), tests=well("b"))
    assert code == 0 and record["driver"] == "1.2"
    assert record["exchange"]["summary"] == "a" and record["tests"]["summary"] == "b" and "bench" not in record


def test_failures_and_missing_backends_show_in_the_exit_code(pretended):
    assert pretended(tests=lambda: {"ok": False, "summary": "1 failed"})[0] == 1
    assert pretended(tests=well(), backends_ok=False)[0] == 1


def test_a_part_that_breaks_leaves_the_others(pretended):
    def broken():
        raise RuntimeError("the card fell off the bus")

    code, record = pretended(exchange=well(), tests=broken, sanitizer=well())
    assert code == 1 and record["tests"] == {"ok": False, "summary": "RuntimeError: the card fell off the bus"}
    assert record["exchange"]["ok"] and record["sanitizer"]["ok"]


def test_a_process_that_hangs_is_stopped():
    """With its children, which would hold its output open."""
    begun = time.monotonic()
    code, output = gpu_check.run(["sh", "-c", "sleep 60 & echo begun; wait"], 1)
    assert code is None and output == "begun\n" and time.monotonic() - begun < 30


def fake_bench(monkeypatch, code: int | None, records: list[dict]):
    def run(command, seconds, **_):
        Path(command[command.index("--output") + 1]).write_text("".join(json.dumps(r) + "\n" for r in records))
        return code, "what it said"

    monkeypatch.setattr(gpu_check, "run", run)
    return gpu_check.run_bench()


def test_the_bench_keeps_what_a_stopped_run_had_measured(monkeypatch):
    left_out = {"group": "tf32", "T": 256}
    records = [{"kernels": KERNELS}, {"modules": MODULES}, {"row": FULL_ROW}, {"left_out": left_out}]
    found = fake_bench(monkeypatch, 0, records)
    assert found["ok"] and found["rows"] == [FULL_ROW] and found["left_out"] == [left_out]
    summary = found["summary"]
    assert "0.91 us/step" in summary and "2.00x over 1 rows (floor 2.0, aim 5.0)" in summary
    assert "1.50 us/step, nn.LSTM 3.00, 2.00x (floor 3.0, aim 1.2)" in summary and "tf32 256" in summary
    stopped = fake_bench(monkeypatch, None, records[:3])
    assert not stopped["ok"] and stopped["rows"] == [FULL_ROW] and "stopped at its limit of 120 s" in stopped["summary"]


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


def run_bench_main(monkeypatch, tmp_path, run_row, seconds: float = 60) -> tuple[int, list[dict]]:
    output = tmp_path / "rows.jsonl"
    monkeypatch.setattr(gpu_bench, "run_kernels", lambda: KERNELS)
    monkeypatch.setattr(gpu_bench, "run_modules", lambda: MODULES)
    monkeypatch.setattr(gpu_bench, "run_row", run_row)
    code = gpu_bench.main(["--output", str(output), "--seconds", str(seconds)])
    return code, [json.loads(line) for line in output.read_text().splitlines()]


def test_a_row_that_fails_leaves_the_others(monkeypatch, tmp_path):
    def run_row(shape):
        if shape.group == "fp16":
            raise RuntimeError("out of memory")
        return FULL_ROW

    code, records = run_bench_main(monkeypatch, tmp_path, run_row)
    rows = [record["row"] for record in records if "row" in record]
    assert code == 1 and records[:2] == [{"kernels": KERNELS}, {"modules": MODULES}]
    assert len(rows) == len(list(gpu_bench.shapes())) and rows[0] == FULL_ROW
    assert rows[1]["failed"] == "RuntimeError: out of memory" and rows[1]["group"] == "fp16"


def test_out_of_time_the_other_rows_are_named(monkeypatch, tmp_path):
    code, records = run_bench_main(monkeypatch, tmp_path, lambda shape: FULL_ROW, seconds=-1)
    assert code == 0 and [record["left_out"]["T"] for record in records[2:]] == [s.T for s in gpu_bench.shapes()]


@pytest.mark.parametrize("group, found", [("bf16", {"error": float("nan")}), ("tf32", {"error": 1.0})])
def test_wrong_results_are_never_timed(monkeypatch, group, found):
    monkeypatch.setattr(gpu_bench.persistent, "unavailable", lambda: None)
    monkeypatch.setattr(gpu_bench.persistent, "refuses", lambda *_: None)
    monkeypatch.setattr(gpu_bench, "build", lambda shape: (None, None, None))
    monkeypatch.setattr(gpu_bench, "errors", lambda *_: (found["error"], 1e-3))
    row = gpu_bench.run_row(gpu_bench.Shape(group, 8, 2, 4))
    assert "wrong" in row and "ratio" not in row


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
    found = gpu_check.run_sanitizer()
    assert found["ok"] == ok and found["summary"].count(told) == 5
    assert all(f"memcheck of {backend}" in found["summary"] for backend in gpu_check.BACKENDS)
    assert all(f"{check} of persistent" in found["summary"] for check in ("synccheck", "racecheck"))


def test_without_a_sanitizer_it_says_so(monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda *_, **__: None)
    assert gpu_check.run_sanitizer() == {"ok": True, "summary": "skipped: compute-sanitizer is not installed"}


def test_failed_and_skipped_tests_are_named(monkeypatch):
    lines = ["SKIPPED [1] tests/test_gpu.py:99: there is one GPU", "FAILED tests/test_x.py::test_y", "1 failed"]
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (1, "\n".join(lines)))
    found = gpu_check.run_tests()
    assert not found["ok"] and found["skipped"] == lines[:1] and found["failed"] == lines[1:2]
    assert found["summary"] == "1 failed"
    monkeypatch.setattr(gpu_check, "run", lambda *_, **__: (None, "..."))
    assert "stopped at its limit of 200 s" in gpu_check.run_tests()["summary"]


def test_environment_names_driver_and_triton():
    assert {"driver", "clocks", "triton", "commit", "torch"} <= gpu_check.environment().keys()


# ---- The exchange of a cluster -------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_the_exchange_benchmark_compiles_without_a_warning(tmp_path):
    options = ["-std=c++17", "-O3", "-gencode=arch=compute_90a,code=sm_90a", "-Werror", "all-warnings"]
    command = ["nvcc", *options, "-Xcompiler", "-Wall,-Wextra", "-o", str(tmp_path / "exchange"), str(exchange.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr


@pytest.fixture
def tools(monkeypatch, tmp_path):
    """nvcc as the test says: a shell script that makes a program of another."""

    def install(nvcc: str) -> None:
        path = tmp_path / "nvcc"
        path.write_text(f"#!/bin/sh\n{nvcc}\n")
        path.chmod(0o755)
        monkeypatch.setattr(exchange.shutil, "which", lambda *_, **__: str(path))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    return install


def program(text: str) -> str:
    """A compiler whose program runs ``text``."""
    return f"""while [ "$1" != -o ]; do shift; done; printf '#!/bin/sh\\n{text}\\n' > "$2"; chmod +x "$2" """


def test_exchange_without_its_needs_is_skipped(monkeypatch):
    monkeypatch.setattr(exchange.shutil, "which", lambda *_, **__: None)
    assert exchange.measure() == {"ok": True, "summary": "skipped: nvcc is not installed"}
    monkeypatch.setattr(exchange.shutil, "which", lambda *_, **__: "nvcc")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert "compute capability 8.6 has no clusters" in exchange.measure()["summary"]


def test_exchange_gives_what_its_program_prints(tools):
    step = {"what": "message", "size": 16, "blocks": 2, "clocks": 210.5, "ns": 120.0}
    printed = json.dumps({"gpu": "Test", "clusters": {"2": 66}, "steps": [step]})
    tools(program(f"echo \\047{printed}\\047"))
    found = exchange.measure()
    assert found["ok"] and found["steps"] == [step]
    assert "66 of 2" in found["summary"] and "210.5 clocks" in found["summary"]


def test_exchange_tells_what_failed(tools, monkeypatch):
    tools("echo no such card >&2; exit 3")
    assert exchange.measure() == {"ok": False, "summary": "nvcc failed: no such card"}
    monkeypatch.setattr(exchange, "SECONDS", 0.2)
    tools("sleep 5")
    assert exchange.measure() == {"ok": False, "summary": "nvcc did not end within 0.2 s"}
