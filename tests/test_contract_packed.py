"""PackedSequence: torch's values, order of states, index objects; errors where torch truncates or reads on."""

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import lstm_fast

F64 = {"dtype": torch.float64}


def pair(backend="auto", **config):
    torch.manual_seed(0)
    theirs = nn.LSTM(3, 5, **config, **F64)
    ours = lstm_fast.LSTM(3, 5, **config, **F64, backend=backend)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 4], [4, 4, 4], [1]], ids=str)
@pytest.mark.parametrize("layers, both", [(1, False), (2, True)])
@pytest.mark.parametrize("with_state", [True, False])
@pytest.mark.parametrize("proj", [0, 2])
def test_values_gradients_and_order(backend, lengths, layers, both, with_state, proj):
    config = {"num_layers": layers, "bidirectional": both, "proj_size": proj, "batch_first": True}
    theirs, ours = pair("auto" if proj and backend == "cpu" else backend, **config)
    batch, count = len(lengths), layers * (1 + both)
    padded = torch.randn(batch, max(lengths), 3, **F64)
    for row, length in zip(padded, lengths, strict=True):
        row[length:] = float("nan")  # padding never enters
    hx = [torch.randn(count, batch, proj or 5, **F64), torch.randn(count, batch, 5, **F64)]
    found = []
    for module in (theirs, ours):
        x, h0, c0 = (t.clone().requires_grad_() for t in (padded, *hx))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, (h_n, c_n) = module(packed, (h0, c0) if with_state else None)
        assert isinstance(y, PackedSequence)
        assert all(a is b for a, b in zip(y[1:], packed[1:], strict=True))
        loss = y.data.square().sum() + h_n.cos().sum() + c_n.sin().sum()
        wanted = [x, *module.parameters(), *([h0, c0] if with_state else [])]
        grads = torch.autograd.grad(loss, wanted)
        assert not grads[0].isnan().any()
        found.append([y.data, h_n, c_n, *grads])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(b, a, rtol=0, atol=1e-12)


def test_sorted_input_has_no_indices_and_states_are_each_sequences_last():
    _, ours = pair()
    lengths = [5, 3, 2]
    packed = pack_padded_sequence(torch.randn(5, 3, 3, **F64), lengths)
    y, (h_n, _) = ours(packed)
    assert y.sorted_indices is None and y.unsorted_indices is None
    padded, _ = pad_packed_sequence(y)
    for b, length in enumerate(lengths):
        assert torch.equal(h_n[0, b], padded[length - 1, b])


def test_dropout_masks_are_torchs():
    config = {"num_layers": 3, "dropout": 0.5, "bidirectional": True}
    theirs, ours = pair(**config)
    packed = pack_padded_sequence(torch.randn(6, 3, 3, **F64), [2, 6, 3], enforce_sorted=False)
    found = []
    for module in (theirs, ours):
        torch.manual_seed(3)
        found.append((module(packed)[0].data, torch.rand(1)))
    torch.testing.assert_close(found[1][0], found[0][0])
    assert torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "sizes, text",
    [
        (torch.tensor([3, 2]), "sum to the 6 rows of data, got a sum of 5"),
        (torch.tensor([3, 2, 2]), "got a sum of 7"),
        (torch.tensor([2, 3, 1]), "never grow"),
        (torch.tensor([3, 3, 0]), "stay above 0"),
        (torch.tensor([3, 2, 1], dtype=torch.int32), "int64"),
    ],
)
def test_batch_sizes_that_do_not_fit_raise(backend, sizes, text):
    _, ours = pair(backend)
    with pytest.raises(RuntimeError, match=text):
        ours(PackedSequence(torch.randn(6, 3, **F64), sizes))


def state(rows, size=5, dims=3, **kind):
    shape = (1, rows, size) if dims == 3 else (rows, size)
    return torch.zeros(*shape, **{**F64, **kind})


@pytest.mark.parametrize("sort", [True, False])
@pytest.mark.parametrize(
    "hx, kind, text",
    [
        ((state(2), state(3)), RuntimeError, r"hidden\[0\] size \(1, 3, 5\), got \[1, 2, 5\]"),
        ((state(3), state(2)), RuntimeError, r"hidden\[1\] size \(1, 3, 5\), got \[1, 2, 5\]"),
        # torch truncates in silence where the input is unsorted
        ((state(4), state(4)), RuntimeError, r"hidden\[0\] size \(1, 3, 5\), got \[1, 4, 5\]"),
        ((state(3, 4), state(3)), RuntimeError, r"hidden\[0\] size \(1, 3, 5\), got \[1, 3, 4\]"),
        ((state(3, dims=2), state(3, dims=2)), RuntimeError, "should also be 3-D"),
        ((state(3, dtype=torch.float32), state(3)), RuntimeError, "not of the same dtype"),
        ((state(3),), IndexError, "index out of range"),
        ((state(3),) * 3, RuntimeError, "two hidden states, got 3"),
        (torch.zeros(2, 1, 3, 5, **F64), TypeError, "hx should be a tuple"),
    ],
)
def test_states_that_do_not_fit_raise(hx, kind, text, sort):
    _, ours = pair()
    lengths = [3, 2, 1] if sort else [1, 3, 2]
    packed = pack_padded_sequence(torch.zeros(3, 3, 3, **F64), lengths, enforce_sorted=sort)
    with pytest.raises(kind, match=text):
        ours(packed, hx)


def test_features_and_dtype_are_checked():
    _, ours = pair()
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        ours(pack_padded_sequence(torch.zeros(3, 2, 4, **F64), [3, 1]))
    with pytest.raises(ValueError, match="does not match weight dtype"):
        ours(pack_padded_sequence(torch.zeros(3, 2, 3), [3, 1]))
    with pytest.raises((RuntimeError, IndexError)):
        ours(PackedSequence(torch.zeros(0, 3, **F64), torch.zeros(0, dtype=torch.int64)))
