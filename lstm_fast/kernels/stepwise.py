"""The recurrence as one library GEMM and one gate kernel a step, for any shape; the CUDA and Triton backends are this.

Work is queued on the tensors' device and its current stream; nothing waits for it, and every copy stays on the device,
so that a CUDA graph can capture a call. lstm_fast/kernels/__init__.py states what each tensor is; Acc is float64 for
float64 and float32 for the others.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from lstm_fast.kernels.queue import on_device_of
from lstm_fast.reference import accumulate_dtype


class BindForward(Protocol):
    """A backend's forward gate kernel, F1-F6, with all but the step bound.

    ``product`` [B, 4H] Acc: the step's h' W_hh^T. ``c`` [D, B, H] Acc and ``h`` [D, B, H] T: the state, in place.
    ``gates``, ``y``, ``cells``: those of ``recurrence_forward``. The kernel is then called with (direction, first row,
    rows), and writes only those rows. It may hold addresses alone: its caller keeps the tensors alive.
    """

    def __call__(
        self, gates: Tensor, product: Tensor, c: Tensor, h: Tensor, y: Tensor, cells: Tensor | None, /
    ) -> Callable[[int, int, int], None]: ...


class BindBackward(Protocol):
    """A backend's backward gate kernel, B1-B6, with all but the step bound.

    The tensors are those of ``recurrence_backward``; ``dh`` and ``dc`` [D, B, H] Acc: the gradients of h without dy,
    and of c, in place. The kernel is then called with (direction, first row, rows, previous first row, previous rows):
    sequences below ``previous rows`` have their c' in ``cells`` at the walk's previous step, the others start here,
    from ``c0``. It may hold addresses alone: its caller keeps the tensors alive.
    """

    def __call__(
        self, gates: Tensor, cells: Tensor, c0: Tensor, dy: Tensor | None, dh: Tensor, dc: Tensor, dgates: Tensor, /
    ) -> Callable[[int, int, int, int, int], None]: ...


def _walk(steps: list[int], reverse: bool) -> list[tuple[int, int]]:
    """(first row, active sequences) of each step, in the order in which the direction visits them."""
    rows, start = [], 0
    for n in steps:
        rows.append((start, n))
        start += n
    return rows[::-1] if reverse else rows


def recurrence_forward(
    bind: BindForward,
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
    """F1-F6 over all steps. A sequence that ended keeps its state, and one that has yet to join has its initial one."""
    with on_device_of(gates):
        h_n.copy_(h0)
        c = c0.to(accumulate_dtype(c0.dtype), copy=True)
        product = c.new_empty(c.size(1), gates.size(2))
        kernel = bind(gates, product, c, h_n, y, cells)
        for d, w in enumerate(w_hh):
            multiply = _multiply(w.t(), product.dtype)
            operands = {rows: (h_n[d, :rows], product[:rows]) for rows in set(steps)}
            for first, rows in _walk(steps, reverse=d == 1):
                multiply(*operands[rows])
                kernel(d, first, rows)
        c_n.copy_(c)


def recurrence_backward(
    bind: BindBackward,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: list[Tensor],
    steps: list[int],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
) -> None:
    """B1-B7 over all steps."""
    with on_device_of(gates):
        dh, dc = _initial(dh_n, c0), _initial(dc_n, c0)
        kernel = bind(gates, cells, c0, dy, dh, dc, dgates)
        for d, w in enumerate(w_hh):
            multiply = _multiply(w, dh.dtype)
            order = _walk(steps, reverse=d == 1)
            previous = [(0, 0), *order[:-1]]
            for (first, rows), before in zip(order[::-1], previous[::-1], strict=True):
                kernel(d, first, rows, *before)
                multiply(dgates[d, first : first + rows], dh[d, :rows])  # B7
        for to, found in ((dh0, dh), (dc0, dc)):
            if to is not None:
                to.copy_(found)


def _initial(grad: Tensor | None, state: Tensor) -> Tensor:
    """A state's gradient in Acc as the walk back begins with it and overwrites it."""
    acc = accumulate_dtype(state.dtype)
    return torch.zeros_like(state, dtype=acc) if grad is None else grad.to(acc, copy=True)


def _multiply(w: Tensor, acc: torch.dtype) -> Callable[[Tensor, Tensor], Tensor]:
    """out [rows, n] Acc = a [rows, k] T times w [k, n] T, called with a and out."""
    if w.dtype == acc:
        return lambda a, out: torch.mm(a, w, out=out)
    if w.is_cuda:
        return lambda a, out: torch.mm(a, w, out_dtype=acc, out=out)
    wide = w.to(acc)  # elsewhere torch has no GEMM from T to Acc
    return lambda a, out: torch.mm(a.to(acc), wide, out=out)
