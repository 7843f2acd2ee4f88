"""The kinds of sentence. Each template draws one sentence, or None where the words drawn don't fit together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from . import lexicon
from .ambiguous import ambiguous
from .lexicon import VERBS, Verb
from .phrases import (
    HE,
    IT,
    PERSONS,
    SHE,
    THEY,
    WE,
    WHO,
    YOU,
    Clause,
    I,
    Nominal,
    NounPhrase,
    Pronoun,
    Tense,
    Text,
    pronoun_for,
    sentence,
)
from .sampler import BE, Sampler, nouns_for

Template = Callable[[Sampler], Text | None]

_PLAIN = tuple(v for v in VERBS if "ambiguous" not in v.flags)
_SIMPLE = tuple(v for v in _PLAIN if "giver" not in v.flags)
_GIVING = tuple(v for v in VERBS if "giver" in v.flags)
_DIRECT = tuple(v for v in _SIMPLE if v.direct and "stative" not in v.flags)
_ON_PERSONS = tuple(v for v in _DIRECT if "person" in v.objects)
_INTRANSITIVE = tuple(v for v in _SIMPLE if not v.objects and not {"stative", "nomodal"} & v.flags)
_COMMANDS = tuple(v for v in _SIMPLE if v.objects and not {"stative", "nomodal", "noprogressive"} & v.flags)

_NUMBERS = (
    ("five", "cinq"),
    ("seven", "sept"),
    ("ten", "dix"),
    ("twelve", "douze"),
    ("twenty", "vingt"),
    ("thirty", "trente"),
    ("forty", "quarante"),
    ("fifty", "cinquante"),
    ("sixty", "soixante"),
)
_WEATHER = (
    ("it rains", "il pleut"),
    ("it snows", "il neige"),
    ("it is cold", "il fait froid"),
    ("it is hot", "il fait chaud"),
    ("the weather is nice", "il fait beau"),
)
_SPOTS = {  # where things lie: English, French preposition, kinds of noun
    ("on", "sur"): "surface",
    ("under", "sous"): "table bed chair tree sofa",
    ("in", "dans"): "container wardrobe drawer indoors garden",
    ("behind", "derrière"): "door sofa wardrobe house tree",
    ("near", "près de"): "window door bed lamp church river lake",
    ("in front of", "devant"): "door house hotel church mirror window",
}
_SEQUENCES = (  # what one does to a thing, and then to the same thing
    ("buy", "eat"),
    ("pick", "eat"),
    ("buy", "read"),
    ("choose", "buy"),
    ("buy", "lose"),
    ("find", "sell"),
    ("open", "close"),
    ("wash", "wear"),
    ("see", "follow"),
    ("meet", "invite"),
    ("call", "thank"),
    ("break", "repair"),
    ("buy", "wear"),
)
_REPORTS = tuple(
    Verb(en, past, past, fr, frozenset(), frozenset(), frozenset({"stative"}))
    for en, past, fr in (
        ("think that", "thought that", "penser que"),
        ("know that", "knew that", "savoir que"),
        ("say that", "said that", "dire que"),
        ("believe that", "believed that", "croire que"),
    )
)
_WONDER = replace(_REPORTS[1], english="know if", french="savoir si")


# -- plain statements ------------------------------------------------------------------------------------------------


def plain(s: Sampler) -> Text | None:
    return sentence(s.clause(s.pick(_SIMPLE)).text())


def giving(s: Sampler) -> Text | None:
    return sentence(s.clause(s.pick(_GIVING)).text())


def quality(s: Sampler) -> Text | None:
    """The rose is red."""
    if s.chance(0.12):
        clause = s.described(s.pick(PERSONS))
    else:
        noun = s.pick(lexicon.NOUNS)
        subject = s.definite(noun, describe=0.1)
        owned = not noun.kinds.isdisjoint(("thing", "clothes", "pet", "vehicle", "house", "garden"))
        if noun.number == "" and "kin" not in noun.kinds and s.chance(0.3):
            owners = ("my", "your", "his", "her", "our", "this") if owned else ("this",)
            subject = replace(subject, determiner=s.pick(owners))
        clause = s.described(subject)
    return None if clause is None else sentence(clause.text())


def comparison(s: Sampler) -> Text | None:
    """The dog is bigger than the cat."""
    quality = s.pick(tuple(a for a in lexicon.ADJECTIVES if a.comparative and a.use != "attributive"))
    kind = s.pick(("person", "animal", "thing", "clothes", "vehicle", "building", "food", "drink", "furniture", "read"))
    options = tuple(n for n in nouns_for(frozenset((kind,))) if not n.kinds.isdisjoint(quality.kinds))
    if len(options) < 2:
        return None
    first = s.definite(s.pick(options), describe=0)
    second = s.definite(s.pick(options), describe=0, plural=first.plural)
    if first.noun is second.noun:
        return None
    form = quality.agree(first.feminine, first.plural)
    if s.chance(0.75):
        compared = Text(f"{quality.comparative} than", f"plus {form} que")
    else:
        compared = Text(f"as {quality.english} as", f"aussi {form} que")
    links = ((first.noun.key, quality.key), (second.noun.key, quality.key))
    tense = Tense.PRESENT if s.chance(0.8) else Tense.PAST
    predicate = compared + second.text() + Text("", "", links)
    return sentence(Clause(first, BE, tense, polarity=_maybe_not(s), complement=predicate).text())


def position(s: Sampler) -> Text | None:
    """The key is on the table; there is a key on the table; where is the key?"""
    english, french = s.pick(tuple(_SPOTS))
    place = s.noun(_SPOTS[english, french])
    eating = place.english in ("table", "basket", "kitchen", "shelf", "box") and s.chance(0.5)
    noun = s.noun("food" if eating else "small pet clothes toy")
    if noun is place:
        return None
    spot = Text(english, french) + NounPhrase(place).text() + Text("", "", ((place.key, noun.key),))
    tense = Tense.PRESENT if s.chance(0.7) else Tense.PAST
    plural = noun.number == "many" or (noun.number == "" and s.chance(0.3))
    phrase = NounPhrase(noun, "the", plural, s.adjectives(noun, 0.3))
    kind = s.weighted((("the", 5.0), ("there", 4.0), ("where", 2.0)))
    if kind == "there":
        be, french_be = _be(plural, tense, "il y a", "il y avait", "il y a", "il y avait")
        determiner = s.pick(("two", "three", "several", "many", "bare")) if plural else "a"
        return sentence(Text(f"there {be}", french_be) + replace(phrase, determiner=determiner).text() + spot)
    if s.chance(0.35) and not eating:
        phrase = replace(phrase, determiner=s.pick(("my", "your", "his", "her", "our", "their")))
    if kind == "where":
        be, french_be = _be(plural, tense, "est", "était", "sont", "étaient")
        return sentence(Text(f"where {be}", f"où {french_be}") + phrase.text(), "?")
    return sentence(Clause(phrase, BE, tense, polarity=_maybe_not(s), complement=spot).text())


def _be(plural: bool, tense: Tense, one: str, one_past: str, many: str, many_past: str) -> tuple[str, str]:
    """English is, was, are, were, and the French form of these four that goes with it."""
    past = tense is Tense.PAST
    if plural:
        return ("were", many_past) if past else ("are", many)
    return ("was", one_past) if past else ("is", one)


def age(s: Sampler) -> Text | None:
    """My sister is ten years old."""
    subject = s.subject("person", pronouns=0.3)
    english, french = s.pick(_NUMBERS)
    have = replace(BE, french="avoir")
    tense = Tense.PRESENT if s.chance(0.8) else Tense.PAST
    years = Text(f"{english} years old", f"{french} ans")
    return sentence(Clause(subject, have, tense, complement=years).text())


def possession(s: Sampler) -> Text | None:
    """The boy's dog is big."""
    thing = s.noun("clothes pet car bike boat truck house garden jewel instrument toy kin")
    owner = s.definite(s.noun("person"), describe=0.1, plural=False)
    if owner.noun is thing or thing.number == "one" or ("kin" in thing.kinds and "kin" in owner.noun.kinds):
        return None
    if thing.english in ("dress", "skirt") and not owner.feminine:
        return None
    phrase = NounPhrase(thing, "the", thing.number == "many", owner=owner)
    clause = s.described(phrase)
    return None if clause is None else sentence(clause.text())


