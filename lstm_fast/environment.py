"""What a result was obtained with; it stands beside every recorded number."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import lstm_fast


def environment() -> dict[str, str | int]:
    """Versions, processor, threads that torch uses, and the GPU if there is one."""
    found: dict[str, str | int] = {
        "lstm_fast": lstm_fast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
