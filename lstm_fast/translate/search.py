"""From scores to sentences: greedy and beam search over batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lstm_fast.translate.batches import cut, pad_sources
from lstm_fast.translate.model import Memory, State, Translator
from lstm_fast.translate.tokenizer import BOS, EOS, PAD, UNK, Tokenizer

BEAM = 5
_BATCH = 64  # sentences
_BATCH_TOKENS = 6400  # their padded subwords: a long sentence shares its batch with few


@dataclass(frozen=True)
class Hypothesis:
    """A target sentence as the model wrote it."""

    ids: list[int]  # T subwords, EOS the last
    score: float  # log-probability over the number of subwords
    attention: Tensor  # [T, S], rows summing to 1


@dataclass(frozen=True)
class Translation:
    """A sentence with its translation; ``attention[t, s]`` is what target piece t took of source piece s."""

    source: str
    text: str
    score: float
    source_pieces: list[str]
    target_pieces: list[str]
    attention: Tensor


def translate(model: Translator, tokenizer: Tokenizer, sentences: Sequence[str], beam: int = BEAM) -> list[Translation]:
    """Every sentence's best translation, in the sentences' order; a blank one translates to nothing.

    Args:
        model: in eval mode.
        sentences: of the source language.
        beam: hypotheses kept at each step; 1 is greedy search.
    """
    sources = tokenizer.encode(sentences)
    order = sorted((i for i, ids in enumerate(sources) if ids), key=lambda i: len(sources[i]))
    results = [Translation(sentence, "", 0.0, [], [], torch.zeros(0, 0)) for sentence in sentences]
    for batch in cut(order, [len(ids) + 1 for ids in sources], _BATCH_TOKENS, _BATCH):
        source, lengths = pad_sources([sources[i] for i in batch])
        source = source.to(model.output_bias.device)
        found = greedy_search(model, source, lengths) if beam == 1 else beam_search(model, source, lengths, beam)
        texts = tokenizer.decode([hypothesis.ids for hypothesis in found])
        for i, hypothesis, text in zip(batch, found, texts, strict=True):
            pieces = tokenizer.pieces([*sources[i], EOS])
            attention = hypothesis.attention[:, : len(pieces)].cpu()
            results[i] = Translation(
                sentences[i], text, hypothesis.score, pieces, tokenizer.pieces(hypothesis.ids), attention
            )
    return results


@torch.inference_mode()
def greedy_search(model: Translator, source: Tensor, lengths: Tensor) -> list[Hypothesis]:
    """The most probable subword at each step: source [B, S] and lengths [B] as for ``Translator.encode``."""
    memory = model.encode(source, lengths)
    state, limit = memory.state, _limit(lengths).to(source.device)
    tokens = torch.full_like(source[:, :1], BOS)  # [B, 1 + t]
    total = source.new_zeros(len(source), dtype=torch.float64)
    attentions: list[Tensor] = []
    done = torch.zeros_like(total, dtype=torch.bool)
    while not done.all():
        log_p, attention, state = _step(model, tokens, memory, state, limit)
        best, word = log_p.max(-1)
        total += best.masked_fill(done, 0)
        tokens = torch.cat([tokens, word.masked_fill(done, PAD).unsqueeze(1)], 1)
        attentions.append(attention)
        done |= word == EOS
    return [_hypothesis(*row) for row in zip(tokens, total, torch.stack(attentions, 1), strict=True)]


@torch.inference_mode()
def beam_search(model: Translator, source: Tensor, lengths: Tensor, beam: int) -> list[Hypothesis]:
    """The best of ``beam`` hypotheses, by log-probability over length (Wu et al. 2016, with exponent 1).

    source [B, S] and lengths [B] as for ``Translator.encode``. K hypotheses of each sentence are rows b * K to
    b * K + K - 1; finished ones stay in the beam as they are. Where there are fewer than K to keep, the rest of the
    beam is impossible ones.
    """
    batch, device = len(source), source.device
    memory = model.encode(source, lengths).repeat(beam)
    state, limit = memory.state, _limit(lengths).to(device).repeat_interleave(beam)
    tokens = torch.full((batch * beam, 1), BOS, device=device)
    attentions: list[Tensor] = []  # of each step [B * K, S], and the rows that its hypotheses went on from
    origins: list[Tensor] = []
    total = torch.full((batch, beam), -torch.inf, dtype=torch.float64, device=device)
    total[:, 0] = 0  # one hypothesis to begin with
    length = torch.zeros_like(total)
    done = torch.zeros_like(total, dtype=torch.bool)
    first_row = torch.arange(0, batch * beam, beam, device=device).unsqueeze(1)
    while not done.all():
        log_p, attention, state = _step(model, tokens, memory, state, limit)
        log_p = log_p.view(batch, beam, -1)  # [B, K, V]
        log_p[done] = -torch.inf
        log_p[..., PAD].masked_fill_(done, 0)
        length += ~done
        sums = total.unsqueeze(2) + log_p
        _, best = (sums / length.unsqueeze(2)).flatten(1).topk(beam)  # [B, K]
        total = sums.flatten(1).gather(1, best)
        origin, word = best // log_p.size(-1), best % log_p.size(-1)
        length, done = length.gather(1, origin), done.gather(1, origin) | (word == EOS) | total.isneginf()
        rows = (first_row + origin).flatten()
        tokens = torch.cat([tokens[rows], word.view(-1, 1)], 1)
        attentions.append(attention)
        origins.append(rows)
        state = tuple((h[:, rows], c[:, rows]) for h, c in state)
    winners = first_row.flatten() + (total / length).argmax(1)
    rows, steps = winners, []
    for attention, origin in zip(reversed(attentions), reversed(origins), strict=True):
        rows = origin[rows]
        steps.append(attention[rows])
    found = zip(tokens[winners], total.view(-1)[winners], torch.stack(steps[::-1], 1), strict=True)
    return [_hypothesis(*row) for row in found]


def _limit(lengths: Tensor) -> Tensor:
    """Target subwords [B] at which a sentence must end: room enough for any honest translation."""
    return 2 * lengths + 10


def _step(
    model: Translator, tokens: Tensor, memory: Memory, state: State, limit: Tensor
) -> tuple[Tensor, Tensor, State]:
    """Log-probabilities [B, V] of the subword after tokens [B, 1 + t], the attention [B, S] and the state there."""
    features, attention, state = model.decode(tokens[:, -1:], memory, state)
    logits = model.logits(features[:, 0])
    logits[:, [PAD, UNK, BOS]] = -torch.inf
    log_p = logits.log_softmax(-1)
    at_limit = tokens.size(1) >= limit
    if at_limit.any():
        end = log_p[:, EOS].clone()
        log_p[at_limit] = -torch.inf
        log_p[:, EOS] = end
    return log_p, attention[:, 0], state


def _hypothesis(tokens: Tensor, total: Tensor, attention: Tensor) -> Hypothesis:
    """From tokens [1 + t], BOS first and PAD after EOS."""
    ids = [i for i in tokens.tolist()[1:] if i != PAD]
    return Hypothesis(ids, float(total) / len(ids), attention[: len(ids)])
