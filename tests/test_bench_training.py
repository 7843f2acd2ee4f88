"""The training benchmark: two sides that differ in their LSTM alone, and that are told apart when the LSTM is wrong."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence

import lstm_fast
from lstm_fast.bench import training
from lstm_fast.translate.corpus import Pair, Splits
from lstm_fast.translate.training import TrainingConfig

WORDS = [("rose", "rose"), ("saw", "scie"), ("key", "clé"), ("book", "livre"), ("table", "table"), ("owl", "hibou")]
SPLITS = Splits(
    [Pair(f"I see the {a} and the {b}.", f"Je vois {x} et {y}.") for a, x in WORDS for b, y in WORDS], [], []
)
SMALL = {
    "translator": partial(
        training.translator, config=TrainingConfig(epochs=1, vocab_size=320, width=16, batch_tokens=120)
    ),
    "language model": partial(training.language_model, width=16, sequences=4, steps=12),
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(training, "builtin", lambda: SPLITS)
    monkeypatch.setattr(training, "TASKS", SMALL)


@pytest.mark.parametrize("task", SMALL)
def test_both_sides_learn_the_same(task):
    before = torch.get_rng_state()
    result = json.loads(json.dumps(training.run(task, 25)))
    assert torch.equal(torch.get_rng_state(), before)
    ours, theirs = result["loss"]["ours"], result["loss"]["torch"]
    assert len(ours) == len(theirs) == result["steps"] == 25 and ours[-1] < ours[0]
    assert result["same_curve"]
    assert result["loss_difference"] == max(abs(a / b - 1) for a, b in zip(ours, theirs, strict=True))
    assert all(rate > 0 for rate in result["tokens_per_s"].values())
    assert 0 < result["ratio_p20"] <= result["ratio"] <= result["ratio_p80"]


@pytest.mark.parametrize("task", SMALL)
def test_both_sides_get_the_same_weights_batches_and_dropout(task, monkeypatch):
    made = SMALL[task](SPLITS)
    calls = []

    def loss(model, batch):
        classes = {type(m) for m in model.modules() if isinstance(m, nn.RNNBase)}
        calls.append((classes, [p.detach().clone() for p in model.parameters()], batch, torch.rand(3)))
        return made.loss(model, batch)

    monkeypatch.setitem(SMALL, task, lambda splits: made._replace(loss=loss))
    training.run(task, 2)
    ours, theirs = calls[::2], calls[1::2]
    assert len(ours) == len(theirs) == training.WARM_UP + 2
    assert all(a[0] == {lstm_fast.LSTM} and b[0] == {nn.LSTM} for a, b in zip(ours, theirs, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(ours[0][1], theirs[0][1], strict=True))
    for (_, _, a, chance), (_, _, b, same) in zip(ours, theirs, strict=True):
        assert torch.equal(chance, same)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(ours[0][3], ours[1][3])


@pytest.mark.parametrize("task", SMALL)
@pytest.mark.parametrize("wrong", [lambda y: y + 0.1 * torch.randn_like(y), lambda y: y * torch.nan])
def test_a_wrong_kernel_shows_in_the_curve(task, wrong, monkeypatch):
    forward = lstm_fast.LSTM.forward

    def noisy(self, *args):
        y, states = forward(self, *args)
        return PackedSequence(wrong(y.data), *y[1:]) if isinstance(y, PackedSequence) else wrong(y), states

    monkeypatch.setattr(lstm_fast.LSTM, "forward", noisy)
    result = training.run(task, 4)
    assert not result["same_curve"]
    assert "NOT the same curve" in training.table([result])


def test_segments_carry_the_state_and_follow_each_other():
    model, batches, loss, tokens = SMALL["language model"](SPLITS)
    first, second = next(batches), next(batches)
    assert first.shape == (13, 4) and tokens(first) == 48
    assert torch.equal(first[-1], second[0])
    loss(model, first)
    h, c = model.state
    carried = loss(model, second)
    y, _ = model.lstm(model.embedding(second[:-1]), (h, c))
    torch.testing.assert_close(carried, nn.functional.cross_entropy(model.output(y).mT, second[1:]))


def test_padding_is_no_token():
    _, batches, _, tokens = SMALL["translator"](SPLITS)
    batch = next(batches)
    assert tokens(batch) == sum(len([i for i in row if i != 0]) - 1 for row in batch.target.tolist())


def test_the_table_names_both_rates():
    curve = {"ours": [8.0, 5.25], "torch": [8.0, 5.25]}
    ratios = {"ratio": 1.5, "ratio_p20": 1.25, "ratio_p80": 1.75}
    rates = {"ours": 12345.6, "torch": 8230.4}
    result = {"task": "translator", "steps": 2, "tokens_per_s": rates, **ratios}
    text = training.table([{**result, "loss": curve, "loss_difference": 0.0, "same_curve": True}])
    assert "lstm_fast" in text and "nn.LSTM" in text
    line = text.splitlines()[-1].split()
    assert line[:5] == ["translator", "12,346", "8,230", "1.50×", "1.25..1.75"]
    assert text.endswith("8.00 to 5.25 in 2 steps, the same curve")


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"^task should be 'translator' or 'language model', got: 'poet'$"):
        training.run("poet")
    with pytest.raises(ValueError, match=r"^steps should be at least 2, got: 1$"):
        training.run("translator", 1)
