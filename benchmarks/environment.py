"""What a result was measured on: machine, versions, commit."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import torch

from lstm_fast.environment import environment


def commit() -> str:
    """The checkout's commit, with "+changes" if tracked files differ from it; "unknown" outside a checkout."""
    root = Path(__file__).parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        changes = subprocess.run(["git", "diff", "--quiet", "HEAD"], cwd=root, check=False).returncode
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if changes else "")


def describe() -> dict[str, str | int]:
    """Machine, versions, commit and date, ready for JSON."""
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    found = {"date": date, "commit": commit(), **environment()}
    if torch.version.cuda is not None:
        found["cuda"] = torch.version.cuda
    return found
