"""No walk reads or writes past what it was given: the kernels' own source on the host, under AddressSanitizer."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lstm_fast.kernels import persistent
from tests.compiled import CSRC, CXX
from tests.persistent_case import Case, granted
from tests.persistent_library import BF16, Library, build, host_layer

ASAN = "-fsanitize=address"
# The host layer's fibres are no threads that ASan knows, and Python keeps what it likes.
OPTIONS = "detect_stack_use_after_return=0:detect_leaks=0"


def walk_all(grid: bool, forward: Library, backward: Library) -> None:
    """Tiles of 1 to 8 sequences, alone or two in turns, both directions, dense and packed; K padded, units past H; over
    a grid groups of two and of more warps."""
    splits = set()
    sizes = [*((20, 32, columns) for columns in range(1, 9)), *((76, 32, columns) for columns in (1, 3, 6, 8))]
    for hidden, units, columns in [*sizes, *((300, 16, columns) for columns in (3, 8) if grid)]:
        for batch, directions in ((columns, 2), (2 * columns, 1)):
            lengths = [3] * columns + [2] * (batch - columns) if columns % 2 else [3] * batch
            lengths[-1] -= columns % 2
            with granted({}, -(-hidden // units) * directions) if grid else granted({4: directions}):
                case = Case("bf16", hidden, lengths, directions)
                plan = persistent._plan(BF16, False, hidden, batch, directions, None)
                assert plan is not None and plan.columns == min(8, batch if columns <= 4 else columns), plan
                splits.add(plan.splits)
                error, saved = forward.forward(case, schedule=columns)
                assert error == ""
                error, found = backward.backward(case, saved, schedule=columns)
                assert error == ""
                whole = case.both()
                for name, value in {**saved, **found}.items():
                    assert torch.equal(value, whole[name]), name
    assert max(splits) > 2 or not grid


def library_of(name: str) -> str:
    """The path of the compiler's own; the bare name where it has none."""
    command = [*CXX, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("grid", [False, True])
def test_no_walk_reaches_past_its_memory(tmp_path, grid):
    libraries = [library_of("libasan.so"), library_of("libstdc++.so.6")]  # the latter throws
    if not all(map(os.path.isabs, libraries)):
        pytest.skip(f"{CXX[0]} has no libasan")
    layer = host_layer(tmp_path, ASAN)
    walks = [
        build(tmp_path / f"{way}.so", CSRC, layer, way == "backward", grid, ASAN) for way in ("forward", "backward")
    ]
    command = [sys.executable, "-m", __name__, str(grid), *map(str, walks)]
    environment = {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": OPTIONS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    walk_all(sys.argv[1] == "True", *(Library(Path(path)) for path in sys.argv[2:]))
