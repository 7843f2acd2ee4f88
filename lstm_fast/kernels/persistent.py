"""The whole recurrence in one launch, W_hh on chip: in thread-block clusters, or over the grid where none holds it.

csrc/cuda/persistent.h is its contract.

On CPU tensors the kernels' own source runs on the host, one fibre a CUDA thread, which tests use.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lstm_fast.kernels import LayerInputs, Saved, cuda, hoisted, rows
from lstm_fast.kernels.queue import on_device_of, stream_of
from lstm_fast.precision import rnn_precision, rnn_tf32

with suppress(ImportError):  # cuda.unavailable says so
    from lstm_fast import _C

_BFLOAT16, _FLOAT16, _TF32, _FLOAT32 = range(4)
_OLDEST = (8, 0)  # compute capability
# What host runs plan for, about an H100's: clusters of each size that run at once, and blocks of a grid.
_ON_HOST = {2: 66, 4: 32, 8: 16, 16: 7}
_GRID_ON_HOST = 132
_clusters = True  # whether plans may use clusters


class Plan(NamedTuple):
    """How a launch is laid out: csrc/cuda/persistent.h, Plan."""

    cluster: int
    groups: int
    splits: int
    tiles: int
    columns: int
    clusters: int
    shared: int
    grid: int
    directions: int
    clocks: int


def unavailable() -> str | None:
    """None where this process can run the kernels, else what is missing."""
    missing: str | None = cuda.unavailable()
    return missing


def refuses(device: torch.device, dtype: torch.dtype, hidden: int) -> str | None:
    """None if the kernels serve tensors of this device and dtype with so many hidden units, else why not."""
    if device.type != "cuda":
        return f"it serves tensors on a CUDA GPU, not on {device.type}"
    if _kind(dtype) is None:
        return f"it serves float32, bfloat16 and float16, not {str(dtype).removeprefix('torch.')}"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        major, minor = capability
        return f"it needs compute capability 8.0, and the GPU has {major}.{minor}"
    if None in plans(device, dtype, hidden, 1, 1):
        return f"this GPU does not hold the {4 * hidden} x {hidden} weights of {hidden} hidden units on chip"
    return None


def plans(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, directions: int) -> list[Plan | None]:
    """How a GPU lays out the forward and the backward walk; None if it doesn't hold the weights."""
    kind = _kind(dtype)
    assert kind is not None
    index = torch.cuda.current_device() if device.index is None else device.index
    return [_plan(kind, backward, hidden, batch, directions, index) for backward in (False, True)]


def crowded(device: torch.device, dtype: torch.dtype, hidden: int, batch: int) -> str | None:
    """None if a GPU that holds the weights holds so many sequences too, else that it doesn't."""
    if None not in plans(device, dtype, hidden, batch, 1):
        return None
    return f"this GPU does not hold {batch} sequences of {hidden} hidden units on chip"


def outweighed(device: torch.device, dtype: torch.dtype, hidden: int, batch: int, plain: bool) -> str | None:
    """None unless torch's own LSTM is expected to be faster, else why: by estimates from an H100 and an H200.

    ``plain``: the call is of dense steps without a projection, of which cuDNN has a kernel as persistent as ours."""
    kind = _kind(dtype)
    assert kind is not None
    walks = plans(device, dtype, hidden, batch, 1)[: 2 if torch.is_grad_enabled() else 1]
    ours = sum(plan.clocks for plan in walks if plan is not None)
    theirs = len(walks) * _C.persistent_library_clocks(kind=kind, hidden=hidden, batch=batch, plain=plain)
    if ours <= theirs:
        return None
    return f"a step of {batch} x {hidden} units is expected to take {ours / theirs:.1f} times what torch's takes"


@contextmanager
def over_the_grid() -> Iterator[None]:
    """Plans as for a GPU without thread-block clusters: for tests, and to measure what clusters are worth."""
    global _clusters
    before, _clusters = _clusters, False
    _plan.cache_clear()
    try:
        yield
    finally:
        _clusters = before
        _plan.cache_clear()


