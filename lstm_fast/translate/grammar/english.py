"""English morphology: regular endings by rule; what a rule can't make stands in the lexicon."""

from __future__ import annotations

_DOUBLED = {"run", "swim", "stop", "sit", "get", "cut", "forget"}
_SIBILANT = ("s", "x", "z", "ch", "sh")
_BE = {"I": ("am", "was"), "he": ("is", "was"), "we": ("are", "were")}
_CONTRACTIONS = {
    "do not": "don't",
    "does not": "doesn't",
    "did not": "didn't",
    "is not": "isn't",
    "are not": "aren't",
    "was not": "wasn't",
    "were not": "weren't",
    "has not": "hasn't",
    "have not": "haven't",
    "will not": "won't",
    "cannot": "can't",
    "should not": "shouldn't",
}


def first_word(rule_result: str, phrase: str) -> str:
    """The phrase with its first word replaced: an inflected verb keeps its particle."""
    return rule_result + phrase[len(phrase.split(" ", 1)[0]) :]


def plural(noun: str) -> str:
    """Also the third person singular of a verb: both take -s by the same spelling rule."""
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + ("es" if noun.endswith(_SIBILANT) else "s")


def third_person(phrase: str) -> str:
    head = phrase.split(" ", 1)[0]
    return first_word({"have": "has", "be": "is", "go": "goes"}.get(head) or plural(head), phrase)


def regular_past(phrase: str) -> str:
    head = phrase.split(" ", 1)[0]
    if head.endswith("y") and head[-2] not in "aeiou":
        return first_word(head[:-1] + "ied", phrase)
    return first_word(head + ("d" if head.endswith("e") else "ed"), phrase)


def progressive(phrase: str) -> str:
    head = phrase.split(" ", 1)[0]
    if head in ("be", "see", "die"):
        return first_word({"be": "being", "see": "seeing", "die": "dying"}[head], phrase)
    if head in _DOUBLED:
        return first_word(head + head[-1] + "ing", phrase)
    return first_word((head[:-1] if head.endswith("e") else head) + "ing", phrase)


def be(person: int, plural_subject: bool, past: bool) -> str:
    if plural_subject or person == 2:
        return _BE["we"][past]
    return _BE["I" if person == 1 else "he"][past]


def indefinite(following: str) -> str:
    """ "a" or "an" before the word that follows it."""
    return "an" if following[0].lower() in "aeiou" or (following.startswith("hon") and following != "honey") else "a"


def contract(sentence: str) -> str:
    """The spoken negation: "does not" to "doesn't"."""
    for full, short in _CONTRACTIONS.items():
        sentence = sentence.replace(f" {full} ", f" {short} ")
    return sentence
