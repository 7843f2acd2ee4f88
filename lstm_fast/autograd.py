"""One layer as a differentiable operation: the only save_for_backward.

Eager calls go through ``LayerFunction``; compilers, exporters and dispatch modes see the registered operators
``lstm_fast::layer`` and ``lstm_fast::layer_backward``. Both reach ``_forward`` and ``_backward`` below, which give the
layer to a kernel (lstm_fast/kernels/__init__.py).

The 13 tensor inputs, in order: x, h0, c0, then for the forward and for the reverse direction w_ih, w_hh, b_ih, b_hh,
w_hr (None where absent). D directions, N rows over all steps (N = T*B when dense), R features of h. x is [.., I] with
N rows in all, and y has its form: to change it outside would be a node of the graph, as slow as a small layer. For the
same reason the node of an LSTMCell has states [B, H], and no h_n.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import reduce
from typing import Any

import torch
from torch import Tensor, library
from torch._functorch.utils import unwrap_dead_wrappers

from lstm_fast import reference
from lstm_fast.checks import (
    INPUTS,
    OF_DIRECTION,
    STATES,
    batch_of,
    check_inputs,
    check_saved,
    directions_of,
    output_from,
    plain,
    saved_shapes,
    steps_of,
)
from lstm_fast.context import autocast_enabled, is_profiled, transforms_active
from lstm_fast.dispatch import KERNELS
from lstm_fast.kernels import LayerInputs, Saved, Weights, cpu

try:
    from lstm_fast._C import layer_inputs_fit
except ImportError:  # then the reference serves, and everything is checked here

    def layer_inputs_fit(inputs: Sequence[Tensor | None], cell: bool = False) -> bool:
        return False


_NOTHING = nullcontext()
_NOWHERE = torch.empty(0, device="cpu")
_TAKE_NO_STATES = ("persistent",)  # backends for which None stands for zeros


def _watched(tensors: Iterable[Any]) -> bool:
    """Whether a dispatch mode or a subclass of Tensor must see the registered operators."""
    return torch._C._len_torch_dispatch_stack() > 0 or any(
        isinstance(t, Tensor) and type(t) not in (Tensor, torch.nn.Parameter) for t in tensors
    )


def layer(
    x: Tensor,
    h0: Tensor | int,
    c0: Tensor | int,
    weights: Sequence[Weights],
    batch_sizes: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """One layer, all its directions.

    Args:
        x: rows of all steps, [N, I] or with more dimensions in place of N; row (t, b) is ``start(t) + b``.
        h0, c0: [D, B, R] and [D, B, H]; or R and H for zeros, then x is [.., B, I] unless ``batch_sizes`` says B. While
            a transform is active also those of a cell, [B, H]: results are then a cell's.
        weights: for each direction w_ih [4H, I], w_hh [4H, R], b_ih [4H], b_hh [4H], w_hr [P, H].
        batch_sizes: active sequences of each step, int64 [T] on the CPU, never growing; None when dense.
        backend: a key of ``dispatch.KERNELS``, or "reference".
    Returns:
        y [N, D*R], in x's form, h_n [D, B, R], c_n [D, B, H].
    Raises:
        RuntimeError: a shape, dtype, device or ``batch_sizes`` that doesn't fit the others.
    """
    absent = (None,) * (OF_DIRECTION * (2 - len(weights)))
    rest = (*(t for direction in weights for t in direction), *absent)
    inputs: tuple[Any, ...] = (x, h0, c0, *rest)
    zeros = isinstance(c0, int)
    if zeros:
        inputs = (x, None, None, *rest)
    transformed = transforms_active()
    followed = transformed or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    fits = not followed and layer_inputs_fit(inputs)
    seen_by_others = followed or (not fits and _watched(inputs))
    if zeros and not (fits and backend in _TAKE_NO_STATES and _weights_tell(x, c0, weights)):
        inputs = (x, *_zero_states(x, batch_sizes, len(weights), features=h0, hidden=c0), *rest)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    result: Sequence[Any]
    if not seen_by_others:
        if not fits:
            inputs = unwrap_dead_wrappers(inputs)  # tensors that outlived the transform which made them
        recorded = torch.profiler.record_function("lstm_fast::layer") if is_profiled() else _NOTHING
        with recorded, torch.no_grad() if save else _NOTHING:
            *result, saved = _forward(*inputs, batch_sizes, backend, save)
        if saved is not None:
            result = _apply(*inputs, batch_sizes, backend, (*result, *saved))
    elif transformed:
        check_inputs(inputs)
        *result, _ = _differentiable_forward(inputs, steps_of(batch_sizes, x, inputs[2]))
    else:
        result = torch.ops.lstm_fast.layer(*inputs, batch_sizes, backend, save)
    return result[0], result[1], result[2]


def _weights_tell(x: Tensor, hidden: Any, weights: Sequence[Weights]) -> bool:
    """Whether the weights tell H and the directions as states of zeros would, and x has rows."""
    return x.numel() > 0 and weights[-1][0] is not None and weights[0][1].size(1) == hidden


def _zero_states(
    x: Tensor, batch_sizes: Tensor | None, directions: int, features: Any, hidden: Any
) -> tuple[Tensor, Tensor]:
    """h0 and c0."""
    batch = batch_of(x, batch_sizes)
    c0 = x.new_zeros(directions, batch, hidden)
    return c0 if features == hidden else x.new_zeros(directions, batch, features), c0


def _with_states(inputs: Sequence[Any], batch_sizes: Tensor | None) -> Sequence[Any]:
    """The inputs, with zeros for states that are None."""
    if inputs[2] is not None:
        return inputs
    x, weights = inputs[0], directions_of(inputs)
    hidden = weights[0][1].size(1)
    return [x, *_zero_states(x, batch_sizes, len(weights), hidden, hidden), *inputs[STATES:]]


def _ready(inputs: Sequence[Any], batch_sizes: Tensor | None) -> Sequence[Any]:
    """The inputs, checked and plain."""
    if layer_inputs_fit(inputs):
        return inputs
    inputs = _with_states(inputs, batch_sizes)
    check_inputs(inputs)
    return [None if t is None else plain(t) for t in inputs]


def _without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    if not autocast_enabled() or not torch.is_autocast_enabled(x.device.type):
        return _NOTHING
    return torch.autocast(x.device.type, enabled=False)


def _forward(*args: Any) -> tuple[Tensor, Tensor, Tensor, Saved | None]:
    """y, h_n, c_n, and with ``save`` activated gates and cells for backward."""
    *given, batch_sizes, backend, save = args
    inputs = _ready(given, batch_sizes)
    x, h0, c0 = inputs[:STATES]
    steps = steps_of(batch_sizes, x, c0)
    saved: Saved | None
    with _without_autocast(x):
        if not steps:
            directions = c0.size(0)
            y, h_n, c_n = x.new_empty(*x.shape[:-1], directions * h0.size(2)), h0.clone(), c0.clone()
            saved = _empty_saved(backend, x, directions_of(inputs), 0)
        elif backend == "reference":
            with torch.no_grad():
                y, h_n, c_n, of_steps = _differentiable_forward(inputs, steps)
            saved = _saved_of(of_steps, x.dtype)
        else:
            layer_inputs = LayerInputs(x, h0, c0, directions_of(inputs), steps)
            y, h_n, c_n, saved = KERNELS[backend].layer_forward(layer_inputs, save)
    return y, h_n, c_n, saved if save else None


def _empty_saved(backend: str, x: Tensor, weights: Sequence[Weights], rows: int) -> Saved:
    _, gates, cells = saved_shapes(backend, x, weights, rows)
    return x.new_empty(gates), x.new_empty(cells, dtype=reference.accumulate_dtype(x.dtype))


def _backward(*args: Any) -> Sequence[Tensor | None]:
    """The gradients of the 13 inputs, or at least of those that ``needs`` asks for."""
    dy, dh_n, dc_n, *given, batch_sizes, y, gates, cells, backend, needs = args
    if _of_cell(given):
        of_layer, its_grads = _as_layer(given, (dy, dh_n, dc_n))
        return _as_cell(_backward(*its_grads, *of_layer, batch_sizes, y, gates, cells, backend, needs))
    inputs = _ready(given, batch_sizes)
    x, h0, c0 = inputs[:STATES]
    weights = directions_of(inputs)
    y, gates, cells = check_saved(backend, x, weights, y, gates, cells)
    steps = steps_of(batch_sizes, x, c0)
    grads: list[Tensor | None]
    with torch.no_grad() if torch.is_grad_enabled() else _NOTHING, _without_autocast(x):
        if not steps:
            grads = _no_steps_backward((dy, dh_n, dc_n), inputs)
        elif backend == "reference":
            of_steps = _of_steps(y, (gates, cells), steps)
            grads = _reference_backward((dy, dh_n, dc_n), inputs, of_steps, steps, needs)
        else:
            of_outputs = [None if g is None else plain(g) for g in (dy, dh_n, dc_n)]
            layer_inputs = LayerInputs(x, h0, c0, weights, steps)
            grads = KERNELS[backend].layer_backward(layer_inputs, y, (gates, cells), of_outputs, needs)
            grads += [None] * (INPUTS - len(grads))
    return grads


def _saved_of(of_steps: Sequence[reference.OfSteps], dtype: torch.dtype) -> Saved:
    """Gates [D, N, 4H] and cells [D, N, H] of what the reference has of each direction's steps."""
    gates = [torch.cat([torch.cat([*of_step], -1) for of_step in own]) for _, own, _ in of_steps]
    return torch.stack(gates).to(dtype), torch.stack([torch.cat([*cells]) for _, _, cells in of_steps])


