"""A whole layer on a CPU in one C++ call forward and one backward (csrc/cpu/layer.h is its contract)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lstm_fast.kernels import LayerInputs, Saved, dtype_name

_problem: str | None = None
_CODES: dict[torch.dtype, int] = {}  # of the dtypes it serves
try:
    import lstm_fast._C as _C

    _CODES = {getattr(torch, name): code for name, code in _C.DTYPES.items()}
except ImportError as error:
    _problem = f"lstm_fast._C can't be loaded: {error}; `pip install .` in the source of lstm_fast builds it"


def infer(module: nn.Module, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
    """An LSTM's or an LSTMCell's results; None where a quick look can't tell that all fit."""
    return None if _problem is not None else _C.infer(module.__dict__, x, hx, batch_sizes, *_means())


def train(module: nn.Module, layer: int, x: Tensor, hx: Any, batch_sizes: Tensor | None) -> Any:
    """The 13 inputs of one of its layers, and y, h_n (None of a cell), c_n, gates and cells; None likewise."""
    return None if _problem is not None else _C.train(module.__dict__, layer, x, hx, batch_sizes, *_means())


def train_backward(
    saved: tuple[Any, ...], grads: tuple[Tensor | None, ...], needs: tuple[bool, ...]
) -> tuple[Tensor | None, ...] | None:
    """The gradients of a layer's or a cell's 13 inputs from those, batch_sizes, y, gates and cells, None for the rest
    that ``needs`` speaks of; None likewise."""
    return _C.train_backward(saved, grads, needs, *_means())


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
    y, h_n, c_n, gates, cells = _C.cpu_layer_forward(inputs, _sizes(inputs), save)
    return y, h_n, c_n, (gates, cells) if save else None


def layer_backward(
    inputs: LayerInputs, y: Tensor, saved: Saved, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    """B1 to B8 over all steps; lstm_fast/kernels/__init__.py states what each tensor is."""
    found: list[Tensor | None] = _C.cpu_layer_backward(inputs, _sizes(inputs), y, *saved, grads, needs)
    return found


def _sizes(inputs: LayerInputs) -> tuple[int, int, int, int, int, int]:
    """I, H, R, the dtype's code, threads, and the best instruction set."""
    x, h0, c0, _, _ = inputs
    assert h0 is not None and c0 is not None
    return x.size(-1), c0.size(2), h0.size(2), _CODES[x.dtype], *_means()


def _means() -> tuple[int, int]:
    """Threads, and the best instruction set."""
    return torch.get_num_threads(), len(_C.CPU_INSTRUCTION_SETS) - 1
