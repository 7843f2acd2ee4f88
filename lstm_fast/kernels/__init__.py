"""One thin file a backend: tensors in, pointers out, nothing decided.

Gates are stacked i, f, g, o. T is the storage dtype; Acc is float64 for float64, else float32. N rows over all steps
(T*B when dense), B sequences, I input features, H hidden units, R features of h (H unless projected), D directions.
Row (t, b) is ``start(t) + b``.
``steps``: active sequences of each step, never growing, all above 0. Direction 1 walks from the last to the first step.
Each backend has:

``unavailable() -> str | None``
    None if it can run in this process, else what is missing.
``refuses(device, dtype, hidden) -> str | None``
    None if it serves tensors of that kind with H = ``hidden``, else why not.
``layer_forward(inputs, save) -> y, h_n, c_n, saved``
    F1-F6 over all steps of ``inputs``, a ``LayerInputs``. Returns ``y`` [.., D*R] T, in x's form, direction d in
    columns d*R to (d+1)*R; ``h_n`` and ``c_n``, shaped as ``h0`` and ``c0``; with ``save``, what backward needs: the
    activated gates T, as it has them, and c_t of every step [D, N, H] Acc; else None.
``layer_backward(inputs, y, saved, grads, needs) -> gradients``
    B1-B8 over all steps. ``grads``: those of y, h_n and c_n, shaped as they are, T; None for zero. Returns those of x,
    h0, c0, and of each direction's w_ih, w_hh, b_ih, b_hh and w_hr, T; None where ``needs``, a flag for each in the
    same order, is false, or where there is no such input. No two share memory.

Those but the CPU's know the recurrence alone, without projection, and leave the other products to ``hoisted.py``:

``recurrence_forward(gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)``
    F1-F6 over all steps. ``gates`` [D, N, 4H] T: on entry the input product with both biases; on return the activated
    gates, unless ``cells`` is None. ``w_hh``: D tensors [4H, H] T. Written: ``y``, ``h_n``, ``c_n``, and ``cells``
    [D, N, H] Acc, or None for inference.
``recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh_n, dc_n, dgates, dh0, dc0)``
    B1-B7 over all steps. ``dy``, ``dh_n``, ``dc_n``: T, shaped as y, h_n and c_n, or None for zero. Written:
    ``dgates`` [D, N, 4H] T, the gradient of the pre-activations, and ``dh0`` and ``dc0`` T unless they are None.

``persistent.py`` says what differs there.
All tensors are contiguous, nothing but what is named as written is written, and results are the same bits
on every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Weights = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]  # w_ih, w_hh, b_ih, b_hh, w_hr
Saved = tuple[Tensor, Tensor]  # gates and cells


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


class LayerInputs(NamedTuple):
    """``x`` [.., I] with N rows in all, ``h0`` [D, B, R], ``c0`` [D, B, H], None for zeros where a backend says so; of
    each direction w_ih [4H, I], w_hh [4H, R], b_ih and b_hh [4H] or None, w_hr [R, H] or None; ``steps``, the active
    sequences of each step."""

    x: Tensor
    h0: Tensor | None
    c0: Tensor | None
    weights: Sequence[Weights]
    steps: list[int]
