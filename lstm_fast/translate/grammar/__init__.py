"""A seeded grammar of English sentences and their French translations.

Words stand in tables (:mod:`.lexicon`), the grammar of each language in :mod:`.english` and :mod:`.french`, and
:mod:`.phrases` realises one structure in both. :mod:`.sampler` and :mod:`.templates` draw sentences.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .english import contract
from .phrases import Link
from .phrases import Text as Sentence
from .sampler import Sampler
from .templates import TEMPLATES

__all__ = ["Link", "Sentence", "sentences"]

_LONGEST = 14  # words of English


def sentences(seed: int) -> Iterator[Sentence]:
    """An endless stream of sentences with distinct English, always the same for a seed."""
    sampler, seen = Sampler(seed), set[str]()
    while True:
        drawn = sampler.weighted(TEMPLATES)(sampler)
        if drawn is None:
            continue
        english = contract(drawn.english) if sampler.chance(0.4) else drawn.english
        if english not in seen and len(english.split()) <= _LONGEST:
            seen.add(english)
            yield replace(drawn, english=english)
