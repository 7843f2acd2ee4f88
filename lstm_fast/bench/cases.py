"""What is measured: shapes, and the named grids of them.

Published grids: FlashRNN (Pöppel et al. 2024, arXiv:2412.07752: 768 hidden units), DeepBench (Baidu, the LSTM shapes of
its training and inference lists), haste (LMNT, its 50 steps).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any, NamedTuple

MODES = ("inference", "forward", "forward+backward")


class Case(NamedTuple):
    """One module and its input.

    T steps, B sequences, H hidden units, I input features (0 for H), P features of the projection (0 for none);
    ``packed``: lengths uniform in 1..T; ``cell``: an LSTMCell, T = 1; ``last``: gradients are those of the last states
    alone, as where a sequence is classified.
    """

    T: int
    B: int
    H: int
    I: int = 0  # noqa: E741
    P: int = 0
    layers: int = 1
    bidirectional: bool = False
    packed: bool = False
    cell: bool = False
    dtype: str = "float32"
    last: bool = False  # runs recorded before there was such a case don't say so

    @classmethod
    def of(cls, row: dict[str, Any]) -> Case:
        """What a recorded row measured."""
        return cls(**{field: row[field] for field in cls._fields if field in row})

    @property
    def inputs(self) -> int:
        return self.I or self.H

    def weights(self) -> int:
        """Elements of all weight matrices."""
        directions, features = 2 if self.bidirectional else 1, self.P or self.H
        total = 0
        for layer in range(self.layers):
            inputs = self.inputs if layer == 0 else directions * features
            total += directions * (4 * self.H * (inputs + features) + self.P * self.H)
        return total

    def flops(self, rows: int, mode: str) -> float:
        """Of the products over ``rows`` rows, each multiply-add two; a backward pass is two forward passes more."""
        return 2.0 * rows * self.weights() * (3 if mode == "forward+backward" else 1)

    def bytes(self, rows: int, mode: str) -> int:
        """What any implementation has to read or write: input, output and weights once; a backward pass
        reads them again and writes their gradients."""
        features = (2 if self.bidirectional else 1) * (self.P or self.H)
        size = {"float64": 8, "float32": 4}.get(self.dtype, 2)
        return size * (rows * (self.inputs + features) + self.weights()) * (3 if mode == "forward+backward" else 1)

    def label(self) -> str:
        """What sets it apart, in words."""
        parts = [f"T{self.T} B{self.B} H{self.H}"]
        parts += [f"I{self.I}"] * (self.I > 0) + [f"P{self.P}"] * (self.P > 0)
        parts += [f"{self.layers} layers"] * (self.layers > 1)
        parts += [name for name in ("bidirectional", "packed", "cell") if getattr(self, name)]
        return " ".join([*parts, self.dtype] + ["last states"] * self.last)


Grid = dict[str, list[Case]]  # groups by name; reports give each group a line


def _cases(steps: Iterable[int], batches: Iterable[int], hidden: Iterable[int]) -> list[Case]:
    return [Case(*shape) for shape in product(steps, batches, hidden)]


_HIDDEN = (64, 128, 256, 512, 1024)
_SHAPES = _cases((25, 128), (8, 64), (128, 256, 512))

GRIDS: dict[str, Grid] = {
    "quick": {
        "dense": _cases((32,), (1, 16), (64, 256)),
        "packed": [Case(32, 16, 128, packed=True)],
        "one step": [Case(1, 1, 128), Case(1, 1, 128, cell=True)],
    },
    "cpu": {
        **{f"fp32, B = {B}": _cases((25, 128), (B,), _HIDDEN) for B in (1, 8, 32, 128)},
        "fp32, B = 64, H = 512": _cases((25, 128), (64,), (512,)),
        "fp32, B = 1, T = 1..64": _cases((1, 4, 16, 64), (1,), _HIDDEN),
        "fp32, packed": [case._replace(packed=True) for case in _SHAPES],
        "fp32, projected to H / 2": [case._replace(P=case.H // 2) for case in _SHAPES],
        "bf16": [case._replace(dtype="bfloat16") for case in _SHAPES],
    },
    "tune": {
        "layer": [*_cases((1, 32), (1, 16, 64), (64, 256, 1024)), Case(256, 16, 256)],
        "bf16": [case._replace(dtype="bfloat16") for case in _cases((1, 32), (1, 16, 64), (64, 256, 1024))],
        "cell": [case._replace(cell=True) for case in _cases((1,), (1, 16, 64), (64, 256, 1024))],
        "packed": [case._replace(packed=True) for case in _cases((32,), (16, 64), (64, 256))],
        "projected": [case._replace(P=case.H // 2) for case in _cases((32,), (1, 16), (64, 256))],
    },
    "tune-gpu": {
        **{
            name: [case._replace(dtype=dtype) for case in _cases((256,), (2, 16, 64, 128), (256, 512, 768, 1024))]
            for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16"), ("fp32", "float32"))
        },
        "packed": [Case(256, B, H, packed=True, dtype="bfloat16") for B in (16, 64) for H in (256, 512, 1024)],
    },
    "flashrnn": {
        "H = 768, T = 1024": _cases((1024,), (2, 4, 8, 16, 32, 64, 128, 256), (768,)),
        "H = 768, B = 16": _cases((256, 512, 2048), (16,), (768,)),
    },
    "deepbench": {
        "training, T = 25": _cases((25,), (16, 32, 64, 128), (512, 1024, 2048, 4096)),
        "training, T = 50": _cases((50,), (8, 16, 32), (1536,)),
        "training, T = 150": _cases((150,), (16, 32, 64), (256,)),
        "inference, small batches": _cases((25,), (1, 2, 4), (512, 1536)),
    },
    "haste": {"T = 50": _cases((50,), (1, 4, 16, 32, 64, 128), (128, 256, 512, 1024, 2048, 4096))},
    "cells": {
        "LSTM, one step": _cases((1,), (1, 16, 128), _HIDDEN),
        "LSTMCell": [case._replace(cell=True) for case in _cases((1,), (1, 16, 128), _HIDDEN)],
    },
    "packed": {
        "one direction": [case._replace(packed=True) for case in _SHAPES],
        "both directions": [case._replace(packed=True, bidirectional=True) for case in _SHAPES],
    },
    "small": {
        "H inputs": _cases((32,), (1, 32, 256), (8, 16, 32, 50, 100)),
        "one input": [case._replace(I=1) for case in _cases((32,), (1, 32, 256), (8, 16, 32, 50, 100))],
    },
    "classifier": {
        "fp32, last states": [case._replace(last=True) for case in _cases((128, 512), (8, 32), (64, 128, 256))],
    },
    "layers": {
        "two layers": [case._replace(layers=2) for case in _SHAPES],
        "two layers, both directions": [case._replace(layers=2, bidirectional=True) for case in _SHAPES],
        "H = 160 and 192": _cases((128,), (40, 64), (160, 192)),
    },
}
