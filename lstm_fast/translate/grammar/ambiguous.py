"""Words whose reading depends on their sentence: rose the flower and rose the past of rise, and two dozen more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from . import lexicon
from .lexicon import VERBS, Noun
from .phrases import IT, NOTHING, PERSONS, YOU, Clause, I, Modal, NounPhrase, Tense, Text, sentence
from .sampler import BE, Sampler

Template = Callable[[Sampler], Text | None]

_TO_SEE = tuple(v for v in VERBS if v.direct and not {"ambiguous", "giver"} & v.flags)
_GIVING = tuple(v for v in VERBS if "giver" in v.flags)
_HABITS = tuple(v for v in VERBS if "habit" in v.flags and not {"ambiguous", "stative"} & v.flags)
_MODALS = (Modal.CAN, Modal.MUST, Modal.WANT, Modal.SHOULD, Modal.WOULD_LIKE)
_LIKENESS = (
    ("swim", "fish"),
    ("sing", "bird"),
    ("run", "rabbit"),
    ("run", "horse"),
    ("cry", "child"),
    ("laugh", "child"),
    ("dance", "princess"),
    ("sleep", "cat"),
    ("swim", "duck"),
    ("sing", "actress"),
)
_GENRES = (
    ("music", "musique"),
    ("movie", "film"),
    ("book", "livre"),
    ("song", "chanson"),
    ("story", "histoire"),
    ("flower", "fleur"),
    ("house", "maison"),
    ("wine", "vin"),
    ("dress", "robe"),
    ("cake", "gâteau"),
)
_GAMES = (("soccer", "au football"), ("tennis", "au tennis"), ("chess", "aux échecs"), ("cards", "aux cartes"))
_OVER = ("hill", "sea", "lake", "village", "forest", "mountain", "city", "field", "island")


# -- readings made from the lexicon ----------------------------------------------------------------------------------


def _noun(english: str, french: str = "") -> Template:
    """Sentences about a thing: seen, given, described."""
    noun = lexicon.noun(english, french)
    seeing = tuple(v for v in _TO_SEE if not noun.kinds.isdisjoint(v.objects))
    giving = tuple(v for v in _GIVING if not noun.kinds.isdisjoint(v.objects))

    def draw(s: Sampler) -> Text | None:
        kind = s.weighted((("seen", 6.0), ("given", 2.0 if giving else 0.0), ("described", 3.0)))
        if kind == "described":
            clause = s.described(s.definite(noun, describe=0.15))
            return None if clause is None else sentence(clause.text())
        clause = s.clause(s.pick(giving if kind == "given" else seeing))
        subject = clause.subject
        if isinstance(subject, NounPhrase) and subject.noun is noun:
            return None
        if "ambiguous" in clause.verb.flags:
            return None
        return sentence(replace(clause, object=_object(s, clause, noun)).text())

    return draw


def _object(s: Sampler, clause: Clause, noun: Noun) -> NounPhrase:
    """This noun as the object of the clause, described more often than others."""
    phrase = s.phrase(noun, clause.subject.possessive, describe=0.4)
    loose = {"generic", "stative"} & clause.verb.flags and phrase.determiner in ("bare", "many", "several", "a")
    phrase = replace(phrase, determiner="the") if loose else phrase
    return s.negatable(phrase) if clause.polarity else phrase


def _past(english: str, french: str = "", complement: Callable[[Sampler], Text] | None = None) -> Template:
    """The verb in the past, whose English form is the ambiguous one; now and then in another tense."""
    verb = lexicon.verb(english, french)

    def draw(s: Sampler) -> Text | None:
        tense = Tense.PAST if s.chance(0.85) else s.pick((Tense.PRESENT, Tense.FUTURE, Tense.PERFECT))
        subject = s.subject(verb.subjects, pronouns=0.5)
        thing = s.object(verb, subject) if verb.objects else None
        rest = NOTHING if complement is None else complement(s)
        if rest is NOTHING:
            rest = s.time(tense, 0.3)
        return sentence(Clause(subject, verb, tense, thing, complement=rest).text())

    return draw


def _base(english: str, french: str = "", complement: Callable[[Sampler], Text] | None = None) -> Template:
    """The verb in forms that look like the noun: after a modal, will, did not, a plural subject, in a command."""
    verb = lexicon.verb(english, french)

    def draw(s: Sampler) -> Text | None:
        subject = s.subject(verb.subjects, pronouns=0.5)
        thing = s.object(verb, subject) if verb.objects else None
        rest = NOTHING if complement is None else complement(s)
        clause = Clause(subject, verb, object=thing, complement=rest)
        willing = "person" in verb.subjects and "nomodal" not in verb.flags
        form = s.weighted(
            (
                ("modal", 4.0 if willing else 0.0),
                ("future", 2.0),
                ("plural", 3.0),
                ("command", 1.0 if willing else 0.0),
                ("did not", 1.0),
                ("other", 1.5),
            )
        )
        if form == "modal":
            clause = replace(clause, modal=s.pick(_MODALS), polarity="not" if s.chance(0.15) else "")
        elif form == "future":
            clause = replace(clause, tense=s.pick((Tense.FUTURE, Tense.GOING)))
        elif form == "plural" and (subject in (I, YOU) or subject.plural):
            clause = replace(clause, polarity="not" if s.chance(0.2) else "")
        elif form == "command":
            fixed = None if thing is None else s.definite(thing.noun)
            clause = Clause(YOU, verb, Tense.IMPERATIVE, fixed, complement=rest)
        elif form == "did not":
            clause = replace(clause, tense=Tense.PAST, polarity="not")
        else:
            clause = replace(clause, tense=s.pick((Tense.PAST, Tense.PRESENT)))
        if thing is not None and clause.polarity:
            clause = replace(clause, object=s.negatable(thing))
        return sentence(clause.text())

    return draw


# -- what stands beside them -----------------------------------------------------------------------------------------


def _with(english: str, french: str, nouns: Sequence[str], probability: float = 1.0) -> Callable[[Sampler], Text]:
    """A prepositional phrase with one of these nouns: "on the table"."""

    def draw(s: Sampler) -> Text:
        if not s.chance(probability):
            return NOTHING
        noun = lexicon.noun(s.pick(nouns))
        plural = noun.english in ("hill", "mountain", "field")
        return Text(english, french, ((noun.key, english),)) + NounPhrase(noun, "the", plural).text()

    return draw


def _sun_rose(s: Sampler) -> Text | None:
    """The sun rose over the hills."""
    subject = NounPhrase(lexicon.noun(s.pick(("sun", "moon", "sun"))))
    where = _with(*s.pick((("over", "sur"), ("over", "sur"), ("behind", "derrière"))), _OVER)(s)
    tense = Tense.PAST if s.chance(0.8) else s.pick((Tense.PRESENT, Tense.FUTURE))
    verb = lexicon.verb("rise")
    return sentence(Clause(subject, verb, tense, complement=where).text())


def _rose_early(s: Sampler) -> Text | None:
    subject = s.subject("person", pronouns=0.4)
    when = Text(
        *s.pick((("early", "tôt"), ("late", "tard"), ("at six o'clock", "à six heures"), ("slowly", "lentement")))
    )
    verb = lexicon.verb("rise")
    return sentence(Clause(subject, verb, Tense.PAST, complement=when).text())


def _rose_from(s: Sampler) -> Text | None:
    """The old woman rose from her chair."""
    verb = lexicon.verb("rise from")
    subject = s.subject(verb.subjects, pronouns=0.5)
    seat = NounPhrase(s.noun(verb.objects), s.pick(("the", subject.possessive)))
    if subject.plural and seat.determiner == "their":
        seat = replace(seat, plural=True)
    tense = Tense.PAST if s.chance(0.85) else s.pick((Tense.PRESENT, Tense.PERFECT))
    return sentence(Clause(subject, verb, tense, seat, complement=s.time(tense, 0.15)).text())


def _rose_dress(s: Sampler) -> Text | None:
    color = lexicon.adjective("rose")
    clause = s.clause(lexicon.verb(s.pick(("wear", "buy", "choose", "wash", "look for", "find", "lose", "sell"))))
    phrase = s.phrase(s.noun(color.kinds), clause.subject.possessive, describe=0)
    return sentence(replace(clause, object=replace(phrase, adjectives=(color,))).text())


def _side(english: str, french: str) -> Template:
    """Left and right as directions, sides and hands."""
    adjective = lexicon.adjective(english, {"left": "gauche", "right": "droit"}[english])

    def draw(s: Sampler) -> Text | None:
        kind = s.pick(("turn", "on", "in", "raise", "hold"))
        if kind == "turn":
            verb = lexicon.verb("turn")
            subject = s.subject(verb.subjects, pronouns=0.5)
            if subject is YOU and s.chance(0.8):
                return sentence(Clause(YOU, verb, Tense.IMPERATIVE, complement=Text(english, f"à {french}")).text())
            tense = s.pick((Tense.PAST, Tense.PAST, Tense.FUTURE, Tense.GOING))
            where = _with("at", "à", ("station", "bridge", "church", "bank", "castle"), 0.4)(s)
            return sentence(Clause(subject, verb, tense, complement=Text(english, f"à {french}") + where).text())
        if kind == "on":
            place = s.definite(s.noun("building door window garden park"), describe=0.2, plural=False)
            side = Text(f"on the {english}", f"à {french}", ((place.noun.key, english),))
            return sentence(Clause(place, BE, complement=side).text())
        owner = s.pick(("my", "your", "his", "her"))
        hand = NounPhrase(lexicon.noun("hand"), owner, adjectives=(adjective,))
        thing = s.definite(s.noun("small"), describe=0.15, plural=False)
        if kind == "in":
            inside = Text("in", "dans", ((thing.noun.key, english),)) + hand.text()
            tense = Tense.PRESENT if s.chance(0.7) else Tense.PAST
            return sentence(Clause(thing, BE, tense, complement=inside).text())
        subject = s.subject("person", pronouns=0.5)
        verb = lexicon.verb(kind)
        own = Text(f"{subject.possessive} {english} hand", f"la main {adjective.feminine}")
        if kind == "raise":
            return sentence(Clause(subject, verb, s.pick((Tense.PAST, Tense.FUTURE)), complement=own).text())
        held = Text("in", "dans", ((thing.noun.key, english),)) + own
        tense = s.pick((Tense.PROGRESSIVE, Tense.BACKGROUND))
        return sentence(Clause(subject, verb, tense, thing, complement=held).text())

    return draw


def _with_a_saw(s: Sampler) -> Text | None:
    subject = s.subject("person", pronouns=0.5)
    tree = s.phrase(lexicon.noun("tree"), describe=0.3)
    tense = s.pick((Tense.PAST, Tense.PAST, Tense.FUTURE, Tense.PROGRESSIVE))
    saw = s.phrase(lexicon.noun("saw"), subject.possessive, describe=0.4, plural=False)
    tool = Text("with", "avec") + saw.text()
    return sentence(Clause(subject, lexicon.verb("cut"), tense, tree, complement=tool).text())


def _can(s: Sampler) -> Text | None:
    verb = s.pick(tuple(v for v in VERBS if not {"stative", "nomodal", "ambiguous"} & v.flags))
    clause = s.clause(verb, Tense.PRESENT)
    clause = replace(clause, modal=Modal.CAN, adverb=NOTHING, polarity="not" if s.chance(0.2) else "")
    if clause.subject is not I and s.chance(0.2) and not clause.polarity:
        return sentence(clause.question(), "?")
    return sentence(clause.text())


def _bear_noise(s: Sampler) -> Text | None:
    """I cannot bear the noise."""
    subject = s.subject("person", pronouns=0.5)
    noun = s.noun("nuisance cook neighbor city exam insect")
    thing = NounPhrase(noun, s.pick(("the", "this")), noun.number == "" and s.chance(0.3))
    modal = s.pick((Modal.CAN, Modal.COULD))
    return sentence(Clause(subject, lexicon.verb("bear"), object=thing, polarity="not", modal=modal).text())


def _ring_bell(s: Sampler) -> Text | None:
    noun = s.noun("phone bell clock")
    subject = s.definite(noun, describe=0.2, plural=s.chance(0.6))
    if noun.english == "bell":
        owner = s.noun("church school castle station city village farm factory")
        whose = Text("of", "de", ((noun.key, owner.key),)) + NounPhrase(owner).text()
        subject = replace(subject, after=whose)
    tense = s.pick((Tense.PRESENT, Tense.FUTURE, Tense.PAST, Tense.GOING))
    polarity = "not" if s.chance(0.4) else ""
    time = s.time(tense, 0.4) if not polarity else NOTHING
    return sentence(Clause(subject, lexicon.verb("ring"), tense, polarity=polarity, complement=time).text())


def _game(s: Sampler) -> Text:
    return Text(*s.pick(_GAMES)) if s.chance(0.5) else s.place()


def _kind_of(s: Sampler) -> Text | None:
    english, french = s.pick(_GENRES)
    subject = s.subject("person", pronouns=0.6)
    verb = lexicon.verb(s.pick(("like", "love", "hate", "prefer")))
    genre = Text(f"this kind of {english}", f"ce genre de {french}", ((verb.key, f"kind of {english}"),))
    clause = Clause(subject, verb, polarity="not" if s.chance(0.25) else "", complement=genre)
    return sentence(clause.text())


def _quality(english: str, french: str) -> Template:
    """The adjective in one of its readings, as a predicate or with its noun."""
    adjective = lexicon.adjective(english, french)

    def draw(s: Sampler) -> Text | None:
        noun = s.noun(adjective.kinds)
        if noun.number == "name" or "kin" in noun.kinds:
            return None
        if adjective.use == "template" or s.chance(0.4):
            clause = s.clause(s.pick(tuple(v for v in _TO_SEE if not noun.kinds.isdisjoint(v.objects)) or _TO_SEE))
            if noun.kinds.isdisjoint(clause.verb.objects):
                return None
            phrase = replace(_object(s, clause, noun), adjectives=(adjective,))
            if adjective.english == "right":
                phrase = replace(phrase, determiner="the")
            return sentence(replace(clause, object=phrase).text())
        subject = s.definite(noun, describe=0)
        tense = Tense.PRESENT if s.chance(0.7) else Tense.PAST
        degree = Text("very", "très") if s.chance(0.3) else NOTHING
        return sentence(s.be(subject, adjective, tense, "not" if s.chance(0.2) else "", degree).text())

    return draw


def _work_hard(s: Sampler) -> Text | None:
    subject = s.subject("person", pronouns=0.4)
    tense = s.pick((Tense.PRESENT, Tense.PAST, Tense.FUTURE, Tense.HABIT, Tense.PROGRESSIVE, Tense.GOING))
    rest = Text("hard", "dur") + s.time(tense, 0.4)
    return sentence(Clause(subject, lexicon.verb("work"), tense, complement=rest).text())


def _state(english: str) -> Template:
    """She is cold, in French: has cold."""
    verb = lexicon.verb(english)

    def draw(s: Sampler) -> Text | None:
        clause = s.clause(verb)
        if s.chance(0.2) and clause.subject is not I:
            return sentence(replace(clause, polarity="").question(), "?")
        return sentence(clause.text())

    return draw


def _weather(english: str, french: str) -> Template:
    def draw(s: Sampler) -> Text | None:
        do = replace(BE, french="faire")
        tense = s.pick((Tense.PRESENT, Tense.PAST, Tense.FUTURE))
        place = NounPhrase(s.noun("in"))
        where = Text("in", "dans", ((place.noun.key, english),)) + place.text()
        degree = Text("very", "très") if s.chance(0.3) else NOTHING
        polarity = "not" if s.chance(0.15) else ""
        weather = degree + Text(english, french) + where
        return sentence(Clause(IT, do, tense, polarity=polarity, complement=weather).text())

    return draw


def _like_a_fish(s: Sampler) -> Text | None:
    """She swims like a fish."""
    action, model = s.pick(_LIKENESS)
    verb, noun = lexicon.verb(action), lexicon.noun(model)
    subject = s.subject("person", pronouns=0.5)
    likeness = Text("like", "comme", ((verb.key, noun.key),)) + NounPhrase(noun, "a", subject.plural).text()
    tense = s.pick((Tense.PRESENT, Tense.PRESENT, Tense.PAST, Tense.PROGRESSIVE))
    return sentence(Clause(subject, verb, tense, complement=likeness).text())


def _river_bank(s: Sampler) -> Text | None:
    """They slept on the bank of the river."""
    verb = lexicon.verb(s.pick(("sleep", "sit down", "rest", "sing", "dance", "read", "cry", "fall asleep", "work")))
    subject = s.subject("person", pronouns=0.4)
    where = Text("on the bank of the river", "sur la berge de la rivière", ((verb.key, "bank of the river"),))
    tense = s.pick((Tense.PAST, Tense.PAST, Tense.PROGRESSIVE, Tense.FUTURE))
    thing = s.object(verb, subject) if verb.objects else None
    return sentence(Clause(subject, verb, tense, thing, complement=where).text())


def _money_bank(s: Sampler) -> Text | None:
    bank = NounPhrase(lexicon.noun("bank"))
    clause = s.clause(lexicon.verb(s.pick(("go to", "return to", "work at", "clean", "see", "enter"))))
    if isinstance(clause.subject, NounPhrase) and "person" not in clause.subject.noun.kinds:
        return None
    return sentence(replace(clause, object=bank).text())


def _missed(s: Sampler) -> Text | None:
    """I miss my mother: in French the one missed is the subject."""
    misser = s.subject("kin named person", pronouns=0.6)
    missed = s.subject("kin named", pronouns=0.2)
    if missed in PERSONS and misser in PERSONS and missed.person == misser.person:
        return None
    if isinstance(missed, NounPhrase) and isinstance(misser, NounPhrase) and missed.noun is misser.noun:
        return None
    verb = lexicon.verb("miss", "manquer à")
    negation = "not" if s.chance(0.15) else ""
    english = Clause(misser, verb, object=missed, polarity=negation).text().english
    turned = Clause(missed, verb, object=misser, polarity=negation).text()
    return sentence(Text(english, turned.french, turned.links))


def _in_the_fall(s: Sampler) -> Text | None:
    clause = s.clause(s.pick(_HABITS), s.pick((Tense.PRESENT, Tense.FUTURE)))
    season = Text("in the fall", "en automne", ((clause.verb.key, "in the fall"),))
    return sentence(replace(clause, adverb=NOTHING, complement=season).text())


def _well_done(s: Sampler) -> Text | None:
    verb = lexicon.verb(s.pick(("sing", "dance", "swim", "work", "sleep", "cook")))
    subject = s.subject(verb.subjects, pronouns=0.4)
    polarity = "not" if s.chance(0.2) else ""
    return sentence(Clause(subject, verb, polarity=polarity, adverb=NOTHING, complement=Text("well", "bien")).text())


def _well_of_water(s: Sampler) -> Text | None:
    verb = lexicon.verb(s.pick(("sleep", "sing", "dance", "rest", "cry", "play", "work", "stop", "fall")))
    subject = s.subject("person", pronouns=0.4)
    well = NounPhrase(lexicon.noun("well"))
    where = Text(*s.pick((("near", "près de"), ("behind", "derrière"))), ((verb.key, well.noun.key),)) + well.text()
    tense = s.pick((Tense.PAST, Tense.PAST, Tense.PROGRESSIVE, Tense.FUTURE))
    return sentence(Clause(subject, verb, tense, complement=where).text())


READINGS: dict[str, tuple[Template, ...]] = {
    "rose": (
        _noun("rose"),
        _noun("rose"),
        _sun_rose,
        _rose_from,
        _past("rise from the ashes"),
        _rose_early,
        _rose_dress,
    ),
    "left": (
        _past("leave", "quitter"),
        _past("leave", "partir"),
        _past("leave", "laisser", _with("on", "sur", ("table", "chair", "bed", "shelf", "sofa"))),
        _side("left", "gauche"),
        _side("left", "gauche"),
    ),
    "right": (_side("right", "droite"), _state("be right"), _quality("right", "bon")),
    "saw": (_past("see"), _past("see"), _noun("saw"), _with_a_saw),
    "can": (_can, _noun("can")),
    "book": (_noun("book"), _base("book")),
    "light": (_noun("light", "lumière"), _quality("light", "léger"), _base("light")),
    "watch": (_noun("watch"), _base("watch")),
    "fly": (_noun("fly"), _base("fly", "", _with("over", "au-dessus de", ("house", "garden", "lake", "city", "sea")))),
    "bear": (_noun("bear"), _bear_noise),
    "ring": (_noun("ring"), _ring_bell),
    "play": (_noun("play"), _base("play", "jouer", _game), _base("play", "jouer de")),
    "plant": (_noun("plant"), _base("plant")),
    "water": (_noun("water"), _base("water")),
    "park": (_noun("park"), _base("park")),
    "cook": (_noun("cook"), _base("cook")),
    "train": (_noun("train"), _base("train")),
    "miss": (_base("miss", "rater"), _missed),
    "cold": (_quality("cold", "froid"), _state("be cold"), _weather("cold", "froid")),
    "hot": (_quality("hot", "chaud"), _state("be hot"), _weather("hot", "chaud")),
    "hard": (_quality("hard", "dur"), _quality("hard", "difficile"), _work_hard),
    "kind": (_quality("kind", "gentil"), _kind_of),
    "like": (_state("like"), _like_a_fish),
    "bank": (_money_bank, _river_bank),
    "fall": (_base("fall"), _in_the_fall),
    "well": (_well_done, _well_of_water),
}
_WORDS = tuple(READINGS)
_SHOWN_MORE = ("rose", "left", "saw", "can", "book", "light")


def ambiguous(s: Sampler) -> Text | None:
    """A sentence with one of these words in one of its readings."""
    word = s.pick(_SHOWN_MORE if s.chance(0.35) else _WORDS)
    number, template = s.pick(tuple(enumerate(READINGS[word])))
    drawn = template(s)
    return None if drawn is None else replace(drawn, reading=f"{word} {number}")
