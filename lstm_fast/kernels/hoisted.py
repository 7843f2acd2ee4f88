"""A layer for kernels that know the recurrence alone: the products over all steps are one GEMM each of torch's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lstm_fast import reference
from lstm_fast.kernels import LayerInputs, Saved
from lstm_fast.kernels.rows import previous
from lstm_fast.precision import rnn_precision

_STATES = 3  # x, h0 and c0 come before the weights


def layer_forward(
    recurrence_forward: Callable[..., None], inputs: LayerInputs, save: bool
) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """F1 to F6; lstm_fast/kernels/__init__.py states what each tensor is, and what ``recurrence_forward`` does."""
    x, h0, c0, weights, steps = inputs
    form, x = x.shape[:-1], x.flatten(0, -2)
    rows, (directions, _, hidden) = x.size(0), c0.shape
    with rnn_precision(x):
        products = []
        for w_ih, _, b_ih, b_hh, _ in weights:
            bias = None if b_ih is None or b_hh is None else b_ih + b_hh
            products.append(torch.mm(x, w_ih.t()) if bias is None else torch.addmm(bias, x, w_ih.t()))
        gates = products[0].unsqueeze(0) if directions == 1 else torch.stack(products)  # [D, N, 4H]
        y = x.new_empty(*form, directions * hidden)
        h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
        cells = None
        if save:
            cells = x.new_empty(directions, rows, hidden, dtype=reference.accumulate_dtype(x.dtype))
        w_hh = [direction[1] for direction in weights]
        recurrence_forward(gates, h0, c0, w_hh, steps, y.flatten(0, -2), h_n, c_n, cells)
    return y, h_n, c_n, None if cells is None else (gates, cells)


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
    form, x, y = x.shape, x.flatten(0, -2), y.flatten(0, -2)
    dy, (dh, dc) = None if grads[0] is None else grads[0].flatten(0, -2), _states(grads[1], grads[2], c0)
    gates, cells = saved
    hidden = c0.size(2)
    dgates = torch.empty_like(gates)
    with rnn_precision(x):
        w_hh = [direction[1] for direction in weights]
        recurrence_backward(gates, cells, c0, w_hh, steps, dy, dh, dc, dgates)
        of_weights: list[Tensor | None] = []
        for d, (_, _, b_ih, b_hh, _) in enumerate(weights):  # B8, before dx: what packed rows need of y takes its place
            da = dgates[d].t()
            of_w_ih, of_w_hh, of_b_ih, of_b_hh, _ = needs[_STATES + len(of_weights) :][:5]
            dw_ih, dw_hh, db, same = torch.mm(da, x) if of_w_ih else None, None, None, None
            if of_w_hh:
                dw_hh = _over_previous(da, y[:, d * hidden : (d + 1) * hidden], h0[d], steps, d == 1)
            if b_ih is not None and of_b_ih:
                db = _over_rows(da)
            if b_hh is not None and of_b_hh:
                same = _over_rows(da) if db is None else db.clone()
            of_weights += [dw_ih, dw_hh, db, same, None]
        dx = None
        if needs[0]:
            parts = [torch.mm(da, direction[0]) for da, direction in zip(dgates, weights, strict=True)]  # B7
            dx = (parts[0] if len(parts) == 1 else parts[0].add_(parts[1])).view(form)
    return [dx, dh.to(h0.dtype) if needs[1] else None, dc.to(c0.dtype) if needs[2] else None, *of_weights]


def _over_rows(da: Tensor) -> Tensor:
    """The sums of ``da`` [4H, N] over its rows; Tensor.sum would take as much memory again as da on a GPU."""
    return torch.mv(da, da.new_ones(da.size(1)))


def _over_previous(da: Tensor, y: Tensor, initial: Tensor, steps: list[int], reverse: bool) -> Tensor:
    """``da`` [4H, N] times h [N, H] of the step before in the direction's order, ``initial`` [B, H] where it starts."""
    rows, batch = y.size(0), steps[0]
    if steps[-1] != batch:
        return torch.mm(da, previous(y, initial, steps, reverse))
    if rows == batch:
        return torch.mm(da, initial)
    later, first = (da[:, :-batch], da[:, -batch:]) if reverse else (da[:, batch:], da[:, :batch])
    return torch.mm(later, y[batch:] if reverse else y[:-batch]).addmm_(first, initial)  # y is not copied


def _states(dh: Tensor | None, dc: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the last states as the walk back begins with them, which overwrites them."""
    acc = reference.accumulate_dtype(state.dtype)
    if dh is None and dc is None:
        first, second = torch.zeros(2, *state.shape, dtype=acc, device=state.device).unbind()
        return first, second
    first, second = (
        torch.zeros(state.shape, dtype=acc, device=state.device)
        if grad is None
        else grad.to(acc, copy=True, memory_format=torch.contiguous_format)
        for grad in (dh, dc)
    )
    return first, second
