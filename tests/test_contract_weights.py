"""Weights are read anew on each call: replaced, parametrised, pruned, tied or handed in, as with torch.nn.LSTM."""

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations, parametrize, prune

import lstm_fast
from lstm_fast.autograd import layer

X = torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0))


def pair(**config):
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, **config)
    ours = lstm_fast.LSTM(3, 5, **config)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def step(module):
    """Two steps of an optimiser around the module: its outputs before and after, and the last gradients."""
    outputs = []
    for _ in range(2):
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        optimiser.zero_grad()
        y = module(X)[0]
        outputs.append(y.detach())
        y.square().sum().backward()
        optimiser.step()
    return outputs, {name: p.grad for name, p in module.named_parameters()}


class Halve(nn.Module):
    def forward(self, w):
        return w / 2


CHANGES = {
    "weight_norm": lambda m: parametrizations.weight_norm(m, "weight_hh_l0"),
    "spectral_norm": lambda m: parametrizations.spectral_norm(m, "weight_hh_l0"),
    "orthogonal": lambda m: parametrizations.orthogonal(m, "weight_hh_l0"),
    "old weight_norm": lambda m: nn.utils.weight_norm(m, "weight_hh_l0"),
    "old spectral_norm": lambda m: nn.utils.spectral_norm(m, "weight_hh_l0"),
    "prune": lambda m: prune.l1_unstructured(m, "weight_ih_l0", 0.4),
    "parametrize": lambda m: parametrize.register_parametrization(m, "bias_ih_l0", Halve()),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_parametrisations_and_pruning(change):
    found = []
    for module in pair():
        torch.manual_seed(1)
        change(module)
        found.append(step(module))
    torch.testing.assert_close(found[1], found[0])


class Drop(nn.Module):
    def forward(self, w):
        return nn.functional.dropout(w, 0.5)


class Float(nn.Module):
    def forward(self, w):
        return w.float()


@pytest.mark.parametrize("name", ["weight_ih", "weight_hh", "bias_ih"])
def test_a_parametrised_weight_is_computed_once_a_call(name):
    """As torch.nn.LSTMCell does; torch.nn.LSTM takes four draws of each."""
    found = []
    for cls in (nn.LSTMCell, lstm_fast.LSTMCell):
        torch.manual_seed(0)
        cell = cls(3, 5)
        parametrize.register_parametrization(cell, name, Drop())
        found.append((cell(X[0])[0], torch.rand(1)))
    torch.testing.assert_close(found[1], found[0])
    module = lstm_fast.LSTM(3, 5)
    parametrize.register_parametrization(module, f"{name}_l0", Drop())
    torch.manual_seed(1)
    module(X, (torch.zeros(1, 2, 5), torch.zeros(1, 2, 5)))
    after = torch.rand(1)
    torch.manual_seed(1)
    getattr(module, f"{name}_l0")
    assert torch.equal(after, torch.rand(1))


def test_a_weight_kept_in_another_dtype():
    theirs, ours = pair()
    for module in (theirs, ours):
        for name in ("weight_ih_l0", "weight_hh_l0"):
            getattr(module, name).data = getattr(module, name).data.bfloat16()
            parametrize.register_parametrization(module, name, Float(), unsafe=True)
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])


def test_cached_and_removed_parametrisations():
    theirs, ours = pair()
    for module in (theirs, ours):
        parametrizations.weight_norm(module, "weight_hh_l0")
    assert type(ours).__name__ == "ParametrizedLSTM"
    with parametrize.cached():
        torch.testing.assert_close(ours(X)[0], theirs(X)[0])
    parametrize.remove_parametrizations(ours, "weight_hh_l0")
    assert type(ours) is lstm_fast.LSTM
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])
    prune.random_unstructured(ours, "weight_hh_l0", 0.5)
    pruned = ours(X)[0]
    prune.remove(ours, "weight_hh_l0")
    assert torch.equal(ours(X)[0], pruned)


REPLACEMENTS = {
    "parameter": lambda m, w: setattr(m, "weight_hh_l0", nn.Parameter(w)),
    "deleted and set": lambda m, w: (delattr(m, "weight_hh_l0"), setattr(m, "weight_hh_l0", w)),
    "data": lambda m, w: setattr(m.weight_hh_l0, "data", w),
    "copy": lambda m, w: m.weight_hh_l0.data.copy_(w),
    "register": lambda m, w: m.register_parameter("weight_hh_l0", nn.Parameter(w)),
    "dictionary": lambda m, w: m._parameters.__setitem__("weight_hh_l0", nn.Parameter(w)),
    "strided": lambda m, w: setattr(m, "weight_hh_l0", nn.Parameter(w.t().contiguous().t())),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS.keys())
