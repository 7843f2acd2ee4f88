"""What tests of the quick way from Python to the CPU's kernel (csrc/module_calls.h) share: cases, and who was asked."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import lstm_fast
from lstm_fast import lstm as module_file
from lstm_fast.kernels import cpu

IN, H = 3, 5
X = torch.randn(4, 2, IN)


needs_exchange_api = pytest.mark.skipif(
    not hasattr(torch.Tensor, "__dlpack_c_exchange_api__"), reason="this torch has no exchange API"
)


def watched(monkeypatch, module, name):
    """What each call of the module's function gives from now on."""
    found = []

    def spy(*args):
        found.append(function(*args))
        return found[-1]

    function = getattr(module, name)
    monkeypatch.setattr(module, name, spy)
    return found


def without(monkeypatch, call):
    """``call()`` where the quick look never tells."""
    with monkeypatch.context() as patch:
        for module, name in ((module_file, "infer"), (module_file, "train"), (cpu, "train_backward")):
            patch.setattr(module, name, lambda *_: None)
        return call()


def flat(result):
    if isinstance(result, PackedSequence):
        return [result.data]
    return [result] if isinstance(result, torch.Tensor) else [t for part in result for t in flat(part)]


def check_agreement(got, want, exact, bounds):
    """Bit by bit the longer way's, and torch's in fp64 within the dtype's bounds: absolute, relative."""
    for a, b, c in zip(got, want, exact, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        absolute, relative = bounds[a.dtype]
        torch.testing.assert_close(a.double(), c, atol=absolute, rtol=relative)


def lstm_state(module, batch):
    count = module.num_layers * (2 if module.bidirectional else 1)
    features = module.proj_size or module.hidden_size
    dtype = module.weight_ih_l0.dtype
    middle = () if batch is None else (batch,)
    return torch.randn(count, *middle, features).to(dtype), torch.randn(count, *middle, H).to(dtype)


CONFIGS = {
    "one layer": {},
    "three layers": {"num_layers": 3},
    "both directions": {"bidirectional": True, "num_layers": 2},
    "projected": {"proj_size": 2, "num_layers": 2},
    "no bias": {"bias": False},
    "projected, no bias": {"bias": False, "proj_size": 2, "bidirectional": True},
    "dropout outside training": {"dropout": 0.5, "num_layers": 2},
    **{name: {"dtype": getattr(torch, name)} for name in ("float64", "bfloat16", "float16")},
}
PACKED = {"sorted": ([4, 4, 1], True), "unsorted": ([1, 4, 2], False), "one": ([3], True)}

every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
every_packing = pytest.mark.parametrize(("lengths", "in_order"), PACKED.values(), ids=PACKED.keys())
given_or_zeros = pytest.mark.parametrize("given", [False, True], ids=["zeros", "states"])


def in_double(module, kind):
    """torch's module with the same weights, which both ways are compared with; ``kind`` makes it."""
    oracle = kind(dtype=torch.float64).eval()
    oracle.load_state_dict({k: v.double() for k, v in module.state_dict().items()})
    return oracle


def doubled(value):
    """The same value in fp64, as a new leaf where it is one."""
    if value is None:
        return None
    if isinstance(value, PackedSequence):
        return PackedSequence(doubled(value.data), *value[1:])
    if isinstance(value, tuple):
        return tuple(doubled(t) for t in value)
    return value.detach().double().requires_grad_(value.requires_grad)


def lstm_case(config, batch_first=False):
    """A module, and torch's in fp64."""
    torch.manual_seed(0)
    module = lstm_fast.LSTM(IN, H, batch_first=batch_first, **config).eval()
    config = {k: v for k, v in config.items() if k != "dtype"}
    return module, in_double(module, partial(nn.LSTM, IN, H, batch_first=batch_first, **config))


def cell_case(bias):
    torch.manual_seed(0)
    module = lstm_fast.LSTMCell(IN, H, bias=bias, backend="cpu")
    return module, in_double(module, partial(nn.LSTMCell, IN, H, bias=bias))


def packed_input(module, lengths, in_order):
    x = torch.randn(max(lengths), len(lengths), IN).to(module.weight_ih_l0.dtype)
    return pack_padded_sequence(x, lengths, enforce_sorted=in_order)