def profession(s: Sampler) -> Text | None:
    """My mother is a doctor: no article in French."""
    subject = s.subject("kin named", pronouns=0)
    job = s.noun("work", unlike=subject)
    if subject.plural or (
        job.feminine != subject.feminine and job.english not in ("teacher", "doctor", "writer", "artist")
    ):
        return None
    tense = s.pick((Tense.PRESENT, Tense.PRESENT, Tense.PAST))
    phrase = Text(NounPhrase(job, "a").english(), job.french, ((BE.key, job.key),))
    return sentence(Clause(subject, BE, tense, polarity=_maybe_not(s), complement=phrase).text())


# -- pronouns and agreement over a distance --------------------------------------------------------------------------


def object_pronoun(s: Sampler) -> Text | None:
    """She saw them yesterday."""
    verb = s.pick((*_ON_PERSONS, lexicon.verb("talk to"), lexicon.verb("answer"), lexicon.verb("obey")))
    subject = s.subject("person", pronouns=0.5)
    clause = s.clause(verb, subject=subject)
    options: tuple[Pronoun, ...] = PERSONS
    if isinstance(subject, Pronoun):  # "they saw him" is fine, "I saw us" is not
        third = subject.person == 3
        options = tuple(p for p in PERSONS if (p.slot != subject.slot if third else p.person != subject.person))
    return sentence(replace(clause, object=s.pick(options)).text())


