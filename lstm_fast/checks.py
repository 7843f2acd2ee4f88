"""What a layer's 13 inputs are (lstm_fast/autograd.py has their order) and what is saved of a call: all checks that
they fit each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lstm_fast.kernels import Weights
from lstm_fast.reference import accumulate_dtype

OF_DIRECTION = 5  # w_ih, w_hh, b_ih, b_hh, w_hr
STATES = 3  # x, h0, c0
INPUTS = STATES + 2 * OF_DIRECTION
_NAMES = ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")


def directions_of(inputs: Sequence[Any]) -> list[Weights]:
    """Each direction's weights; the second has none where there is one."""
    directions = [tuple(inputs[first : first + OF_DIRECTION]) for first in (STATES, STATES + OF_DIRECTION)]
    return directions if directions[1][0] is not None else directions[:1]


def batch_of(x: Tensor, batch_sizes: Tensor | None) -> int:
    """B where there are no states to tell."""
    if batch_sizes is None:
        return x.size(-2)
    _check_kind(batch_sizes)
    return int(batch_sizes[0]) if batch_sizes.numel() > 0 else 0


def check_inputs(inputs: Sequence[Tensor | None]) -> None:
    """That a layer's inputs or a cell's, states too, fit each other; RuntimeError if not, in torch.nn.LSTM's words."""
    x, h0, c0 = inputs[0], inputs[1], inputs[2]
    assert x is not None and h0 is not None and c0 is not None
    directions, hidden = 1 if c0.dim() == 2 else c0.size(0), c0.size(-1)
    if h0.shape[:-1] != c0.shape[:-1]:
        raise RuntimeError(f"h_0 and c_0 should agree in their first two sizes, got {[*h0.shape]} and {[*c0.shape]}")
    for b_ih, b_hh in zip(inputs[STATES + 2 :: OF_DIRECTION], inputs[STATES + 3 :: OF_DIRECTION], strict=True):
        if (b_ih is None) != (b_hh is None):
            raise RuntimeError("bias_ih and bias_hh should both be given, or neither")
    dtype, device, gates, projected = x.dtype, x.device, 4 * hidden, h0.size(-1)
    for name, state in (("hidden", h0), ("cell", c0)):
        if state.dtype != dtype or state.device != device:
            raise _wrong_kind(name, state, x)
    shapes = ((gates, x.size(-1)), (gates, projected), (gates,), (gates,), (projected, hidden))
    for index, weight in enumerate(inputs[STATES : STATES + directions * OF_DIRECTION]):
        if weight is None:
            if index % OF_DIRECTION < 2:
                name, direction = _NAMES[index % OF_DIRECTION], index // OF_DIRECTION
                raise RuntimeError(f"{name} of direction {direction} of {directions} should be given, got None")
            if index % OF_DIRECTION == OF_DIRECTION - 1 and projected != hidden:
                raise RuntimeError(
                    f"weight_hr should be given where h_0 has {projected} features, not {hidden}, got None"
                )
            continue
        if weight.shape != shapes[index % OF_DIRECTION]:
            name, shape = _NAMES[index % OF_DIRECTION], shapes[index % OF_DIRECTION]
            raise RuntimeError(f"{name} should have size {[*shape]}, got {[*weight.shape]}")
        if weight.dtype != dtype or weight.device != device:
            raise _wrong_kind("parameter", weight, x)


def _wrong_kind(name: str, tensor: Tensor, x: Tensor) -> RuntimeError:
    if tensor.device != x.device:
        return RuntimeError(
            f"Input and {name} tensors are not at the same device, "
            f"found input tensor at {x.device} and {name} tensor at {tensor.device}"
        )
    return RuntimeError(
        f"Input and {name} tensors are not of the same dtype, "
        f"found input tensor of {x.dtype} and {name} tensor of {tensor.dtype}"
    )


