"""The embedded demo task: is this English sentence grammatical? Made by the small grammar below, nothing is downloaded.

Five phenomena, in the manner of BLiMP's minimal pairs (Warstadt et al. 2020, TACL; none of its sentences or code is
used): agreement of subject and verb across a distractor, of determiner and noun, of auxiliary and verb form, of
reflexive and subject, and word order. Sentences come in blocks of two acceptable and two unacceptable ones, and the
two kinds hold exactly the same words: neither a word nor the length tells the label, only the way the words go
together. About half of the evaluation rows (`held_out`) use only nouns and verbs that never occur in training.

The evaluation rows are the same for every seed, so that runs compare row by row; the seed draws the training rows.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base import Task
from ..files import require_rows
from ..names import register_task
from . import lexicon as lex
from .lexicon import Words

if TYPE_CHECKING:
    import datasets

N_TRAIN = 2000
N_EVAL = 500
LABELS = ("unacceptable", "acceptable")
BLOCK = (1, 0, 1, 0)  # labels of a block; alternating, so that every even number of rows is balanced
MAX_ATTEMPTS = 10_000  # draws in a row without a new sentence before the grammar counts as exhausted

Block = list[str]  # four sentences, acceptable where `BLOCK` is 1


def subject_verb_agreement(rng: random.Random, words: Words) -> Block:
    """The key near the cabinets is / *are old."""
    form = rng.choice(("object", "person", "relative", "verb"))
    noun, distractor = rng.sample(words["object" if form == "object" else "person"], 2)
    distractor = rng.choice((distractor, lex.plural(distractor)))
    link = f"who {rng.choice(words['person_verb'])}" if form == "relative" else rng.choice(lex.NEAR)
    between = rng.choice((f"{link} the {distractor}", ""))
    verbs = rng.choice(lex.COPULAS)
    rest = rng.choice(lex.OBJECT_ADJECTIVES if form == "object" else lex.PERSON_ADJECTIVES)
    if form == "verb":
        verb = rng.choice(words["intransitive"])
        verbs, rest = (lex.third_person(verb), verb), rng.choice(lex.MANNERS)
    return _crossed((noun, lex.plural(noun)), verbs, f"the {{}} {between} {{}} {rest}")


def determiner_noun_agreement(rng: random.Random, words: Words) -> Block:
    """The teacher sold this chair / *this chairs yesterday."""
    noun = rng.choice(words["object"])
    start = f"the {rng.choice(words['person'])} {rng.choice(words['object_verb'])}"
    adjective = rng.choice((rng.choice(lex.OBJECT_ADJECTIVES), "", ""))
    frame = f"{start} {{}} {adjective} {{}} {rng.choice(lex.TIMES)}"
    return _crossed(lex.DETERMINERS, (noun, lex.plural(noun)), frame)


def auxiliary_verb_form(rng: random.Random, words: Words) -> Block:
    """The doctor has laughed / *laughing again."""
    base = rng.choice(words["intransitive"])
    forms = {"participle": lex.past(base), "gerund": lex.gerund(base), "base": base}
    first, second = rng.sample(sorted(lex.AUXILIARIES), 2)
    auxiliaries = (rng.choice(lex.AUXILIARIES[first]), rng.choice(lex.AUXILIARIES[second]))
    frame = f"the {rng.choice(words['person'])} {{}} {{}} {rng.choice(lex.MANNERS)}"
    return _crossed(auxiliaries, (forms[first], forms[second]), frame)


def reflexive_agreement(rng: random.Random, words: Words) -> Block:
    """The king near the nurse blamed himself / *herself yesterday."""
    couple, gender = rng.choice(words["couple"]), rng.randrange(2)
    subjects, reflexives = couple, ("himself", "herself")
    if rng.random() < 1 / 3:
        subjects, reflexives = (couple[gender], lex.plural(couple[gender])), (reflexives[gender], "themselves")
    between = rng.choice((f"{rng.choice(lex.NEAR)} the {rng.choice(words['person'])}", "", ""))
    frame = f"the {{}} {between} {rng.choice(words['person_verb'])} {{}} {rng.choice(lex.TIMES)}"
    return _crossed(subjects, reflexives, frame)


def word_order(rng: random.Random, words: Words) -> Block:
    """The teacher sold the old chair / *old the chair yesterday."""
    return [sentence for _ in range(2) for sentence in _swapped(rng, words)]


def _swapped(rng: random.Random, words: Words) -> tuple[str, str]:
    """A sentence, and the same with two neighbours swapped."""
    person, thing = rng.choice(words["person"]), rng.choice(words["object"])
    thing = rng.choice((thing, lex.plural(thing)))
    verb, intransitive = rng.choice(words["object_verb"]), rng.choice(words["intransitive"])
    adjective, time = rng.choice(lex.OBJECT_ADJECTIVES), rng.choice(lex.TIMES)
    frame, neighbours = rng.choice(
        (
            (f"the {person} {verb} {{}} {{}} {thing} {time}", ("the", adjective)),
            (f"the {person} {verb} {{}} {{}} {time}", ("the", thing)),
            (f"the {person} {lex.past(intransitive)} {{}} {{}} {thing} {time}", (rng.choice(lex.NEAR), "the")),
            (f"the {person} {{}} {{}} {time}", (verb, f"the {thing}")),
            (f"the {person} {{}} {{}} {time}", (rng.choice(lex.AUXILIARIES["base"]), intransitive)),
        )
    )
    return _sentence(frame.format(*neighbours)), _sentence(frame.format(*reversed(neighbours)))


PHENOMENA: dict[str, Callable[[random.Random, Words], Block]] = {
    grammar.__name__: grammar
    for grammar in (
        subject_verb_agreement,
        determiner_noun_agreement,
        auxiliary_verb_form,
        reflexive_agreement,
        word_order,
    )
}


def load_acceptability(
    *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
) -> dict[str, datasets.Dataset]:
    """`n_train` training rows (2000 where None) drawn with `seed`, and the 500 evaluation rows; `glue_dir` is not
    needed."""
    require_rows(n_train, str(N_TRAIN))
    n_train = N_TRAIN if n_train is None else n_train
    training, kept = lex.lexicon(held_out=False), lex.lexicon(held_out=True)
    seen: set[str] = set()
    evaluation = _draw("evaluation", N_EVAL, (training, kept), seen)
    return {"train": _draw(f"train-{seed}", n_train, (training,), seen), "eval": evaluation}


def _draw(seed: str, n: int, lexicons: tuple[Words, ...], seen: set[str]) -> datasets.Dataset:
    """`n` rows whose sentences are not in `seen`, which grows by them; the second lexicon, if any, is the held-out
    one."""
    import datasets  # now, as it takes a second

    rng = random.Random(seed)  # a string seed goes through SHA-512, whatever Python's hash seed
    rows: list[dict[str, Any]] = []
    for block in _blocks(rng, lexicons, seen):
        rows += block
        if len(rows) >= n:
            break
    rows = rows[:n]
    rng.shuffle(rows)
    string = datasets.Value("string")
    label, held_out = datasets.ClassLabel(names=list(LABELS)), datasets.Value("bool")
    features = datasets.Features(sentence=string, label=label, phenomenon=string, held_out=held_out)
    return datasets.Dataset.from_list(rows, features=features)


def _blocks(rng: random.Random, lexicons: tuple[Words, ...], seen: set[str]) -> Iterator[list[dict[str, Any]]]:
    """Blocks of new rows without end: the phenomena in turn, and the lexicons in turn after each round of phenomena."""
    while True:
        for held_out, words in enumerate(lexicons):
            for phenomenon, grammar in PHENOMENA.items():
                sentences = _new_block(rng, words, grammar, seen)
                yield [
                    {"sentence": sentence, "label": label, "phenomenon": phenomenon, "held_out": bool(held_out)}
                    for sentence, label in zip(sentences, BLOCK, strict=True)
                ]


def _new_block(
    rng: random.Random, words: Words, grammar: Callable[[random.Random, Words], Block], seen: set[str]
) -> Block:
    for _ in range(MAX_ATTEMPTS):
        sentences = grammar(rng, words)
        if len(set(sentences) - seen) == len(BLOCK):
            seen.update(sentences)
            return sentences
    raise ValueError(f"the grammar is exhausted after {len(seen)} sentences: ask for fewer training rows")


def _crossed(left: tuple[str, str], right: tuple[str, str], frame: str) -> Block:
    """Both agreeing combinations of two pairs, each followed by one of the two that clash."""
    return [_sentence(frame.format(left[i], right[j])) for i, j in ((0, 0), (0, 1), (1, 1), (1, 0))]


def _sentence(words: str) -> str:
    text = " ".join(words.split())
    return text[0].upper() + text[1:] + "."


@register_task("acceptability")
def acceptability() -> Task:
    """Is a sentence grammatical? Generated by a small grammar, so that a first run needs no download."""
    return Task(
        name="acceptability", text_columns=("sentence",), labels=LABELS, metric_name="accuracy", load=load_acceptability
    )  # fmt: skip
