"""Training by one call from Python to C++ forward and one backward, of a layer or of a cell: against torch in fp64,
and bit by bit against the longer way."""

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence

import lstm_fast
from lstm_fast.kernels import cpu
from tests.quick_case import (
    IN,
    H,
    X,
    cell_case,
    check_agreement,
    doubled,
    every_config,
    every_packing,
    flat,
    given_or_zeros,
    lstm_case,
    lstm_state,
    needs_exchange_api,
    packed_input,
    watched,
    without,
)

pytestmark = needs_exchange_api


def gradients(module, x, hx, weights):
    """Outputs, and the gradients of everything that has one."""
    outputs = flat(module(x, hx))
    inputs = [t for t in (*flat(x), *(hx or ()), *module.parameters()) if t.requires_grad]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


# absolute, relative
BOUNDS = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-6, 1e-5),
    torch.float16: (2e-2, 2e-2),
    torch.bfloat16: (1e-1, 1e-1),
}


def check(monkeypatch, trained, module, oracle, x, hx, forward, backward):
    """Outputs and gradients are torch's within bounds and the longer way's bit by bit, after so many quick calls."""
    weights = [torch.randn(out.shape).to(out.dtype) for out in flat(module(x, hx))]
    trained.clear()
    answers = watched(monkeypatch, cpu, "train_backward")
    got = gradients(module, x, hx, weights)
    assert len(trained) == forward and None not in trained
    assert len(answers) == backward and None not in answers
    want = without(monkeypatch, lambda: gradients(module, x, hx, weights))
    exact = gradients(oracle, doubled(x), doubled(hx), [weight.double() for weight in weights])
    check_agreement(got, want, exact, BOUNDS)


def with_gradients(states):
    return tuple(t.requires_grad_() for t in states)


def check_lstm(monkeypatch, trained, module, oracle, x, hx):
    taken = hx is None or module.num_layers == 1
    check(monkeypatch, trained, module, oracle, x, hx, module.num_layers if taken else 0, module.num_layers)


def test_gradients_that_lie_otherwise_are_answered_too(monkeypatch):
    """As those of y.sum(), which are one number everywhere, and of y.permute(..)."""
    module, _ = lstm_case({})
    answers = watched(monkeypatch, cpu, "train_backward")
    for dy in torch.ones(1, 1, 1).expand(4, 2, H), torch.randn(H, 2, 4).permute(2, 1, 0):
        got, want = (torch.autograd.grad(module(X)[0], [*module.parameters()], g) for g in (dy, dy.contiguous()))
        assert all(map(torch.equal, got, want))
    assert len(answers) == 4 and None not in answers


@given_or_zeros
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@every_config
def test_training_gives_torchs_gradients_and_the_slower_ways_bits(trained, monkeypatch, config, batch_first, given):
    module, oracle = lstm_case(config, batch_first)
    x = torch.randn(2, 4, IN).to(module.weight_ih_l0.dtype).requires_grad_()
    hx = with_gradients(lstm_state(module, 2 if batch_first else 4)) if given else None
    check_lstm(monkeypatch, trained, module, oracle, x, hx)


@given_or_zeros
@every_packing
@every_config
def test_packed_training_gives_torchs_gradients_and_the_slower_ways_bits(
    trained, monkeypatch, config, lengths, in_order, given
):
    module, oracle = lstm_case(config, batch_first=True)
    packed = packed_input(module, lengths, in_order)
    hx = with_gradients(lstm_state(module, len(lengths))) if given and in_order else None
    x = PackedSequence(packed.data.requires_grad_(), *packed[1:])
    check_lstm(monkeypatch, trained, module, oracle, x, hx)


@given_or_zeros
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cell_in_training_gives_torchs_gradients_and_the_slower_ways_bits(trained, monkeypatch, batch, bias, given):
    module, oracle = cell_case(bias)
    hx = with_gradients(torch.randn(2, batch, H).unbind()) if given else None
    check(monkeypatch, trained, module, oracle, torch.randn(batch, IN).requires_grad_(), hx, 1, 1)


def test_a_cells_backward_pass_by_every_other_way(trained, monkeypatch):
    cell = lstm_fast.LSTMCell(IN, H, backend="cpu").double()
    x, h, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (IN, H, H))
    assert torch.autograd.gradgradcheck(lambda x, h, c: cell(x, (h, c)), (x, h, c))
    assert None not in trained and len(trained) > 0
    _, c_new = cell(x, (h, c))  # h' without a gradient
    (want,) = torch.autograd.grad(c_new.sum(), h, retain_graph=True)
    (batched,) = torch.autograd.grad(c_new, h, torch.ones(3, 2, H, dtype=torch.float64), is_grads_batched=True)
    torch.testing.assert_close(batched, want.expand(3, 2, H))
    h_new, _ = cell(x, (h, c))
    (want,) = torch.autograd.grad(h_new.sum(), c, retain_graph=True)
    monkeypatch.setattr(cpu, "train_backward", lambda *_: None)  # as where what was saved came back otherwise
    (got,) = torch.autograd.grad(h_new.sum(), c)
    assert torch.equal(got, want) and got.shape == c.shape


def test_a_frozen_module_saves_nothing(answers, trained):
    module = lstm_fast.LSTM(IN, H).requires_grad_(False)
    assert not module(X)[0].requires_grad and answers[0] is not None and trained == []
    assert module(X.clone().requires_grad_())[0].requires_grad and trained[0] is not None
    assert (
        module(X, tuple(t.requires_grad_() for t in lstm_state(module, 2)))[0].requires_grad and trained[1] is not None
    )


def test_second_derivatives_and_a_second_backward_pass_after_a_quick_call(trained):
    module, x = lstm_fast.LSTM(IN, H).double(), X.double().requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: module(x)[0], x)
    assert trained[0] is not None
    y = module(x)[0].sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    assert torch.equal(first, second)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("rows", [400, 1], ids=["more rows", "fewer"])
@pytest.mark.parametrize("cell", [False, True], ids=["layer", "cell"])
def test_an_input_that_another_has_replaced_before_the_backward_pass_is_refused(trained, cell, rows):
    """What was saved has the rows of the forward pass, and would be read behind its end."""
    module = lstm_fast.LSTMCell(IN, H, backend="cpu") if cell else lstm_fast.LSTM(IN, H)
    x = (X[0] if cell else X).clone().requires_grad_()
    y = module(x)[0]
    assert trained[0] is not None
    x.data = torch.randn(rows, *x.shape[1:])
    with pytest.raises(RuntimeError, match="input and output should have kept their sizes"):
        y.sum().backward()


def test_nor_may_all_else_have_become_wider(trained):
    """Weights and states that fit each other, but not what was saved."""
    module, wider = lstm_fast.LSTM(IN, H), lstm_fast.LSTM(IN, H + 1)
    hx = lstm_state(module, 2)
    y = module(X, hx)[0]
    assert trained[0] is not None
    replaced = [
        *zip(module.parameters(), wider.parameters(), strict=True),
        *((t, torch.randn(1, 2, H + 1)) for t in hx),
    ]
    for old, new in replaced:
        old.data = new.data
    with pytest.raises(RuntimeError, match="input and output should have kept their sizes"):
        y.sum().backward()


def test_a_weight_that_another_has_replaced_before_the_backward_pass_is_refused(trained):
    module = lstm_fast.LSTM(IN, H)
    y, _ = module(X)
    assert trained[0] is not None
    module.weight_hh_l0.data = torch.randn(2, 2)  # of which no version counter hears
    with pytest.raises(RuntimeError, match="weight_hh should have size"):
        y.sum().backward()
