"""The words of the demo task and their forms: common English, chosen so that every clash of forms is ungrammatical.

Every third noun and verb is kept from training (`lexicon(held_out=True)`); adjectives, adverbs and function words are
shared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

HELD_OUT_EVERY = 3

Words = Mapping[str, list[Any]]
"""Kind of noun or verb -> its words; a couple is a pair of words."""


def _words(text: str) -> list[str]:
    return text.split()


PERSONS = _words(
    "teacher doctor student farmer lawyer singer dancer driver writer painter baker pilot soldier sailor "
    "neighbor visitor tourist child nurse manager engineer artist player hunter gardener customer guest "
    "musician scientist reporter officer"
)
COUPLES = [
    tuple(couple.split("/"))
    for couple in _words(
        "king/queen boy/girl man/woman father/mother brother/sister uncle/aunt prince/princess "
        "grandfather/grandmother son/daughter nephew/niece husband/wife waiter/waitress gentleman/lady "
        "grandson/granddaughter stepfather/stepmother policeman/policewoman groom/bride duke/duchess monk/nun "
        "wizard/witch schoolboy/schoolgirl"
    )
]
OBJECTS = _words(
    "table chair lamp book box bottle cup plate clock key cabinet mirror picture window door car bike hat coat "
    "shirt bag basket knife guitar phone camera letter ring ball boat tent rug blanket candle"
)
# Intransitive, the participle unlike the base. Left out: verbs with an adjectival participle ("is retired"), a
# passive ("is sung"), or a base that is a mass noun ("has work").
INTRANSITIVES = _words(
    "laugh smile sneeze cough yawn shiver complain hesitate blush tremble giggle snore wink weep stumble nod "
    "chuckle grin frown gasp yell listen apologize wander struggle sigh scream cry wait flinch sob doze squint "
    "sulk boast fidget"
)
# Past tense, which does not agree with its subject.
PERSON_VERBS = _words(
    "blamed hurt praised introduced defended described forgave admired watched dressed calmed fooled surprised "
    "protected hated reminded trained embarrassed injured distracted washed criticized convinced warned"
)
OBJECT_VERBS = _words(
    "bought sold found lost cleaned carried moved stole hid borrowed dropped noticed fixed kept wanted needed "
    "broke liked used chose brought checked painted sketched"
)
NOUNS_AND_VERBS: Words = {
    "person": PERSONS,
    "couple": COUPLES,
    "object": OBJECTS,
    "intransitive": INTRANSITIVES,
    "person_verb": PERSON_VERBS,
    "object_verb": OBJECT_VERBS,
}

PERSON_ADJECTIVES = _words("tired happy busy angry hungry late ready famous lonely nervous polite rich")
OBJECT_ADJECTIVES = _words("old new dirty clean expensive heavy beautiful small useful strange cheap green")
NEAR = ("near", "behind", "beside")
# Few function words and many sentences that end early: long or varied frames hide the clash from a small encoder.
MANNERS = ("", "", "again", "at night")
TIMES = ("", "", "again", "yesterday")
COPULAS = (("is", "are"), ("was", "were"))
DETERMINERS = ("this", "these")
AUXILIARIES = {"participle": ("has",), "gerund": ("is",), "base": ("can", "will")}


def lexicon(*, held_out: bool) -> Words:
    """The nouns and verbs of training, or those kept from it; no word is in both."""
    return {
        kind: [word for place, word in enumerate(words, start=1) if (place % HELD_OUT_EVERY == 0) == held_out]
        for kind, words in NOUNS_AND_VERBS.items()
    }


def plural(noun: str) -> str:
    if noun == "child":
        return "children"
    if noun.endswith("man"):
        return noun[:-2] + "en"
    if noun.endswith("fe"):
        return noun[:-2] + "ves"
    return _with_s(noun)


def third_person(verb: str) -> str:
    return _with_s(verb)


def past(verb: str) -> str:
    """Past tense and participle, one form for every intransitive verb above."""
    if verb == "weep":
        return "wept"
    if verb == "cry":
        return "cried"
    return verb + "d" if verb.endswith("e") else _stem(verb) + "ed"


def gerund(verb: str) -> str:
    return _stem(verb.removesuffix("e")) + "ing"


def _with_s(word: str) -> str:
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _stem(verb: str) -> str:
    return verb + verb[-1] if verb in ("nod", "grin", "sob") else verb
