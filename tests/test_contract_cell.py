"""LSTMCell: torch.nn.LSTMCell's forms, values, gradients and errors."""

import pytest
import torch
from torch import nn

import lstm_fast

F64 = {"dtype": torch.float64}


def pair(bias=True, backend="auto", **kind):
    torch.manual_seed(0)
    theirs = nn.LSTMCell(3, 5, bias, **kind)
    ours = lstm_fast.LSTMCell(3, 5, bias, **kind, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [(), (1,), (4,)], ids=["unbatched", "one", "four"])
@pytest.mark.parametrize("with_state", [True, False])
def test_values_and_gradients(backend, bias, batch, with_state):
    theirs, ours = pair(bias, backend, **F64)
    inputs = [torch.randn(*batch, size, **F64) for size in (3, 5, 5)]
    upstream = [torch.randn(*batch, 5, **F64) for _ in range(2)]
    found = []
    for module in (theirs, ours):
        x, h, c = (t.clone().requires_grad_() for t in inputs)
        result = module(x, (h, c)) if with_state else module(x)
        assert type(result) is tuple
        wanted = [x, *module.parameters(), *([h, c] if with_state else [])]
        found.append([*result, *torch.autograd.grad(result, wanted, upstream)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "x, hx",
    [
        (torch.zeros(1, 2, 3), None),
        (torch.zeros(2, 3), (torch.zeros(1, 2, 5), torch.zeros(2, 5))),
        (torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(1, 2, 5))),
        (torch.zeros(2, 4), None),
        (torch.zeros(2, 3), (torch.zeros(2, 4), torch.zeros(2, 5))),
        (torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(2, 4))),
        (torch.zeros(2, 3), (torch.zeros(3, 5), torch.zeros(2, 5))),
        (torch.zeros(2, 3), (torch.zeros(2, 5), torch.zeros(3, 5))),
        (None, None),
        ([1.0], None),
        # two faults: the first that torch looks for
        (torch.zeros(1, 2, 3, **F64), (torch.zeros(1, 2, 5), torch.zeros(2, 5))),
        (torch.zeros(2, 4), (torch.zeros(1, 2, 5), torch.zeros(2, 5))),
        (torch.zeros(2, 4), (torch.zeros(2, 4), torch.zeros(3, 5))),
        (torch.zeros(2, 3), (torch.zeros(3, 5), torch.zeros(2, 4))),
    ],
)
def test_errors_are_torchs(x, hx):
    theirs, ours = pair()
    with pytest.raises((ValueError, RuntimeError, AttributeError)) as wanted:
        theirs(x, hx)
    with pytest.raises(wanted.type) as found:
        ours(x, hx)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize(
    "x, hx, text",
    [
        (torch.zeros(2, 3), (torch.zeros(2, 5),), "lstm_cell expects two hidden states, got 1"),
        (torch.zeros(2, 3), (torch.zeros(2, 5),) * 3, "lstm_cell expects two hidden states, got 3"),
        (torch.zeros(3), (torch.zeros(1, 5), torch.zeros(1, 5)), "should be 1-D as input is, got 2-D"),
        (torch.zeros(2, 3), (torch.zeros(5), torch.zeros(5)), "should be 2-D as input is, got 1-D"),
        (torch.zeros(2, 3, **F64), None, "input and weight_ih must have the same dtype"),
        (torch.zeros(2, 3), (torch.zeros(2, 5, **F64), torch.zeros(2, 5)), "not of the same dtype"),
        (torch.zeros(2, 3), torch.zeros(2, 2, 2, 5), r"Expected hx\[0\] to be 1D or 2D, got 3D"),
    ],
)
def test_errors_in_our_own_words(x, hx, text):
    theirs, ours = pair()
    with pytest.raises((RuntimeError, ValueError), match=text):
        ours(x, hx)
    if not isinstance(hx, torch.Tensor):  # torch may read out of bounds
        with pytest.raises(RuntimeError):
            theirs(x, hx)


def test_empty_batch_and_saturation():
    _, ours = pair()
    assert [t.shape for t in ours(torch.zeros(0, 3))] == [(0, 5), (0, 5)]
    h, c = ours(torch.full((1, 3), 1e30), (torch.zeros(1, 5), torch.full((1, 5), 1e3)))
    assert torch.isfinite(h).all() and torch.isfinite(c).all()


@pytest.mark.parametrize("state", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("low", [True, False])
def test_autocast_gives_torchs_dtype(low, weights, state):
    theirs, ours = pair(dtype=weights)
    x = torch.randn(2, 3).to(torch.bfloat16 if low else torch.float32)
    hx = None if state is None else (torch.randn(2, 5).to(state), torch.randn(2, 5).to(state))
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(ours(x, hx), theirs(x, hx), strict=True):
            assert a.dtype == b.dtype == (state or x.dtype)
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


def test_low_precision_and_complex():
    for dtype in (torch.float16, torch.bfloat16, torch.complex64):
        theirs, ours = pair(dtype=dtype)
        x = torch.randn(2, 3, dtype=dtype)
        for a, b in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(a, b, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_every_derivative(backend):
    _, ours = pair(backend=backend, **F64)
    inputs = [torch.randn(2, size, **F64, requires_grad=True) for size in (3, 5, 5)]
    assert torch.autograd.gradcheck(lambda x, h, c: ours(x, (h, c)), inputs)
    assert torch.autograd.gradgradcheck(lambda x, h, c: ours(x, (h, c)), inputs)
    _, auto = pair(**F64)
    x = inputs[0].detach()
    _, tangent = torch.func.jvp(lambda v: auto(v)[0], (x,), (torch.ones_like(x),))
    columns = torch.func.jacrev(lambda v: auto(v)[0])(x)
    torch.testing.assert_close(tangent, columns.sum((2, 3)))


def test_a_loop_of_cells_is_a_layer():
    _, cell = pair(**F64)
    layer = nn.LSTM(3, 5, **F64)
    layer.load_state_dict({f"{name}_l0": value for name, value in cell.state_dict().items()})
    x = torch.randn(6, 2, 3, **F64)
    state, outputs = None, []
    for step in x:
        state = cell(step, state)
        outputs.append(state[0])
    torch.testing.assert_close(torch.stack(outputs), layer(x)[0])
