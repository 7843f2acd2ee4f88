"""Rows of packed sequences on their device: where steps start, and what each row's sequence had a step before."""

from __future__ import annotations

from contextlib import suppress
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lstm_fast import reference

_C: Any = None
with suppress(ImportError):  # cuda.unavailable says so
    from lstm_fast import _C


def starts(steps: list[int], device: torch.device) -> Tensor:
    """The first row of each step, and the number of rows: int32 [T + 1] on the device.

    To a GPU as kernel arguments: nothing waits, and a CUDA graph holds the values, not a pointer to the host's memory.
    """
    values = [0, *accumulate(steps)]
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int32)
    found = torch.empty(len(values), dtype=torch.int32, device=device)
    with torch.cuda.device(device):  # the extension's runtime changes the thread's device
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.upload(values=values, to=found.data_ptr(), device=found.device.index, stream=stream)
    return found


def previous(y: Tensor, initial: Tensor, steps: list[int], reverse: bool) -> Tensor:
    """``reference.previous``; on a GPU where the extension has CUDA in one launch, however many steps there are."""
    if not y.is_cuda or _C is None or not _C.build_info()["cuda"]:
        return reference.previous(y, initial, steps, reverse)
    before = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    first, size = starts(steps, y.device), y.element_size()
    with torch.cuda.device(y.device):
        _C.previous(
            y=y.data_ptr(),
            initial=initial.data_ptr(),
            starts=first.data_ptr(),
            before=before.data_ptr(),
            rows=y.size(0),
            steps=len(steps),
            width=size * y.size(1),
            stride=size * y.stride(0),
            reverse=reverse,
            device=y.device.index,
            stream=torch.cuda.current_stream(y.device).cuda_stream,
        )
    return before
