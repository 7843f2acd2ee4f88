"""The translator's model and loss: padding changes nothing, attention is a distribution, the loss is torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lstm_fast.translate.batches import collate, cut, pad_sources, plan_epoch
from lstm_fast.translate.loss import linear_cross_entropy, product_dtype
from lstm_fast.translate.model import ModelConfig, Translator
from lstm_fast.translate.tokenizer import EOS, PAD, Tokenizer, VocabularyError

EXAMPLES = [([5, 6, 7, 8, 9], [4, 5]), ([7], [9, 8, 7, 6]), ([8, 9, 4], [5, 5, 6])]


@pytest.fixture(params=[(1, 1), (3, 2)], ids=["one layer", "three and two"])
def model(request: pytest.FixtureRequest) -> Translator:
    torch.manual_seed(1)
    encoder_layers, decoder_layers = request.param
    return Translator(ModelConfig(12, 16, encoder_layers, decoder_layers, dropout=0.5)).double().eval()


def test_a_batch_equals_its_sentences_one_by_one(model):
    batch = collate(EXAMPLES)
    memory = model.encode(batch.source, batch.lengths)
    features, attention, _ = model.decode(batch.target, memory, memory.state)
    for row, example in enumerate(EXAMPLES):
        alone = collate([example])
        memory = model.encode(alone.source, alone.lengths)
        expected, weights, _ = model.decode(alone.target, memory, memory.state)
        steps, words = alone.target.size(1), alone.source.size(1)
        torch.testing.assert_close(features[row, :steps], expected[0], rtol=0, atol=1e-13)
        torch.testing.assert_close(attention[row, :steps, :words], weights[0], rtol=0, atol=1e-13)


def test_attention_sums_to_one_over_words_and_ignores_padding(model):
    batch = collate(EXAMPLES)
    memory = model.encode(batch.source, batch.lengths)
    _, attention, _ = model.decode(batch.target, memory, memory.state)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]), rtol=0, atol=1e-14)
    padding = (batch.source == PAD).unsqueeze(1).expand_as(attention)
    assert padding.any()
    assert (attention[padding] == 0).all()
    assert (attention[~padding] > 0).all()


def test_steps_one_at_a_time_equal_all_at_once(model):
    batch = collate(EXAMPLES)
    memory = model.encode(batch.source, batch.lengths)
    expected, weights, after = model.decode(batch.target, memory, memory.state)
    state = memory.state
    for t in range(batch.target.size(1)):
        features, attention, state = model.decode(batch.target[:, t : t + 1], memory, state)
        torch.testing.assert_close(features[:, 0], expected[:, t], rtol=0, atol=1e-13)
        torch.testing.assert_close(attention[:, 0], weights[:, t], rtol=0, atol=1e-13)
    torch.testing.assert_close(state, after, rtol=0, atol=1e-13)


def test_every_parameter_learns(model):
    batch = collate(EXAMPLES)
    memory = model.encode(batch.source, batch.lengths)
    features, _, _ = model.decode(batch.target[:, :-1], memory, memory.state)
    targets = batch.target[:, 1:]
    nn.functional.cross_entropy(model.logits(features)[targets != PAD], targets[targets != PAD]).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name


def test_a_forget_gate_starts_open():
    config = ModelConfig(12, 16)
    biases = [p for name, p in Translator(config).named_parameters() if "bias_ih_l" in name]
    assert len(biases) == 2 * config.encoder_layers + config.decoder_layers
    for bias in biases:
        input_gate, forget_gate, cell, output_gate = bias.chunk(4)
        assert forget_gate.mean() > 0.7
        assert torch.cat([input_gate, cell, output_gate]).abs().max() < 0.5


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("width", 15, "width should be even"),
        ("width", 0, "width should be at least 1, got: 0"),
        ("decoder_layers", 0, "decoder_layers should be at least 1, got: 0"),
        ("dropout", 1.0, "dropout should be at least 0 and below 1, got: 1.0"),
    ],
)
def test_impossible_sizes_are_refused(field, value, message):
    with pytest.raises(ValueError, match=message):
        ModelConfig(**{"vocab_size": 10, field: value})


@pytest.mark.parametrize("rows", [1, 128, 300])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_and_gradients_are_torchs(rows, smoothing):
    torch.manual_seed(rows)
    inputs = [torch.randn(rows, 6), torch.randn(11, 6), torch.randn(11)]
    ours, theirs = ([t.double().requires_grad_() for t in inputs] for _ in range(2))
    targets = torch.randint(0, 11, (rows,))
    loss = linear_cross_entropy(*ours, targets, smoothing) * 0.5
    logits = nn.functional.linear(*theirs)
    expected = nn.functional.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="sum") * 0.5
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    loss.backward()
    expected.backward()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-11, atol=1e-12)


def test_loss_in_fp32_is_as_exact_as_its_products():
    torch.manual_seed(0)
    features, weight, bias = torch.randn(200, 32).tanh(), torch.randn(500, 32) * 0.2, torch.randn(500)
    targets = torch.randint(0, 500, (200,))
    exact = nn.functional.cross_entropy(
        nn.functional.linear(features.double(), weight.double(), bias.double()), targets, reduction="sum"
    )
    rounding = torch.finfo(product_dtype(weight)).eps
    assert abs(linear_cross_entropy(features, weight, bias, targets, 0.0) / exact - 1) < rounding


@pytest.mark.parametrize(
    ("place", "dtype"),
    [
        *(("cpu avx512_bf16", torch.bfloat16), ("cpu amx", torch.bfloat16)),
        *(("cpu avx512_slow_bf16", torch.float32), ("cpu avx2", torch.float32), ("cpu", torch.float32)),
    ],
)
def test_products_of_the_loss_are_bf16_where_that_is_faster(
    place: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lstm_fast.translate.loss.place", lambda device: place)
    assert product_dtype(torch.zeros(1)) == dtype
    assert product_dtype(torch.zeros(1, dtype=torch.float64)) == torch.float64


def test_an_epoch_holds_every_pair_once_in_batches_within_the_limit():
    chance = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 30, (200, 2), generator=chance).tolist()
    examples = [([5] * s, [6] * t) for s, t in sizes]
    plan = plan_epoch(examples, 100, seed=3, epoch=0)
    assert sorted(i for batch in plan for i in batch) == list(range(200))
    for indices in plan:
        batch = collate([examples[i] for i in indices])
        assert batch.source.numel() <= 100
        assert batch.target[:, 1:].numel() <= 100
    assert plan == plan_epoch(examples, 100, seed=3, epoch=0)
    assert plan != plan_epoch(examples, 100, seed=3, epoch=1)


def test_a_pair_longer_than_the_limit_is_a_batch_of_its_own():
    examples = [([5] * 50, [6]), ([5], [6]), ([5], [6] * 50)]
    assert sorted(map(len, plan_epoch(examples, 10, seed=0, epoch=0))) == [1, 1, 1]


def test_batches_are_cut_by_rows_and_by_padded_subwords():
    assert cut([2, 0, 1, 3, 4], [1, 2, 1, 3, 9], tokens=6, rows=2) == [[2, 0], [1, 3], [4]]
    assert cut([], [], tokens=6) == []


def test_sources_end_with_eos_and_padding():
    source, lengths = pad_sources([[5, 6, 7], [8]])
    assert source.tolist() == [[5, 6, 7, EOS], [8, EOS, PAD, PAD]]
    assert lengths.tolist() == [4, 2]


TEXT = ["the rose is red", "la rose est rouge", "I rose from the ashes", "je me suis relevé des cendres"] * 3


def test_subwords_give_any_text_back():
    tokenizer = Tokenizer.train(TEXT, 320)
    texts = ["the rose", "relevé des cendres", "Ünseen 漢字 letters!", ""]
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    assert "".join(tokenizer.pieces(tokenizer.encode(["the rose"])[0])) == "▁the▁rose"


def test_the_same_text_gives_the_same_subwords():
    model = Tokenizer.train(TEXT, 320).model
    assert model == Tokenizer.train(TEXT, 320).model
    assert Tokenizer(model).encode(TEXT) == Tokenizer.train(TEXT, 320).encode(TEXT)


def test_impossible_subwords_are_refused():
    with pytest.raises(VocabularyError, match="vocab_size should be larger for this text, got: 100"):
        Tokenizer.train(TEXT, 100)
    with pytest.raises(ValueError, match="model should be a serialized sentencepiece model"):
        Tokenizer(b"no such thing")
