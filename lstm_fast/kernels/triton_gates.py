"""The Triton gate kernel in the stepwise recurrence.

It runs on a GPU; under TRITON_INTERPRET=1, set before the first use, it runs on CPU tensors instead, slowly, for tests.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import cache, partial
from types import ModuleType

import torch
from torch import Tensor

from lstm_fast.kernels import dtype_name, hoisted, stepwise

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_UNITS = (32, 256)  # fewest and most of one program


@cache
def unavailable() -> str | None:
    """None where this process can run the kernel, else what is missing."""
    if not _interpreted() and not torch.cuda.is_available():
        return "torch finds no GPU or driver, and TRITON_INTERPRET=1 is not set"
    try:
        _kernels()
    except ImportError as error:
        return f"triton can't be loaded: {error}"
    return None


def refuses(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None if the kernel serves tensors of this device and dtype, else why not."""
    served = "cpu" if _interpreted() else "cuda"
    if device.type != served:
        under = "with TRITON_INTERPRET=1" if _interpreted() else "without TRITON_INTERPRET=1"
        return f"{under} it serves tensors on {served}, not on {device.type}"
    if dtype not in DTYPES:
        return f"it serves {', '.join(map(dtype_name, DTYPES))}, not {dtype_name(dtype)}"
    return None


def bind_forward(
    gates: Tensor, product: Tensor, c: Tensor, h: Tensor, y: Tensor, cells: Tensor | None, /
) -> Callable[[int, int, int], None]:
    """F1-F6, ready for each step."""
    kernel = _kernels().forward
    directions, batch, hidden = c.shape
    block, blocks, warps = _tiling(hidden, gates.element_size())

    def step(direction: int, first: int, rows: int) -> None:
        sizes = (gates.size(1), batch, hidden, directions)
        kernel[rows, blocks](gates, product, c, h, y, cells, *sizes, direction, first, BLOCK=block, num_warps=warps)

    return step


def bind_backward(
    gates: Tensor, cells: Tensor, c0: Tensor, dy: Tensor | None, dh: Tensor, dc: Tensor, dgates: Tensor, /
) -> Callable[[int, int, int, int, int], None]:
    """B1-B6, ready for each step."""
    kernel = _kernels().backward
    directions, batch, hidden = dc.shape
    block, blocks, warps = _tiling(hidden, gates.element_size())

    def step(direction: int, first: int, rows: int, previous_first: int, previous_rows: int) -> None:
        sizes = (gates.size(1), batch, hidden, directions)
        place = (direction, first, previous_first, previous_rows)
        kernel[rows, blocks](gates, cells, c0, dy, dh, dc, dgates, *sizes, *place, BLOCK=block, num_warps=warps)

    return step


recurrence_forward = partial(stepwise.recurrence_forward, bind_forward)
recurrence_backward = partial(stepwise.recurrence_backward, bind_backward)
layer_forward = partial(hoisted.layer_forward, recurrence_forward)
layer_backward = partial(hoisted.layer_backward, recurrence_backward)


def _tiling(hidden: int, element_size: int) -> tuple[int, int, int]:
    """Units of a program, programs of a sequence, and warps: as many as give each thread 16 bytes of T."""
    units = min(max(_UNITS[0], 1 << (hidden - 1).bit_length()), _UNITS[1])
    return units, -(-hidden // units), max(1, units * element_size // (16 * 32))


@cache
def _kernels() -> ModuleType:
    return importlib.import_module("lstm_fast.kernels.triton_kernels")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"
