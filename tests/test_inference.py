"""One call from Python to C++ for inference, and for a layer's forward pass in training (csrc/module_calls.h): what
takes it, what doesn't, and that both ways agree."""

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.utils.flop_counter import FlopCounterMode

import lstm_fast
from lstm_fast import lstm as module_file
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
    without,
)

pytestmark = needs_exchange_api


BOUNDS = {
    torch.float64: (1e-12, 0),
    torch.float32: (1e-6, 0),
    torch.float16: (1e-2, 0),
    torch.bfloat16: (5e-2, 0),
}


def check(monkeypatch, answers, module, oracle, x, hx):
    """The one quick answer is torch's within bounds, and the longer way's bit by bit; what it was."""
    with torch.no_grad():
        got = module(x, hx)
        want = without(monkeypatch, lambda: module(x, hx))
        exact = oracle(doubled(x), doubled(hx))
    assert len(answers) == 1 and answers[0] is not None
    check_agreement(flat(got), flat(want), flat(exact), BOUNDS)
    return got


@given_or_zeros
@every_config
@pytest.mark.parametrize("shape", [(4, 2), (1, 1), (130, 3), (4,)], ids=str)
def test_an_lstm_gives_torchs_values_and_the_slower_ways_bits(answers, monkeypatch, config, shape, given):
    module, oracle = lstm_case(config)
    x = torch.randn(*shape, IN).to(module.weight_ih_l0.dtype)
    hx = lstm_state(module, shape[1] if len(shape) == 2 else None) if given else None
    got = check(monkeypatch, answers, module, oracle, x, hx)
    assert answers[0] is got and isinstance(got, tuple) and isinstance(got[1], tuple)


@given_or_zeros
@every_packing
@every_config
def test_packed_input_gives_torchs_values_and_the_slower_ways_bits(
    answers, monkeypatch, config, lengths, in_order, given
):
    module, oracle = lstm_case(config, batch_first=True)
    x = packed_input(module, lengths, in_order)
    hx = lstm_state(module, len(lengths)) if given and in_order else None
    y, _ = check(monkeypatch, answers, module, oracle, x, hx)
    assert type(y) is PackedSequence and all(a is b for a, b in zip(y[1:], x[1:], strict=True))


@given_or_zeros
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(2,), ()], ids=str)
def test_a_cell_gives_torchs_values_and_the_slower_ways_bits(answers, monkeypatch, shape, bias, given):
    module, oracle = cell_case(bias)
    hx = (torch.randn(*shape, H), torch.randn(*shape, H)) if given else None
    assert check(monkeypatch, answers, module, oracle, torch.randn(*shape, IN), hx) is answers[0]


@pytest.mark.parametrize("shape", [(1, 4), (3, 1)], ids=str)
def test_batch_first_is_served_where_rows_lie_step_by_step(answers, shape):
    module = lstm_fast.LSTM(IN, H, batch_first=True)
    twin = nn.LSTM(IN, H, batch_first=True)
    twin.load_state_dict(module.state_dict())
    x, hx = torch.randn(*shape, IN), lstm_state(module, shape[0])
    with torch.no_grad():
        torch.testing.assert_close(module(x, hx), twin(x, hx))
    assert answers[0] is not None


def test_results_own_their_memory_and_follow_changed_weights(answers):
    module, x = lstm_fast.LSTM(IN, H), torch.randn(1, 1, IN)
    with torch.no_grad():
        y, (h, c) = module(x)
        before = copy.deepcopy((y, h, c))
        y.zero_(), c.zero_()
        assert torch.equal(h, before[1])
        module.weight_hh_l0.data.mul_(2)  # of which no version counter hears
        module.bias_ih_l0.data += 1
        twin = nn.LSTM(IN, H)
        twin.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(x, before[1:]), twin(x, before[1:]))
    assert all(answer is not None for answer in answers)


def test_inference_mode_gives_inference_tensors(answers):
    module = lstm_fast.LSTM(IN, H)
    with torch.inference_mode():
        y, _ = module(torch.randn(4, 2, IN))
    assert y.is_inference() and answers[0] is not None


# ---- What stands aside ---------------------------------------------------------------------------------------------


def plain():
    return lstm_fast.LSTM(IN, H), nn.LSTM(IN, H)


def twins(ours, theirs):
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def normed():
    ours, theirs = twins(*plain())
    for module in (ours, theirs):
        torch.manual_seed(4)
        parametrizations.weight_norm(module, "weight_hh_l0")
    return ours, theirs


