"""Processes of their own for what may hang or break: each ends within its time."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

STUCK = 15  # seconds after which a process that even a kill does not end, inside the driver, is left behind


def run(command: list[str], seconds: float, cwd: Path | None = None, **environment: str) -> tuple[int | None, str]:
    """Exit code and output; None for a process that was stopped at its limit, with those that it started."""
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,  # its children, which hold its output open, can be stopped as one group
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException as error:  # Ctrl-C doesn't reach that group by itself
        os.killpg(process.pid, signal.SIGKILL)
        output = _rest(process)
        if not isinstance(error, subprocess.TimeoutExpired):
            raise
        return None, output
    return process.returncode, output


def _rest(process: subprocess.Popen[str]) -> str:
    """What a killed process had said."""
    try:
        return process.communicate(timeout=STUCK)[0]
    except subprocess.TimeoutExpired as error:
        said = error.output or b""
        return said.decode(errors="replace") if isinstance(said, bytes) else str(said)
