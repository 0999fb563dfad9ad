"""The task `squad`: questions whose answer is a part of a paragraph, SQuAD 1.1.

    pyro-blora train --task squad --squad_train train-v1.1.json --squad_eval dev-v1.1.json

Files are in the form of the official ones: `data`, a list of articles, each with `paragraphs`, each with a `context`
and its questions `qas`, each with `id`, `question` and one or more `answers`, which have their `text` and the character
`answer_start` at which it begins. Without files the hub's `rajpurkar/squad` is read.
Source: Rajpurkar et al., SQuAD: 100,000+ questions for machine comprehension of text (2016), CC BY-SA 4.0.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..user_files import load_json, read_text
from .base import Task
from .files import limited, require_rows
from .names import register_task
from .span_scores import SpanScores
from .spans import Spans

if TYPE_CHECKING:
    import datasets

HUB_DATASET = "rajpurkar/squad"
_HUB_SPLITS = {"train": "train", "eval": "validation"}
_LARGEST = 1 << 30  # characters of a file
_FORM = "give a file in the form of SQuAD's train-v1.1.json"
_SHOWN = 60  # characters of a text in a message


@register_task(
    "squad", proposes={"max_length": 384},  # of the official scripts: few paragraphs need a second window
    flags={"squad_train": "FILE of questions to learn from, in the form of train-v1.1.json; without files: the hub's",
           "squad_eval": "FILE of questions to evaluate on, in the form of dev-v1.1.json"},
)  # fmt: skip
def squad(
    *, squad_train: str | None = None, squad_eval: str | None = None, held_out: int | None = None, stride: int = 128,
    longest: int = 30, best: int = 20,
) -> Task:  # fmt: skip
    """Which part of a paragraph answers a question? (SQuAD 1.1; exact match and F1)

    held_out: questions to evaluate on, evenly spaced in the file; None: all. stride: tokens that neighbouring windows
    of a long paragraph share. longest: tokens of an answer that is given. best: spans that are kept, the most probable.
    """
    if held_out is not None and held_out < 1:
        raise ValueError(f"--task.held_out must be at least 1, got {held_out}")
    if (squad_train is None) != (squad_eval is None):
        missing = "squad_train" if squad_train is None else "squad_eval"
        raise ValueError(f"task 'squad' has one file only: give --{missing}, too, or none for the hub's {HUB_DATASET}")

    @functools.cache
    def rows() -> dict[str, list[dict[str, Any]]]:
        """Of both splits; texts are numbered through them."""
        texts: dict[str, int] = {}
        if squad_train is None or squad_eval is None:
            found = {split: [_row(*each, texts) for each in _of_hub(split)] for split in _HUB_SPLITS}
        else:
            files = {"train": squad_train, "eval": squad_eval}
            found = {split: [_row(*each, texts) for each in _of_file(Path(file).expanduser())]
                     for split, file in files.items()}  # fmt: skip
        if held_out is not None and held_out < len(found["eval"]):
            step = len(found["eval"]) / held_out
            found["eval"] = [found["eval"][int(i * step)] for i in range(held_out)]
        return found

    def load(
        *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
    ) -> dict[str, datasets.Dataset]:
        import datasets

        require_rows(n_train)
        tables = {split: datasets.Dataset.from_list(found) for split, found in rows().items()}
        return {**tables, "train": limited(tables["train"], n_train, seed)}

    def metric() -> Any:
        return SpanScores({row["label"][0]: row["context"] for found in rows().values() for row in found})

    return Task(
        name="squad", text_columns=("question", "context"), metric_name="f1", load=load, make_metric=metric,
        kind=Spans(stride=stride, longest=longest, best=best),
    )  # fmt: skip


def _of_file(path: Path) -> Iterator[tuple[str, str, Any, str]]:
    """(context, id, question with its answers, where it stands)  Errors: ValueError naming the place and the remedy."""
    if not path.is_file():
        raise ValueError(f"there is no file {path}: {_FORM}")
    count = 0
    for article in _listed(load_json(read_text(path, _LARGEST), str(path)), "data", str(path)):
        where = f"{path}, article {str(article.get('title') if isinstance(article, Mapping) else '')[:_SHOWN]!r}"
        for number, paragraph in enumerate(_listed(article, "paragraphs", where), 1):
            here = f"{where}, paragraph {number}"
            questions = _listed(paragraph, "qas", here)
            for question in questions:
                count += 1
                yield _text(paragraph, "context", here), _text(question, "id", here), question, here
    if not count:
        raise ValueError(f"{path} has no questions: {_FORM}")


def _of_hub(split: str) -> Iterator[tuple[str, str, Any, str]]:
    import datasets

    try:
        loaded = datasets.load_dataset(HUB_DATASET, split=_HUB_SPLITS[split])
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, or not cached
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"task 'squad': the hub's {HUB_DATASET} cannot be read ({reason}): give --squad_train and --squad_eval, or "
            "go online once"
        ) from None
    for row in loaded:
        answers = [dict(zip(("text", "answer_start"), pair, strict=True))
                   for pair in zip(row["answers"]["text"], row["answers"]["answer_start"], strict=True)]  # fmt: skip
        yield row["context"], row["id"], {**row, "answers": answers}, f"the hub's {HUB_DATASET}"


def _row(context: str, name: str, question: Any, where: str, texts: dict[str, int]) -> dict[str, Any]:
    where = f"{where}, question {name!r}"
    edges, answers = [], _listed(question, "answers", where)
    if not answers:
        raise ValueError(f"{where} has no answer, every question of SQuAD 1.1 has one: leave it out")
    for answer in answers:
        text, start = _text(answer, "text", where), answer.get("answer_start")
        if not isinstance(start, int) or isinstance(start, bool):
            raise ValueError(f"{where}: `answer_start` of {text[:_SHOWN]!r} must be a whole number: {_FORM}")
        if start < 0 or context[start : start + len(text)] != text:
            raise ValueError(
                f"{where}: the answer {text[:_SHOWN]!r} does not stand in its context at character {start}: correct "
                "`answer_start`, counted from 0"
            )
        edges += [start, start + len(text)]
    label = [texts.setdefault(context, len(texts)), len(context.split()), *edges]
    known = {"question": _text(question, "question", where).strip(), "context": context, "label": label, "id": name}
    return {**known, "answers": [answer["text"] for answer in answers]}


def _listed(table: Any, name: str, where: str) -> Sequence[Any]:
    found = table.get(name) if isinstance(table, Mapping) else None
    if not isinstance(found, list):
        raise ValueError(f"{where} has no list `{name}`: {_FORM}")
    return found


def _text(table: Any, name: str, where: str) -> str:
    found = table.get(name) if isinstance(table, Mapping) else None
    if not isinstance(found, str) or not found.strip():
        raise ValueError(f"{where} has no text `{name}`: {_FORM}")
    return found
