"""Sentence pairs as padded batches of like lengths."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lstm_fast.translate.tokenizer import BOS, EOS, PAD

Example = tuple[list[int], list[int]]  # subword ids of the source and of the target, without BOS and EOS


class Batch(NamedTuple):
    """B pairs, padded with PAD."""

    source: Tensor  # [B, S], ends with EOS
    lengths: Tensor  # [B], of the sources, on the CPU
    target: Tensor  # [B, T + 1], from BOS to EOS

    def to(self, device: torch.device) -> Batch:
        return Batch(self.source.to(device), self.lengths, self.target.to(device))


def pad_sources(sources: Sequence[list[int]]) -> tuple[Tensor, Tensor]:
    """Ids [B, S], EOS appended, and lengths [B]."""
    rows = [torch.tensor([*ids, EOS]) for ids in sources]
    return pad_sequence(rows, batch_first=True, padding_value=PAD), torch.tensor([len(row) for row in rows])


def collate(examples: Sequence[Example]) -> Batch:
    source, lengths = pad_sources([source for source, _ in examples])
    targets = [torch.tensor([BOS, *target, EOS]) for _, target in examples]
    return Batch(source, lengths, pad_sequence(targets, batch_first=True, padding_value=PAD))


def padded(example: Example) -> int:
    """The subwords of a pair's longer side, with its BOS or EOS."""
    return 1 + max(map(len, example))


def cut(order: Sequence[int], lengths: Sequence[int], tokens: int, rows: float = math.inf) -> list[list[int]]:
    """``order`` in batches of at most ``rows`` items and ``tokens`` padded subwords, but at least one item.

    Args:
        order: indices of ``lengths``.
        lengths: of the items, in subwords.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in order:
        longest = max(longest, lengths[index])
        if not batches or len(batches[-1]) >= rows or longest * (len(batches[-1]) + 1) > tokens:
            batches.append([])
            longest = lengths[index]
        batches[-1].append(index)
    return batches


def plan_epoch(examples: Sequence[Example], tokens: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch as indices of ``examples``: like lengths together, in an order of chance.

    A batch holds at most ``tokens`` padded subwords of either language, and at least one pair. The same arguments give
    the same plan, so that a place in training is (epoch, batch).
    """
    chance = random.Random(f"{seed}/{epoch}")
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i][1]) + chance.random(), len(examples[i][0])))
    batches = cut(order, [padded(example) for example in examples], tokens)
    chance.shuffle(batches)
    return batches
