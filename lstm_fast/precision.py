"""How exactly fp32 is multiplied on a GPU: TF32 where torch lets an nn.LSTM use it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def rnn_tf32() -> bool:
    """Whether torch lets cuDNN's recurrent layers multiply fp32 as TF32: on, unless the user said otherwise."""
    cudnn = torch.backends.cudnn
    if not hasattr(cudnn, "rnn"):  # before torch 2.9
        return bool(cudnn.allow_tf32)
    return bool(cudnn.rnn.fp32_precision == "tf32")  # type: ignore[attr-defined]


@contextmanager
def rnn_precision(x: Tensor) -> Iterator[None]:
    """Matrix products of x's device and dtype follow what torch allows nn.LSTM, not what it allows torch.mm."""
    if not x.is_cuda or x.dtype != torch.float32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")
    name = "fp32_precision" if newer else "allow_tf32"
    before, wanted = getattr(matmul, name), ("ieee", "tf32")[rnn_tf32()] if newer else rnn_tf32()
    if before == wanted:  # may be inherited from a setting for all of torch, which must go on to reach it
        yield
        return
    setattr(matmul, name, wanted)
    try:
        yield
    finally:
        setattr(matmul, name, before)
