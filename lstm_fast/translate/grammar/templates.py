"""The kinds of sentence. Each template draws one sentence, or None where the words drawn don't fit."""

from __future__ import annotations

from dataclasses import replace

from . import lexicon
from .lexicon import VERBS, Verb
from .phrases import (
    IT,
    NOTHING,
    PERSONS,
    WHO,
    YOU,
    Clause,
    Link,
    Nominal,
    NounPhrase,
    Pronoun,
    Tense,
    Text,
    pronoun_for,
    sentence,
)
from .sampler import BE, Sampler, adjectives_for, nouns_for

_PLAIN = tuple(v for v in VERBS if "ambiguous" not in v.flags)
_DIRECT = tuple(v for v in _PLAIN if v.direct and not {"stative", "giver"} & v.flags)
_INTRANSITIVE = tuple(v for v in _PLAIN if not v.objects and "person" in v.subjects and "stative" not in v.flags)
_GIVING = tuple(v for v in VERBS if "giver" in v.flags)
_SIMPLE = tuple(v for v in _PLAIN if "giver" not in v.flags)
_COMMANDS = tuple(v for v in _SIMPLE if "stative" not in v.flags and "nomodal" not in v.flags and v.objects)

BE_NOUN = lexicon.noun


def plain(s: Sampler) -> Text | None:
    return sentence(s.clause(s.pick(_SIMPLE)).text())


def quality(s: Sampler) -> Text | None:
    noun = s.pick(lexicon.NOUNS)
    subject: Nominal = s.pick(PERSONS) if s.chance(0.15) else s.definite(noun, describe=0.1)
    if isinstance(subject, NounPhrase) and s.chance(0.35) and subject.determiner == "the" and noun.number == "":
        subject = replace(subject, determiner=s.pick(("this", "my", "his", "her", "your", "our", "their", "this")))
        if subject.determiner != "this" and noun.kinds.isdisjoint(("thing", "clothes", "pet", "vehicle", "house")):
            return None
    clause = s.described(subject)
    return None if clause is None else sentence(clause.text())


def command(s: Sampler) -> Text | None:
    verb = s.pick(_COMMANDS)
    complement = s.object(verb, YOU)
    polarity = "not" if s.chance(0.3) else ""
    return sentence(Clause(YOU, verb, Tense.IMPERATIVE, complement, polarity=polarity).text())


def giving(s: Sampler) -> Text | None:
    return sentence(s.clause(s.pick(_GIVING)).text())


TEMPLATES = ((plain, 30.0), (quality, 10.0), (command, 3.0), (giving, 6.0))
