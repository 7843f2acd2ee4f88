"""Noun phrases, pronouns and clauses as data, realised side by side in English and in French."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from . import english as en
from . import french as fr
from .lexicon import CONJUGATOR, Adjective, Noun, Verb

Link = tuple[str, str]  # the keys of two content words that one phrase brings together


@dataclass(frozen=True)
class Text:
    """A phrase in both languages, and the pairs of content words that it combines."""

    english: str
    french: str
    links: tuple[Link, ...] = ()
    reading: str = ""  # which reading of which ambiguous word the sentence was made to show

    def __add__(self, other: Text) -> Text:
        return Text(_words(self.english, other.english), _words(self.french, other.french), self.links + other.links)


NOTHING = Text("", "")

# English determiner: French masculine, feminine, plural
_DETERMINERS = {
    "the": ("le", "la", "les"),
    "generic": ("le", "la", "les"),  # bare in English: "I like tea"
    "a": ("un", "une", "des"),
    "some": ("de le", "de la", "des"),
    "bare": ("de le", "de la", "des"),  # "she drinks tea"
    "this": ("ce", "cette", "ces"),
    "my": ("mon", "ma", "mes"),
    "your": ("votre", "votre", "vos"),
    "his": ("son", "sa", "ses"),
    "her": ("son", "sa", "ses"),
    "its": ("son", "sa", "ses"),
    "our": ("notre", "notre", "nos"),
    "their": ("leur", "leur", "leurs"),
    "two": ("", "", "deux"),
    "three": ("", "", "trois"),
    "four": ("", "", "quatre"),
    "many": ("", "", "beaucoup de"),
    "several": ("", "", "plusieurs"),
    "all the": ("", "", "tous les"),
    "": ("", "", ""),
}
INDEFINITE = ("a", "some", "bare")
_BEFORE_VOWEL = {"ce": "cet", "ma": "mon", "sa": "son"}


@dataclass(frozen=True)
class NounPhrase:
    """A noun with its determiner (an English word of the table above), adjectives and what follows the noun."""

    noun: Noun
    determiner: str = "the"
    plural: bool = False
    adjectives: tuple[Adjective, ...] = ()
    after: Text = NOTHING
    owner: NounPhrase | None = None  # "the boy's dog"

    person = 3

    @property
    def possessive(self) -> str:
        if self.plural:
            return "their"
        if "person" not in self.noun.kinds:
            return "its"
        return "her" if self.feminine else "his"

    @property
    def slot(self) -> int:
        return 4 if self.plural else 1

    @property
    def feminine(self) -> bool:
        return self.noun.feminine

    @property
    def links(self) -> tuple[Link, ...]:
        owned = () if self.owner is None else ((self.noun.key, self.owner.noun.key), *self.owner.links)
        return tuple((self.noun.key, a.key) for a in self.adjectives) + self.after.links + owned

    def english(self, negated: bool = False) -> str:
        noun = self.noun.english_plural if self.plural else self.noun.english
        core = _words(*(a.english for a in self.adjectives), noun)
        determiner = self.determiner
        if determiner == "a":
            determiner = "" if self.plural else en.indefinite(core)
        elif determiner == "some" and negated:
            determiner = "any"
        elif determiner == "this" and self.plural:
            determiner = "these"
        elif determiner in ("generic", "bare"):
            determiner = ""
        if self.owner is not None:
            owner = self.owner.english()
            determiner = owner + ("'" if owner.endswith("s") and self.owner.plural else "'s")
        return _words(determiner, core, self.after.english)

    def french(self, reduced: bool = False) -> str:
        """``reduced``: un, une, du, de la, des shrink to "de", as after a negated verb."""
        noun = self.noun.french_plural if self.plural else self.noun.french
        before = [a for a in self.adjectives if a.position == "before"]
        words = [a.agree(self.feminine, self.plural) for a in before]
        if before and before[-1].liaison and not self.feminine and not self.plural and fr.vowel_sound(noun):
            words[-1] = before[-1].liaison
        following = [a.agree(self.feminine, self.plural) for a in self.adjectives if a.position != "before"]
        core = _words(*words, noun, *following)
        after = self.after.french if self.owner is None else "de " + self.owner.french()
        if self.determiner in INDEFINITE and (reduced or (self.plural and before)):  # de grandes maisons
            return _words("de", core, after)
        determiner = _DETERMINERS[self.determiner][2 if self.plural else int(self.feminine)]
        if determiner == "tous les" and self.feminine:
            determiner = "toutes les"
        if fr.vowel_sound(core):
            determiner = _BEFORE_VOWEL.get(determiner, determiner)
        return _words(determiner, core, after)

    def text(self) -> Text:
        return Text(self.english(), self.french(), self.links)


@dataclass(frozen=True)
class Pronoun:
    """A personal pronoun (or who/qui as a subject) with the forms and features that verbs need."""

    subject: tuple[str, str]  # English, French
    object: tuple[str, str]  # English, French direct object
    dative: str
    possessive: str
    person: int
    slot: int
    plural: bool
    feminine: bool = False

    links: tuple[Link, ...] = ()

    def english(self, negated: bool = False) -> str:
        return self.subject[0]

    def french(self, reduced: bool = False) -> str:
        return self.subject[1]


I = Pronoun(("I", "je"), ("me", "me"), "me", "my", 1, 0, False)  # noqa: E741 - the pronoun's name
YOU = Pronoun(("you", "vous"), ("you", "vous"), "vous", "your", 2, 3, False)
HE = Pronoun(("he", "il"), ("him", "le"), "lui", "his", 3, 1, False)
SHE = Pronoun(("she", "elle"), ("her", "la"), "lui", "her", 3, 1, False, True)
IT = Pronoun(("it", "il"), ("it", "le"), "lui", "its", 3, 1, False)
IT_FEMININE = Pronoun(("it", "elle"), ("it", "la"), "lui", "its", 3, 1, False, True)
WE = Pronoun(("we", "nous"), ("us", "nous"), "nous", "our", 1, 2, True)
THEY = Pronoun(("they", "ils"), ("them", "les"), "leur", "their", 3, 4, True)
THEY_FEMININE = Pronoun(("they", "elles"), ("them", "les"), "leur", "their", 3, 4, True, True)
WHO = Pronoun(("who", "qui"), ("", ""), "", "his", 3, 1, False)
PERSONS = (I, YOU, HE, SHE, WE, THEY)

Nominal = NounPhrase | Pronoun


def pronoun_for(phrase: NounPhrase) -> Pronoun:
    """The pronoun that takes a noun phrase up again: it, he, she, they with the French gender."""
    if phrase.plural:
        return THEY_FEMININE if phrase.feminine else THEY
    if "person" in phrase.noun.kinds:
        return SHE if phrase.feminine else HE
    return IT_FEMININE if phrase.feminine else IT


class Tense(Enum):
    PRESENT = "eats"
    PAST = "ate"
    FUTURE = "will eat"
    PROGRESSIVE = "is eating"
    BACKGROUND = "was eating"
    HABIT = "used to eat"
    PERFECT = "has eaten"
    GOING = "is going to eat"
    IMPERATIVE = "eat!"


class Modal(Enum):
    """English, French infinitive, French tense."""

    CAN = ("can", "pouvoir", "present")
    COULD = ("could", "pouvoir", "imperfect")
    MUST = ("must", "devoir", "present")
    SHOULD = ("should", "devoir", "conditional")
    WANT = ("want to", "vouloir", "present")
    WANTED = ("wanted to", "vouloir", "imperfect")
    WOULD_LIKE = ("would like to", "vouloir", "conditional")


_POLARITY = {"not": "pas", "never": "jamais", "no longer": "plus"}
_REFLEXIVE = ("me", "se", "nous", "vous", "se")


@dataclass(frozen=True)
class Clause:
    """A finite clause. ``gap`` is the antecedent that serves as its direct object: "(the rose) that she picked"."""

    subject: Nominal
    verb: Verb
    tense: Tense = Tense.PRESENT
    object: Nominal | None = None
    recipient: Nominal | None = None
    polarity: str = ""  # "", "not", "never", "no longer"
    adverb: Text = NOTHING  # often, already: English before the main verb, French after the finite verb
    modal: Modal | None = None
    complement: Text = NOTHING
    gap: NounPhrase | None = None

    @property
    def links(self) -> tuple[Link, ...]:
        nominals = [n for n in (self.subject, self.object, self.recipient) if n is not None]
        heads = [n.noun for n in (*nominals, self.gap) if isinstance(n, NounPhrase)]
        own = tuple((self.verb.key, noun.key) for noun in heads)
        return own + sum((n.links for n in nominals), ()) + self.complement.links

    def text(self) -> Text:
        """The clause as a statement or, in the imperative, without its subject."""
        auxiliary, rest = self._english_group(inverted=False)
        imperative = self.tense is Tense.IMPERATIVE
        subjects = ("", "") if imperative else (self.subject.english(), self.subject.french())
        english = _words(subjects[0], auxiliary, rest, self._english_tail())
        return Text(english, _words(subjects[1], self._french_predicate()), self.links)

    def question(self, asked: Text = NOTHING) -> Text:
        """A question, after ``asked`` ("where") where one is given: French est-ce que with the order of a statement."""
        auxiliary, rest = self._english_group(inverted=True)
        english = _words(asked.english, auxiliary, self.subject.english(), rest, self._english_tail(any_=True))
        french = _words(asked.french, "est-ce que", self.subject.french(), self._french_predicate())
        return Text(english, french, self.links + asked.links)

    def _english_group(self, inverted: bool) -> tuple[str, str]:
        """The verb's words, split behind the auxiliary that a question moves."""
        subject, modal, tense = self.subject, self.modal, self.tense
        base = self.verb.english
        middle = _words(self.polarity if self.polarity != "not" else "", self.adverb.english)
        be = base.split(" ", 1)[0] == "be"
        is_ = en.be(subject.person, subject.plural, past=tense in (Tense.PAST, Tense.BACKGROUND))
        third = subject.person == 3 and not subject.plural
        auxiliary, tail = "", base
        if modal in (Modal.CAN, Modal.COULD, Modal.MUST, Modal.SHOULD):
            auxiliary = modal.value[0]
        elif modal is Modal.WOULD_LIKE:
            auxiliary, tail = "would", f"like to {base}"
        elif tense is Tense.FUTURE:
            auxiliary = "will"
        elif tense in (Tense.PROGRESSIVE, Tense.BACKGROUND):
            auxiliary, tail = is_, en.progressive(base)
        elif tense is Tense.GOING:
            auxiliary, tail = is_, f"going to {base}"
        elif tense is Tense.PERFECT:
            auxiliary, tail = "has" if third else "have", self.verb.participle
        elif be and modal is None and tense in (Tense.PRESENT, Tense.PAST):
            auxiliary, tail = is_, base[len("be ") :]
        if not auxiliary:
            past = tense is Tense.PAST or modal is Modal.WANTED
            if modal is not None:
                base = f"want to {base}"
            if self.polarity == "not" or inverted:
                auxiliary = "did" if past else "does" if third and tense is not Tense.IMPERATIVE else "do"
                tail = base
            elif tense is Tense.HABIT:
                tail = f"used to {base}"
            elif past:
                tail = en.regular_past(base) if modal is not None else self.verb.past
            else:
                tail = en.third_person(base) if third and tense is not Tense.IMPERATIVE else base
        if self.polarity == "not":
            auxiliary += "not" if auxiliary == "can" else " not"
        return auxiliary, _words(middle, tail)

    def _english_tail(self, any_: bool = False) -> str:
        negated = bool(self.polarity) or any_
        recipient = ""
        if self.recipient is not None:
            short = isinstance(self.recipient, Pronoun)
            name = self.recipient.object[0] if isinstance(self.recipient, Pronoun) else self.recipient.english()
            direct = "" if self.object is None else _english_object(self.object, negated)
            recipient = _words(name, direct) if short else _words(direct, "to", name)
        elif self.object is not None:
            recipient = _english_object(self.object, negated)
        return _words(recipient, self.complement.english)

    def _french_predicate(self) -> str:
        verb, slot = self.verb, self.subject.slot
        clitic, objects = self._french_objects()
        if verb.reflexive:
            clitic = _REFLEXIVE[slot]
        finite, after, particle = self._french_finite()
        inner = _words(_POLARITY.get(self.polarity, ""), self.adverb.french)
        ne = "ne" if self.polarity else ""
        if self.tense is Tense.IMPERATIVE and not self.polarity and clitic:
            finite, clitic = f"{finite}-{'moi' if clitic == 'me' else clitic}", ""
        if self.modal is not None or self.tense is Tense.GOING:  # il ne veut pas le voir
            group = _words(ne, finite, inner, clitic, after)
        else:
            group = _words(ne, clitic, finite, inner, after)
        return _words(group, particle, *objects, self.complement.french)

    def _french_finite(self) -> tuple[str, str, str]:
        """Finite verb; infinitive or participle; particle."""
        verb, slot, tense = self.verb, self.subject.slot, self.tense
        particle = verb.particle
        if isinstance(self.object, Pronoun) and particle == "à":  # lui parler
            particle = ""
        if isinstance(self.object, NounPhrase) and self._reduces_after_de():
            particle = particle.removesuffix("de").strip()
        if self.modal is not None:
            _, infinitive, form = self.modal.value
            return getattr(CONJUGATOR, form)(infinitive, slot), verb.infinitive, particle
        if tense is Tense.GOING:
            return CONJUGATOR.present("aller", slot), verb.infinitive, particle
        stative = "stative" in verb.flags
        if tense is Tense.PERFECT or (tense is Tense.PAST and not stative):
            return CONJUGATOR.present(verb.auxiliary, slot), self._agreed_participle(), particle
        if tense in (Tense.PAST, Tense.HABIT, Tense.BACKGROUND):
            return CONJUGATOR.imperfect(verb.infinitive, slot), "", particle
        if tense is Tense.FUTURE:
            return CONJUGATOR.future(verb.infinitive, slot), "", particle
        return CONJUGATOR.present(verb.infinitive, slot), "", particle

    def _agreed_participle(self) -> str:
        """With être it agrees with the subject, with avoir with a direct object that stands before it."""
        participle = CONJUGATOR.participle(self.verb.infinitive)
        controller: Nominal | None = self.gap
        if self.verb.auxiliary == "être":
            controller = self.subject
        elif isinstance(self.object, Pronoun) and self.verb.direct:
            controller = self.object
        return participle if controller is None else fr.agree(participle, controller.feminine, controller.plural)

    def _french_objects(self) -> tuple[str, list[str]]:
        """The clitic before the verb, and the objects after it."""
        clitic, objects = "", []
        if isinstance(self.object, Pronoun):
            clitic = self.object.object[1] if self.verb.direct else self.object.dative
        elif self.object is not None:
            negated = bool(self.polarity) and self.verb.direct
            objects.append(self.object.french(reduced=negated or self._reduces_after_de()))
        if isinstance(self.recipient, Pronoun):
            clitic = self.recipient.dative
        elif self.recipient is not None:
            objects.append("à " + self.recipient.french())
        return clitic, objects

    def _reduces_after_de(self) -> bool:
        """besoin de + du pain gives besoin de pain."""
        phrase = self.object
        if not isinstance(phrase, NounPhrase) or not f" {self.verb.particle}".endswith(" de"):
            return False
        return phrase.determiner in ("some", "bare") or (phrase.determiner == "a" and phrase.plural)


def _english_object(nominal: Nominal, negated: bool) -> str:
    return nominal.object[0] if isinstance(nominal, Pronoun) else nominal.english(negated)


def _words(*parts: str) -> str:
    return " ".join(part for part in parts if part)


def sentence(text: Text, mark: str = ".") -> Text:
    """Spelled out: elision and contraction, a capital, and the closing mark (French: a space before "?" and "!")."""
    french = fr.spell(text.french)
    english = text.english
    gap = "" if mark == "." else " "
    return Text(english[0].upper() + english[1:] + mark, french[0].upper() + french[1:] + gap + mark, text.links)
