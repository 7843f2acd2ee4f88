"""Encoder, decoder and attention: the whole translator as one readable module.

LSTMs (Hochreiter & Schmidhuber 1997, forget gate: Gers et al. 2000) that read a sentence and write another (Sutskever
et al. 2014), both ways over the source (Bahdanau et al. 2015), with "general" attention (Luong et al. 2015) from the
first decoder layer, whose context the layers above take as input (Wu et al. 2016). No layer waits for the attention of
the step before it, so that in training each one runs over all steps in a single fused call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from lstm_fast import LSTM
from lstm_fast.translate.tokenizer import PAD

State = tuple[tuple[Tensor, Tensor], ...]  # per decoder layer h and c, each [1, B, W]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes: ``vocab_size`` V; ``width`` W of embeddings and layers, even; stacked layers; dropout probability."""

    vocab_size: int
    width: int = 256
    encoder_layers: int = 2
    decoder_layers: int = 2
    dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "encoder_layers", "decoder_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} should be at least 1, got: {getattr(self, name)}")
        if self.width % 2:
            raise ValueError(f"width should be even, half for each direction of the encoder, got: {self.width}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout should be at least 0 and below 1, got: {self.dropout}")


class Memory(NamedTuple):
    """An encoded batch, for the decoder to attend to."""

    values: Tensor  # [B, S, W]
    keys: Tensor  # [B, S, W]
    mask: Tensor  # [B, S], True at subwords, False at padding
    state: State

    def repeat(self, times: int) -> Memory:
        """Each sentence ``times`` times in a row: B becomes B * times."""
        values, keys, mask = (x.repeat_interleave(times, 0) for x in self[:3])
        state = tuple((h.repeat_interleave(times, 1), c.repeat_interleave(times, 1)) for h, c in self.state)
        return Memory(values, keys, mask, state)


class Translator(nn.Module):
    """Scores of the next target subword, given the source sentence and the target so far."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        width, dropout = config.width, config.dropout
        self.embedding = nn.Embedding(config.vocab_size, width, padding_idx=PAD)  # both languages in, French out
        self.encoder = nn.ModuleList(
            LSTM(width, width // 2, bidirectional=True, batch_first=True) for _ in range(config.encoder_layers)
        )
        self.bridge = nn.Linear(width, 2 * config.decoder_layers * width)
        self.decoder = nn.ModuleList(
            LSTM(width if k == 0 else 2 * width, width, batch_first=True) for k in range(config.decoder_layers)
        )
        self.keys = nn.Linear(width, width, bias=False)
        self.readout = nn.Linear(2 * width, width)
        self.output_bias = nn.Parameter(torch.zeros(config.vocab_size))
        self.dropout = nn.Dropout(dropout)
        self._initialise()

    def _initialise(self) -> None:
        with torch.no_grad():
            self.embedding.weight.normal_(0, self.config.width**-0.5)[PAD].zero_()
            for name, parameter in self.named_parameters():
                if "bias_ih_l" in name:  # gates are stacked i, f, g, o: a forget gate that starts open remembers
                    parameter.chunk(4)[1].add_(1.0)

    def encode(self, source: Tensor, lengths: Tensor) -> Memory:
        """source [B, S] of subword ids, padded with PAD; lengths [B] on the CPU, each at least 1."""
        x = self._embed(source)
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        for k, layer in enumerate(self.encoder):
            y, (h_n, _) = layer(packed)  # y.data [sum of lengths, W], h_n [2, B, W / 2]
            x = self.dropout(y.data)
            packed = packed._replace(data=x if k == 0 else packed.data + x)
        values, _ = pad_packed_sequence(packed, batch_first=True, total_length=source.size(1))
        start = torch.tanh(self.bridge(h_n.transpose(0, 1).flatten(1)))  # [B, 2 * layers * W]
        parts = start.unsqueeze(0).chunk(2 * len(self.decoder), -1)
        state = tuple((h.contiguous(), c.contiguous()) for h, c in zip(parts[::2], parts[1::2], strict=True))
        return Memory(values, self.keys(values), source != PAD, state)

    def decode(self, tokens: Tensor, memory: Memory, state: State) -> tuple[Tensor, Tensor, State]:
        """The steps that read ``tokens``: all at once in training, one at a time in search.

        Args:
            tokens: ids [B, T], from BOS on.
            memory: of ``encode``.
            state: ``memory.state`` at BOS, then what the call before returned.
        Returns:
            features [B, T, W], which ``logits`` takes; attention [B, T, S], rows summing to 1; the state after T steps.
        """
        x, after = self.decoder[0](self._embed(tokens), state[0])
        scores = torch.bmm(x, memory.keys.transpose(1, 2))  # [B, T, S]
        attention = scores.masked_fill(~memory.mask.unsqueeze(1), -torch.inf).softmax(-1)
        context = torch.bmm(attention, memory.values)  # [B, T, W]
        states = [after]
        x = self.dropout(x)
        for layer, before in zip(self.decoder[1:], state[1:], strict=True):
            y, after = layer(torch.cat([x, context], -1), before)
            x = x + self.dropout(y)
            states.append(after)
        features = self.dropout(torch.tanh(self.readout(torch.cat([x, context], -1))))
        return features, attention, tuple(states)

    def logits(self, features: Tensor) -> Tensor:
        """features [..., W] to scores [..., V] of the next subword."""
        return nn.functional.linear(features, self.embedding.weight, self.output_bias)

    def _embed(self, tokens: Tensor) -> Tensor:
        """[B, T] to [B, T, W], of unit scale: the rows, which serve the output too, are W^-1/2 of that."""
        x: Tensor = self.dropout(self.embedding(tokens) * self.config.width**0.5)
        return x
