"""The task `choice`: questions with several options, in JSON files or in a data set of the hub.

    pyro-blora train --task choice --choice_dir FOLDER --backbone demo-decoder
    pyro-blora train --task choice --choice_dir allenai/ai2_arc/ARC-Challenge --backbone demo-decoder

The folder has `train.json` or `train.jsonl`, and to validate on `dev`, `validation` or `test`, the first that there is;
or it was saved by `datasets`, with splits of these names. A file is a list of objects, or has one a line. A row is

    {"question": "What is red?", "options": ["a leaf", "blood"], "answer": "B"}      or the option's text, or its place
    {"question": "What is red?", "choices": {"text": ["a leaf", "blood"], "label": ["A", "B"]}, "answerKey": "B"}
    {"instruction": "... question: What is red?\\n\\nAnswer1: a leaf Answer2: blood\\n\\n...", "answer": "answer2"}

The second is that of ARC, OpenBookQA (with `question_stem`) and CommonsenseQA on the hub, the third that of
LLM-Adapters (Hu et al., 2023) for these and others. A place is counted from 0.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..user_files import load_json, read_text
from .base import Task
from .files import limited, require_rows
from .multiple_choice import LETTERS, MultipleChoice
from .names import register_task
from .tabular.sources import dataset_of, splits_of

if TYPE_CHECKING:
    import datasets

_SPLITS = {"train": ("train",), "eval": ("dev", "validation", "test")}
_LARGEST = 1 << 30  # bytes of a file
_ASKED = re.compile(r"(?:.*?question: )?(.*?)\s*\n\s*(Answer1: .*?)\s*(?:\n\s*Answer format: .*)?", re.DOTALL)
_OPTION = re.compile(r"(?:^|\s)Answer\d+: ")
_FORM = 'give {"question": ..., "options": [..., ...], "answer": "A"}'


class _Row(NamedTuple):
    question: str
    options: list[str]
    label: int


@register_task(
    "choice", named_after="choice_dir",
    flags={"choice_dir": "FOLDER of questions with options (train.json, dev.json or test.json), or a name on the hub"},
)  # fmt: skip
def choice(*, choice_dir: str, held_out: int | None = None) -> Task:
    """Questions with several options (ARC, OpenBookQA), by the letter that a language model writes next.

    held_out: questions to validate on, evenly spaced in the file; None: all.
    """
    if held_out is not None and held_out < 1:
        raise ValueError(f"--task.held_out must be at least 1, got {held_out}")
    rows = {split: _rows(*_source(choice_dir, names)) for split, names in _SPLITS.items()}
    kind = MultipleChoice(tuple(LETTERS[: max(len(row.options) for split in rows.values() for row in split)]))
    if held_out is not None and held_out < len(rows["eval"]):
        step = len(rows["eval"]) / held_out
        rows["eval"] = [rows["eval"][int(i * step)] for i in range(held_out)]

    def load(
        *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
    ) -> dict[str, datasets.Dataset]:
        import datasets

        require_rows(n_train)
        tables = {split: datasets.Dataset.from_list([row._asdict() for row in found]) for split, found in rows.items()}
        return {**tables, "train": limited(tables["train"], n_train, seed)}

    return Task(name="choice", text_columns=("question", "options"), kind=kind, metric_name="accuracy", load=load)


def _source(choice_dir: str, names: tuple[str, ...]) -> tuple[str, Iterable[tuple[str, Any]]]:
    """The first of these files, or splits, that there is: what it is called, and its rows, each with its place."""
    folder = Path(choice_dir).expanduser()
    for name in names:
        for ending in (".json", ".jsonl"):
            if (path := folder / f"{name}{ending}").is_file():
                return str(path), _objects(path)
    saved = (folder / "dataset_dict.json").is_file()
    splits = splits_of(choice_dir) if saved or not folder.exists() else ()
    for name in names:
        if name in splits and (table := dataset_of(choice_dir, name)) is not None:
            return f"{choice_dir}:{name}", ((f"row {number}", row) for number, row in enumerate(table, 1))
    if splits:
        raise ValueError(f"{choice_dir} has no split {' or '.join(names)}, but {', '.join(splits)}: choose another")
    called = " or ".join(f"{name}.json" for name in names)
    raise ValueError(f"there is no {called} in {folder}: point --choice_dir at the folder that has it")


def _rows(source: str, objects: Iterable[tuple[str, Any]]) -> list[_Row]:
    """Errors: ValueError naming the file, the row (from 1) and the remedy."""
    found = [_row(each, f"{source}, {where}") for where, each in objects]
    if not found:
        raise ValueError(f"{source} has no rows: {_FORM}")
    return found


def _objects(path: Path) -> Iterator[tuple[str, Any]]:
    text = read_text(path, _LARGEST)
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):  # splitlines cuts at U+2028 and others, also in texts
            if line.strip():
                yield f"line {number}", load_json(line, f"{path}, line {number}")
        return
    content = load_json(text, str(path))
    if not isinstance(content, list):
        raise ValueError(f"{path} must be a list of questions, got {type(content).__name__}: {_FORM}")
    yield from ((f"row {number}", each) for number, each in enumerate(content, 1))


def _row(given: Any, where: str) -> _Row:
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a question must be an object, got {type(given).__name__}: {_FORM}")
    question, options, answer = given.get("question"), given.get("options"), given.get("answer")
    if isinstance(given.get("choices"), dict):  # of the hub
        options, question = given["choices"].get("text"), given.get("question_stem", question)
        labels, key = given["choices"].get("label"), given.get("answerKey")
        answer = labels.index(key) if isinstance(labels, list) and key in labels else key
    if question is None and isinstance(given.get("instruction"), str):
        question, options = _taken_apart(given["instruction"])
        answer = re.sub(r"^answer(\d+)$", lambda match: str(int(match[1]) - 1), str(answer))
        answer = int(answer) if answer.isdecimal() else answer
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"{where}: there is no question: {_FORM}")
    if not isinstance(options, list) or not options:
        raise ValueError(f"{where}: the question {question[:60]!r} has no options: {_FORM}")
    if not all(isinstance(x, str) and x.strip() for x in options) or not 2 <= len(options) <= len(LETTERS):
        raise ValueError(f"{where}: options must be 2 to {len(LETTERS)} texts, got {json.dumps(options)[:80]}")
    return _Row(question.strip(), [x.strip() for x in options], _place(answer, options, where))


def _taken_apart(instruction: str) -> tuple[str, list[str]]:
    """The question, and its options in the order of their numbers; [] without any."""
    parts = _ASKED.fullmatch(instruction.strip())
    if parts is None:
        return instruction, []
    return parts[1], [option.strip() for option in _OPTION.split(parts[2])[1:]]


def _place(answer: Any, options: list[str], where: str) -> int:
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    if isinstance(answer, str) and answer in options:
        return options.index(answer)
    if isinstance(answer, str) and len(answer.strip()) == 1 and answer.strip() in LETTERS[: len(options)]:
        return LETTERS.index(answer.strip())
    allowed = f"{', '.join(LETTERS[: len(options)])}, an option's text, or 0 to {len(options) - 1}"
    raise ValueError(f"{where}: the answer {str(answer)[:60]!r} is none of the options: give {allowed}")
