"""C++ compiled for a test, by $CXX or else g++."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[1] / "csrc"
CXX = shlex.split(os.environ.get("CXX", "g++"))


def compiled(target: Path, *arguments: str | Path) -> Path:
    """``target``: a shared library or, with -c, an object. Without a compiler the test is skipped."""
    if shutil.which(CXX[0]) is None:
        pytest.skip(f"no C++ compiler: {CXX[0]}")
    kind = [] if "-c" in arguments else ["-shared"]
    subprocess.run([*CXX, "-std=c++17", "-fPIC", *kind, *map(str, arguments), "-o", str(target)], check=True)
    return target
