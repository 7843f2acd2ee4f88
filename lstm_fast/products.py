"""The matrix products over all steps, by the fastest library at hand.

fp32 on a CPU goes through oneDNN where a product is large enough to pay for the call: MKL, which torch.mm takes, does
not use AVX-512 on processors of other makers than its own. Everything else is torch.mm; on a GPU, fp32 products may use
TF32 where torch lets an nn.LSTM use it (``rnn_precision``).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

_WORTH_ONEDNN = 4e6  # flops; below, the call costs more than it saves
_SUM_ROWS = 128  # oneDNN adds up in one go: longer sums would lose digits that torch.mm keeps


@functools.cache
def _onednn() -> Callable[..., Any] | None:
    """x w^T + b by oneDNN, or None where this build of torch has none."""
    try:
        product: Callable[..., Any] = torch.ops.mkldnn._linear_pointwise.default
        product(torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4), "none", [], "")
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return None
    return product


def rnn_tf32() -> bool:
    """Whether torch lets cuDNN's recurrent layers multiply fp32 as TF32: on, unless the user said otherwise."""
    precision = getattr(torch.backends.cudnn.rnn, "fp32_precision", None)  # torch 2.9 and later
    return bool(torch.backends.cudnn.allow_tf32) if precision is None else precision == "tf32"


@contextmanager
def rnn_precision(x: Tensor) -> Iterator[None]:
    """Matrix products of x's device and dtype follow what torch allows nn.LSTM, not what it allows torch.mm."""
    if not x.is_cuda or x.dtype != torch.float32:
        yield
        return
    matmul = torch.backends.cuda.matmul
    newer = hasattr(matmul, "fp32_precision")
    name = "fp32_precision" if newer else "allow_tf32"
    before = getattr(matmul, name)
    setattr(matmul, name, ("ieee", "tf32")[rnn_tf32()] if newer else rnn_tf32())
    try:
        yield
    finally:
        setattr(matmul, name, before)


def linear(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    """x [M, K] times w [N, K] transposed, plus b [N]: [M, N]; any strides."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and 2.0 * x.numel() * w.size(0) >= _WORTH_ONEDNN:
        onednn = _onednn()
        if onednn is not None:
            result: Tensor = onednn(x, w, b, "none", [], "")
            return result
    return torch.mm(x, w.t()) if b is None else torch.addmm(b, x, w.t())


def sum_of_outer(a: Tensor, b: Tensor) -> Tensor:
    """The sum over rows n of a[n]^T b[n], for a [N, K] and b [N, M]: [K, M]."""
    if a.dtype != torch.float32 or a.device.type != "cpu" or a.size(0) <= _SUM_ROWS:
        return linear(a.t(), b.t())
    total = linear(a[:_SUM_ROWS].t(), b[:_SUM_ROWS].t())
    for first in range(_SUM_ROWS, a.size(0), _SUM_ROWS):
        rows = slice(first, first + _SUM_ROWS)
        total += linear(a[rows].t(), b[rows].t())
    return total
