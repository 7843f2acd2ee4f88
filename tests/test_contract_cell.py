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


def test_gradients_of_gradients_and_batches_of_them():
    found = []
    theirs, ours = pair(**F64)
    inputs = [torch.randn(2, size, **F64) for size in (3, 5, 5)]
    for module in (theirs, ours):
        x, h, c = (t.clone().requires_grad_() for t in inputs)
        leaves = [x, h, c, *module.parameters()]
        h2, c2 = module(x, module(x, (h, c)))
        total, of_every_order = (h2 * c2).sum(), []
        for _ in range(3):
            grads = torch.autograd.grad(total, leaves, create_graph=True)
            total = sum(g.square().sum() for g in grads)
            of_every_order += [g.detach() for g in grads]
        found.append(of_every_order)
    torch.testing.assert_close(found[1], found[0])
    y, _ = ours(x, (h, c))
    many = torch.randn(4, *y.shape, **F64)
    batched = torch.autograd.grad(y, leaves, many, is_grads_batched=True, retain_graph=True)
    one_by_one = zip(*(torch.autograd.grad(y, leaves, g, retain_graph=True) for g in many), strict=True)
    torch.testing.assert_close(batched, tuple(torch.stack(own) for own in one_by_one))


@pytest.mark.parametrize("batch", [(), (2,)], ids=["unbatched", "two"])
@pytest.mark.parametrize("with_state", [True, False])
def test_transforms(batch, with_state):
    theirs, ours = pair(**F64)
    x, h, c = (torch.randn(*batch, size, **F64) for size in (3, 5, 5))

    def total(module, x):
        h2, c2 = module(x, (h, c)) if with_state else module(x)
        return (h2 * c2).sum()

    for transform in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(transform(total, 1)(ours, x), transform(total, 1)(theirs, x))
    xs = torch.stack([x, 2 * x])
    one_by_one = torch.stack([torch.func.grad(total, 1)(theirs, x) for x in xs])
    torch.testing.assert_close(torch.vmap(torch.func.grad(total, 1), (None, 0))(ours, xs), one_by_one)


def test_an_empty_batch_that_is_differentiated():
    _, ours = pair()
    x = torch.zeros(0, 3, requires_grad=True)
    for found in (
        torch.func.grad(lambda x: ours(x)[0].sum())(x.detach()),
        *torch.autograd.grad(ours(x)[0].sum(), x, create_graph=True),
    ):
        assert found.shape == (0, 3)


@pytest.mark.parametrize("transformed", [False, True])
def test_a_step_that_is_differentiated_is_no_layer_of_one(transformed):
    """To make one of it, and it of that, takes half as many operators again."""
    _, ours = pair()
    x, h, c = (torch.randn(2, size, requires_grad=not transformed) for size in (3, 5, 5))
    y, c2 = ours(x, (h, c))
    with torch.profiler.profile() as profile:
        if transformed:
            torch.func.grad(lambda x: ours(x, (h, c))[0].sum())(x)
        else:
            torch.autograd.grad((y, c2), x, (torch.ones_like(y), torch.ones_like(c2)), create_graph=True)
    names = [event.name for event in profile.events()]
    assert names.count("aten::cat") == 1  # of the four gates
    assert not {"aten::to", "aten::stack", "aten::select", "aten::unsqueeze", "aten::split_with_sizes"} & {*names}
