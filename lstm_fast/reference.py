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
run under every torch.func transform. Since that takes as long as its operators are many, B1-B5 have torch's own:
``sigmoid_backward(d, y) = d * y * (1 - y)`` and ``tanh_backward(d, y) = d * (1 - y^2)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

_LONGEST_SUM = 256  # terms that a library is given to add up

# y [n, R], gates i, f, g, o [n, H] each, and c [n, H], each of all steps.
OfSteps = tuple[Sequence[Tensor], Sequence[Sequence[Tensor]], Sequence[Tensor]]

sigmoid_backward = torch.ops.aten.sigmoid_backward.default
tanh_backward = torch.ops.aten.tanh_backward.default


class Gradients(NamedTuple):
    """What ``layer_backward`` returns; shapes are those of the tensors they belong to."""

    x: Tensor | None
    h0: Tensor
    c0: Tensor
    w_ih: Tensor | None
    w_hh: Tensor | None
    b: Tensor | None  # [4H], of b_ih and of b_hh alike
    w_hr: Tensor | None


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the cell state, the gate maths and all sums: fp32 for bf16 and fp16, else the same."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """``Tensor.to``, which transforms follow even where it changes nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def in_order(steps: list[int], reverse: bool) -> range:
    """The numbers of steps as the direction visits them."""
    return range(len(steps))[:: -1 if reverse else 1]


def previous(value: Tensor, initial: Tensor, steps: list[int], reverse: bool) -> Tensor:
    """For each row the value [N, F] one step earlier in the direction's order; ``initial`` [B, F] where it starts."""
    if steps[0] == steps[-1]:  # dense
        batch = steps[0]
        return torch.cat([value[batch:], initial] if reverse else [initial, value[:-batch]])
    return torch.cat(previous_of(value.split(steps), initial, steps, reverse))


def previous_of(values: Sequence[Tensor], initial: Tensor, steps: list[int], reverse: bool) -> list[Tensor]:
    """The same step by step."""
    found: list[Tensor] = []
    before = initial
    for t in in_order(steps, reverse):
        n = steps[t]
        found.append(kept(top(before, n), top(initial, n)))  # sequences beyond those before start at this step
        before = values[t]
    return found[::-1] if reverse else found


def top(state: Tensor, n: int) -> Tensor:
    """Its first ``n`` rows."""
    return state[:n] if n < state.size(0) else state