def sequence(s: Sampler) -> Text | None:
    """The girl bought an apple and she ate it."""
    first, second = (lexicon.verb(v) for v in s.pick(_SEQUENCES))
    subject = s.subject("person", pronouns=0.5)
    common = tuple(n for n in nouns_for(first.objects) if not n.kinds.isdisjoint(second.objects))
    noun = s.pick(common)
    if (isinstance(subject, NounPhrase) and subject.noun is noun) or noun.number == "name":
        return None
    phrase = s.phrase(noun, subject.possessive, describe=0.15)
    if phrase.determiner == "bare":
        phrase = replace(phrase, determiner="the")
    again = subject if isinstance(subject, Pronoun) else pronoun_for(subject)
    joined = Text("but", "mais") if second.english == "lose" else Text("and", "et")
    start = Clause(subject, first, Tense.PAST, phrase).text()
    return sentence(start + joined + Clause(again, second, Tense.PAST, pronoun_for(phrase)).text())


def gap_relative(s: Sampler) -> Text | None:
    """The flowers that the old man saw are red; I like the flowers that the old man saw."""
    verb = s.pick(_DIRECT)
    noun = s.noun(verb.objects)
    if "kin" in noun.kinds or noun.number in ("name", "one"):
        return None
    actor = s.subject(verb.subjects, pronouns=0.5)
    if isinstance(actor, NounPhrase) and actor.noun is noun:
        return None
    bare = NounPhrase(noun, "the", noun.number == "many" or (noun.number == "" and s.chance(0.45)))
    tense = s.weighted(((Tense.PAST, 7.0), (Tense.PRESENT, 1.0), (Tense.FUTURE, 1.0)))
    negation = "not" if s.chance(0.1) else ""
    inner = Clause(actor, verb, tense, polarity=negation, gap=bare).text()
    phrase = replace(bare, after=Text("that", "que") + inner)
    if s.chance(0.7):
        clause = s.described(phrase, None if tense is Tense.PAST else Tense.PRESENT)
    else:
        clause = _object_clause(s, phrase, verb)
    return None if clause is None else sentence(clause.text())


def subject_relative(s: Sampler) -> Text | None:
    """The girl who sings is happy."""
    person = s.chance(0.7)
    noun = s.noun("person" if person else "pet livestock wild")
    if noun.number in ("name", "one", "many") or "kin" in noun.kinds:
        return None
    plural = s.chance(0.35)
    verbs = tuple(v for v in _SIMPLE if ("person" if person else "animal") in v.subjects and "nomodal" not in v.flags)
    bare = NounPhrase(noun, "the", plural)
    who = replace(WHO, slot=bare.slot, plural=plural, feminine=noun.feminine, possessive=bare.possessive)
    who = who if person else replace(who, subject=("that", "qui"))
    verb = s.pick(verbs)
    tense = s.pick((Tense.PRESENT, Tense.PAST)) if "stative" in verb.flags else s.pick((Tense.PAST, Tense.PROGRESSIVE))
    if tense is Tense.PROGRESSIVE and "noprogressive" in verb.flags:
        tense = Tense.PAST
    inner = Clause(who, verb, tense, s.object(verb, bare) if verb.objects else None)
    phrase = replace(bare, after=Text(inner.text().english, inner.text().french, (*inner.links, (verb.key, noun.key))))
    outer = None if tense is Tense.PAST else Tense.PRESENT
    clause = s.described(phrase, outer) if s.chance(0.6) else _object_clause(s, phrase, verb)
    return None if clause is None else sentence(clause.text())


# -- questions and commands ------------------------------------------------------------------------------------------


