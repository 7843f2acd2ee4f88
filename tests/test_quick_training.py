"""Training by one call from Python to C++ forward and one backward, of a layer or of a cell: against torch in fp64,
and bit by bit against the longer way."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_fast
from lstm_fast.kernels import cpu
from tests.quick_case import CONFIGS, IN, PACKED, H, X, flat, lstm_state, packed_case, watched, without

pytestmark = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange API"
)


def gradients(module, x, hx, weights):
    """Outputs, and the gradients of everything that has one."""
    outputs = flat(module(x, hx))
    inputs = [t for t in (*flat(x), *(hx or ()), *module.parameters()) if t.requires_grad]
    loss = sum((out * weight).sum() for out, weight in zip(outputs, weights, strict=True))
    return [*outputs, *torch.autograd.grad(loss, inputs)]


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["steps first", "batch first"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_training_gives_torchs_gradients_and_the_slower_ways_bits(trained, monkeypatch, config, batch_first, given):
    torch.manual_seed(0)
    module = lstm_fast.LSTM(IN, H, batch_first=batch_first, **config).eval()
    x = torch.randn(2, 4, IN).to(module.weight_ih_l0.dtype).requires_grad_()
    hx = tuple(t.requires_grad_() for t in lstm_state(module, 2 if batch_first else 4)) if given else None
    weights = [torch.randn(out.shape).to(x.dtype) for out in flat(module(x, hx))]
    trained.clear()
    backward = watched(monkeypatch, cpu, "train_backward")
    got = gradients(module, x, hx, weights)
    taken = hx is None or module.num_layers == 1
    assert len(trained) == (module.num_layers if taken else 0) and None not in trained
    assert len(backward) == module.num_layers and None not in backward
    want = without(monkeypatch, lambda: gradients(module, x, hx, weights))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    oracle = nn.LSTM(IN, H, batch_first=batch_first, **(config | {"dtype": torch.float64})).eval()
    oracle.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    exact = gradients(
        oracle,
        x.detach().double().requires_grad_(),
        hx and tuple(t.detach().double().requires_grad_() for t in hx),
        [weight.double() for weight in weights],
    )
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[x.dtype]
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=bound)


def doubled(*tensors):
    return tuple(t.detach().double().requires_grad_() for t in tensors)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("lengths, in_order", PACKED.values(), ids=PACKED.keys())
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_packed_training_gives_torchs_gradients_and_the_slower_ways_bits(
    trained, monkeypatch, config, lengths, in_order, given
):
    module, packed, oracle = packed_case(lengths, in_order, config)
    x = PackedSequence(packed.data.requires_grad_(), *packed[1:])
    hx = tuple(t.requires_grad_() for t in lstm_state(module, len(lengths))) if given and in_order else None
    weights = [torch.randn(out.shape).to(x.data.dtype) for out in flat(module(x, hx))]
    trained.clear()
    backward = watched(monkeypatch, cpu, "train_backward")
    got = gradients(module, x, hx, weights)
    taken = hx is None or module.num_layers == 1
    assert len(trained) == (module.num_layers if taken else 0) and None not in trained
    assert len(backward) == module.num_layers and None not in backward
    want = without(monkeypatch, lambda: gradients(module, x, hx, weights))
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, want, strict=True))
    in_double = PackedSequence(*doubled(x.data), *packed[1:])
    exact = gradients(oracle, in_double, hx and doubled(*hx), [weight.double() for weight in weights])
    bound = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}[x.data.dtype]
    for a, b in zip(got, exact, strict=True):
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=bound)


@pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_cell_in_training_gives_torchs_gradients_and_the_slower_ways_bits(trained, monkeypatch, batch, bias, given):
    torch.manual_seed(0)
    module = lstm_fast.LSTMCell(IN, H, bias=bias, backend="cpu")
    oracle = nn.LSTMCell(IN, H, bias=bias).double()
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(batch, IN).requires_grad_()
    hx = tuple(torch.randn(batch, H).requires_grad_() for _ in range(2)) if given else None
    weights = [torch.randn(batch, H) for _ in range(2)]
    backward = watched(monkeypatch, cpu, "train_backward")
    got = gradients(module, x, hx, weights)
    assert len(trained) == len(backward) == 1 and trained[0] is not None and backward[0] is not None
    want = without(monkeypatch, lambda: gradients(module, x, hx, weights))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    exact = gradients(oracle, *doubled(x), hx and doubled(*hx), [weight.double() for weight in weights])
    for a, b in zip(got, exact, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b, atol=1e-6, rtol=1e-5)


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


def test_a_weight_that_another_has_replaced_before_the_backward_pass_is_refused(trained):
    module = lstm_fast.LSTM(IN, H)
    y, _ = module(X)
    assert trained[0] is not None
    module.weight_hh_l0.data = torch.randn(2, 2)  # of which no version counter hears
    with pytest.raises(RuntimeError, match="weight_hh should have size"):
        y.sum().backward()