def strided():
    ours, theirs = twins(*plain())
    with torch.no_grad():
        ours.weight_hh_l0.set_(ours.weight_hh_l0.t().contiguous().t())
    return ours, theirs


ASIDE = {
    "input of other strides": (lambda: twins(*plain()), torch.randn(2, 4, IN).transpose(0, 1), None),
    "batch first": (
        lambda: twins(lstm_fast.LSTM(IN, H, batch_first=True), nn.LSTM(IN, H, batch_first=True)),
        torch.randn(2, 4, IN),
        None,
    ),
    "states in a list": (lambda: twins(*plain()), X, [torch.randn(1, 2, H), torch.randn(1, 2, H)]),
    "states of other strides": (lambda: twins(*plain()), X, (torch.randn(H, 2, 1).permute(2, 1, 0),) * 2),
    "weights of other strides": (strided, X, None),
    "parametrised": (normed, X, None),
}


@pytest.mark.parametrize("make, x, hx", ASIDE.values(), ids=ASIDE.keys())
def test_what_needs_a_longer_look_gets_it(answers, make, x, hx):
    ours, theirs = make()
    with torch.no_grad():
        torch.testing.assert_close(ours(x, hx), theirs(x, hx))
    assert answers == [None]


@pytest.mark.parametrize("sizes", [[2.0, 1.0], [1, 2], [2, 2], [3, 0], [[2, 1]], []], ids=str)
def test_batch_sizes_that_do_not_fit_are_not_taken(answers, sizes):
    packed = PackedSequence(torch.randn(3, IN), torch.tensor(sizes, dtype=None if sizes else torch.int64))
    with torch.no_grad(), pytest.raises(RuntimeError, match="batch_sizes should"):
        lstm_fast.LSTM(IN, H)(packed)
    assert answers == [None]


def test_states_of_a_packed_input_that_has_to_be_sorted_are_not_taken(answers):
    packed = pack_padded_sequence(X, [2, 4], enforce_sorted=False)
    ours, theirs = twins(*plain())
    hx = lstm_state(ours, 2)
    with torch.no_grad():
        torch.testing.assert_close(flat(ours(packed, hx)), flat(theirs(packed, hx)))
    assert answers == []


ungraded = torch.no_grad  # how the next ones call


def grad(module):
    return module(X)[0].sum().backward()


def autocast(module):
    with ungraded(), torch.autocast("cpu", torch.bfloat16):
        assert module(X)[0].dtype == torch.bfloat16


def mode(module):
    with ungraded(), FlopCounterMode(display=False):
        module(X)


def vmap(module):
    with ungraded():
        torch.func.vmap(lambda x: module(x)[0])(torch.stack([X, X]))


def trace(module):
    with ungraded():
        assert "aten::lstm" in str(torch.jit.trace(module, X, check_trace=False).inlined_graph)


def dual(module):
    with ungraded(), torch.autograd.forward_ad.dual_level():
        module(X)


def named(module):
    module.backend = "reference"
    with ungraded():
        module(X)


def of_environment(module):
    with pytest.MonkeyPatch.context() as patch, ungraded():
        patch.setenv("LSTM_FAST_BACKEND", "reference")
        module(X)


def subclass(module):
    class Own(torch.Tensor):
        pass

    with ungraded():
        module(X.as_subclass(Own))


@pytest.mark.parametrize(
    "call",
    [grad, autocast, mode, vmap, trace, dual, named, of_environment, subclass],
    ids=lambda c: c.__name__,
)
def test_who_needs_more_than_results_is_never_answered_in_haste(answers, trained, call):
    call(lstm_fast.LSTM(IN, H))
    assert answers == []
    assert (trained != []) == (call is grad)


@pytest.mark.parametrize("call", [autocast, mode, vmap, trace, dual, named, of_environment, subclass])
def test_nor_is_it_in_training(answers, trained, monkeypatch, call):
    monkeypatch.setitem(globals(), "ungraded", contextlib.nullcontext)
    call(lstm_fast.LSTM(IN, H))
    assert answers == [] and trained == []


@pytest.mark.parametrize("layers", [1, 2])
def test_what_has_to_be_dropped_takes_the_longer_way(answers, trained, layers):
    """Between layers alone, as in nn.LSTM."""
    module = lstm_fast.LSTM(IN, H, layers, dropout=1.0 if layers == 2 else 0.0)
    module.dropout = 1.0
    y, _ = module(X)
    with torch.no_grad():
        module(X)
    assert [found is None for found in (*trained, *answers)] == [layers == 2] * 2
    if layers == 2:  # all but the biases is dropped: steps of a sequence differ by the states alone
        assert torch.equal(y[0, 0], y[0, 1])


