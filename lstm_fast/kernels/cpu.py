"""The C++ recurrence on a CPU: all steps and directions in one call (csrc/cpu/recurrence.h is its contract)."""

from __future__ import annotations

import torch
from torch import Tensor

_problem: str | None = None
try:
    import lstm_fast._C as _C
except ImportError as error:
    _problem = f"the compiled extension lstm_fast._C can't be loaded: {error}"


def unavailable() -> str | None:
    """None where this process can run the kernel, else what is missing."""
    return _problem


def refuses(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None if the kernel serves tensors of this device and dtype, else why not."""
    if device.type != "cpu":
        return f"it serves tensors on the CPU, not on {device.type}"
    if _name(dtype) not in _C.DTYPES:
        return f"it serves {', '.join(_C.DTYPES)}, not {_name(dtype)}"
    return None


def recurrence_forward(
    gates: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: list[Tensor],
    steps: list[int],
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
) -> None:
    """All steps of all D directions, F1 to F6; every tensor contiguous, shapes in csrc/cpu/recurrence.h."""
    _C.cpu_recurrence_forward(
        gates=gates.data_ptr(),
        h0=h0.data_ptr(),
        c0=c0.data_ptr(),
        w_hh=[w.data_ptr() for w in w_hh],
        steps=steps,
        y=y.data_ptr(),
        h_n=h_n.data_ptr(),
        c_n=c_n.data_ptr(),
        cells=0 if cells is None else cells.data_ptr(),
        hidden=c0.size(2),
        dtype=_C.DTYPES[_name(gates.dtype)],
        threads=torch.get_num_threads(),
        instruction_set=len(_C.CPU_INSTRUCTION_SETS) - 1,
    )


def recurrence_backward(
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: list[Tensor],
    steps: list[int],
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    dgates: Tensor,
) -> None:
    """B1 to B7 over all steps; ``dh`` and ``dc`` [D, B, H] become the gradients of h0 and c0 in place."""
    _C.cpu_recurrence_backward(
        gates=gates.data_ptr(),
        cells=cells.data_ptr(),
        c0=c0.data_ptr(),
        w_hh=[w.data_ptr() for w in w_hh],
        steps=steps,
        dy=0 if dy is None else dy.data_ptr(),
        dh=dh.data_ptr(),
        dc=dc.data_ptr(),
        dgates=dgates.data_ptr(),
        hidden=c0.size(2),
        dtype=_C.DTYPES[_name(gates.dtype)],
        threads=torch.get_num_threads(),
        instruction_set=len(_C.CPU_INSTRUCTION_SETS) - 1,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
