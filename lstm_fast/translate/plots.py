"""Attention as a picture: which source words each target word was written from (as in Bahdanau et al. 2015)."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lstm_fast.translate.search import Translation

_WORD_START = "▁"


def plot_attention(translation: Translation, path: Path) -> None:
    """Writes a PNG heat map: source words across, target words down, each row summing to 1."""
    columns, sources = _words(translation.source_pieces)
    rows, targets = _words(translation.target_pieces)
    # a word takes what its subwords take: the mean over the target's, the sum over the source's
    weights = rows.t() @ translation.attention @ columns / rows.sum(0).unsqueeze(1)
    width = 2 + 0.1 * max(map(len, targets)) + 0.6 * len(sources)
    height = 1 + 0.07 * max(map(len, sources)) + 0.4 * len(targets)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(weights.numpy(), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(sources)), sources, rotation=45, ha="left", rotation_mode="anchor")
    axes.set_yticks(range(len(targets)), targets)
    axes.xaxis.tick_top()
    figure.colorbar(image, label="attention weight")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png", dpi=150)


def _words(pieces: list[str]) -> tuple[Tensor, list[str]]:
    """Membership [pieces, words] of 0 and 1, and the words; the end of the sentence counts as one."""
    words: list[str] = []
    owner = []
    for piece in pieces:
        if piece.startswith(_WORD_START) or piece == "</s>" or not words:
            words.append("")
        words[-1] += piece.replace(_WORD_START, "")
        owner.append(len(words) - 1)
    membership = torch.zeros(len(pieces), len(words))
    membership[torch.arange(len(pieces)), torch.tensor(owner, dtype=torch.long)] = 1
    return membership, ["⟨end⟩" if word == "</s>" else word for word in words]
