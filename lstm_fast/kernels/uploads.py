"""Small lists of integers on their way to a device."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from lstm_fast import _C
except ImportError:  # cuda.unavailable says so
    _C = None


def upload(values: list[int], device: torch.device) -> Tensor:
    """int32 [len(values)] on the device. On a GPU as kernel arguments where the extension has CUDA: no wait, and a CUDA
    graph holds the values, not a pointer to memory of the host."""
    if device.type != "cuda" or _C is None or not _C.build_info()["cuda"]:
        return torch.tensor(values, dtype=torch.int32, device=device)
    on_device = torch.empty(len(values), dtype=torch.int32, device=device)
    with torch.cuda.device(device):  # the extension's runtime changes the thread's device
        stream = torch.cuda.current_stream(device).cuda_stream
        _C.upload(values=values, to=on_device.data_ptr(), device=on_device.device.index, stream=stream)
    return on_device
