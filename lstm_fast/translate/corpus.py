"""Training text: reading ``English<TAB>French`` files, and the text that ships with the package.

The built-in text has two sources: a hand-written set (``data/handwritten.tsv``) and a seeded grammar
(:mod:`lstm_fast.translate.grammar`). All text is NFC.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path

from .grammar import Link, sentences

HANDWRITTEN = Path(__file__).parent / "data" / "handwritten.tsv"
HELD_OUT_SENTENCES = 500  # in dev and in test of the built-in text
_HELD_OUT_LINKS = 0.05  # share of word combinations kept for dev, and again for test

_SALT = 23  # of the hash that keeps combinations; chosen so that test has every reading of the ambiguous words

# For the demonstration: the course's sentence, then words whose reading depends on their sentence.
SHOWCASE: tuple[str, ...] = (
    "I rose from the ashes.",
    "The sun rose over the hills.",
    "She picked a red rose.",
    "The old woman rose from her chair.",
    "He left the room.",
    "The key is in her left hand.",
    "My brother saw an owl in the forest.",
    "The gardener bought a saw.",
    "The farmer can open the can.",
    "She wants to book a table.",
    "The book is not light.",
    "The flowers that the old man saw are red.",
)


class CorpusError(ValueError):
    """A file of sentence pairs can't be used; the message is one sentence."""


@dataclass(frozen=True)
class Pair:
    """One sentence in English and in French."""

    english: str
    french: str


@dataclass(frozen=True)
class Splits:
    """Pairs for training, for choosing among checkpoints, and for the final score."""

    train: list[Pair]
    dev: list[Pair]
    test: list[Pair]


def read_pairs(path: str | PathLike[str]) -> list[Pair]:
    """The pairs of a UTF-8 file with one ``English<TAB>French`` a line.

    Further columns are ignored, blank lines skipped; a byte order mark and CRLF are accepted.
    Raises CorpusError for a missing or empty file, a directory, bytes that aren't UTF-8, and malformed lines.
    """
    path = Path(path)
    pairs = [_pair(line, path, number) for number, line in enumerate(_lines(path), 1) if line.strip()]
    if not pairs:
        raise CorpusError(f"{path} holds no sentence pair: expected lines of English<TAB>French.")
    return pairs


def builtin(seed: int = 0, size: int = 24_000) -> Splits:
    """The text that ships with the package: ``size`` training pairs, and at most 500 each for dev and test.

    A *combination* is two content words that a phrase brings together (verb and object, subject and verb, noun and
    adjective, ...). A hash of the two words, independent of ``seed``, keeps 5 % of all combinations for dev and 5 %
    for test. In the generated part of train none of them occurs, in no kind of sentence; every test sentence holds
    at least one test combination (and no dev combination), every dev sentence at least one dev combination (and no
    test combination). Half of dev and test show ambiguous words, their readings in turn; in the other half the
    combinations take turns. Every word of dev and test, in either language, occurs in train, while no sentence, in
    either language, does. The hand-written pairs are all in train.
    """
    train = read_pairs(HANDWRITTEN)
    if size < len(train):
        raise ValueError(f"size must be at least {len(train)}, the number of hand-written pairs, but is {size}.")
    held: dict[str, list[_Held]] = {"dev": [], "test": []}
    showcase = {normalise(text) for text in SHOWCASE}
    for s in sentences(seed):
        if len(train) == size:
            break
        if normalise(s.english) in showcase:
            continue
        pair = Pair(s.english, s.french)
        kept_for = {bucket: link for link in s.links if (bucket := _bucket(link)) != "train"}
        if not kept_for:
            train.append(pair)
        elif len(kept_for) == 1:
            (bucket, link), *_ = kept_for.items()
            held[bucket].append(_Held(pair, link, s.reading))
    return Splits(train, _selected(_unseen(held["dev"], train)), _selected(_unseen(held["test"], train)))


