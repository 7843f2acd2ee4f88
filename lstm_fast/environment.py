"""What a result was obtained with; it stands beside every recorded number."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

import lstm_fast


def environment() -> dict[str, str | int]:
    """Versions, processor, threads that torch uses, and the GPU with its compute capability if there is one."""
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
        found["capability"] = "{}.{}".format(*torch.cuda.get_device_capability())
    return found


def cpuinfo() -> str:
    """What Linux says of the processor."""
    info = Path("/proc/cpuinfo")
    return info.read_text() if info.exists() else ""


def _cpu() -> str:
    """Its name, with the instruction set that the kernels take: virtual machines give different processors one name."""
    names = [line.partition(":")[2].strip() for line in cpuinfo().splitlines() if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    try:
        from lstm_fast import _C
    except ImportError:
        return name
    return f"{name} with {_C.CPU_INSTRUCTION_SETS[-1]}"
