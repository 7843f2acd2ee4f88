"""A layer for kernels that know the recurrence alone: the products over all steps are one GEMM each of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lstm_fast import reference
from lstm_fast.kernels import Gradients, LayerInputs, Saved
from lstm_fast.precision import rnn_precision


def layer_forward(
    recurrence_forward: Callable[..., None], inputs: LayerInputs, save: bool
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """F1 to F6; lstm_fast/kernels/__init__.py states what each tensor is, and what ``recurrence_forward`` does."""
    x, h0, c0, weights, steps = inputs
    rows, (directions, _, hidden) = x.size(0), c0.shape
    with rnn_precision(x):
        products = []
        for w_ih, _, b_ih, b_hh, _ in weights:
            bias = None if b_ih is None or b_hh is None else b_ih + b_hh
            products.append(torch.mm(x, w_ih.t()) if bias is None else torch.addmm(bias, x, w_ih.t()))
        gates = products[0].unsqueeze(0) if directions == 1 else torch.stack(products)  # [D, N, 4H]
        y = x.new_empty(rows, directions * hidden)
        h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
        cells = None
        if save:
            cells = x.new_empty(directions, rows, hidden, dtype=reference.accumulate_dtype(x.dtype))
        w_hh = [direction[1] for direction in weights]
        recurrence_forward(gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)
    return y, h_n, c_n, None if cells is None else (gates, cells)


def layer_backward(
    recurrence_backward: Callable[..., None],
    inputs: LayerInputs,
    y: Tensor,
    saved: Saved,
    dy: Tensor | None,
    dh: Tensor,
    dc: Tensor,
    needs_x: bool,
    needs: Sequence[Sequence[bool]],
) -> tuple[Tensor | None, list[Gradients]]:
    """B1 to B8; lstm_fast/kernels/__init__.py states what each tensor is, and what ``recurrence_backward`` does."""
    x, h0, c0, weights, steps = inputs
    gates, cells = saved
    hidden = c0.size(2)
    dgates = torch.empty_like(gates)
    with rnn_precision(x):
        w_hh = [direction[1] for direction in weights]
        recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh, dc, dgates)
        dx = None
        if needs_x:
            parts = [torch.mm(da, direction[0]) for da, direction in zip(dgates, weights, strict=True)]  # B7
            dx = parts[0] if len(parts) == 1 else parts[0].add_(parts[1])
        gradients: list[Gradients] = []
        for d, need in enumerate(needs):  # B8
            da = dgates[d].t()
            dw_ih = torch.mm(da, x) if need[0] else None
            dw_hh = None
            if need[1]:
                before = reference.previous(y[:, d * hidden : (d + 1) * hidden], h0[d], steps, d == 1)
                dw_hh = torch.mm(da, before)
            gradients.append((dw_ih, dw_hh, dgates[d].sum(0) if any(need[2:4]) else None, None))
    return dx, gradients
