"""French morphology and spelling: conjugation, agreement, elision, contraction.

A finite form is named by its slot: 0 je, 1 il/elle, 2 nous, 3 vous, 4 ils/elles.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_VOWELS = "aeiouyàâéèêëîïôùûœ"
_ASPIRATED = ("haricot", "hibou", "héros", "hache", "haut")  # h aspiré: no elision
_ENDINGS = ("e", "e", "ons", "ez", "ent")
_IR_ENDINGS = ("is", "it", "issons", "issez", "issent")
_RE_ENDINGS = ("s", "", "ons", "ez", "ent")
_FUTURE = ("ai", "a", "ons", "ez", "ont")
_IMPERFECT = ("ais", "ait", "ions", "iez", "aient")

_CONSONANT = "[bcdfghj-np-tv-z]"
_NOT_VOWEL = rf"(?!{'|'.join(_ASPIRATED)})"
_BEFORE_VOWEL = rf" (?={_NOT_VOWEL}[{_VOWELS}h])"
_ELIDE = re.compile(rf"\b(j|m|t|s|l|d|n|qu|c)(?:e|(?<=l)a){_BEFORE_VOWEL}", re.IGNORECASE)
_SI_IL = re.compile(r"\b([Ss])i (?=ils?\b)")
_CONTRACT = re.compile(r"\b(de|à) (les?)\b", re.IGNORECASE)
_CONTRACTED = {("de", "le"): "du", ("de", "les"): "des", ("à", "le"): "au", ("à", "les"): "aux"}


def vowel_sound(word: str) -> bool:
    """Whether a word calls for elision and liaison: a vowel or a mute h begins it."""
    return word[:1].lower() in _VOWELS + "h" and not word.lower().startswith(_ASPIRATED)


def spell(text: str) -> str:
    """Elision, then contraction, over words set side by side: "de le homme" to "de l'homme", "à le roi" to "au roi"."""
    text = _SI_IL.sub(r"\1'", _ELIDE.sub(r"\1'", text))
    return _CONTRACT.sub(lambda m: _match_case(_CONTRACTED[m[1].lower(), m[2].lower()], m[1]), text)


def _match_case(word: str, like: str) -> str:
    return word.capitalize() if like[0].isupper() else word


def plural(word: str) -> str:
    """The plural of a noun or of a masculine adjective."""
    if word.endswith(("s", "x", "z")):
        return word
    if word.endswith("al"):
        return word[:-2] + "aux"
    return word + ("x" if word.endswith(("au", "eu")) and word != "bleu" else "s")


def agree(participle: str, feminine: bool, plural_: bool) -> str:
    """A past participle with its ending: "vu" to "vues"."""
    form = participle + "e" if feminine else participle
    return plural(form) if plural_ else form


class Conjugator:
    """Finite forms and participles of French infinitives.

    ``irregular`` maps an infinitive to its five present forms, future stem and participle; all others follow the
    rules of -er (with the spelling changes of manger, commencer, nettoyer, acheter, préférer), -ir and -re.
    """

    def __init__(self, irregular: Mapping[str, tuple[str, ...]]) -> None:
        self._irregular = irregular

    def present(self, verb: str, slot: int) -> str:
        if verb in self._irregular:
            return self._irregular[verb][slot]
        stem, ending = verb[:-2], verb[-2:]
        if ending == "er":
            return self._er_present(stem, slot)
        return stem + (_IR_ENDINGS if ending == "ir" else _RE_ENDINGS)[slot]

    def future(self, verb: str, slot: int) -> str:
        return self._future_stem(verb) + _FUTURE[slot]

    def conditional(self, verb: str, slot: int) -> str:
        return self._future_stem(verb) + _IMPERFECT[slot]

    def imperfect(self, verb: str, slot: int) -> str:
        stem = "ét" if verb == "être" else self.present(verb, 2)[: -len("ons")]
        if _IMPERFECT[slot].startswith("i"):  # the softening of g and c is only needed before a
            stem = stem[:-1] if stem.endswith("ge") else stem[:-1] + "c" if stem.endswith("ç") else stem
        return stem + _IMPERFECT[slot]

    def participle(self, verb: str) -> str:
        if verb in self._irregular:
            return self._irregular[verb][-1]
        return verb[:-2] + {"er": "é", "ir": "i", "re": "u"}[verb[-2:]]

    def _er_present(self, stem: str, slot: int) -> str:
        if slot == 2:
            stem = stem + "e" if stem.endswith("g") else stem[:-1] + "ç" if stem.endswith("c") else stem
        elif slot != 3:
            stem = _silent_stem(re.sub(f"é(?={_CONSONANT}+$)", "è", stem))
        return stem + _ENDINGS[slot]

    def _future_stem(self, verb: str) -> str:
        if verb in self._irregular:
            return self._irregular[verb][-2]
        if verb.endswith("er"):
            return _silent_stem(verb[:-2]) + "er"
        return verb.removesuffix("e")


def _silent_stem(stem: str) -> str:
    """An -er stem before a silent e: achet- to achèt-, nettoy- to nettoi-."""
    if stem.endswith(("oy", "uy")):
        return stem[:-1] + "i"
    return re.sub(f"e(?={_CONSONANT}$)", "è", stem)
