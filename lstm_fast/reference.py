"""The LSTM's equations, forward and backward, in plain torch: the documentation and the oracle of every kernel.

One layer in one direction over rows: row (t, b) of step t is ``start(t) + b``, and steps never grow
(``steps[t] >= steps[t + 1]``), which is PackedSequence's layout; a dense batch is ``steps = [B] * T``.
I inputs, H hidden units, R = H features of h (R = P with a projection). Gates are stacked i, f, g, o.

Forward (Hochreiter & Schmidhuber 1997; forget gate: Gers et al. 2000; projection: Sak et al. 2014),
with a = x W_ih^T + b_ih + h' W_hh^T + b_hh, and h', c' the state one step earlier::

    F1  i = sigmoid(a_i)           F4  o = sigmoid(a_o)
    F2  f = sigmoid(a_f)           F5  c = f * c' + i * g
    F3  g = tanh(a_g)              F6  h = o * tanh(c)          (projected: h = W_hr (o * tanh(c)))

Backward, with dh, dc the gradients that reach h and c, and da those of the pre-activations::

    B1  da_o = dh * tanh(c) * o * (1 - o)             (projected: dh = W_hr^T dh first)
    B2  dc   = dc + dh * o * (1 - tanh(c)^2)
    B3  da_i = dc * g * i * (1 - i)
    B4  da_f = dc * c' * f * (1 - f)
    B5  da_g = dc * i * (1 - g^2)
    B6  dc'  = dc * f
    B7  dh'  = da W_hh             dx    = da W_ih
    B8  dW_ih = sum_t da^T x       dW_hh = sum_t da^T h'        db = sum_t da

Nothing is written in place, so that both functions are differentiable themselves, any number of times, and
run under every torch.func transform.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

_LONGEST_SUM = 256  # terms that a library is given to add up


class Gradients(NamedTuple):
    """What ``layer_backward`` returns; shapes are those of the tensors they belong to."""

    x: Tensor
    h0: Tensor
    c0: Tensor
    w_ih: Tensor
    w_hh: Tensor
    b: Tensor  # [4H], of b_ih and of b_hh alike
    w_hr: Tensor | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state, the gate maths and all sums: fp32 for bf16 and fp16, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def in_order(steps: list[int], reverse: bool) -> range:
    """The numbers of steps as the direction visits them."""
    return range(len(steps))[:: -1 if reverse else 1]


def previous(value: Tensor, initial: Tensor, steps: list[int], reverse: bool) -> Tensor:
    """For each row the value [N, F] one step earlier in the direction's order; ``initial`` [B, F] where it starts."""
    if steps[0] == steps[-1]:  # dense
        batch = steps[0]
        return torch.cat([value[batch:], initial] if reverse else [initial, value[:-batch]])
    values = value.split(steps)
    pieces: list[Tensor] = []
    before = initial[:0]
    for t in in_order(steps, reverse):
        known = min(steps[t], before.size(0))  # sequences [known:] start at this step
        pieces.append(torch.cat([before[:known], initial[known : steps[t]]]))
        before = values[t]
    return torch.cat(pieces[::-1] if reverse else pieces)


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., K] times b [K, ..], in parts of K: on some processors a library adds all terms up one after the other."""
    pairs = zip(a.split(_LONGEST_SUM, 1), b.split(_LONGEST_SUM), strict=True)
    result: Tensor = reduce(torch.add, (left @ right for left, right in pairs))
    return result


def layer(
    x: Tensor,  # [N, I]
    h0: Tensor,  # [B, R]
    c0: Tensor,  # [B, H]
    w_ih: Tensor,  # [4H, I]
    w_hh: Tensor,  # [4H, R]
    b_ih: Tensor | None,  # [4H]
    b_hh: Tensor | None,  # [4H]
    w_hr: Tensor | None,  # [P, H]
    steps: list[int],
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """F1-F6 over all steps: y [N, R], h_n [B, R], c_n [B, H], and for backward gates [N, 4H] and cells [N, H]."""
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    w_hh_acc = w_hh.to(acc)
    w_hr_acc = None if w_hr is None else w_hr.to(acc)
    a_x = linear(x.to(acc), w_ih.to(acc), None if b_ih is None else b_ih.to(acc))  # [N, 4H]
    if b_hh is not None:
        a_x = a_x + b_hh.to(acc)
    h, c = h0.to(acc), c0.to(acc)
    ys: list[Tensor] = []
    gates: list[Tensor] = []
    cells: list[Tensor] = []
    a_x_of = a_x.split(steps)  # the gradient of a slice is as large as the whole: of T slices, T times that
    for t in in_order(steps, reverse):
        n = steps[t]
        a = a_x_of[t] + linear(h[:n], w_hh_acc)  # [n, 4H]
        a_i, a_f, a_g, a_o = a.chunk(4, dim=-1)
        i = torch.sigmoid(a_i)  # F1
        f = torch.sigmoid(a_f)  # F2
        g = torch.tanh(a_g)  # F3
        o = torch.sigmoid(a_o)  # F4
        c_t = f * c[:n] + i * g  # F5
        h_t = o * torch.tanh(c_t)  # F6
        if w_hr_acc is not None:
            h_t = linear(h_t, w_hr_acc)
        y_t = h_t.to(dtype)
        ys.append(y_t)
        gates.append(torch.cat([i, f, g, o], dim=-1))
        cells.append(c_t)
        h = torch.cat([y_t.to(acc), h[n:]])  # a sequence that is over, or has not begun, keeps its state
        c = torch.cat([c_t, c[n:]])
    if reverse:
        ys, gates, cells = ys[::-1], gates[::-1], cells[::-1]
    return torch.cat(ys), h.to(dtype), c.to(dtype), torch.cat(gates), torch.cat(cells)


def layer_backward(
    dy: Tensor | None,  # [N, R]
    dh_n: Tensor | None,  # [B, R]
    dc_n: Tensor | None,  # [B, H]
    x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    w_hr: Tensor | None,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    steps: list[int],
    reverse: bool,
) -> Gradients:
    """B1-B8 over all steps, from what ``layer`` returned; a gradient that is None counts as zero."""
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    dh = torch.zeros_like(h0, dtype=acc) if dh_n is None else dh_n.to(acc)
    dc = torch.zeros_like(c0, dtype=acc) if dc_n is None else dc_n.to(acc)
    w_hh_acc = w_hh.to(acc)
    gates_of, cells_of = gates.to(acc).split(steps), cells.split(steps)
    c_previous_of = previous(cells, c0.to(acc), steps, reverse).split(steps)
    dy_of = None if dy is None else dy.to(acc).split(steps)
    das: list[Tensor] = []
    dhs: list[Tensor] = []
    hiddens: list[Tensor] = []
    for t in in_order(steps, not reverse):
        n = steps[t]
        i, f, g, o = gates_of[t].chunk(4, dim=-1)
        tanh_c = torch.tanh(cells_of[t])
        dh_t = dh[:n] if dy_of is None else dh[:n] + dy_of[t]
        if w_hr is not None:
            dhs.append(dh_t)
            hiddens.append(o * tanh_c)
            dh_t = dh_t @ w_hr.to(acc)
        da_o = dh_t * tanh_c * o * (1 - o)  # B1
        dc_t = dc[:n] + dh_t * o * (1 - tanh_c * tanh_c)  # B2
        da_i = dc_t * g * i * (1 - i)  # B3
        da_f = dc_t * c_previous_of[t] * f * (1 - f)  # B4
        da_g = dc_t * i * (1 - g * g)  # B5
        da = torch.cat([da_i, da_f, da_g, da_o], dim=-1)  # [n, 4H]
        das.append(da)
        dc = torch.cat([dc_t * f, dc[n:]])  # B6
        dh = torch.cat([da @ w_hh_acc, dh[n:]])  # B7
    if not reverse:
        das, dhs, hiddens = das[::-1], dhs[::-1], hiddens[::-1]
    da = torch.cat(das)  # [N, 4H]
    h_previous = previous(y, h0, steps, reverse).to(acc)  # [N, R]
    return Gradients(
        x=product(da, w_ih.to(acc)).to(dtype),  # B7
        h0=dh.to(dtype),
        c0=dc.to(dtype),
        w_ih=product(da.mT, x.to(acc)).to(dtype),  # B8
        w_hh=product(da.mT, h_previous).to(dtype),
        b=da.sum(0).to(dtype),
        w_hr=None if w_hr is None else product(torch.cat(dhs).mT, torch.cat(hiddens)).to(dtype),
    )