def yes_no(s: Sampler) -> Text | None:
    clause = replace(s.clause(s.pick(_SIMPLE)), polarity="")
    if clause.tense is Tense.HABIT or (clause.subject is I and clause.modal is None):
        return None
    return sentence(clause.question(), "?")


def wh_question(s: Sampler) -> Text | None:
    asked = s.pick((("where", "où"), ("when", "quand"), ("why", "pourquoi")))
    verb = s.pick(_SIMPLE)
    tense = Tense.PAST if s.chance(0.6) or asked[0] == "when" else Tense.PROGRESSIVE
    if asked[0] == "where":
        verb = lexicon.verb(
            s.pick(("buy", "find", "see", "lose", "meet", "hide", "sleep", "swim", "work", "sing", "dance"))
        )
    if "stative" in verb.flags or ("noprogressive" in verb.flags and tense is Tense.PROGRESSIVE):
        return None
    subject = s.subject(verb.subjects)
    if subject is I:
        return None
    thing = s.object(verb, subject) if verb.objects else None
    return sentence(Clause(subject, verb, tense, thing).question(Text(*asked)), "?")


def what_question(s: Sampler) -> Text | None:
    """What did she buy? How many apples did she buy? Which dress did she choose?"""
    verb = s.pick(_DIRECT)
    subject = s.subject(verb.subjects & {"person", "adult"}, pronouns=0.5)
    if "person" in verb.objects:
        return None
    noun = s.noun(verb.objects)
    form = s.weighted((("what", 2.0), ("how many", 2.0), ("which", 2.0)))
    if form == "what":
        tense = s.pick((Tense.PAST, Tense.FUTURE, Tense.PROGRESSIVE))
        if tense is Tense.PROGRESSIVE and "noprogressive" in verb.flags:
            return None
        return sentence(Clause(subject, verb, tense).question(Text("what", "que")), "?")
    if noun.number in ("mass", "one", "name") or "kin" in noun.kinds:
        return None
    many = form == "how many"
    gap = NounPhrase(noun, "", many or noun.number == "many")
    which = ("quelles" if noun.feminine else "quels") if gap.plural else ("quelle" if noun.feminine else "quel")
    asked = Text("how many", "combien de") if many else Text("which", which)
    return sentence(Clause(subject, verb, Tense.PAST, gap=gap).question(asked + gap.text()), "?")


def who_question(s: Sampler) -> Text | None:
    verb = s.pick(_SIMPLE)
    if "person" not in verb.subjects or "stative" in verb.flags:
        return None
    tense = s.pick((Tense.PAST, Tense.PAST, Tense.PROGRESSIVE, Tense.FUTURE))
    if tense is Tense.PROGRESSIVE and "noprogressive" in verb.flags:
        return None
    return sentence(Clause(WHO, verb, tense, s.object(verb, YOU) if verb.objects else None).text(), "?")


def command(s: Sampler) -> Text | None:
    verb = s.pick(_COMMANDS)
    thing: Nominal = s.definite(s.noun(verb.objects))
    if verb.direct and not verb.english.startswith("turn") and s.chance(0.2):  # "turn it off" splits the verb
        thing = s.pick((IT, THEY))
    return sentence(Clause(YOU, verb, Tense.IMPERATIVE, thing, polarity=_maybe_not(s)).text())


# -- two clauses -----------------------------------------------------------------------------------------------------


def report(s: Sampler) -> Text | None:
    """She thinks that the soup is hot; I do not know if he is happy."""
    speaker = s.subject("person", pronouns=0.7)
    if s.chance(0.2):
        main = Clause(speaker, _WONDER, polarity="not").text()
    else:
        main = Clause(speaker, s.pick(_REPORTS)).text()
    inner = s.described(s.subject("person", pronouns=0.6)) if s.chance(0.4) else s.clause(s.pick(_SIMPLE))
    if inner is None or (inner.subject is not speaker and {inner.subject, speaker} <= {I, WE}):
        return None
    return sentence(main + inner.text())