@pytest.mark.parametrize("flag, value", [("dropout", 1.0), ("training", True), ("batch_first", True)])
@pytest.mark.parametrize("grad", [False, True])
def test_flags_that_a_subclass_computes_count(flag, value, grad):
    class Own(lstm_fast.LSTM):
        pass

    setattr(Own, flag, property(lambda self: value, lambda self, given: None))
    first = flag == "batch_first"
    p = 0.0 if first else 1.0  # what is dropped takes the longer way anyhow
    module, plain = Own(IN, H, 2, dropout=p), lstm_fast.LSTM(IN, H, 2, dropout=p, batch_first=first)
    plain.load_state_dict(module.state_dict())
    with torch.set_grad_enabled(grad):
        for found, expected in zip(flat(module(X)), flat(plain(X)), strict=True):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("kind, x", [(lstm_fast.LSTM, X), (lstm_fast.LSTMCell, X[0])], ids=["LSTM", "LSTMCell"])
@pytest.mark.parametrize("grad", [False, True])
def test_a_profiler_sees_each_layer(kind, x, grad):
    module = kind(IN, H)
    with torch.set_grad_enabled(grad), torch.profiler.profile() as profile:
        y = module(x)[0]
        if grad:
            y.sum().backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["lstm_fast::layer"] == 1
    assert counts.get("LayerFunctionBackward", 0) == grad


def test_where_torch_is_measured_to_be_faster_it_serves(answers, monkeypatch):
    monkeypatch.setattr(module_file, "surely_cpu", lambda *_: False)
    with torch.no_grad():
        lstm_fast.LSTM(IN, H)(X)
    assert answers == []


WRONG = {
    "features": (torch.randn(4, 2, IN + 1), None),
    "dtype": (X.double(), None),
    "dimensions": (torch.randn(1, 4, 2, IN), None),
    "no steps": (torch.randn(0, 2, IN), None),
    "states' batch": (X, (torch.randn(1, 3, H), torch.randn(1, 3, H))),
    "states' features": (X, (torch.randn(1, 2, H), torch.randn(1, 2, H + 1))),
    "states' dimensions": (X, (torch.randn(2, H), torch.randn(2, H))),
    "states' dtype": (X, (torch.randn(1, 2, H).double(), torch.randn(1, 2, H).double())),
    "one state": (X, (torch.randn(1, 2, H),)),
}


@pytest.mark.parametrize("x, hx", WRONG.values(), ids=WRONG.keys())
def test_what_is_wrong_is_said_as_with_gradients(x, hx):
    module = lstm_fast.LSTM(IN, H)
    with pytest.raises(Exception) as with_gradients:
        module(x, hx)
    with torch.no_grad(), pytest.raises(with_gradients.type) as without_gradients:
        module(x, hx)
    assert str(without_gradients.value) == str(with_gradients.value)


@pytest.mark.parametrize("name", ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"])
def test_a_weight_of_the_wrong_size_is_refused(name):
    module = lstm_fast.LSTM(IN, H)
    weight = getattr(module, name)
    setattr(module, name, nn.Parameter(torch.randn(weight.size(0) - 1, *weight.shape[1:])))
    with torch.no_grad(), pytest.raises(RuntimeError, match=name[:-3]):
        module(X)


def test_a_module_that_was_changed_by_hand_is_not_answered_in_haste(answers):
    module = lstm_fast.LSTM(IN, H)
    module.bidirectional = True
    with torch.no_grad(), pytest.raises(RuntimeError, match="weight_ih of direction 1 of 2 should be given, got None"):
        module(X)
    module = lstm_fast.LSTM(IN, H)
    module._all_weights = [[*module._all_weights[0], "weight_hr_l0", "weight_more_l0"]]
    with torch.no_grad(), pytest.raises((AttributeError, ValueError)):
        module(X)
    assert answers == [None, None]


def test_calls_side_by_side_give_what_one_alone_gives():
    module = lstm_fast.LSTM(IN, 64, num_layers=2)
    xs = [torch.randn(50, 2, IN) for _ in range(4)]
    with torch.no_grad():
        want = [module(x)[0] for x in xs]
    wrong = []

    def work(index):
        with torch.no_grad():
            for _ in range(30):
                if not torch.equal(module(xs[index])[0], want[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(xs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
