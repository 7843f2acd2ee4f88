"""Search against enumeration, scores against sacrebleu's own command line, pictures."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from matplotlib.axes import Axes
from PIL import Image

from lstm_fast.translate.batches import pad_sources
from lstm_fast.translate.corpus import Pair
from lstm_fast.translate.model import ModelConfig, Translator
from lstm_fast.translate.plots import plot_attention
from lstm_fast.translate.scoring import evaluate, score
from lstm_fast.translate.search import Hypothesis, Translation, beam_search, greedy_search, translate
from lstm_fast.translate.tokenizer import BOS, EOS, Tokenizer

SOURCES = [[4, 5, 6, 7], [5], [7, 7, 4], [6, 5]]
LETTERS = 8  # subwords of the tiny model: PAD, UNK, BOS, EOS and four letters


@pytest.fixture(params=range(5))
def model(request: pytest.FixtureRequest) -> Translator:
    """Random weights of a size that makes scores differ and sentences end."""
    torch.manual_seed(request.param)
    model = Translator(ModelConfig(LETTERS, 16, 1, 2)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def log_probability(model: Translator, source: list[int], ids: list[int]) -> float:
    """Of one target, all steps at once, by a path that search doesn't take."""
    memory = model.encode(*pad_sources([source]))
    features, _, _ = model.decode(torch.tensor([[BOS, *ids[:-1]]]), memory, memory.state)
    logits = model.logits(features[0])
    logits[:, : BOS + 1] = -torch.inf
    return logits.log_softmax(-1).gather(1, torch.tensor(ids).unsqueeze(1)).sum().item()


def test_one_beam_is_greedy(model):
    batch = pad_sources(SOURCES)
    for greedy, beam in zip(greedy_search(model, *batch), beam_search(model, *batch, 1), strict=True):
        assert beam.ids == greedy.ids
        assert beam.score == pytest.approx(greedy.score, abs=1e-12)
        torch.testing.assert_close(beam.attention, greedy.attention, rtol=0, atol=1e-12)


@pytest.mark.parametrize("search", [greedy_search, lambda *batch: beam_search(*batch, 4)], ids=["greedy", "beam"])
def test_scores_are_those_of_the_model_and_padding_changes_nothing(model, search):
    for source, found in zip(SOURCES, search(model, *pad_sources(SOURCES)), strict=True):
        (alone,) = search(model, *pad_sources([source]))
        assert found.ids == alone.ids
        assert found.score == pytest.approx(log_probability(model, source, found.ids) / len(found.ids), abs=1e-12)
        assert found.attention[:, len(source) + 1 :].eq(0).all()
        torch.testing.assert_close(found.attention.sum(1), torch.ones(len(found.ids), dtype=torch.float64))


def test_attention_is_that_of_the_hypothesis_through_all_its_steps(model):
    for source, found in zip(SOURCES, beam_search(model, *pad_sources(SOURCES), 4), strict=True):
        memory = model.encode(*pad_sources([source]))
        _, attention, _ = model.decode(torch.tensor([[BOS, *found.ids[:-1]]]), memory, memory.state)
        torch.testing.assert_close(found.attention[:, : len(source) + 1], attention[0], rtol=0, atol=1e-12)


def test_a_wide_beam_finds_the_best_of_all_sentences(model, monkeypatch):
    longest = 3
    monkeypatch.setattr("lstm_fast.translate.search._limit", lambda lengths: torch.full_like(lengths, longest))
    found = beam_search(model, *pad_sources(SOURCES), beam=4**longest)
    sentences = [
        [*letters, EOS] for n in range(longest) for letters in itertools.product(range(EOS + 1, LETTERS), repeat=n)
    ]
    for source, hypothesis in zip(SOURCES, found, strict=True):
        # at the limit the end costs what the model says, so that enumeration needs no special case
        best = max(sentences, key=lambda ids: log_probability(model, source, ids) / len(ids))
        assert hypothesis.ids == best


def test_a_beam_is_at_least_as_good_as_greedy_here(model):
    batch = pad_sources(SOURCES)
    greedy, beam = greedy_search(model, *batch), beam_search(model, *batch, 8)
    assert all(b.score >= g.score - 1e-12 for g, b in zip(greedy, beam, strict=True))
    assert sum(b.score for b in beam) > sum(g.score for g in greedy) - 1e-12


def test_every_sentence_ends():
    torch.manual_seed(0)
    model = Translator(ModelConfig(LETTERS, 16, 1, 1)).eval()
    with torch.no_grad():
        model.output_bias[EOS] = -1e9
    for found in (*greedy_search(model, *pad_sources(SOURCES)), *beam_search(model, *pad_sources(SOURCES), 3)):
        assert found.ids[-1] == EOS
        assert EOS not in found.ids[:-1]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["the rose is red", "la rose est rouge"], 300)


def test_beam_search_keeps_one_row_of_attention_a_step(monkeypatch):
    torch.manual_seed(0)
    model = Translator(ModelConfig(LETTERS, 16, 1, 1)).eval()
    with torch.no_grad():
        model.output_bias[EOS] = -1e9
    most, cat = [0], torch.cat
    monkeypatch.setattr(
        torch, "cat", lambda tensors, dim=0: most.append(sum(t.numel() for t in tensors)) or cat(tensors, dim)
    )
    (found,) = beam_search(model, *pad_sources([[4] * 100]), 5)
    assert found.attention.shape == (212, 101)
    assert max(most) < 101 * 212


