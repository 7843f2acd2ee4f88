"""A whole layer on a CPU in one C++ call forward and one backward (csrc/cpu/layer.h is its contract)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lstm_fast.kernels import Gradients, LayerInputs, Saved, dtype_name
from lstm_fast.reference import accumulate_dtype


def _cannot_tell(*_: Any) -> None:
    """What ``infer`` gives where the extension is missing."""


infer: Callable[..., Any] = _cannot_tell  # csrc/inference.h
_problem: str | None = None
_CODES: dict[torch.dtype, int] = {}  # of the dtypes it serves
try:
    import lstm_fast._C as _C

    _CODES = {getattr(torch, name): code for name, code in _C.DTYPES.items()}
    infer = _C.infer
except ImportError as error:
    _problem = f"the compiled extension lstm_fast._C can't be loaded: {error}"


def unavailable() -> str | None:
    """None where this process can run the kernel, else what is missing."""
    return _problem


def refuses(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None if the kernel serves tensors of this device and dtype, else why not."""
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if dtype not in _CODES:
        return f"it serves {', '.join(_C.DTYPES)}, not {dtype_name(dtype)}"
    return None


def layer_forward(inputs: LayerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """F1 to F6 over all steps; lstm_fast/kernels/__init__.py states what each tensor is."""
    x, h0, c0, weights, steps = inputs
    rows, (directions, _, hidden) = x.size(0), c0.shape
    y = x.new_empty(rows, directions * h0.size(2))
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    if not save:
        _C.cpu_layer_forward(steps, _sizes(x, h0, hidden), weights, (x, h0, c0, y, h_n, c_n, None, None))
        return y, h_n, c_n, None
    gates = x.new_empty(directions, rows, 4 * hidden)
    cells = x.new_empty(directions, rows, hidden, dtype=accumulate_dtype(x.dtype))
    _C.cpu_layer_forward(steps, _sizes(x, h0, hidden), weights, (x, h0, c0, y, h_n, c_n, gates, cells))
    return y, h_n, c_n, (gates, cells)


def layer_backward(
    inputs: LayerInputs,
    y: Tensor,
    saved: Saved,
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    needs_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[Gradients]]:
    """B1 to B8 over all steps; lstm_fast/kernels/__init__.py states what each tensor is."""
    x, h0, c0, weights, steps = inputs
    dx = torch.empty_like(x) if needs_x else None
    gradients: list[Gradients] = []
    for (w_ih, w_hh, _, _, w_hr), need in zip(weights, needs, strict=True):
        dw_ih = torch.empty_like(w_ih) if need[0] else None
        dw_hh = torch.empty_like(w_hh) if need[1] else None
        db = x.new_empty(w_hh.size(0)) if need[2] or need[3] else None
        gradients.append((dw_ih, dw_hh, db, torch.empty_like(w_hr) if need[4] and w_hr is not None else None))
    tensors = (x, h0, c0, y, *saved, dy, dh, dc, dx)
    _C.cpu_layer_backward(steps, _sizes(x, h0, c0.size(2)), weights, gradients, tensors)
    return dx, gradients


def _sizes(x: Tensor, h0: Tensor, hidden: int) -> tuple[int, int, int, int, int, int]:
    """I, H, R, the dtype's code, threads, and the best instruction set."""
    threads, best = torch.get_num_threads(), len(_C.CPU_INSTRUCTION_SETS) - 1
    return x.size(1), hidden, h0.size(2), _CODES[x.dtype], threads, best
