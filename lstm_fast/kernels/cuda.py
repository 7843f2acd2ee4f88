"""The CUDA C++ gate kernel in the stepwise recurrence (csrc/gates.h is its contract)."""

from __future__ import annotations

from contextlib import suppress
from functools import cache, partial

import torch
from torch import Tensor

from lstm_fast.kernels import cpu, dtype_name, hoisted, stepwise
from lstm_fast.kernels.queue import stream_of

with suppress(ImportError):  # cpu.unavailable says so
    from lstm_fast import _C


@cache
def unavailable() -> str | None:
    """None where this process can run the kernel, else what is missing."""
    if cpu.unavailable() is not None:
        return cpu.unavailable()
    if not _C.build_info()["cuda"]:
        return "lstm_fast._C was built without CUDA (nvcc was not found, or LSTM_FAST_CUDA=0)"
    if torch.version.cuda is None:
        return f"this torch, {torch.__version__}, has no CUDA"
    if not torch.cuda.is_available():
        return "torch finds no NVIDIA GPU or driver"
    return None


def refuses(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None if the kernel serves tensors of this device and dtype, else why not."""
    if device.type != "cuda":
        return f"it serves tensors on a CUDA GPU, not on {device.type}"
    if dtype_name(dtype) not in _C.DTYPES:
        return f"it serves {', '.join(_C.DTYPES)}, not {dtype_name(dtype)}"
    return _lacks_code(torch.cuda.get_device_capability(device))


def bind_forward(
    gates: Tensor, product: Tensor, c: Tensor, h: Tensor, y: Tensor, cells: Tensor | None, /
) -> _C.ForwardGates:
    """F1-F6, ready for each step; on CPU tensors the kernel's body runs on the host, which tests use."""
    return _C.gates_forward(
        gates=gates.data_ptr(),
        product=product.data_ptr(),
        c=c.data_ptr(),
        h=h.data_ptr(),
        y=y.data_ptr(),
        cells=0 if cells is None else cells.data_ptr(),
        sizes=_sizes(gates, c),
        dtype=_C.DTYPES[dtype_name(gates.dtype)],
        device=gates.device.index if gates.is_cuda else None,
        stream=stream_of(gates),
    )


def bind_backward(
    gates: Tensor, cells: Tensor, c0: Tensor, dy: Tensor | None, dh: Tensor, dc: Tensor, dgates: Tensor, /
) -> _C.BackwardGates:
    """B1-B6, ready for each step; on CPU tensors the kernel's body runs on the host, which tests use."""
    return _C.gates_backward(
        gates=gates.data_ptr(),
        cells=cells.data_ptr(),
        c0=c0.data_ptr(),
        dy=0 if dy is None else dy.data_ptr(),
        dh=dh.data_ptr(),
        dc=dc.data_ptr(),
        dgates=dgates.data_ptr(),
        sizes=_sizes(gates, dc),
        dtype=_C.DTYPES[dtype_name(gates.dtype)],
        device=gates.device.index if gates.is_cuda else None,
        stream=stream_of(gates),
    )


recurrence_forward = partial(stepwise.recurrence_forward, bind_forward)
recurrence_backward = partial(stepwise.recurrence_backward, bind_backward)
layer_forward = partial(hoisted.layer_forward, recurrence_forward)
layer_backward = partial(hoisted.layer_backward, recurrence_backward)


@cache
def _lacks_code(capability: tuple[int, int]) -> str | None:
    """Why this build has no code for a GPU of this compute capability; None if it has."""
    oldest = min(int(arch.rstrip("af")) for arch in _C.build_info()["cuda_archs"])
    major, minor = capability
    if 10 * major + minor < oldest:
        return f"it was built for compute capability {oldest / 10} and newer, and the GPU has {major}.{minor}"
    return None


def _sizes(gates: Tensor, state: Tensor) -> tuple[int, int, int, int]:
    """N, B, H, D."""
    directions, batch, hidden = state.shape
    return gates.size(1), batch, hidden, directions