def _check_kind(batch_sizes: Tensor) -> None:
    if batch_sizes.dtype != torch.int64 or batch_sizes.device.type != "cpu" or batch_sizes.dim() != 1:
        raise RuntimeError(
            "batch_sizes should be a 1-D int64 tensor on the CPU, "
            f"got {batch_sizes.dim()}-D {batch_sizes.dtype} on {batch_sizes.device}"
        )


def steps_of(batch_sizes: Tensor | None, x: Tensor, c0: Tensor | None) -> list[int]:
    """Active sequences of each step; [] for an empty batch."""
    rows = x.shape[:-1].numel()
    batch = batch_of(x, batch_sizes) if c0 is None else c0.size(-2)
    if batch_sizes is None:
        return [batch] * (rows // batch) if batch > 0 else []
    _check_kind(batch_sizes)
    steps: list[int] = batch_sizes.tolist()
    if not steps or steps[0] != batch or steps[-1] < 1 or any(a < b for a, b in pairwise(steps)):
        raise RuntimeError(f"batch_sizes should start at {batch}, never grow and stay above 0, got {steps}")
    if sum(steps) != rows:
        raise RuntimeError(f"batch_sizes should sum to the {rows} rows of data, got a sum of {sum(steps)}")
    return steps


def plain(tensor: Tensor) -> Tensor:
    """The same, elements one behind the other and as they are: neither negated nor zeros that torch doesn't store.
    RuntimeError if their memory was given back."""
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    tensor = tensor.resolve_neg().contiguous()
    if tensor.data_ptr() == 0 and tensor.numel() > 0 and not tensor.is_meta:
        raise RuntimeError(
            f"a tensor of size {[*tensor.shape]} has no memory: its storage was resized to 0 before its use"
        )
    return tensor


def saved_shapes(
    backend: str, x: Tensor, weights: Sequence[Weights], rows: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of y, activated gates and cells."""
    directions, hidden, features = len(weights), weights[0][0].size(0) // 4, weights[0][1].size(1)  # w_hh [4H, R]
    apart = backend != "persistent"
    gates = (directions, rows, 4 * hidden) if apart else (rows, directions * 4 * hidden)
    return (*x.shape[:-1], directions * features), gates, (directions, rows, hidden)


def check_saved(
    backend: str, x: Tensor, weights: Sequence[Weights], y: Tensor, gates: Tensor, cells: Tensor
) -> list[Tensor]:
    """y, gates and cells for a kernel, if they are what was saved: who kept them may have changed them."""
    rows = x.shape[:-1].numel()
    shapes = saved_shapes(backend, x, weights, rows)
    if y.shape != shapes[0]:
        sizes = f"{[*x.shape]} and {[*y.shape]}"
        raise RuntimeError(f"input and output should have kept their sizes until the backward pass, got {sizes}")
    dtypes = (x.dtype, x.dtype, accumulate_dtype(x.dtype))
    for name, t, shape, dtype in zip(("output", "gates", "cells"), (y, gates, cells), shapes, dtypes, strict=True):
        if (t.shape, t.dtype, t.device) != (shape, dtype, x.device):
            raise RuntimeError(
                f"what was saved as {name} should come back as {dtype} {[*shape]} on {x.device}, "
                f"got {t.dtype} {[*t.shape]} on {t.device}"
            )
    return [plain(t) for t in (y, gates, cells)]


def output_from(backend: str, y: Tensor, weights: Sequence[Weights], gates: Tensor, cells: Tensor) -> Tensor:
    """y as it was, from what else is saved (F6, and the projection), where somebody has changed it since."""
    directions, rows, hidden = cells.shape
    if backend == "persistent":  # [N, D, H, 4]
        o = gates.reshape(rows, directions, hidden, 4)[..., 3].transpose(0, 1)
    else:
        o = gates.reshape(directions, rows, 4, hidden)[:, :, 3]
    m = (o.to(cells.dtype) * cells.tanh()).to(y.dtype)
    h = [own if w_hr is None else own @ w_hr.t() for own, (*_, w_hr) in zip(m, weights, strict=True)]
    return torch.cat(h, dim=-1).view_as(y)
