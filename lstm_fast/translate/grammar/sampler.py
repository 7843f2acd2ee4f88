"""Random noun phrases and clauses that make sense: the lexicon's kinds decide which words go together."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TypeVar

from . import lexicon
from .lexicon import Adjective, Noun, Verb
from .phrases import NOTHING, PERSONS, SHE, Clause, Modal, Nominal, NounPhrase, Pronoun, Tense, Text

T = TypeVar("T")
Weighted = Sequence[tuple[T, float]]

BE = Verb("be", "was", "been", "être", frozenset(), frozenset(), frozenset({"stative"}))

_TIMES: dict[Tense, tuple[tuple[str, str], ...]] = {
    Tense.PRESENT: (
        ("every day", "tous les jours"),
        ("every morning", "tous les matins"),
        ("every evening", "tous les soirs"),
        ("every week", "toutes les semaines"),
        ("on Sundays", "le dimanche"),
    ),
    Tense.PAST: (
        ("yesterday", "hier"),
        ("last night", "hier soir"),
        ("this morning", "ce matin"),
        ("last week", "la semaine dernière"),
        ("two days ago", "il y a deux jours"),
        ("on Monday", "lundi"),
    ),
    Tense.FUTURE: (
        ("tomorrow", "demain"),
        ("next week", "la semaine prochaine"),
        ("tonight", "ce soir"),
        ("next month", "le mois prochain"),
        ("on Saturday", "samedi"),
    ),
    Tense.PROGRESSIVE: (("now", "maintenant"), ("right now", "en ce moment")),
}
_TIMES[Tense.GOING] = _TIMES[Tense.FUTURE]
_FREQUENCY = (("often", "souvent"), ("always", "toujours"), ("sometimes", "parfois"))
_PLACES = {  # English, French: kinds of noun
    ("in", "dans"): frozenset("in".split()),
    ("under", "sous"): frozenset("tree table bridge".split()),
    ("near", "près de"): frozenset("river lake window door castle church station school tree fire".split()),
    ("behind", "derrière"): frozenset("house church tree wall school".split()),
    ("in front of", "devant"): frozenset("house church hotel school museum mirror".split()),
}
_TENSES: Weighted[Tense] = (
    (Tense.PRESENT, 4),
    (Tense.PAST, 6),
    (Tense.FUTURE, 2.5),
    (Tense.PROGRESSIVE, 2),
    (Tense.BACKGROUND, 0.7),
    (Tense.HABIT, 0.8),
    (Tense.PERFECT, 1),
    (Tense.GOING, 1.2),
)
_SINGULAR: Weighted[str] = (("the", 5), ("a", 3), ("this", 0.8), ("own", 1.5))
_PLURAL: Weighted[str] = (
    ("the", 4),
    ("bare", 2),
    ("these", 0.8),
    ("own", 1),
    ("two", 0.5),
    ("three", 0.4),
    ("four", 0.2),
    ("many", 0.5),
    ("several", 0.3),
    ("all the", 0.3),
)
_OWNED = frozenset("thing clothes pet car bike boat truck house garden instrument read".split())
_COUNTED = _OWNED | frozenset("food flower animal person".split())
_COUNTING = ("bare", "two", "three", "four", "many", "several")
_POSSESSIVES = ("my", "my", "your", "his", "her", "our", "their")
_SPOUSES = {"husband": ("my", "your", "her"), "wife": ("my", "your", "his")}
_EXCESSIVE = frozenset(
    "big small old young long short heavy light hot cold expensive dangerous tired sick slow fast shy proud dark "
    "difficult easy hard dirty tall high".split()
)


@cache
def nouns_for(kinds: frozenset[str]) -> tuple[Noun, ...]:
    return lexicon.of_kinds(kinds)


@cache
def adjectives_for(noun: Noun, predicate: bool = False) -> tuple[Adjective, ...]:
    return tuple(
        a
        for a in lexicon.ADJECTIVES
        if not noun.kinds.isdisjoint(a.kinds) and a.use in ("", "predicate" if predicate else "attributive")
    )


class Sampler:
    """Draws with ``random.Random.random()`` alone, whose sequence Python guarantees to stay the same."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed).random

    def chance(self, probability: float) -> bool:
        return self._random() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random() * len(options))]

    def weighted(self, options: Weighted[T]) -> T:
        point = self._random() * sum(weight for _, weight in options)
        for option, weight in options:
            point -= weight
            if point < 0:
                return option
        return options[-1][0]

    # -- noun phrases --------------------------------------------------------------------------------------------

    def noun(self, kinds: frozenset[str] | str, unlike: Nominal | None = None) -> Noun:
        """A noun of these kinds, other than the one that heads ``unlike``."""
        options = nouns_for(frozenset(kinds.split()) if isinstance(kinds, str) else kinds)
        while True:
            noun = self.pick(options)
            if not isinstance(unlike, NounPhrase) or unlike.noun is not noun or len(options) == 1:
                return noun

    def phrase(self, noun: Noun, owner: str = "", describe: float = 0.25, plural: bool | None = None) -> NounPhrase:
        """The noun with a fitting number, determiner and perhaps an adjective. ``owner``: a possessive to use."""
        if noun.number == "name":
            return NounPhrase(noun, "")
        counted = not _COUNTED.isdisjoint(noun.kinds)
        if plural is None:
            plural = self.chance(0.3 if counted else 0.06)
        plural = noun.number == "many" or (plural and noun.number == "")
        possessive = owner if owner in _POSSESSIVES and self.chance(0.8) else self.pick(_POSSESSIVES)
        if noun.english in _SPOUSES and possessive not in _SPOUSES[noun.english]:
            possessive = self.pick(_SPOUSES[noun.english])
        if "kin" in noun.kinds:
            return NounPhrase(noun, possessive, noun.number == "many" or (plural and self.chance(0.5)))
        if noun.number == "mass":
            determiner = self.weighted((("the", 3.0), ("some", 1.0), ("bare", 2.0), ("own", 0.3)))
        elif noun.number == "one":
            determiner = "the"
        else:
            determiner = self.weighted(_PLURAL if plural else _SINGULAR)
        if determiner == "these":
            determiner = "this"
        if determiner in ("bare", "many", "several", "all the") and not counted and noun.number != "mass":
            determiner = "the"
        if determiner in ("bare", "many", "several") and "person" in noun.kinds:
            determiner = "the"
        if determiner == "own":
            determiner = possessive if not _OWNED.isdisjoint(noun.kinds) or noun.number == "mass" else "the"
        return NounPhrase(noun, determiner, plural, self.adjectives(noun, describe))

    def definite(self, noun: Noun, describe: float = 0.2, plural: bool | None = None) -> NounPhrase:
        """The noun with "the", or with what a name or a relative needs."""
        phrase = self.phrase(noun, describe=describe, plural=plural)
        fixed = noun.number == "name" or "kin" in noun.kinds
        return phrase if fixed else NounPhrase(noun, "the", phrase.plural, phrase.adjectives)

    def adjectives(self, noun: Noun, probability: float) -> tuple[Adjective, ...]:
        options = adjectives_for(noun)
        if not options or not self.chance(probability):
            return ()
        first = self.pick(options)
        if first.position == "before" and self.chance(0.2):
            second = tuple(a for a in options if a.position == "after" and "color" in a.kinds)
            if second:
                return (first, self.pick(second))
        return (first,)

    def subject(self, kinds: frozenset[str] | str, pronouns: float = 0.4) -> Nominal:
        """Who or what a clause is about; a personal pronoun only where persons are meant."""
        kinds = frozenset(kinds.split()) if isinstance(kinds, str) else kinds
        if not kinds.isdisjoint(("person", "adult")) and self.chance(pronouns):
            return self.pick(PERSONS)
        noun = self.pick(nouns_for(kinds))
        if noun.number in ("", "many") and "kin" not in noun.kinds and self.chance(0.85):
            return self.definite(noun, describe=0.22)
        return self.phrase(noun, describe=0.2)

    def object(self, verb: Verb, subject: Nominal, polarity: str = "") -> NounPhrase:
        """What the verb's flags ask for: "the" after "go to", "a" after "have", "tea" or "the tea" after "like"."""
        noun = self.noun(verb.objects, unlike=subject)
        describe = 0.0 if "undescribed" in verb.flags else 0.25
        if "definite" in verb.flags:
            return self.definite(noun, describe, plural=False)
        loose = noun.number in ("", "mass") and noun.kinds.isdisjoint(("kin", "person"))
        if "generic" in verb.flags and loose and self.chance(0.5):
            return NounPhrase(noun, "generic", plural=noun.number == "")
        owner = subject.possessive if isinstance(subject, Pronoun) or "person" in subject.noun.kinds else ""
        phrase = self.phrase(noun, owner, describe)
        if (
            "indefinite" in verb.flags
            and noun.number == ""
            and "kin" not in noun.kinds
            and phrase.determiner not in _COUNTING
        ):
            return replace(phrase, determiner="a", plural=False)
        if "generic" in verb.flags and phrase.determiner in ("a", "some", *_COUNTING):
            return replace(phrase, determiner="the")
        return self.negatable(phrase) if polarity else phrase

    def negatable(self, phrase: NounPhrase) -> NounPhrase:
        """The phrase as it sounds natural under a negation: "not the chairs", "no chair"."""
        if phrase.determiner == "a" and self.chance(0.4):
            return replace(phrase, adjectives=())
        return replace(phrase, determiner="the") if phrase.determiner in ("a", *_COUNTING) else phrase

    # -- clauses -------------------------------------------------------------------------------------------------

    def place(self) -> Text:
        """Where something happens: "in the garden"."""
        english, french = self.pick(tuple(_PLACES))
        phrase = NounPhrase(self.noun(_PLACES[english, french]))
        return Text(english, french) + phrase.text()

    def time(self, tense: Tense, probability: float = 0.25) -> Text:
        if tense in _TIMES and self.chance(probability):
            return Text(*self.pick(_TIMES[tense]))
        return NOTHING

    def tense(self, verb: Verb) -> Tense:
        if "stative" in verb.flags:
            return Tense.PRESENT if self.chance(0.65) else Tense.PAST
        while True:
            tense = self.weighted(_TENSES)
            if tense is Tense.HABIT and "habit" not in verb.flags:
                continue
            if tense in (Tense.PROGRESSIVE, Tense.BACKGROUND) and "noprogressive" in verb.flags:
                continue
            return tense

    def polarity(self, verb: Verb, tense: Tense, probability: float = 0.22) -> str:
        if tense in (Tense.HABIT, Tense.BACKGROUND) or not self.chance(probability):
            return ""
        usual, stative = "habit" in verb.flags, "stative" in verb.flags
        if tense in (Tense.PRESENT, Tense.FUTURE) and (usual or stative) and self.chance(0.2):
            return "no longer"
        if tense in (Tense.PRESENT, Tense.FUTURE, Tense.PERFECT) and usual and not stative and self.chance(0.25):
            return "never"
        return "not"

    def clause(self, verb: Verb, tense: Tense | None = None, subject: Nominal | None = None) -> Clause:
        """The verb with a subject, objects, tense, negation, modal, adverb and adjunct that go together."""
        subject = subject or self.subject(verb.subjects)
        modal = None
        if tense is None and not {"stative", "nomodal"} & verb.flags and self.chance(0.2):
            animate = isinstance(subject, Pronoun) or "person" in subject.noun.kinds
            modal = self.pick(tuple(Modal) if animate else (Modal.CAN, Modal.COULD, Modal.MUST))
            tense = Tense.PRESENT
        tense = tense or self.tense(verb)
        polarity = self.polarity(verb, tense)
        if modal is not None and polarity:
            polarity = "not"
        usual = tense is Tense.PRESENT and "habit" in verb.flags and "stative" not in verb.flags
        adverb = NOTHING
        if not polarity and modal is None:
            if tense is Tense.PERFECT and self.chance(0.6):
                adverb = Text("already", "déjà")
            elif usual and self.chance(0.2):
                adverb = Text(*self.pick(_FREQUENCY))
        thing = self.object(verb, subject, polarity) if verb.objects else None
        recipient = self.recipient(subject) if "giver" in verb.flags else None
        if recipient is SHE and thing is not None and thing.determiner == "bare":  # "gave her books" has two readings
            thing = replace(thing, determiner="the")
        return Clause(
            subject,
            verb,
            tense,
            thing,
            recipient,
            polarity,
            adverb,
            modal,
            self.adjunct(verb, tense, free=adverb is NOTHING and modal is None and polarity in ("", "not")),
        )

    def adjunct(self, verb: Verb, tense: Tense, free: bool) -> Text:
        if "located" in verb.flags and self.chance(0.35):
            return self.place()
        if not free or "stative" in verb.flags or (tense is Tense.PRESENT and "habit" not in verb.flags):
            return NOTHING
        return self.time(tense)

    def recipient(self, giver: Nominal) -> Nominal:
        """To whom: a person other than the giver."""
        if self.chance(0.45):
            options = tuple(p for p in PERSONS if isinstance(giver, NounPhrase) or p.person != giver.person)
            return self.pick(options)
        owner = giver.possessive
        noun = self.noun("person", unlike=giver)
        return self.phrase(noun, owner) if "kin" in noun.kinds else self.definite(noun)

    def described(self, subject: Nominal, tense: Tense | None = None, polarity: bool = True) -> Clause | None:
        """ "The rose is red": a predicate adjective, or None where no adjective fits the subject."""
        if isinstance(subject, Pronoun):
            options = tuple(a for a in lexicon.ADJECTIVES if "person" in a.kinds)
        else:
            options = adjectives_for(subject.noun, predicate=True)
            colored = any("color" in a.kinds for a in subject.adjectives)
            options = tuple(a for a in options if a not in subject.adjectives and not (colored and "color" in a.kinds))
        if not options:
            return None
        quality = self.pick(options)
        tense = tense or self.weighted(((Tense.PRESENT, 6.0), (Tense.PAST, 3.0)))
        negation = "not" if polarity and self.chance(0.2) else ""
        degree = NOTHING
        if quality.comparative and self.chance(0.3):
            excessive = quality.english in _EXCESSIVE and self.chance(0.4)
            degree = Text("too", "trop") if excessive else Text("very", "très")
        return self.be(subject, quality, tense, negation, degree)

    @staticmethod
    def be(
        subject: Nominal, quality: Adjective, tense: Tense = Tense.PRESENT, polarity: str = "", degree: Text = NOTHING
    ) -> Clause:
        links = ((subject.noun.key, quality.key),) if isinstance(subject, NounPhrase) else ()
        form = Text(quality.english, quality.agree(subject.feminine, subject.plural), links)
        return Clause(subject, BE, tense, polarity=polarity, complement=degree + form)