def reason(s: Sampler) -> Text | None:
    """The boy cried because he was tired."""
    effect = lexicon.verb(s.pick(("cry", "sleep", "rest", "sit down", "laugh", "smile", "stop", "shout", "go to bed")))
    causes = {
        "cry": "sad tired sick be-cold be-hungry",
        "sleep": "tired sick be-sleepy",
        "rest": "tired sick be-hot",
        "sit down": "tired sick be-sleepy",
        "laugh": "happy",
        "smile": "happy proud",
        "stop": "tired be-hungry be-thirsty",
        "shout": "be-hungry be-cold",
        "go to bed": "tired sick be-sleepy be-cold",
    }
    subject = s.subject("person", pronouns=0.35)
    again = subject if isinstance(subject, Pronoun) else pronoun_for(subject)
    past = s.chance(0.6)
    cause = s.pick(causes[effect.english].split())
    tense = Tense.PAST if past else Tense.PRESENT
    if cause.startswith("be-"):
        second = Clause(again, lexicon.verb(cause.replace("-", " ")), tense)
    else:
        second = s.be(again, lexicon.adjective(cause), tense)
    first = Clause(subject, effect, Tense.PAST if past else Tense.PROGRESSIVE)
    links = ((effect.key, cause),)
    return sentence(first.text() + Text("because", "parce que", links) + second.text())


def interrupted(s: Sampler) -> Text | None:
    """I was sleeping when the phone rang."""
    doing = s.pick((*_INTRANSITIVE, lexicon.verb("read"), lexicon.verb("clean"), lexicon.verb("wash")))
    if "habit" not in doing.flags:
        return None
    subject = s.subject("person", pronouns=0.5)
    thing = s.object(doing, subject) if doing.objects else None
    event = s.pick(("arrive", "come back", "fall", "shout", "enter", "call"))
    if event in ("enter", "call"):
        verb = lexicon.verb(event)
        actor = s.subject("person", pronouns=0.3)
        if isinstance(actor, Pronoun) and isinstance(subject, Pronoun) and actor.person == subject.person:
            return None
        what: Nominal | None = NounPhrase(lexicon.noun("kitchen")) if event == "enter" else None
        if what is None:
            options = tuple(p for p in PERSONS if isinstance(actor, NounPhrase) or p.person != actor.person)
            what = s.pick(options)
        second = Clause(actor, verb, Tense.PAST, what)
    else:
        actor = s.subject("person", pronouns=0.4)
        if actor == subject:
            return None
        second = Clause(actor, lexicon.verb(event), Tense.PAST)
    first = Clause(subject, doing, Tense.BACKGROUND, thing)
    return sentence(first.text() + Text("when", "quand") + second.text())


def condition(s: Sampler) -> Text | None:
    """If it rains, we will stay in the house."""
    start = Text("if", "si")
    if s.chance(0.6):
        start += Text(*s.pick(_WEATHER))
    else:
        start += Clause(s.pick((HE, SHE, THEY)), s.pick(_INTRANSITIVE), Tense.PRESENT).text()
    verb = s.pick((*_INTRANSITIVE, lexicon.verb("stay in"), lexicon.verb("go to"), lexicon.verb("return to")))
    subject = s.subject("person", pronouns=0.75)
    place = s.definite(s.noun(verb.objects), describe=0) if verb.objects else None
    then = Clause(subject, verb, Tense.FUTURE, place, polarity="not" if s.chance(0.2) else "")
    return sentence(Text(start.english + ",", start.french + ",", start.links) + then.text())


# -- helpers ---------------------------------------------------------------------------------------------------------


def _maybe_not(s: Sampler) -> str:
    return "not" if s.chance(0.2) else ""


def _object_clause(s: Sampler, phrase: NounPhrase, used: Verb) -> Clause | None:
    """A clause whose object is this phrase."""
    options = ("like", "love", "see", "find", "look for", "know", "want", "remember")
    verb = lexicon.verb(s.pick(options))
    if verb is used or verb.objects.isdisjoint(phrase.noun.kinds):
        return None
    tense = Tense.PRESENT if "stative" in verb.flags else Tense.PAST
    return Clause(s.subject("person", pronouns=0.7), verb, tense, phrase, polarity=_maybe_not(s))


TEMPLATES: tuple[tuple[Template, float], ...] = (
    (ambiguous, 46.0),
    (plain, 26.0),
    (giving, 6.0),
    (quality, 9.0),
    (comparison, 4.0),
    (position, 6.0),
    (age, 1.0),
    (possession, 2.5),
    (profession, 1.5),
    (object_pronoun, 6.0),
    (sequence, 4.0),
    (gap_relative, 8.0),
    (subject_relative, 5.0),
    (yes_no, 5.0),
    (wh_question, 3.0),
    (what_question, 3.0),
    (who_question, 2.0),
    (command, 3.0),
    (report, 4.0),
    (reason, 2.0),
    (interrupted, 2.0),
    (condition, 2.0),
)
