"""One walk of the persistent kernels on the host: its inputs, its outputs, and nn.LSTM in fp64 beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lstm_fast.kernels import persistent

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}


@contextlib.contextmanager
def precision(kind: str) -> Iterator[None]:
    """fp32 products as TF32, or not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = kind != "fp32"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


@contextlib.contextmanager
def granted(clusters: dict[int, int], grid: int = 0) -> Iterator[None]:
    """The host grants so many clusters of each size, of others none; and so many blocks of a grid."""
    before, before_grid = dict(persistent._ON_HOST), persistent._GRID_ON_HOST
    persistent._ON_HOST.update({size: clusters.get(size, 0) for size in before})
    persistent._GRID_ON_HOST = grid
    persistent._plan.cache_clear()
    try:
        yield
    finally:
        persistent._ON_HOST.update(before)
        persistent._GRID_ON_HOST = before_grid
        persistent._plan.cache_clear()


def nan(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, float("nan"), dtype=dtype)


@dataclass
class Case:
    """H units, D directions; ``lengths`` of the sequences, the longest first."""

    kind: str
    hidden: int
    lengths: list[int]
    directions: int = 1
    scale: float = 1.0  # of the inputs
    theirs: nn.LSTM = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(self.hidden * 100 + len(self.lengths))
        dtype, hidden = DTYPES[self.kind], self.hidden
        batch, self.steps = len(self.lengths), [sum(n > t for n in self.lengths) for t in range(self.lengths[0])]
        rows, two = sum(self.steps), self.directions == 2
        self.theirs = nn.LSTM(hidden, hidden, bidirectional=two).to(dtype)
        self.x = (torch.randn(rows, hidden) * self.scale).to(dtype)
        self.h0, self.c0 = (torch.randn(self.directions, batch, hidden).to(dtype) for _ in range(2))
        self.dy = torch.randn(rows, self.directions * hidden).to(dtype)
        self.dh_n, self.dc_n = (torch.randn(self.directions, batch, hidden).to(dtype) for _ in range(2))
        suffixes = ["", "_reverse"][: self.directions]
        self.w_hh = [getattr(self.theirs, f"weight_hh_l0{s}").detach().contiguous() for s in suffixes]
        self.w_ih = [getattr(self.theirs, f"weight_ih_l0{s}").detach().double() for s in suffixes]
        names = [(f"bias_ih_l0{s}", f"bias_hh_l0{s}") for s in suffixes]
        self.biases = [tuple(getattr(self.theirs, name).detach() for name in pair) for pair in names]
        products = torch.stack([self.x.double() @ w.t() for w in self.w_ih], 1)  # [N, D, 4H]
        units = products.view(rows, self.directions, 4, hidden).transpose(2, 3)
        self.gates = units.reshape(rows, -1).to(dtype)

    def forward(self, save: bool = True, schedule: int = 0) -> dict[str, Tensor]:
        """The kernel's results, into memory full of NaN."""
        dtype, (directions, batch, hidden) = self.gates.dtype, self.c0.shape
        rows = self.gates.size(0)
        found = {
            "gates": self.gates.clone(),
            "y": nan(rows, directions * hidden, dtype=dtype),
            "h_n": nan(directions, batch, hidden, dtype=dtype),
            "c_n": nan(directions, batch, hidden, dtype=dtype),
        }
        cells = nan(directions, rows, hidden) if save else None
        with precision(self.kind):
            persistent.recurrence_forward(
                *(found["gates"], self.h0, self.c0, self.w_hh, self.biases, self.steps),
                *(found["y"], found["h_n"], found["c_n"], cells),
                schedule=schedule,
            )
        return found if cells is None else {**found, "cells": cells}

    def backward(self, saved: dict[str, Tensor], schedule: int = 0, dy: bool = True) -> dict[str, Tensor]:
        """The kernel's gradients, after ``forward``."""
        found = {
            "dgates": nan(self.directions, self.gates.size(0), 4 * self.hidden, dtype=self.gates.dtype),
            **{name: torch.full_like(self.c0, float("nan")) for name in ("dh", "dc")},
        }
        with precision(self.kind):
            persistent.recurrence_backward(
                *(saved["gates"], saved["cells"], self.c0, self.w_hh, self.steps, self.dy if dy else None),
                *(self.dh_n, self.dc_n, *found.values()),
                schedule=schedule,
            )
        return found

    def both(self, schedule: int = 0) -> dict[str, Tensor]:
        saved = self.forward(schedule=schedule)
        return {**saved, **self.backward(saved, schedule)}

    def exact(self, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
        """nn.LSTM's own outputs, states and gradients of x, h0 and c0, in ``dtype``."""
        twin = nn.LSTM(self.hidden, self.hidden, bidirectional=self.directions == 2).to(dtype)
        twin.load_state_dict(self.theirs.state_dict())
        x, h0, c0 = (t.detach().to(dtype).requires_grad_() for t in (self.x, self.h0, self.c0))
        packed, (h_n, c_n) = twin(PackedSequence(x, torch.tensor(self.steps)), (h0, c0))
        outputs = [packed.data, h_n, c_n]
        grads = torch.autograd.grad(outputs, [x, h0, c0], [t.to(dtype) for t in (self.dy, self.dh_n, self.dc_n)])
        return dict(zip(["y", "h_n", "c_n", "dx", "dh", "dc"], [*(t.detach() for t in outputs), *grads], strict=True))

    def comparable(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
        """``found`` as ``exact`` names it: dx from the gates' gradients."""
        dx = sum(da.double() @ w for da, w in zip(found["dgates"], self.w_ih, strict=True))
        assert isinstance(dx, Tensor)
        return {**{name: found[name].double() for name in ("y", "h_n", "c_n", "dh", "dc")}, "dx": dx}


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