def load_splits(
    train: str | PathLike[str], dev: str | PathLike[str] | None = None, test: str | PathLike[str] | None = None
) -> Splits:
    """Splits from files. Without a dev file, one pair in twenty (at most 1000) is split off the training file.

    Pairs that share an English or a French sentence, whatever its case and punctuation, stay together; which go to
    dev depends on the sentences, not on their order. Without a test file, test is empty.
    """
    pairs = read_pairs(train)
    held_out = read_pairs(test) if test is not None else []
    if dev is not None:
        return Splits(pairs, read_pairs(dev), held_out)
    kept, split_off = _split_off(pairs, min(1000, max(1, len(pairs) // 20)))
    if not split_off:
        raise CorpusError(f"{train} can't be split into train and dev: expected two pairs that share no sentence.")
    return Splits(kept, split_off, held_out)


def group_references(pairs: Iterable[Pair]) -> list[tuple[str, list[str]]]:
    """Each distinct English sentence once, in order of appearance, with its distinct French sentences."""
    references: dict[str, dict[str, None]] = {}
    for pair in pairs:
        references.setdefault(pair.english, {})[pair.french] = None
    return [(english, list(french)) for english, french in references.items()]


def normalise(text: str) -> str:
    """The words alone: case, punctuation and spacing removed. Two sentences equal under it are the same sentence."""
    return " ".join(re.findall(r"\w+", text.casefold())) or text


def _lines(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CorpusError(f"{path} doesn't exist: expected a file of English<TAB>French lines.") from None
    except IsADirectoryError:
        raise CorpusError(f"{path} is a directory: expected a file of English<TAB>French lines.") from None
    except OSError as error:
        raise CorpusError(f"{path} can't be read: {error.strerror}.") from None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise CorpusError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} isn't UTF-8; expected a UTF-8 file."
        ) from None
    return iter(unicodedata.normalize("NFC", text).split("\n"))


def _pair(line: str, path: Path, number: int) -> Pair:
    columns = [column.strip() for column in line.split("\t")]
    if len(columns) < 2:
        shown = line.strip() if len(line.strip()) <= 40 else line.strip()[:40] + "..."
        raise CorpusError(f"{path}, line {number}: no tab in {shown!r}; expected English<TAB>French.")
    for side, column in zip(("English", "French"), columns, strict=False):
        if not column:
            raise CorpusError(f"{path}, line {number}: the {side} side is empty; expected English<TAB>French.")
    return Pair(columns[0], columns[1])


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


@cache
def _bucket(link: Link) -> str:
    """Where a combination of two words belongs."""
    share = _hash(f"{_SALT}:" + "+".join(sorted(link))) / 2**64
    return "test" if share < _HELD_OUT_LINKS else "dev" if share < 2 * _HELD_OUT_LINKS else "train"


@dataclass(frozen=True)
class _Held:
    """A pair kept from training, the combination it is kept for, and the ambiguous reading it shows, if any."""

    pair: Pair
    link: Link
    reading: str


def _unseen(candidates: Sequence[_Held], train: Sequence[Pair]) -> list[_Held]:
    """Those whose sentences don't occur in train, while all of their words do."""
    seen = [{normalise(p.english) for p in train}, {normalise(p.french) for p in train}]
    words = [{w for text in side for w in text.split()} for side in seen]

    def fits(text: str, side: int) -> bool:
        return text not in seen[side] and words[side].issuperset(text.split())

    return [c for c in candidates if fits(normalise(c.pair.english), 0) and fits(normalise(c.pair.french), 1)]


def _selected(candidates: Sequence[_Held]) -> list[Pair]:
    """Half with readings of ambiguous words, half without; in each the readings or combinations take turns."""
    ambiguous = _in_turn([c for c in candidates if c.reading], lambda c: c.reading)[: HELD_OUT_SENTENCES // 2]
    others = _in_turn([c for c in candidates if not c.reading], lambda c: c.link)
    return ambiguous + others[: HELD_OUT_SENTENCES - len(ambiguous)]


def _in_turn(candidates: Sequence[_Held], key: Callable[[_Held], object]) -> list[Pair]:
    """First one pair of each key, then a second one of each, and so on."""
    turns: dict[object, int] = {}
    ranked = []
    for candidate in candidates:
        turn = turns.get(key(candidate), 0)
        turns[key(candidate)] = turn + 1
        ranked.append((turn, candidate.pair))
    return [pair for _, pair in sorted(ranked, key=lambda item: item[0])]


def _split_off(pairs: Sequence[Pair], count: int) -> tuple[list[Pair], list[Pair]]:
    """The rest, and about ``count`` pairs in whole groups that share sentences; none where all are one group."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        while parent.setdefault(node, node) != node:
            parent[node] = node = parent[parent[node]]
        return node

    for pair in pairs:
        parent[root("en " + normalise(pair.english))] = root("fr " + normalise(pair.french))
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(root("en " + normalise(pair.english)), []).append(index)
    count = max(count, min(map(len, groups.values())))
    chosen: set[int] = set()
    for group in sorted(groups.values(), key=lambda g: min(_hash(normalise(pairs[i].english)) for i in g)):
        if len(chosen) + len(group) <= count and len(group) < len(pairs):
            chosen.update(group)
    return [p for i, p in enumerate(pairs) if i not in chosen], [p for i, p in enumerate(pairs) if i in chosen]
