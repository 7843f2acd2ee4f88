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
    ],
)
def test_errors_are_torchs(x, hx):
    theirs, ours = pair()
    with pytest.raises((ValueError, RuntimeError)) as wanted:
        theirs(x, hx)
    with pytest.raises(wanted.type) as found:
        ours(x, hx)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize(
    "x, hx",
    [
        (torch.zeros(2, 3), (torch.zeros(2, 5),)),
        (torch.zeros(2, 3), (torch.zeros(2, 5),) * 3),
        (torch.zeros(3), (torch.zeros(1, 5), torch.zeros(1, 5))),
        (torch.zeros(2, 3), (torch.zeros(5), torch.zeros(5))),
        (torch.zeros(2, 3, **F64), None),
        (torch.zeros(2, 3), (torch.zeros(2, 5, **F64), torch.zeros(2, 5))),
        (torch.zeros(2, 3), torch.zeros(2, 2, 2, 5)),
    ],
)
def test_what_else_does_not_fit_raises(x, hx):
    theirs, ours = pair()
    for module in (theirs, ours) if not isinstance(hx, torch.Tensor) else (ours,):
        with pytest.raises((RuntimeError, ValueError, IndexError)):
            module(x, hx)


def test_empty_batch_and_saturation():
    _, ours = pair()
    assert [t.shape for t in ours(torch.zeros(0, 3))] == [(0, 5), (0, 5)]
    h, c = ours(torch.full((1, 3), 1e30), (torch.zeros(1, 5), torch.full((1, 5), 1e3)))
    assert torch.isfinite(h).all() and torch.isfinite(c).all()


def test_autocast_gives_torchs_dtype():
    theirs, ours = pair()
    with torch.autocast("cpu", torch.bfloat16):
        assert [t.dtype for t in ours(torch.zeros(2, 3))] == [t.dtype for t in theirs(torch.zeros(2, 3))]


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
