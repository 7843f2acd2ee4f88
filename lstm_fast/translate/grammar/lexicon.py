"""The word tables in ``lstm_fast/translate/data``, read once into small records."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from . import english as en
from . import french as fr

DATA = Path(__file__).parent.parent / "data"


def table(name: str) -> Iterator[dict[str, str]]:
    """The rows of a tab-separated table with a header."""
    header, *rows = (DATA / name).read_text(encoding="utf-8").splitlines()
    columns = header.split("\t")
    for row in rows:
        yield dict(zip(columns, row.split("\t") + [""] * len(columns), strict=False))


@dataclass(frozen=True)
class Noun:
    """A noun pair.

    ``number``: "" both, "single" no plural, "one" unique ("the sun"), "many" plural only, "mass" uncountable, "name".
    """

    english: str
    english_plural: str
    french: str
    french_plural: str
    feminine: bool
    number: str
    kinds: frozenset[str]  # what it is; its own English word is one of them

    @property
    def key(self) -> str:
        return f"{self.english}={self.french}"


@dataclass(frozen=True)
class Adjective:
    """An adjective pair. ``position``: "before" or "after" its French noun.

    ``use``: "" anywhere, "predicate" or "attributive" only, "template" where a template names it.
    """

    english: str
    comparative: str
    french: str
    feminine: str
    liaison: str  # masculine singular before a vowel: bel, nouvel, vieil
    position: str
    use: str
    kinds: frozenset[str]

    @property
    def key(self) -> str:
        return f"{self.english}={self.french}"

    def agree(self, feminine: bool, plural: bool) -> str:
        if feminine:
            return self.feminine + "s" if plural else self.feminine
        return fr.plural(self.french) if plural else self.french


@dataclass(frozen=True)
class Verb:
    """A verb pair in one sense. Both sides may carry more words: "look for", "avoir besoin de", "se lever"."""

    english: str
    past: str
    participle: str
    french: str
    subjects: frozenset[str]
    objects: frozenset[str]  # empty: takes none
    flags: frozenset[str]

    @property
    def key(self) -> str:
        return f"{self.english}={self.french}"

    @cached_property
    def reflexive(self) -> bool:
        return self.french.startswith(("se ", "s'"))

    @cached_property
    def infinitive(self) -> str:
        return self._bare.split(" ", 1)[0]

    @cached_property
    def particle(self) -> str:
        """What follows the French verb: "besoin de", "à"."""
        return self._bare.partition(" ")[2]

    @property
    def _bare(self) -> str:
        return self.french.removeprefix("se ").removeprefix("s'")

    @property
    def direct(self) -> bool:
        """Takes a direct object in French, so that le, la, les can stand for it."""
        return bool(self.objects) and not self.particle and not self.reflexive

    @property
    def auxiliary(self) -> str:
        return "être" if self.reflexive or self.infinitive in _WITH_ETRE else "avoir"


_WITH_ETRE = frozenset("aller arriver entrer mourir naître partir rester retourner revenir sortir tomber venir".split())


def _kinds(text: str, *more: str) -> frozenset[str]:
    return frozenset([*text.split(), *more])


def _noun(row: dict[str, str]) -> Noun:
    english, french = row["english"], row["french"]
    return Noun(
        english,
        row["plural"] or en.plural(english),
        french,
        row["plural_fr"] or fr.plural(french),
        row["gender"] == "f",
        row["number"],
        _kinds(row["kinds"], english.replace(" ", "-")),
    )


def _verb(row: dict[str, str]) -> Verb:
    english = row["english"]
    past = row["past"] or en.regular_past(english)
    return Verb(
        english,
        past,
        row["participle"] or past,
        row["french"],
        _kinds(row["subjects"]),
        _kinds(row["objects"]),
        _kinds(row["flags"]),
    )


def _adjective(row: dict[str, str]) -> Adjective:
    english, comparative, french, feminine, liaison, position, use, kinds = row.values()
    return Adjective(english, comparative, french, feminine, liaison, position, use, _kinds(kinds))


CONJUGATOR = fr.Conjugator({row["infinitive"]: tuple(row.values())[1:] for row in table("conjugation.tsv")})
NOUNS = tuple(map(_noun, table("nouns.tsv")))
ADJECTIVES = tuple(map(_adjective, table("adjectives.tsv")))
VERBS = tuple(map(_verb, table("verbs.tsv")))


def noun(english: str, french: str = "") -> Noun:
    """The noun of this English word (and French word, where one English word has several)."""
    return next(n for n in NOUNS if n.english == english and french in ("", n.french))


def adjective(english: str, french: str = "") -> Adjective:
    return next(a for a in ADJECTIVES if a.english == english and french in ("", a.french))


def verb(english: str, french: str = "") -> Verb:
    return next(v for v in VERBS if v.english == english and french in ("", v.french))


def of_kinds(kinds: frozenset[str]) -> tuple[Noun, ...]:
    """All nouns of any of these kinds, in the table's order."""
    return tuple(n for n in NOUNS if not kinds.isdisjoint(n.kinds))
