"""A layer for kernels that know the recurrence alone: the products over all steps are one GEMM each of torch's.

On a GPU each operator of torch's costs as much as twenty steps of the walk, views included: as few as there can be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lstm_fast import reference
from lstm_fast.kernels import LayerInputs, Saved
from lstm_fast.kernels.rows import flat, previous, sums
from lstm_fast.precision import rnn_precision

_STATES = 3  # x, h0 and c0 come before the weights


def layer_forward(
    recurrence_forward: Callable[..., None], inputs: LayerInputs, save: bool
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """F1 to F6; lstm_fast/kernels/__init__.py states what each tensor is, and what ``recurrence_forward`` does."""
    x, h0, c0, weights, steps = inputs
    directions, hidden = len(weights), weights[0][1].size(1)
    with rnn_precision(x):
        products = []
        for w_ih, _, b_ih, b_hh, _ in weights:
            bias = None if b_ih is None or b_hh is None else b_ih + b_hh
            products.append(torch.nn.functional.linear(x, w_ih, bias))
        gates = products[0] if directions == 1 else torch.stack(products)
        gates = gates.view(directions, -1, 4 * hidden)  # [D, N, 4H]
        y, h_n, c_n, cells = results(inputs, save)
        w_hh = [direction[1] for direction in weights]
        recurrence_forward(gates, h0, c0, w_hh, steps, y, h_n, c_n, cells)
    return y, h_n, c_n, None if cells is None else (gates, cells)


def results(inputs: LayerInputs, save: bool) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Memory for y, h_n, c_n, and with ``save`` for the cells."""
    x, _, _, weights, steps = inputs
    directions, hidden = len(weights), weights[0][1].size(1)
    y = x.new_empty(*x.shape[:-1], directions * hidden)
    h_n, c_n = (x.new_empty(directions, steps[0], hidden) for _ in range(2))
    if not save:
        return y, h_n, c_n, None
    acc = reference.accumulate_dtype(x.dtype)
    return y, h_n, c_n, x.new_empty(directions, x.shape[:-1].numel(), hidden, dtype=acc)


def layer_backward(
    recurrence_backward: Callable[..., None],
    inputs: LayerInputs,
    y: Tensor,
    saved: Saved,
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """B1 to B8; lstm_fast/kernels/__init__.py states what each tensor is, and what ``recurrence_backward`` does."""
    x, h0, c0, weights, steps = inputs
    dy, dh_n, dc_n = grads
    gates, cells = saved
    dgates = x.new_empty(*cells.shape[:2], 4 * cells.size(2))
    dh0, dc0 = (
        None if s is None or not need else torch.empty_like(s) for s, need in zip((h0, c0), needs[1:3], strict=True)
    )
    with rnn_precision(x):
        w_hh = [direction[1] for direction in weights]
        recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh_n, dc_n, dgates, dh0, dc0)
        of_weights: list[Tensor | None] = []
        of_x, rows = flat(x), flat(y)
        for d, (_, _, b_ih, b_hh, _) in enumerate(weights):  # B8, before dx: what packed rows need of y takes its place
            da = dgates[d].t()
            of_w_ih, of_w_hh, of_b_ih, of_b_hh, _ = needs[_STATES + len(of_weights) :][:5]
            dw_ih, dw_hh = torch.mm(da, of_x) if of_w_ih else None, None
            if of_w_hh:
                h = rows if len(weights) == 1 else rows.chunk(2, 1)[d]
                dw_hh = _over_previous(da, h, None if h0 is None else h0[d], steps, d == 1)
            db_ih, db_hh = sums(dgates[d], b_ih is not None and of_b_ih, b_hh is not None and of_b_hh)
            of_weights += [dw_ih, dw_hh, db_ih, db_hh, None]
        dx = None
        if needs[0]:
            parts = [torch.mm(da, direction[0]) for da, direction in zip(dgates, weights, strict=True)]  # B7
            dx = (parts[0] if len(parts) == 1 else parts[0].add_(parts[1])).view(x.shape)
    return [dx, dh0, dc0, *of_weights]


def _over_previous(da: Tensor, y: Tensor, initial: Tensor | None, steps: list[int], reverse: bool) -> Tensor:
    """``da`` [4H, N] times h [N, H] of the step before in the direction's order, ``initial`` [B, H], None for zeros,
    where it starts."""
    batch = steps[0]
    if steps[-1] != batch:
        return torch.mm(da, previous(y, initial, steps, reverse))
    if len(steps) == 1:
        return da.new_zeros(da.size(0), y.size(1)) if initial is None else torch.mm(da, initial)
    later, before = (da[:, :-batch], y[batch:]) if reverse else (da[:, batch:], y[:-batch])
    product = torch.mm(later, before)  # y is not copied
    if initial is None:
        return product
    return product.addmm_(da[:, -batch:] if reverse else da[:, :batch], initial)