def test_translations_keep_their_order_and_blank_lines(tokenizer):
    torch.manual_seed(0)
    model = Translator(ModelConfig(len(tokenizer), 16)).eval()
    sentences = ["the rose is red", "", "red", "the rose", "   "]
    together = translate(model, tokenizer, sentences)
    assert [t.source for t in together] == sentences
    assert [t.text for t in together] == [translate(model, tokenizer, [s])[0].text for s in sentences]
    assert together[1].text == together[4].text == ""
    assert together[0].attention.shape == (len(together[0].target_pieces), len(together[0].source_pieces))
    assert together[0].source_pieces[-1] == "</s>"


def test_a_long_sentence_shares_its_batch_with_few(tokenizer, monkeypatch):
    shapes = []

    def recorded(model, source, lengths):
        shapes.append(tuple(source.shape))
        return [Hypothesis([EOS], 0.0, torch.zeros(1, source.size(1)))] * len(source)

    monkeypatch.setattr("lstm_fast.translate.search.greedy_search", recorded)
    model = Translator(ModelConfig(len(tokenizer), 16)).eval()
    translate(model, tokenizer, ["red"] * 100 + ["red " * 2000], beam=1)
    assert sum(rows for rows, _ in shapes) == 101
    assert max(rows for rows, _ in shapes) == 64
    assert all(rows == 1 or rows * length <= 6400 for rows, length in shapes)


TRANSLATIONS = ["La rose est rouge.", "Je me suis levé des cendres.", "Il a quitté la maison ce matin."]
REFERENCES = [
    ["La rose est rouge."],
    ["Je me suis relevé des cendres.", "Je me suis levé de mes cendres.", "Je renais de mes cendres."],
    ["Il est parti de la maison ce matin.", "Il a quitté la maison ce matin."],
]


def test_scores_with_one_reference_are_those_of_sacrebleus_command(tmp_path):
    (tmp_path / "hyp").write_text("\n".join(TRANSLATIONS) + "\n", encoding="utf-8")
    (tmp_path / "ref").write_text("\n".join(refs[0] for refs in REFERENCES) + "\n", encoding="utf-8")
    command = [
        sys.executable,
        "-m",
        "sacrebleu",
        tmp_path / "ref",
        "-i",
        tmp_path / "hyp",
        "-m",
        "bleu",
        "chrf",
        "-w",
        "6",
    ]
    told = subprocess.run([*command, "-f", "text"], capture_output=True, text=True, check=True, timeout=60).stdout
    scores = score(TRANSLATIONS, [refs[:1] for refs in REFERENCES])
    assert f"{scores.bleu_signature} = {scores.bleu:.6f} " in told.replace("BLEU|", "")
    assert f"{scores.chrf_signature} = {scores.chrf:.6f}" in told.replace("chrF2|", "")


def test_a_sentence_may_have_fewer_references_than_another():
    scores = score(TRANSLATIONS, REFERENCES)
    # repeating a reference changes neither n-gram matches nor the closest length
    padded = [(refs * 3)[:3] for refs in REFERENCES]
    full = score(TRANSLATIONS, padded)
    assert scores.bleu == pytest.approx(full.bleu, abs=1e-9)
    assert scores.chrf == pytest.approx(full.chrf, abs=1e-9)
    assert scores.bleu > score(TRANSLATIONS, [refs[:1] for refs in REFERENCES]).bleu
    assert "nrefs:var" in scores.bleu_signature and "nrefs:var" in scores.chrf_signature


def test_references_for_each_translation():
    with pytest.raises(ValueError, match="references for each translation, got: 2 for 3"):
        score(TRANSLATIONS, REFERENCES[:2])


def test_each_english_sentence_counts_once(tokenizer):
    torch.manual_seed(0)
    model = Translator(ModelConfig(len(tokenizer), 16)).eval()
    pairs = [Pair("the rose", "la rose"), Pair("red", "rouge"), Pair("the rose", "cette rose")]
    assert evaluate(model, tokenizer, pairs, beam=1).sentences == 2


def test_the_picture_shows_words_not_subwords(tmp_path, monkeypatch):
    drawn, imshow = {}, Axes.imshow
    monkeypatch.setattr(
        Axes,
        "imshow",
        lambda self, weights, **kwargs: drawn.update(weights=weights) or imshow(self, weights, **kwargs),
    )
    attention = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.1, 0.1, 0.7], [0.3, 0.1, 0.1, 0.5], [0.0, 0.0, 0.0, 1.0]])
    translation = Translation("", "", 0.0, ["▁ro", "se", "▁red", "</s>"], ["▁la", "▁ro", "se", "</s>"], attention)
    plot_attention(translation, tmp_path / "deep" / "attention.png")
    # columns: rose, red, end; rows: la, rose (the mean of its two), end
    expected = [[0.7, 0.2, 0.1], [0.3, 0.1, 0.6], [0.0, 0.0, 1.0]]
    assert drawn["weights"] == pytest.approx(torch.tensor(expected).numpy(), abs=1e-6)
    with Image.open(tmp_path / "deep" / "attention.png") as image:
        assert image.format == "PNG"
        assert len(image.convert("L").getcolors(1 << 16)) > 10
