"""``replace`` and ``restore`` change a class, and nothing else."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import lstm_fast


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.ModuleDict({"a": nn.LSTM(3, 4, 2, bidirectional=True)})
        self.cell = nn.LSTMCell(8, 5)
        self.again = self.encoder["a"]

    def forward(self, x):
        return self.cell(self.again(x)[0][-1])[0]


X = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))


def test_in_place_with_the_same_objects_and_back():
    model = Tagger()
    before, modules = model(X), [*model.modules()]
    parameters = dict(model.named_parameters())
    assert lstm_fast.replace(model) is model
    assert type(model.encoder["a"]) is lstm_fast.LSTM and type(model.cell) is lstm_fast.LSTMCell
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True)) and model.again is model.encoder["a"]
    assert all(p is parameters[name] for name, p in model.named_parameters())
    torch.testing.assert_close(model(X), before)
    assert lstm_fast.restore(model) is model
    assert type(model.encoder["a"]) is nn.LSTM and type(model.cell) is nn.LSTMCell
    assert torch.equal(model(X), before)


def test_a_module_that_is_the_model():
    lstm = nn.LSTM(3, 4)
    before = lstm(X)[0]
    torch.testing.assert_close(lstm_fast.replace(lstm)(X)[0], before)
    assert isinstance(lstm, lstm_fast.LSTM) and type(lstm_fast.restore(lstm)) is nn.LSTM


def test_optimiser_and_hooks_go_on():
    model = Tagger()
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    calls = []
    model.cell.register_forward_hook(lambda *a: calls.append(1))
    lstm_fast.replace(model)
    before = model.cell.weight_ih.detach().clone()
    model(X).square().sum().backward()
    optimiser.step()
    assert calls and not torch.equal(model.cell.weight_ih, before)


def test_a_replaced_model_copies_and_keeps_its_state_dict():
    model = lstm_fast.replace(Tagger())
    twin = copy.deepcopy(model)
    assert type(twin.cell) is lstm_fast.LSTMCell and torch.equal(twin(X), model(X))
    assert [*model.state_dict()] == [*Tagger().state_dict()]


def test_an_explicit_backend_does_not_outlive_restore():
    model = nn.Sequential(lstm_fast.LSTM(3, 4, backend="reference"))
    lstm_fast.restore(model)
    assert type(model[0]) is nn.LSTM and "backend" not in vars(model[0])
    assert lstm_fast.replace(model)[0].backend == "auto"


def test_parametrised_ones_too():
    model = nn.Sequential(nn.LSTM(3, 4))
    parametrizations.weight_norm(model[0], "weight_hh_l0")
    before = model(X)[0]
    lstm_fast.replace(model)
    assert isinstance(model[0], lstm_fast.LSTM) and type(model[0]).__name__ == "ParametrizedLSTM"
    torch.testing.assert_close(model(X)[0], before)
    model(X)[0].sum().backward()
    assert model[0].parametrizations.weight_hh_l0.original0.grad is not None
    lstm_fast.restore(model)
    assert isinstance(model[0], nn.LSTM) and torch.equal(model(X)[0], before)


@pytest.mark.parametrize("swap", [lstm_fast.replace, lstm_fast.restore])
def test_subclasses_with_code_of_their_own_are_left_alone(swap):
    class Own(nn.LSTM):
        def forward(self, input, hx=None):
            return input

    class OwnFast(lstm_fast.LSTM):
        pass

    model = swap(nn.Sequential(Own(3, 4), nn.GRU(3, 4), OwnFast(3, 4)))
    assert [type(m) for m in model] == [Own, nn.GRU, OwnFast]


@pytest.mark.parametrize("kind", ["LSTM", "LSTMCell"])
def test_a_forward_that_is_wrapped_follows(kind):
    """As libraries wrap it that move a module's tensors before each call: the old one is kept in an attribute."""
    module = getattr(nn, kind)(3, 5)
    module._old_forward = module.forward
    calls = []

    def forward(*args):
        calls.append(module._old_forward.__func__)
        return module._old_forward(*args)

    module.forward = forward
    x = torch.randn(2, 4, 3) if kind == "LSTM" else torch.randn(4, 3)
    for swap in (lstm_fast.replace, lstm_fast.restore):
        module(x)
        swap(module)
    module(x)
    plain, fast = getattr(nn, kind).forward, getattr(lstm_fast, kind).forward
    assert calls == [plain, fast, plain]