def kept(new: Tensor, old: Tensor) -> Tensor:
    """``new``, and from where it ends on the rows of ``old``: sequences that are over, or have not begun."""
    n = new.size(0)
    return new if n == old.size(0) else torch.cat([new, old[n:]])


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [.., K] times b [K, ..], in parts of K: on some processors a library adds all terms up one after the other."""
    if b.size(0) <= _LONGEST_SUM:
        return a @ b
    pairs = zip(a.split(_LONGEST_SUM, 1), b.split(_LONGEST_SUM), strict=True)
    result: Tensor = reduce(torch.add, (left @ right for left, right in pairs))
    return result


def rows_of(parts: Sequence[Tensor]) -> Tensor:
    """[N, F] of all steps."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


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
) -> tuple[OfSteps, Tensor, Tensor]:
    """F1-F6 over all steps: y, gates and cells of each; h_n [B, R]; c_n [B, H]."""
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    w_hh_t = cast(w_hh, acc).t()
    w_hr_acc = None if w_hr is None else cast(w_hr, acc)
    a_x = linear(cast(x, acc), cast(w_ih, acc), None if b_ih is None else cast(b_ih, acc))  # [N, 4H]
    if b_hh is not None:
        a_x = a_x + cast(b_hh, acc)
    h, c = cast(h0, acc), cast(c0, acc)
    ys: list[Tensor] = []
    gates: list[Sequence[Tensor]] = []
    cells: list[Tensor] = []
    # the gradient of a slice is as large as the whole: of T slices, T times that
    a_x_of = a_x.split(steps) if len(steps) > 1 else [a_x]
    for t in in_order(steps, reverse):
        n = steps[t]
        a = torch.addmm(a_x_of[t], top(h, n), w_hh_t)  # [n, 4H]
        a_i, a_f, a_g, a_o = a.chunk(4, dim=-1)
        i = torch.sigmoid(a_i)  # F1
        f = torch.sigmoid(a_f)  # F2
        g = torch.tanh(a_g)  # F3
        o = torch.sigmoid(a_o)  # F4
        c_t = f * top(c, n) + i * g  # F5
        h_t = o * torch.tanh(c_t)  # F6
        if w_hr_acc is not None:
            h_t = linear(h_t, w_hr_acc)
        y_t = cast(h_t, dtype)
        ys.append(y_t)
        gates.append((i, f, g, o))
        cells.append(c_t)
        h, c = kept(cast(y_t, acc), h), kept(c_t, c)
    if reverse:
        ys, gates, cells = ys[::-1], gates[::-1], cells[::-1]
    return (ys, gates, cells), cast(h, dtype), cast(c, dtype)


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
    of_steps: OfSteps,
    steps: list[int],
    reverse: bool,
    needs: Sequence[bool],
) -> Gradients:
    """B1-B8 over all steps, from what ``layer`` returned; a gradient that is None counts as zero. ``needs``: whether
    those of x, w_ih, w_hh, b and w_hr are asked for."""
    ys, gates, cells = of_steps
    of_x, of_w_ih, of_w_hh, of_b, of_w_hr = needs
    dtype, acc = x.dtype, accumulate_dtype(x.dtype)
    dh = torch.zeros_like(h0, dtype=acc) if dh_n is None else cast(dh_n, acc)
    dc = torch.zeros_like(c0, dtype=acc) if dc_n is None else cast(dc_n, acc)
    w_hh_acc = cast(w_hh, acc)
    c_previous_of = previous_of(cells, cast(c0, acc), steps, reverse)
    dy_of = None if dy is None else cast(dy, acc).split(steps)
    das: list[Tensor] = []
    dhs: list[Tensor] = []
    hiddens: list[Tensor] = []
    for t in in_order(steps, not reverse):
        n = steps[t]
        i, f, g, o = gates[t]
        tanh_c = torch.tanh(cells[t])
        dh_t = top(dh, n)
        if dy_of is not None:
            dh_t = dh_t + dy_of[t]
        if w_hr is not None:
            dhs.append(dh_t)
            hiddens.append(o * tanh_c)
            dh_t = dh_t @ cast(w_hr, acc)
        da_o = sigmoid_backward(dh_t * tanh_c, o)  # B1
        dc_t = top(dc, n) + tanh_backward(dh_t * o, tanh_c)  # B2
        da_i = sigmoid_backward(dc_t * g, i)  # B3
        da_f = sigmoid_backward(dc_t * c_previous_of[t], f)  # B4
        da_g = tanh_backward(dc_t * i, g)  # B5
        da = torch.cat([da_i, da_f, da_g, da_o], dim=-1)  # [n, 4H]
        das.append(da)
        dc = kept(dc_t * f, dc)  # B6
        dh = kept(da @ w_hh_acc, dh)  # B7
    if not reverse:
        das, dhs, hiddens = das[::-1], dhs[::-1], hiddens[::-1]
    da = rows_of(das)  # [N, 4H]
    return Gradients(
        x=cast(product(da, cast(w_ih, acc)), dtype) if of_x else None,  # B7
        h0=cast(dh, dtype),
        c0=cast(dc, dtype),
        w_ih=cast(product(da.mT, cast(x, acc)), dtype) if of_w_ih else None,  # B8
        w_hh=cast(product(da.mT, cast(rows_of(previous_of(ys, h0, steps, reverse)), acc)), dtype) if of_w_hh else None,
        b=cast(da.sum(0), dtype) if of_b else None,
        w_hr=cast(product(rows_of(dhs).mT, rows_of(hiddens)), dtype) if w_hr is not None and of_w_hr else None,
    )
