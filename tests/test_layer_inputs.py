"""``autograd.layer`` on its own: what it takes, what it refuses, and that both ways to check agree."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from lstm_fast import autograd
from lstm_fast.autograd import layer
from lstm_fast.kernels import LayerInputs, cpu
from tests.quick_case import needs_exchange_api

ROWS, BATCH, INPUTS, HIDDEN, FEATURES = 6, 2, 3, 5, 4
STATES, PER_DIRECTION = 3, 5


def inputs(directions: int = 2, bias: bool = True, proj: bool = True, dtype: torch.dtype = torch.float32) -> list:
    """The 13 inputs of autograd.py."""
    torch.manual_seed(0)
    features = FEATURES if proj else HIDDEN
    found = [
        torch.randn(ROWS, INPUTS),
        torch.randn(directions, BATCH, features),
        torch.randn(directions, BATCH, HIDDEN),
    ]
    for _ in range(directions):
        found += [torch.randn(4 * HIDDEN, INPUTS), torch.randn(4 * HIDDEN, features)]
        found += [torch.randn(4 * HIDDEN) if bias else None for _ in range(2)]
        found += [torch.randn(features, HIDDEN) if proj else None]
    return [None if t is None else t.to(dtype) for t in found] + [None] * (PER_DIRECTION * (2 - directions))


def call(tensors: Sequence[Tensor | None], batch_sizes: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    directions = [tensors[i : i + PER_DIRECTION] for i in (STATES, STATES + PER_DIRECTION)]
    weights = [tuple(d) for d in directions if d[0] is not None]
    return layer(tensors[0], tensors[1], tensors[2], weights, batch_sizes, "cpu")  # type: ignore[arg-type]


PLAIN = {
    "both directions": inputs(),
    "one": inputs(directions=1),
    "no bias": inputs(bias=False),
    "no projection": inputs(proj=False),
    "fp64": inputs(dtype=torch.float64),
    "bf16": inputs(dtype=torch.bfloat16),
}


@needs_exchange_api
@pytest.mark.parametrize("tensors", PLAIN.values(), ids=PLAIN.keys())
def test_plain_inputs_pass_at_a_glance(tensors: list[Tensor | None]) -> None:
    assert autograd.layer_inputs_fit(tensors)
    parameters = [None if t is None else torch.nn.Parameter(t) for t in tensors]
    assert autograd.layer_inputs_fit(parameters)


@pytest.mark.parametrize("tensors", PLAIN.values(), ids=PLAIN.keys())
def test_without_the_glance_bits_are_the_same(tensors: list[Tensor | None], monkeypatch: pytest.MonkeyPatch) -> None:
    at_a_glance = call(tensors)
    monkeypatch.setattr(autograd, "layer_inputs_fit", lambda _: False)
    assert all(torch.equal(a, b) for a, b in zip(at_a_glance, call(tensors), strict=True))


@pytest.mark.parametrize("index", range(STATES + 2 * PER_DIRECTION))
@pytest.mark.parametrize("dims", ["strided", "permuted"])
def test_inputs_that_are_not_contiguous_are_copied(index: int, dims: str) -> None:
    tensors = inputs()
    want = call(tensors)
    tensor = tensors[index]
    assert tensor is not None
    if dims == "strided":
        tensors[index] = torch.stack([tensor, tensor], -1)[..., 0]
    elif tensor.dim() == 1:
        tensors[index] = tensor.flip(0).flip(0).expand(2, -1)[1]  # contiguous, at an offset
    else:
        order = list(range(tensor.dim()))[::-1]
        tensors[index] = tensor.permute(order).contiguous().permute(order)
    assert all(torch.equal(a, b) for a, b in zip(want, call(tensors), strict=True))


WRONG: dict[str, tuple[int, Callable[[Tensor], Tensor | None], str]] = {
    "x's features": (0, lambda t: t[:, 1:], r"weight_ih should have size \[20, 2\], got \[20, 3\]"),
    "h_0's batch": (1, lambda t: t[:, 1:], r"h_0 and c_0 should agree in their first two sizes, got \[2, 1, 4\]"),
    "h_0's features": (1, lambda t: t[..., 1:], r"weight_hh should have size \[20, 3\], got \[20, 4\]"),
    "c_0's units": (2, lambda t: t[..., 1:], r"weight_ih should have size \[16, 3\], got \[20, 3\]"),
    "h_0's dtype": (1, lambda t: t.double(), "Input and hidden tensors are not of the same dtype"),
    "c_0's dtype": (2, lambda t: t.half(), "Input and cell tensors are not of the same dtype"),
    "W_ih": (3, lambda t: t[1:], r"weight_ih should have size \[20, 3\], got \[19, 3\]"),
    "W_hh": (4, lambda t: t[:, 1:], r"weight_hh should have size \[20, 4\], got \[20, 3\]"),
    "W_hh's dims": (4, lambda t: t.flatten(), r"weight_hh should have size \[20, 4\], got \[80\]"),
    "W_hh's dtype": (4, lambda t: t.double(), "Input and parameter tensors are not of the same dtype"),
    "W_hh's device": (4, lambda t: t.to("meta"), "Input and parameter tensors are not at the same device"),
    "b_ih": (5, lambda t: t[1:], r"bias_ih should have size \[20\], got \[19\]"),
    "no b_ih": (5, lambda _: None, "bias_ih and bias_hh should both be given, or neither"),
    "b_hh of the reverse direction": (11, lambda t: t[1:], r"bias_hh should have size \[20\], got \[19\]"),
    "W_hr": (7, lambda t: t[:, 1:], r"weight_hr should have size \[4, 5\], got \[4, 4\]"),
    "no W_hh": (9, lambda _: None, "weight_hh of direction 1 of 2 should be given, got None"),
    "no W_hr": (7, lambda _: None, "weight_hr should be given where h_0 has 4 features, not 5, got None"),
}


@pytest.mark.parametrize(("index", "change", "message"), WRONG.values(), ids=WRONG.keys())
def test_what_does_not_fit_is_refused(index: int, change: Callable[[Tensor], Tensor | None], message: str) -> None:
    tensors = inputs()
    tensor = tensors[index]
    assert tensor is not None
    tensors[index] = change(tensor)
    assert not autograd.layer_inputs_fit(tensors)
    with pytest.raises(RuntimeError, match=message):
        call(tensors)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_steps_hand_the_states_and_their_gradients_through(backend: str, create_graph: bool) -> None:
    x, h0, c0, *weights = inputs(directions=1)
    leaves = [t.requires_grad_() for t in (x[:0].clone(), h0, c0, *weights[:PER_DIRECTION])]
    y, h_n, c_n = layer(*leaves[:STATES], [tuple(leaves[STATES:])], None, backend)
    assert y.shape == (0, FEATURES)
    assert torch.equal(h_n, h0)
    assert torch.equal(c_n, c0)
    grads = torch.autograd.grad((2 * h_n).sum() + (3 * c_n).sum(), leaves, create_graph=create_graph)
    assert torch.equal(grads[1], torch.full_like(h0, 2))
    assert torch.equal(grads[2], torch.full_like(c0, 3))
    assert all(not g.any() for g in (grads[0], *grads[STATES:]))


@pytest.mark.parametrize("index", range(STATES + 2 * PER_DIRECTION))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_gradient_alone_is_what_it_is_among_all(index: int, dtype: torch.dtype) -> None:
    """Of the kernel itself, which makes no others; either bias has its gradient where the other has none."""
    x, h0, c0, *weights = inputs(dtype=dtype)
    layer_inputs = LayerInputs(x, h0, c0, [tuple(weights[:PER_DIRECTION]), tuple(weights[PER_DIRECTION:])], [BATCH] * 3)
    y, h_n, c_n, saved = cpu.layer_forward(layer_inputs, True)
    assert saved is not None
    count = STATES + 2 * PER_DIRECTION
    everything = cpu.layer_backward(layer_inputs, y, saved, (y, h_n, c_n), [True] * count)
    alone = cpu.layer_backward(layer_inputs, y, saved, (y, h_n, c_n), [k == index for k in range(count)])
    assert [k for k, g in enumerate(alone) if g is not None] == [index]
    found, want = alone[index], everything[index]
    assert found is not None and want is not None
    assert bool(want.any()) and torch.equal(found, want)


@pytest.mark.parametrize("grad", [False, True])
def test_a_tensor_that_outlived_its_transform_is_taken(grad: bool) -> None:
    left: list[Tensor] = []

    def keep(x: Tensor) -> Tensor:
        left.append(2 * x)
        return x.sum()

    x, h0, c0, *weights = inputs(directions=1)
    torch.func.grad(keep)(x)
    for weight in weights[:2]:
        weight.requires_grad_(grad)
    direction = [tuple(weights[:PER_DIRECTION])]
    got = layer(left[0], h0, c0, direction, None, "cpu")
    want = layer(2 * x, h0, c0, direction, None, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    if grad:
        found = [torch.autograd.grad(out[0].sum(), weights[:2]) for out in (got, want)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_the_operator_hands_gradients_through_too() -> None:
    """Its outputs may not be its inputs, which custom operators refuse."""
    tensors = inputs(directions=1)
    tensors[0] = tensors[0][:0]
    y, h_n, c_n, gates, cells = torch.ops.lstm_fast.layer(*tensors, None, "cpu", True)
    needs = [t is not None for t in tensors]
    grads = torch.ops.lstm_fast.layer_backward(y, h_n, c_n, *tensors, None, y, gates, cells, "cpu", needs)
    assert torch.equal(grads[1], h_n) and torch.equal(grads[2], c_n)
    assert grads[1].data_ptr() != h_n.data_ptr()