def _of_steps(y: Tensor, saved: Saved, steps: list[int]) -> list[reference.OfSteps]:
    """The same the other way."""
    gates, cells = saved
    ys = y.flatten(0, -2).chunk(len(cells), -1)
    return [
        (h.split(steps), [g.chunk(4, -1) for g in own.to(c.dtype).split(steps)], c.split(steps))
        for h, own, c in zip(ys, gates, cells, strict=True)
    ]


def _of_cell(inputs: Sequence[Any]) -> bool:
    return inputs[2] is not None and inputs[2].dim() == 2


def _as_layer(inputs: Sequence[Any], grads: Sequence[Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """A cell's 13 inputs and the gradients of its outputs with the states of a layer."""
    x, h, c, *weights = inputs
    dh, _, dc = grads
    return [x, h.unsqueeze(0), c.unsqueeze(0), *weights], (dh, None, None if dc is None else dc.unsqueeze(0))


def _as_cell(grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradients of a cell's 13 inputs from those of ``_as_layer``'s."""
    dx, dh, dc, *weights = grads
    return [dx, None if dh is None else dh[0], None if dc is None else dc[0], *weights]


def _no_steps_backward(grads: Sequence[Tensor | None], inputs: Sequence[Any]) -> list[Tensor | None]:
    """The gradients of the 13 inputs where h_n is h0 and c_n is c0."""
    found = [None if t is None else torch.zeros_like(t) for t in inputs]
    for index in (1, 2):
        grad = grads[index]
        found[index] = found[index] if grad is None else grad.clone()  # an operator's output is never its input
    return found


def _reference_forward(inputs: Sequence[Any], steps: list[int]) -> list[tuple[reference.OfSteps, Tensor, Tensor]]:
    """What the reference gives for each direction of a layer, or for a cell, differentiable to any order."""
    x, h0, c0 = inputs[0].flatten(0, -2), _of_each(inputs[1]), _of_each(inputs[2])
    return [
        reference.layer(x, h0[d], c0[d], w_ih, w_hh, b_ih, b_hh, w_hr, steps, d == 1)
        for d, (w_ih, w_hh, b_ih, b_hh, w_hr) in enumerate(directions_of(inputs))
    ]


def _of_each(state: Any) -> Any:
    """A state of a layer, to be asked for a direction; or of a cell, which has but one."""
    return [state] if state is not None and state.dim() == 2 else state


def _differentiable_forward(
    inputs: Sequence[Any], steps: list[int]
) -> tuple[Tensor, Tensor, Tensor, Sequence[reference.OfSteps]]:
    """y, h_n, c_n of a layer or a cell by the reference, and what each direction has for backward."""
    x, h0, c0 = inputs[:STATES]
    form = x.shape[:-1]
    if not steps:  # an empty batch: the graph still has to reach every input
        none = sum(t.sum() for t in inputs if t is not None)
        return x.new_zeros(*form, len(directions_of(inputs)) * h0.size(-1)) + none, h0 + none, c0 + none, []
    of_steps, h_n, c_n = zip(*_reference_forward(inputs, steps), strict=True)
    if _of_cell(inputs):
        return h_n[0], h_n[0], c_n[0], of_steps
    y = [torch.cat([*ys]).view(*form, -1) for ys, _, _ in of_steps]
    whole = torch.cat(y, dim=-1)  # of a view autograd would not see a change in place
    return whole, torch.stack(h_n), torch.stack(c_n), of_steps


def _reference_backward(
    grads: Sequence[Tensor | None],
    inputs: Sequence[Any],
    of_steps: Sequence[reference.OfSteps],
    steps: list[int],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the 13 inputs by the reference, differentiable to any order; at least those needed."""
    x, cell = inputs[0], _of_cell(inputs)
    dy, dh_n, dc_n = (None, *grads[::2]) if cell else grads
    h0, c0, dh_n, dc_n = (_of_each(state) for state in (*inputs[1:STATES], dh_n, dc_n))
    rows, features = x.flatten(0, -2), inputs[1].size(-1)
    dy = None if dy is None else dy.reshape(rows.size(0), -1)  # under is_grads_batched there is no flatten
    found, of_weights = [], []
    inputs_of = directions_of(inputs)
    for d, (w_ih, w_hh, _, _, w_hr) in enumerate(inputs_of):
        of_w_ih, of_w_hh, of_b_ih, of_b_hh, of_w_hr = needs[STATES + d * OF_DIRECTION :][:OF_DIRECTION]
        columns = slice(d * features, (d + 1) * features)
        g = reference.layer_backward(
            dy if dy is None or len(inputs_of) == 1 else dy[:, columns],  # no batching rule has all columns
            None if dh_n is None else dh_n[d],
            None if dc_n is None else dc_n[d],
            *(rows, h0[d], c0[d], w_ih, w_hh, w_hr, of_steps[d], steps, d == 1),
            (needs[0], of_w_ih, of_w_hh, of_b_ih or of_b_hh, of_w_hr),
        )
        found.append(g)
        again = g.b.clone() if g.b is not None and of_b_ih and of_b_hh else g.b
        of_weights += [g.w_ih, g.w_hh, g.b, again, g.w_hr]
    dxs = [g.x for g in found if g.x is not None]
    dh0, dc0 = [g.h0 for g in found], [g.c0 for g in found]
    result = [
        reduce(torch.add, dxs).view(x.shape) if dxs else None,
        dh0[0] if cell else torch.stack(dh0),
        dc0[0] if cell else torch.stack(dc0),
        *of_weights,
    ]
    return result + [None] * (INPUTS - len(result))


def _save(
    ctx: Any,
    tensors: Sequence[Any],
    backend: str,
    y: Tensor,
    gates: Tensor,
    cells: Tensor,
    changes: tuple[Tensor, int] | None = None,
) -> None:
    """``tensors``: the 13 inputs and batch_sizes. ``changes``: what counts changes of y in place, and its count now;
    None for a y that nobody else has."""
    ctx.save_for_backward(*tensors, y, gates, cells)
    ctx.set_materialize_grads(False)
    ctx.backend, ctx.changes = backend, changes


def _backward_from_context(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    saved, followed = ctx.saved_tensors, torch.is_grad_enabled() or transforms_active()
    if not followed and ctx.changes is not None and ctx.changes[0]._version != ctx.changes[1]:
        *rest, y, gates, cells = saved
        with _without_autocast(y):
            saved = (*rest, output_from(ctx.backend, y, directions_of(rest), gates, cells), gates, cells)
    if ctx.backend == "cpu" and not followed and torch._C._len_torch_dispatch_stack() == 0:
        all_of = cpu.train_backward(saved, grad_outputs, ctx.needs_input_grad)
        if all_of is not None:
            return all_of
    inputs: Sequence[Any]
    *inputs, batch_sizes, y, gates, cells = saved
    grads, needs = grad_outputs[:STATES], ctx.needs_input_grad[:INPUTS]
    found: Sequence[Tensor | None]
    if followed or _batched(grads):
        inputs = _with_states(inputs, batch_sizes)
        steps = steps_of(batch_sizes, inputs[0], inputs[2])
        with _without_autocast(inputs[0]):
            if steps:
                of_steps = [own for own, _, _ in _reference_forward(inputs, steps)]
                found = _reference_backward(grads, inputs, of_steps, steps, needs)
            else:
                found = _no_steps_backward(grads, inputs)
    else:
        args = (*grads, *inputs, batch_sizes, y, gates, cells, ctx.backend, list(needs))
        found = torch.ops.lstm_fast.layer_backward(*args) if _watched(args) else _backward(*args)
    return (*(g if need else None for g, need in zip(found, needs, strict=True)), None, None, None)


def _batched(grads: Sequence[Tensor | None]) -> bool:
    """Whether torch.autograd.grad was given is_grads_batched."""
    return any(grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad) for grad in grads)


class LayerFunction(torch.autograd.Function):
    """A layer's node in eager autograd, whose outputs a kernel has already given; backward is differentiable through
    the reference."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:  # with a setup_context, each call would cost 20 us more
        *tensors, backend, outputs = args
        y, h_n, c_n, gates, cells = outputs
        counter = y.detach()  # of what is done to y in place,
        counter.data = _NOWHERE  # without its memory
        _save(ctx, tensors, backend, y.data, gates, cells, (counter, counter._version))
        return y, h_n, c_n

    backward = staticmethod(_backward_from_context)


# What Function.apply calls once it knows that no transform is active.
_apply = super(torch.autograd.Function, LayerFunction).apply


def done_on_cpu(
    inputs: tuple[Any, ...], outputs: tuple[Any, ...], batch_sizes: Tensor | None = None
) -> tuple[Tensor, Any, Tensor]:
    """y, h_n, c_n of a layer, or y, None, c_n of a cell, as a node of the graph, from its 13 inputs and from what the
    CPU's kernel made of them: y, h_n, c_n, gates, cells."""
    y, h_n, c_n = _apply(*inputs, batch_sizes, "cpu", outputs)
    return y, h_n, c_n


def _forward_op(*args: Any) -> tuple[Tensor, ...]:
    """``_forward`` as an operator, which can't return None."""
    y, h_n, c_n, saved = _forward(*args)
    return y, h_n, c_n, *(saved or (y.new_empty(0), y.new_empty(0)))


def _backward_op(*args: Any) -> tuple[Tensor, ...]:
    """``_backward`` as an operator, with empty tensors where ``needs`` asks for none."""
    x, needs = args[STATES], args[-1]
    found = zip(_backward(*args), needs, strict=True)
    return tuple(x.new_empty(0) if g is None or not need else g for g, need in found)


def _setup_op_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, backend, _ = inputs
    y, _, _, gates, cells = output
    ctx.mark_non_differentiable(gates, cells)
    _save(ctx, tensors, backend, y.clone(), gates, cells)  # compilers leave the copy out where nobody changes y


_WEIGHTS_SCHEMA = ", ".join(
    f"Tensor{'?' if optional or d else ''} {name}{'_reverse' if d else ''}"
    for d in range(2)
    for name, optional in (("w_ih", False), ("w_hh", False), ("b_ih", True), ("b_hh", True), ("w_hr", True))
)
_layer_op = library.custom_op(
    "lstm_fast::layer",
    _forward_op,
    mutates_args=(),
    schema=f"(Tensor x, Tensor h0, Tensor c0, {_WEIGHTS_SCHEMA}, Tensor? batch_sizes, str backend, bool save)"
    " -> (Tensor y, Tensor h_n, Tensor c_n, Tensor gates, Tensor cells)",
)
_layer_backward_op = library.custom_op(
    "lstm_fast::layer_backward",
    _backward_op,
    mutates_args=(),
    schema=f"(Tensor? dy, Tensor? dh_n, Tensor? dc_n, Tensor x, Tensor h0, Tensor c0, {_WEIGHTS_SCHEMA},"
    " Tensor? batch_sizes, Tensor y, Tensor gates, Tensor cells, str backend, bool[] needs) -> ("
    + ", ".join(["Tensor"] * INPUTS)
    + ")",
)


@_layer_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    *inputs, _, backend, save = args
    check_inputs(inputs)
    x, h0, c0 = inputs[:STATES]
    gates = cells = None
    if save:
        gates, cells = _empty_saved(backend, x, directions_of(inputs), math.prod(x.shape[:-1]))
    return (
        x.new_empty(*x.shape[:-1], c0.size(0) * h0.size(2)),
        h0.new_empty(h0.shape),
        c0.new_empty(c0.shape),
        x.new_empty(0) if gates is None else gates,
        x.new_empty(0) if cells is None else cells,
    )


@_layer_backward_op.register_fake
def _(*args: Any) -> tuple[Tensor, ...]:
    _, _, _, *inputs, _, _, _, _, _, needs = args
    x = inputs[0]
    return tuple(
        t.new_empty(t.shape) if t is not None and need else x.new_empty(0)
        for t, need in zip(inputs, needs, strict=True)
    )


_layer_op.register_autograd(_backward_from_context, setup_context=_setup_op_context)
