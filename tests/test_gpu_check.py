"""make gpu-check, as far as it goes without a GPU."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import gpu_check

ROW = {"backend": "cuda", "dtype": "bfloat16", "T": 64, "B": 16, "H": 512, "mode": "inference"}
TIMES = {"ours_ms": 1.5, "theirs_ms": 3.0, "ratio": 2.0, "ratio_p20": 1.9, "ratio_p80": 2.1, "pairs": 20}


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
    assert "among tests, sanitizer, bench, got: speed" in capsys.readouterr().err


def run_on_a_pretended_gpu(monkeypatch, output, tests_ok: bool, backends_ok: bool = True) -> int:
    status = gpu_check.lstm_fast.dispatch.Status(backends_ok, "as the test says")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 1")
    monkeypatch.setattr(gpu_check, "environment", lambda: {"gpu": "NVIDIA Test 1", "driver": "1.2"})
    monkeypatch.setattr(gpu_check.lstm_fast, "backends", lambda: {"cuda": status, "triton": status})
    monkeypatch.setattr(gpu_check, "run_tests", lambda: {"ok": tests_ok, "summary": "3 tests", "failed": []})
    monkeypatch.setattr(gpu_check, "run_bench", lambda: [{**ROW, **TIMES}])
    return gpu_check.main(["--parts", "tests,bench", "--output", str(output)])


def test_the_record_holds_every_part_that_ran(monkeypatch, tmp_path):
    output = tmp_path / "new" / "result.json"
    assert run_on_a_pretended_gpu(monkeypatch, output, tests_ok=True) == 0
    record = json.loads(output.read_text())
    assert record["driver"] == "1.2" and record["tests"]["summary"] == "3 tests" and "sanitizer" not in record
    assert record["bench"] == [{**ROW, **TIMES}]


def test_failures_and_missing_backends_show_in_the_exit_code(monkeypatch, tmp_path):
    output = tmp_path / "result.json"
    assert run_on_a_pretended_gpu(monkeypatch, output, tests_ok=False) == 1
    assert run_on_a_pretended_gpu(monkeypatch, output, tests_ok=True, backends_ok=False) == 1
    assert "bench" not in json.loads(output.read_text())


def test_a_table_row_names_case_and_figures():
    line = gpu_check.table([{**ROW, **TIMES}])
    assert all(part in line for part in ("cuda", "bfloat16", "T64", "B16", "H512", "1.500", "3.000", "2.00x"))


def test_environment_names_driver_and_triton():
    assert {"driver", "triton", "commit", "torch"} <= gpu_check.environment().keys()