def layer_forward(inputs: LayerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """F1-F6; lstm_fast/kernels/__init__.py states what each tensor is."""
    x, h0, c0, weights, steps = inputs
    with rnn_precision(x):
        gates = torch.mm(rows.flat(x), rows.interleaved([direction[0] for direction in weights]).t())
    y, h_n, c_n, cells = hoisted.results(inputs, save)
    w_hh, biases = [direction[1] for direction in weights], [direction[2:4] for direction in weights]
    recurrence_forward(gates, h0, c0, w_hh, biases, steps, y, h_n, c_n, cells)
    return y, h_n, c_n, None if cells is None else (gates, cells)


def recurrence_forward(
    gates: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    w_hh: list[Tensor],
    biases: list[Any],
    steps: list[int],
    y: Tensor,
    h_n: Tensor,
    c_n: Tensor,
    cells: Tensor | None,
    *,
    schedule: int = 0,
) -> None:
    """F1-F6 over all steps; lstm_fast/kernels/__init__.py states what each tensor is, but for these.

    ``gates`` [N, D * 4H]: of each unit i, f, g, o side by side, on entry without ``biases``, b_ih and b_hh of each
    direction. ``schedule`` orders the fibres of a host run (csrc/host/simt.h), and means nothing on a GPU.
    """
    sizes = gates.size(0), len(steps), steps[0], y.size(-1) // len(w_hh), len(w_hh)
    launch, starts = _launch(gates, sizes, False, schedule), _starts(steps, gates.device)
    with on_device_of(gates):
        _C.persistent_forward(gates, h0, c0, w_hh, biases, starts, y, h_n, c_n, cells, *launch)


def recurrence_backward(
    gates: Tensor,
    cells: Tensor,
    c0: Tensor | None,
    w_hh: list[Tensor],
    steps: list[int],
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dgates: Tensor,
    dh0: Tensor | None,
    dc0: Tensor | None,
    *,
    schedule: int = 0,
) -> None:
    """B1-B7 over all steps; lstm_fast/kernels/__init__.py states what each tensor is, ``recurrence_forward`` gates."""
    directions, rows_in_all, hidden = cells.shape
    sizes = rows_in_all, len(steps), steps[0], hidden, directions
    launch, starts = _launch(gates, sizes, True, schedule), _starts(steps, gates.device)
    with on_device_of(gates):
        _C.persistent_backward(gates, cells, c0, w_hh, starts, dy, dh_n, dc_n, dgates, dh0, dc0, *launch)


def _launch(gates: Tensor, sizes: tuple[int, ...], backward: bool, schedule: int) -> tuple[Any, ...]:
    """What both kernels' calls end with: sizes (N, T, B, H, D), plan, workspace, kind, and where to run."""
    _, _, batch, hidden, directions = sizes
    kind = _kind(gates.dtype)
    assert kind is not None
    device = gates.get_device() if gates.is_cuda else None
    plan = _plan(kind, backward, hidden, batch, directions, device)
    if plan is None:
        raise RuntimeError(f"this device does not hold the weights of {hidden} hidden units on chip")
    workspace = _workspace(kind, backward, plan, directions, gates.device)
    return sizes, plan, workspace, kind, device, stream_of(gates) if gates.is_cuda else schedule


def _workspace(kind: int, backward: bool, plan: Plan, directions: int, device: torch.device) -> Tensor:
    """For the weights as the kernel takes them up, and what the blocks of a grid exchange in, its flags zeroed."""
    flags, size = _workspace_bytes(kind, backward, plan, directions)
    workspace = torch.empty(size, dtype=torch.uint8, device=device)
    if device.type == "cpu":
        workspace.fill_(255)  # NaN, so that what is read before it was written shows
    if flags > 0:
        workspace[:flags].zero_()
    return workspace


@cache
def _workspace_bytes(kind: int, backward: bool, plan: Plan, directions: int) -> tuple[int, int]:
    """Of a grid's flags, and in all."""
    found: tuple[int, int] = _C.persistent_workspace(kind=kind, backward=backward, plan=plan, directions=directions)
    return found


def _starts(steps: list[int], device: torch.device) -> Tensor | None:
    """The first row of each step, and the number of rows, on the device; None when every step has the whole batch."""
    if steps[0] == steps[-1]:
        return None
    return rows.starts(steps, device)


def _kind(dtype: torch.dtype) -> int | None:
    """How W_hh is multiplied (csrc/cuda/persistent.h, Kind)."""
    if dtype == torch.float32:
        return _TF32 if rnn_tf32() else _FLOAT32
    return {torch.bfloat16: _BFLOAT16, torch.float16: _FLOAT16}.get(dtype)


@cache
def _plan(kind: int, backward: bool, hidden: int, batch: int, directions: int, device: int | None) -> Plan | None:
    """The layout of a launch on the device, or on the host; None if it doesn't hold the weights."""
    granted = partial(_granted, kind, backward, device)
    with torch.cuda.device(-1 if device is None else device):
        found = _C.persistent_plan(
            kind=kind, backward=backward, hidden=hidden, batch=batch, directions=directions, granted=granted
        )
    return None if found is None else Plan(*found)


def _granted(kind: int, backward: bool, device: int | None, grid: bool, cluster: int, threads: int, shared: int) -> int:
    """Clusters that run at once, or blocks of a grid that do."""
    if not (grid or _clusters):
        return 0
    if device is None:
        return _GRID_ON_HOST if grid else _ON_HOST[cluster]
    return _granted_by_driver(
        kind=kind, backward=backward, device=device, grid=grid, cluster=cluster, threads=threads, shared=shared
    )


@cache
def _granted_by_driver(**asked: Any) -> int:
    """A plan asks some seventy things, and those of all batches together the same."""
    count: int = _C.persistent_granted(**asked)
    return count


layer_backward = partial(hoisted.layer_backward, recurrence_backward)
