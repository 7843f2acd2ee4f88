"""Where results are written: a file is whole or as it was, and a run that goes on lies beside its own."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class OutputError(ValueError):
    """A file can't be written; the message is one sentence."""


def prepare(path: Path) -> None:
    """Finds out whether ``path`` can be written, before anything is measured.

    Raises:
        OutputError: it can't.
    """
    if path.exists() and not path.is_file():
        raise OutputError(f"the output should be a regular file or a new one, got: {path}")
    part = unfinished(path)
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.touch()
        part.unlink()  # one of an earlier run too
    except OSError as error:
        raise OutputError(f"the output should be a file that can be written, got: {path} ({error.strerror})") from error


def unfinished(path: Path) -> Path:
    """Where a run lies until it is complete and takes the name ``path``."""
    return _beside(path, ".part")


def finish(path: Path) -> None:
    """The run is complete."""
    unfinished(path).replace(_target(path))


def stopped(path: Path) -> str:
    """Says where a stopped run is: at ``path`` unless an older one lies there."""
    older = path.exists()
    if not unfinished(path).exists():
        return "Stopped before anything was measured" + (f"; {path} is as it was." if older else ".")
    if older:
        return f"Stopped; {unfinished(path)} holds what was measured, and {path} is as it was."
    finish(path)
    return f"Stopped; {path} holds what was measured."


def write(path: Path, record: dict[str, Any]) -> None:
    """As JSON, whole or not at all."""
    replace(path, (json.dumps(record, indent=1) + "\n").encode())


def replace(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    new = _beside(path, ".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    new.write_bytes(content)
    new.replace(_target(path))


def _beside(path: Path, suffix: str) -> Path:
    target = _target(path)
    return target.with_name(target.name + suffix)


def _target(path: Path) -> Path:
    """Links stay links."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
