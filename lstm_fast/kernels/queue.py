"""Where work for a tensor's device goes: what each launch asks, and torch.cuda's own ways spend operators' time on."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

_NOTHING = nullcontext()


def on_device_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """Makes the tensor's GPU the thread's, as the extension's runtime does, and puts the former back."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(tensor.get_device())


def stream_of(tensor: Tensor) -> int:
    """The current stream of the tensor's GPU, as an address; 0 on a CPU."""
    return int(torch._C._cuda_getCurrentRawStream(tensor.get_device())) if tensor.is_cuda else 0
