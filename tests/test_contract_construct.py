"""Construction and state: what torch.nn.LSTM and LSTMCell raise, print, store and restore, ours do too."""

import copy
import io
import pickle
import warnings
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
import torch.multiprocessing  # registers how tensors are shared
from torch import nn

import lstm_fast

CLASSES = [(nn.LSTM, lstm_fast.LSTM), (nn.LSTMCell, lstm_fast.LSTMCell)]
CONFIGS = [
    {},
    {"num_layers": 2, "bias": False, "batch_first": True, "dropout": 0.25, "bidirectional": True, "proj_size": 2},
    {"num_layers": 3, "proj_size": 1},
]


def outcome(call):
    """The type and text of what ``call`` raises or warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            call()
        except Exception as error:
            return type(error), str(error)
    return [(w.category, str(w.message)) for w in caught]


@pytest.mark.parametrize(
    "arguments",
    [
        {"dropout": None},
        {"dropout": "abc"},
        {"dropout": "0.5"},
        {"dropout": True},
        {"dropout": 1.5},
        {"dropout": float("nan")},
        {"dropout": torch.tensor(0.5)},
        {"dropout": 0.5},
        {"bias": 1},
        {"bias": None},
        {"batch_first": 0},
        {"input_size": 3.0},
        {"input_size": np.int64(3)},
        {"input_size": 0},
        {"hidden_size": 5.0},
        {"hidden_size": -1},
        {"num_layers": 0},
        {"num_layers": "2"},
        {"num_layers": 1.5},
        {"proj_size": -1},
        {"proj_size": 5},
        {"dtype": torch.int32},
        # two faults: the first that torch looks for
        {"dropout": 2.0, "bias": 0},
        {"bias": 0, "batch_first": 0},
        {"batch_first": 0, "input_size": 0},
        {"input_size": 0, "hidden_size": 0.0},
        {"hidden_size": 0, "num_layers": 0},
        {"num_layers": 0, "proj_size": -1},
    ],
    ids=str,
)
def test_bad_arguments_raise_what_torch_raises(arguments):
    arguments = {"input_size": 3, "hidden_size": 5, **arguments}
    expected = outcome(lambda: nn.LSTM(**arguments))
    assert expected or torch.__version__ < "2.11"  # older ones check less
    assert outcome(lambda: lstm_fast.LSTM(**arguments)) == expected


@pytest.mark.parametrize("call", [lambda c: c(3), lambda c: c(3, 5, nonlinearity="relu"), lambda c: c(*[1] * 12)])
def test_wrong_arity_is_a_type_error(call):
    for cls in (nn.LSTM, lstm_fast.LSTM):
        with pytest.raises(TypeError):
            call(cls)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_same_names_values_random_state_and_repr(config):
    found = []
    for cls in (nn.LSTM, lstm_fast.LSTM):
        torch.manual_seed(7)
        module = cls(3, 5, **config)
        found.append((module, torch.rand(1)))
    (theirs, after_theirs), (ours, after_ours) = found
    assert torch.equal(after_theirs, after_ours)
    assert [*theirs.state_dict()] == [*ours.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert repr(theirs) == repr(ours)
    for name in ("mode", *theirs.__constants__):
        assert getattr(theirs, name) == getattr(ours, name)
    assert [[w.shape for w in layer] for layer in theirs.all_weights] == [
        [w.shape for w in p] for p in ours.all_weights
    ]
    torch.manual_seed(1)
    theirs.reset_parameters()
    torch.manual_seed(1)
    ours.reset_parameters()
    assert torch.equal(theirs.weight_hh_l0, ours.weight_hh_l0)


def test_all_arguments_are_positional_in_torchs_order():
    values = (3, 5, 2, False, True, 0.5, True, 2, "cpu", torch.float64)
    assert repr(lstm_fast.LSTM(*values)) == repr(nn.LSTM(*values))
    assert lstm_fast.LSTM(*values).weight_ih_l0.dtype == torch.float64


def test_defaults_of_dtype_and_device_are_honoured():
    torch.set_default_dtype(torch.float64)
    try:
        assert lstm_fast.LSTM(2, 3).weight_ih_l0.dtype == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.device("meta"):
        assert lstm_fast.LSTM(2, 3).weight_ih_l0.is_meta
    assert nn.utils.skip_init(lstm_fast.LSTM, 2, 3).weight_hh_l0.shape == (12, 3)
    assert isinstance(lstm_fast.LSTM(2, 3), nn.RNNBase)


def test_repr_names_a_backend_that_was_asked_for():
    assert repr(lstm_fast.LSTM(3, 5, bias=False, backend="cpu")) == "LSTM(3, 5, bias=False, backend='cpu')"
    assert repr(lstm_fast.LSTMCell(3, 5, backend="reference")) == "LSTMCell(3, 5, backend='reference')"


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (3, 5, "bias"), (-1, 5), (3, -1), (3.0, 5)], ids=str)
def test_cells_check_as_little_as_torchs(sizes):
    def described(cls):
        try:
            module = cls(*sizes)
        except Exception as error:
            return type(error), str(error)
        return repr(module), [p.shape for p in module.parameters()]

    assert described(lstm_fast.LSTMCell) == described(nn.LSTMCell)


@pytest.mark.parametrize("bias", [True, False])
def test_cells_are_alike(bias):
    found = []
    for cls in (nn.LSTMCell, lstm_fast.LSTMCell):
        torch.manual_seed(7)
        found.append(cls(3, 5, bias))
    theirs, ours = found
    assert repr(theirs) == repr(ours)
    assert [*theirs.state_dict()] == [*ours.state_dict()]
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    assert (ours.bias_ih is None) == (not bias)


@pytest.mark.parametrize("plain, fast", CLASSES, ids=["LSTM", "LSTMCell"])
def test_state_dict_goes_both_ways(plain, fast):
    theirs, ours = plain(3, 5), fast(3, 5)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.state_dict()[next(iter(ours.state_dict()))], next(iter(theirs.state_dict().values())))
    fresh = plain(3, 5)
    fresh.load_state_dict(ours.state_dict(), assign=True)
    assert torch.equal(next(fresh.parameters()), next(theirs.parameters()))
    with pytest.raises(RuntimeError, match="Missing key"):
        ours.load_state_dict({})


def _through_torch_save(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _through_torch_multiprocessing(module):
    return pickle.loads(bytes(ForkingPickler.dumps(module)))


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        copy.copy,
        lambda m: pickle.loads(pickle.dumps(m)),
        _through_torch_save,
        _through_torch_multiprocessing,
    ],
)
def test_copies_compute_the_same_and_train(clone):
    module = lstm_fast.LSTM(3, 5, 2, bidirectional=True, backend="reference")
    x = torch.randn(4, 2, 3)
    copied = clone(module)
    assert copied.backend == "reference" and torch.equal(copied(x)[0], module(x)[0])
    copied(x)[0].sum().backward()
    assert copied.weight_hh_l1_reverse.grad is not None


def test_old_pickles_without_proj_size_load():
    state = lstm_fast.LSTM(3, 5).__getstate__()
    del state["proj_size"]
    old = lstm_fast.LSTM.__new__(lstm_fast.LSTM)
    old.__setstate__(state)
    assert old.proj_size == 0 and old(torch.randn(2, 1, 3))[0].shape == (2, 1, 5)


def test_pickles_older_than_1_4_load():
    """Their ``all_weights`` held the tensors themselves."""
    made = lstm_fast.LSTM(3, 5, 2)
    derived = ("_flat_weights", "_flat_weights_names", "_flat_weight_refs", "_all_weights", "proj_size")
    state = {name: value for name, value in vars(made).items() if name not in derived}
    old = lstm_fast.LSTM.__new__(lstm_fast.LSTM)
    old.__setstate__({**state, "all_weights": made.all_weights})
    x = torch.randn(4, 2, 3)
    assert torch.equal(old(x)[0], made(x)[0])


@pytest.mark.parametrize("flag", ["overwrite", "swap"])
def test_conversion_under_torchs_future_flags(flag):
    module, oracle = lstm_fast.LSTM(3, 5), nn.LSTM(3, 5, dtype=torch.float64)
    oracle.load_state_dict(module.state_dict())
    x = torch.randn(4, 2, 3, dtype=torch.float64)
    switch = getattr(torch.__future__, f"set_{flag}_module_params_on_conversion")
    switch(True)
    try:
        torch.testing.assert_close(module.double()(x)[0], oracle(x)[0])
    finally:
        switch(False)
    assert module._flat_weights[1] is module.weight_hh_l0


def test_meta_then_real():
    module = lstm_fast.LSTM(3, 5, device="meta")
    weights = nn.LSTM(3, 5)
    module.load_state_dict(weights.state_dict(), assign=True)
    x = torch.randn(4, 2, 3)
    torch.testing.assert_close(module(x)[0], weights(x)[0])
    other = lstm_fast.LSTM(3, 5, device="meta").to_empty(device="cpu")
    other.load_state_dict(weights.state_dict())
    assert torch.equal(other(x)[0], module(x)[0])


def test_conversion_keeps_the_parameters_and_uses_the_new_values():
    module = lstm_fast.LSTM(3, 5)
    before = [id(p) for p in module.parameters()]
    module.double()
    assert [id(p) for p in module.parameters()] == before
    assert module(torch.randn(2, 1, 3, dtype=torch.float64))[0].dtype == torch.float64
    module.share_memory()
    assert module.weight_hh_l0.is_shared()


@pytest.fixture
def one_process(tmp_path):
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("packed", [False, True])
def test_distributed_data_parallel_reduces_every_gradient(packed):
    theirs, ours = nn.LSTM(3, 5), lstm_fast.LSTM(3, 5)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(4, 2, 3)
    x = nn.utils.rnn.pack_padded_sequence(x, [4, 2]) if packed else x
    for module in (theirs, nn.parallel.DistributedDataParallel(ours)):
        y, (h, c) = module(x)
        (y.data.square().sum() + h.sum() + c.sum()).backward()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
