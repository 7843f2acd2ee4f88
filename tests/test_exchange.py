"""The exchange benchmark: its machine code, and what becomes of its run; a GPU's own is tests/test_gpu.py's."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from lstm_fast import _C
from lstm_fast.bench import exchange, limits, memory, runner
from tests.test_cuda_compile import ROOT, sass

CUDA = ROOT / "csrc" / "cuda"

STEP = {"what": "message", "size": 16, "blocks": 2, "clocks": 210.5, "ns": 120.0}
EXCHANGES = [
    {**STEP, "what": "exchange", "size": 512, "blocks": blocks, "ns": ns} for blocks, ns in ((8, 900), (16, 750))
]


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["90a", "100"])
def test_its_clock_counts_the_exchange_alone(tmp_path, arch):
    """Without a warning; the widest messages, and no division of integers between them."""
    cubin = tmp_path / "exchange.cubin"
    options = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-cubin"]
    command = ["nvcc", *options, "-o", str(cubin), str(CUDA / "persistent_exchange.cu")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    kernels = sass(cubin)
    (code,) = (text for name, text in kernels.items() if "exchange_steps" in name)
    assert len(kernels) == 4
    for instruction in ("STAS.128", "SYNCS.PHASECHK", "SR_CLOCKLO", "SR_GLOBALTIMERLO"):
        assert instruction in code
    assert "MUFU.RCP" not in code
    assert all("LDL" not in text and "STL" not in text for text in kernels.values())


@pytest.fixture
def card(monkeypatch, tmp_path):
    """A GPU of compute capability 9.0, and a measuring process that is the shell script that the test gives."""

    def install(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(exchange.sys, "executable", str(path))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(_C, "build_info", lambda: {"clusters": True})
    return install


def test_without_its_needs_it_is_skipped(card, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    assert exchange.measure() == {"ok": True, "summary": "skipped: compute capability 8.6 has no clusters"}
    monkeypatch.setattr(_C, "build_info", lambda: {"clusters": False})
    assert exchange.measure() == {"ok": True, "summary": "skipped: lstm_fast._C was built without clusters"}
    assert exchange.shortest_us() is None


def test_it_gives_what_its_process_prints(card):
    printed = "\n".join(
        json.dumps(line) for line in ({"clusters": {"2": 66}}, *({"step": s} for s in (STEP, *EXCHANGES)))
    )
    card(f"test \"$*\" = '-m lstm_fast.bench.exchange 3' && echo '{printed}'")
    found = exchange.measure()
    assert found["ok"] and found["steps"] == [STEP, *EXCHANGES] and found["clusters"] == {"2": 66}
    assert "66 of 2" in found["summary"] and "210.5 clocks" in found["summary"]
    assert exchange.shortest_us() == 0.75


def test_it_tells_what_failed(card, monkeypatch):
    """And keeps what was measured before."""
    step = f"echo '{json.dumps({'step': STEP})}'"
    card(f"{step}; echo no such card >&2; exit 3")
    found = exchange.measure()
    assert not found["ok"] and found["steps"] == [STEP]
    assert found["summary"].endswith("ns\nthe measurement failed: no such card")
    monkeypatch.setattr(exchange, "SECONDS", 1)
    card(f"{step}; sleep 60")
    found = exchange.measure()
    assert not found["ok"] and found["steps"] == [STEP]
    assert found["summary"].endswith("the measurement did not end within 1 s")


def test_the_process_prints_what_the_extension_measures(monkeypatch, capsys):
    monkeypatch.setattr(_C, "clusters_at_once", lambda device: [(2, 66), (16, device)], raising=False)
    monkeypatch.setattr(_C, "measure_exchange", lambda _, report: report(*STEP.values()), raising=False)
    exchange.main(7)
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"clusters": {"2": 66, "16": 7}}, {"step": STEP}]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_the_extension_says_why():
    with pytest.raises(RuntimeError, match=r"cudaSetDevice: |built without clusters"):
        _C.clusters_at_once(0)
    with pytest.raises(RuntimeError, match=r"cudaSetDevice: |built without clusters"):
        _C.measure_exchange(0, print)


def test_a_gpus_limit_counts_the_shortest_exchange(monkeypatch):
    monkeypatch.setattr(limits, "_gpu_rates", lambda: {"float32": 4e4})
    monkeypatch.setattr(limits, "_seconds", lambda *_: 1e-3)
    monkeypatch.setattr(limits, "_SIZES", {"cuda": ()})
    asked = []
    monkeypatch.setattr(exchange, "measure", lambda: asked.append(True) or {"ok": True, "steps": EXCHANGES})
    known = limits.measure("cuda")
    assert known.exchange_us == 0.75
    monkeypatch.setattr(limits, "_gpu_rates", lambda: {"float32": 5e4})
    assert limits.measure("cuda", known) == known._replace(gflops={"float32": 5e4}) and len(asked) == 1


def test_a_run_asks_for_the_exchange_once(monkeypatch, tmp_path):
    known = []
    found = limits.Limits({}, [(1, 1.0)], 0.75)
    monkeypatch.setattr(runner, "measure", lambda device, so_far: known.append(so_far) or found)
    monkeypatch.setattr(memory, "startup", lambda *_: {})
    runner.run("none", {}, [], [], "cpu", 0.0, tmp_path / "run.json", lambda *_: None)
    assert known == [None, found, found] and len(known) == runner.PASSES
