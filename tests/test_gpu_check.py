"""make gpu-check, as far as it goes without a GPU."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import exchange, gpu_bench, gpu_check

ROW = {"group": "bf16", "backend": "persistent", "T": 64, "B": 16, "H": 512, "mode": "inference", "us_per_step": 23.4}
TIMES = {"ours_ms": 1.5, "theirs_ms": 3.0, "ratio": 2.0, "ratio_p20": 1.9, "ratio_p80": 2.1, "pairs": 20}
MEMORY = {"peak_mib": 10.0, "nn_lstm_peak_mib": 12.0, "nn_lstm": {"launches": 130, "commonest": []}}
FULL_ROW = {**ROW, **TIMES, **MEMORY}
KERNELS = {"T": 8, "B": 16, "H": 512, "inference_us_per_step": 0.91}


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
    code, output = gpu_check.run([sys.executable, "-uc", "import time; print('begun'); time.sleep(60)"], 3)
    assert code is None and output == "begun\n"


def fake_bench(monkeypatch, code: int | None, records: list[dict]):
    def run(command, seconds, **_):
        Path(command[command.index("--output") + 1]).write_text("".join(json.dumps(r) + "\n" for r in records))
        return code, "what it said"

    monkeypatch.setattr(gpu_check, "run", run)
    return gpu_check.run_bench()


def test_the_bench_keeps_what_a_stopped_run_had_measured(monkeypatch):
    left_out = {"group": "tf32", "T": 256}
    records = [{"kernels": KERNELS}, {"row": FULL_ROW}, {"left_out": left_out}]
    found = fake_bench(monkeypatch, 0, records)
    assert found["ok"] and found["rows"] == [FULL_ROW] and found["left_out"] == [left_out]
    assert "inference 0.91" in found["summary"] and "2.00x over 1 rows (floor 2.0, aim 5.0)" in found["summary"]
    stopped = fake_bench(monkeypatch, None, records[:2])
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
    assert "no cluster" in gpu_bench.table([{**ROW, "refused": "no cluster holds it"}])


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
