"""The exchange benchmark's build; tests/test_gpu_check.py covers what becomes of its run."""

from __future__ import annotations

import json
import shutil
import subprocess

import pytest
import torch

from benchmarks import exchange
from tests.test_cuda_compile import sass


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
@pytest.mark.parametrize("arch", ["90a", "100"])
def test_its_clock_counts_the_exchange_alone(tmp_path, arch):
    """Without a warning; the widest messages, and no division of integers between them."""
    cubin = tmp_path / "exchange.cubin"
    options = ["-std=c++17", "-O3", f"-arch=sm_{arch}", "-Werror", "all-warnings", "-cubin"]
    command = ["nvcc", *options, "-o", str(cubin), str(exchange.SOURCE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    kernels = sass(cubin)
    (code,) = (text for name, text in kernels.items() if "8exchange" in name.replace("exchange_cu", ""))
    assert len(kernels) == 4
    for instruction in ("STAS.128", "SYNCS.PHASECHK", "SR_CLOCKLO", "SR_GLOBALTIMERLO"):
        assert instruction in code
    assert "MUFU.RCP" not in code
    assert all("LDL" not in text and "STL" not in text for text in kernels.values())


@pytest.mark.parametrize("capability, target", [((9, 0), "90a"), ((10, 0), "100"), ((12, 0), "120")])
@pytest.mark.parametrize("name", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_nvcc_is_found_as_the_build_finds_it_and_told_the_card(monkeypatch, tmp_path, name, capability, target):
    """An nvcc that keeps what it was told, and whose program prints an empty result."""
    folder = tmp_path / "bin"
    folder.mkdir()
    printed = json.dumps({"clusters": {}, "steps": []})
    (folder / "nvcc").write_text(
        f"""#!/bin/sh
echo "$@" > {tmp_path}/told
while [ "$1" != -o ]; do shift; done
printf '#!/bin/sh\\necho \\047{printed}\\047\\n' > "$2"
chmod +x "$2"
"""
    )
    (folder / "nvcc").chmod(0o755)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin" if name == "PATH" else "/usr/bin:/bin")
    if name != "PATH":
        monkeypatch.setenv(name, str(tmp_path))
    assert exchange.measure()["ok"]
    told = (tmp_path / "told").read_text().split()
    assert f"-gencode=arch=compute_{target},code=sm_{target}" in told and told[-1] == str(exchange.SOURCE)
