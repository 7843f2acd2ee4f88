"""Rows of all steps on their device: where steps start, what each row's sequence had a step before, their sums."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lstm_fast import reference
from lstm_fast.kernels.queue import on_device_of, stream_of

_C: Any = None
with suppress(ImportError):  # cuda.unavailable says so
    from lstm_fast import _C


@cache
def _built_with_cuda() -> bool:
    return _C is not None and _C.build_info()["cuda"]


def flat(rows: Tensor) -> Tensor:
    """[N, ..] of contiguous [.., ..]."""
    return rows if rows.dim() == 2 else rows.view(-1, rows.size(-1))


def starts(steps: list[int], device: torch.device) -> Tensor:
    """The first row of each step, and the number of rows: int32 [T + 1] on the device.

    To a GPU as kernel arguments: nothing waits, and a CUDA graph holds the values, not a pointer to the host's memory.
    """
    values = [0, *accumulate(steps)]
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int32)
    found = torch.empty(len(values), dtype=torch.int32, device=device)
    with on_device_of(found):
        _C.upload(values=values, to=found.data_ptr(), device=found.get_device(), stream=stream_of(found))
    return found


def previous(y: Tensor, initial: Tensor | None, steps: list[int], reverse: bool) -> Tensor:
    """``reference.previous``, from zeros where ``initial`` is None. On a GPU it is one launch, however many steps."""
    if not (y.is_cuda and _built_with_cuda()):
        initial = y.new_zeros(steps[0], y.size(1)) if initial is None else initial
        return reference.previous(y, initial, steps, reverse)
    before = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    first, size = starts(steps, y.device), y.element_size()
    with on_device_of(y):
        _C.previous(
            y=y.data_ptr(),
            initial=0 if initial is None else initial.data_ptr(),
            starts=first.data_ptr(),
            before=before.data_ptr(),
            rows=y.size(0),
            steps=len(steps),
            width=size * y.size(1),
            stride=size * y.stride(0),
            reverse=reverse,
            device=y.get_device(),
            stream=stream_of(y),
        )
    return before


def interleaved(weights: Sequence[Tensor]) -> Tensor:
    """The gates' rows of matrices [4H, I], one a direction, unit by unit: [D * 4H, I] with row 4 u + k for k H + u."""
    first = weights[0]
    gates, width = first.shape
    if not (first.is_cuda and _built_with_cuda()):
        return torch.cat([w.view(4, gates // 4, width).transpose(0, 1).reshape(gates, width) for w in weights])
    to = first.new_empty(len(weights) * gates, width)
    with on_device_of(first):
        _C.interleave(weights, to, gates // 4, width * to.element_size(), first.get_device(), stream_of(first))
    return to


_KINDS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}  # csrc/cuda/persistent.h, Kind


def sums(rows: Tensor, wanted: bool, again: bool) -> tuple[Tensor | None, Tensor | None]:
    """The sums of ``rows`` [N, W] over N, if wanted, and once more if wanted again.

    In one launch on a GPU: Tensor.sum would take as much memory again as the rows.
    """
    if not (wanted or again):
        return None, None
    if rows.is_cuda and rows.dtype in _KINDS and _built_with_cuda():
        first, second = (rows.new_empty(rows.size(1)) if asked else None for asked in (wanted, again))
        to, copy = (second, None) if first is None else (first, second)
        with on_device_of(rows):
            _C.row_sums(
                rows, rows.size(0), rows.size(1), to, copy, _KINDS[rows.dtype], rows.get_device(), stream_of(rows)
            )
        return first, second
    found = torch.mv(rows.t(), rows.new_ones(rows.size(0)))
    return found if wanted else None, (found.clone() if wanted else found) if again else None
