"""Where commands write: looked at before the work; a record is whole or as it was, an unfinished run lies beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal


class OutputError(ValueError):
    """A place can't be written; the message is one sentence."""


def check_place(option: str, kind: Literal["regular file", "folder"], path: Path) -> None:
    """That ``path``, given by ``option``, can be written, before the work that it is for; nothing is made yet.

    Raises:
        OutputError: it can't.
    """
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    fits = there.is_file() if kind == "regular file" and there is path else there.is_dir()
    if not fits or not os.access(there, os.W_OK):
        raise OutputError(f"{option} should be a {kind} that can be written, got: {path}")


def prepare(path: Path) -> None:
    """For a record at ``path``, which --out names: what an earlier run left unfinished goes.

    Raises:
        OutputError: it can't be written.
    """
    check_place("--out", "regular file", path)
    unfinished(path).unlink(missing_ok=True)


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
    with whole(path) as new:
        new.write_bytes(content)


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Where to write what then takes the name ``path``; nothing is left of it where that fails.

    Raises:
        OSError: it can't be written; ``filename`` is ``path``.
    """
    new = _beside(path, ".new")
    new.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        with new.open("rb") as file:
            os.fsync(file.fileno())
        new.replace(_target(path))
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        new.unlink(missing_ok=True)


def _beside(path: Path, suffix: str) -> Path:
    target = _target(path)
    return target.with_name(target.name + suffix)


def _target(path: Path) -> Path:
    """Links stay links."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path