def test_replaced_weights_are_used_at_once(replace):
    theirs, ours = pair()
    before = ours(X)[0]
    w = torch.randn(20, 5)
    for module in (theirs, ours):
        replace(module, w.clone())
    torch.testing.assert_close(ours(X)[0], theirs(X)[0])
    assert not torch.equal(ours(X)[0], before)


def test_a_deleted_weight_is_missed_and_a_wrong_shape_refused():
    _, ours = pair()
    ours.weight_hh_l0 = nn.Parameter(torch.randn(20, 4))
    with pytest.raises(RuntimeError, match=r"weight_hh should have size \[20, 5\], got \[20, 4\]"):
        ours(X)
    with pytest.raises(TypeError, match="cannot assign"):
        pair()[1].weight_hh_l0 = torch.randn(20, 5)
    del ours.weight_hh_l0
    with pytest.raises(AttributeError):
        ours(X)


def test_a_weight_made_of_another_is_differentiable_to_its_source():
    theirs, ours = pair()
    source = torch.randn(20, 5, requires_grad=True)
    found = []
    for module in (theirs, ours):
        del module.weight_hh_l0
        module.weight_hh_l0 = source * 2
        found.append(torch.autograd.grad(module(X)[0].sum(), source)[0])
    torch.testing.assert_close(found[1], found[0])


def test_functional_call_leaves_nothing_behind():
    theirs, ours = pair()
    before = ours(X)[0]
    for names in (["weight_hh_l0"], [name for name, _ in ours.named_parameters()]):
        weights = {name: torch.randn_like(p) for name, p in ours.named_parameters() if name in names}
        torch.testing.assert_close(functional_call(ours, weights, (X,))[0], functional_call(theirs, weights, (X,))[0])
    assert torch.equal(ours(X)[0], before)
    assert torch.equal(copy.deepcopy(ours)(X)[0], before)


def test_tied_weights():
    first, second = lstm_fast.LSTM(3, 5), lstm_fast.LSTM(3, 5)
    second.weight_hh_l0 = first.weight_hh_l0
    (first(X)[0].sum() + second(X)[0].sum()).backward()
    alone = copy.deepcopy(first)
    alone.zero_grad()
    alone(X)[0].sum().backward()
    assert not torch.allclose(first.weight_hh_l0.grad, alone.weight_hh_l0.grad)
    tied = lstm_fast.LSTM(3, 5, bidirectional=True)
    tied.weight_hh_l0_reverse = tied.weight_hh_l0
    tied.flatten_parameters()
    assert tied(X)[0].shape == (4, 2, 10)


def test_flatten_parameters_is_harmless_and_may_be_replaced():
    _, ours = pair()
    before = ours(X)[0]
    assert ours.flatten_parameters() is None
    ours.flatten_parameters = lambda: None
    assert torch.equal(ours(X)[0], before)
    replica = pair()[1]._replicate_for_data_parallel()
    assert torch.equal(replica._flat_weights[0], ours.weight_ih_l0)


def test_hooks_see_what_torchs_see():
    found = []
    for module in pair():
        seen = []
        module.register_forward_pre_hook(lambda m, args, seen=seen: seen.append([type(a) for a in args]))
        module.register_forward_hook(lambda m, args, out, seen=seen: seen.append((type(out), out[0].shape)))
        module.register_full_backward_hook(lambda m, gi, go, seen=seen: seen.append([type(g) for g in go]))
        module(X.clone().requires_grad_())[0].sum().backward()
        found.append(seen)
    assert found[1] == found[0] and len(found[1]) == 3


def test_helpers_that_subclasses_use():
    theirs, ours = pair(bidirectional=True, proj_size=2)
    x, order = torch.zeros(4, 2, 3), torch.tensor([1, 0])
    assert ours.get_expected_hidden_size(x, None) == theirs.get_expected_hidden_size(x, None) == (2, 2, 2)
    assert ours.get_expected_cell_size(x, None) == theirs.get_expected_cell_size(x, None) == (2, 2, 5)
    hx = (torch.randn(2, 2, 2), torch.randn(2, 2, 5))
    for a, b in zip(ours.permute_hidden(hx, order), hx, strict=True):
        assert torch.equal(a, b[:, order])
    ours.check_forward_args(x, hx, None)
    with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size \(2, 2, 5\)"):
        ours.check_forward_args(x, (hx[0], hx[0]), None)


def test_one_bias_without_the_other_is_refused():
    module = lstm_fast.LSTM(3, 5)
    w_ih, w_hh, b_ih, _ = module.parameters()
    state = torch.zeros(1, 2, 5)
    with pytest.raises(RuntimeError, match="bias_ih and bias_hh should both be given, or neither"):
        layer(torch.zeros(4, 3), state, state, [(w_ih, w_hh, b_ih, None, None)], None, "cpu")
