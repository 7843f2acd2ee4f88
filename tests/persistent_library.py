"""The persistent kernels' source as a library of its own, for tests that break it or watch its memory: bf16 alone."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

from lstm_fast.kernels import persistent
from tests.compiled import CSRC, compiled
from tests.persistent_case import Case

SHIM = Path(__file__).with_name("persistent_shim.cpp")
BF16 = 0
# Hardened as some distributions' compilers are set up.
FLAGS = ["-O1", "-U_FORTIFY_SOURCE", "-D_FORTIFY_SOURCE=2", "-Wno-unknown-pragmas"]


def host_layer(folder: Path, *flags: str) -> Path:
    """csrc/host/simt.cpp, compiled."""
    return compiled(folder / "simt.o", *FLAGS, *flags, "-c", CSRC / "host" / "simt.cpp")


def build(target: Path, csrc: Path, layer: Path, backward: bool, grid: bool, *flags: str) -> Path:
    """One walk, in clusters or over the grid."""
    walk = [f"-DLSTM_GRID={str(grid).lower()}", *(["-DLSTM_BACKWARD"] if backward else [])]
    return compiled(target, *FLAGS, *flags, *walk, f"-I{csrc}", SHIM, layer)


class Library:
    """What ``build`` gave, to be called as Case.forward and Case.backward are."""

    def __init__(self, path: Path) -> None:
        self._walk = ctypes.CDLL(str(path)).walk
        self._walk.restype = ctypes.c_char_p

    def forward(self, case: Case, schedule: int) -> tuple[str, dict[str, Tensor]]:
        """What went wrong, or "", and the results."""
        directions, batch, hidden = case.c0.shape
        state, rows = (directions, batch, hidden), case.gates.size(0)
        found = {"gates": case.gates.clone(), "y": case.gates.new_full((rows, directions * hidden), 9)}
        found |= {name: case.gates.new_full(state, 9) for name in ("h_n", "c_n")}
        found["cells"] = torch.full((directions, rows, hidden), 9.0)
        biases = [case.biases[d][k] for k in (0, 1) for d in (0, -1)]
        tensors = [found["gates"], case.h0, case.c0, *self._weights(case), *biases, self._starts(case)]
        tensors += [found[name] for name in ("y", "h_n", "c_n", "cells")]
        return self._call(case, tensors, False, schedule), found

    def backward(self, case: Case, saved: dict[str, Tensor], schedule: int) -> tuple[str, dict[str, Tensor]]:
        """What went wrong, or "", and the gradients."""
        found = {"dgates": case.gates.new_full((case.directions, case.gates.size(0), 4 * case.hidden), 9)}
        found |= {name: torch.full_like(case.c0, 9) for name in ("dh", "dc")}
        tensors = [saved["gates"], saved["cells"], case.c0, *self._weights(case), self._starts(case)]
        tensors += [case.dy, case.dh_n, case.dc_n, *found.values()]
        return self._call(case, tensors, True, schedule), found

    def _weights(self, case: Case) -> list[Tensor]:
        return [case.w_hh[0], case.w_hh[-1]]

    def _starts(self, case: Case) -> Tensor | None:
        return persistent._starts(case.steps, torch.device("cpu"))

    def _call(self, case: Case, tensors: list[Tensor | None], backward: bool, schedule: int) -> str:
        directions, batch, hidden = case.c0.shape
        plan = persistent._plan(BF16, backward, hidden, batch, directions, None)
        assert plan is not None
        numbers = [case.gates.size(0), len(case.steps), batch, hidden, directions, *plan]
        tensors = [*tensors, persistent._workspace(BF16, backward, plan, directions, torch.device("cpu"))]
        pointers = (ctypes.c_void_p * len(tensors))(*(None if t is None else t.data_ptr() for t in tensors))
        error: bytes = self._walk(pointers, (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_uint64(schedule))
        return error.decode()
