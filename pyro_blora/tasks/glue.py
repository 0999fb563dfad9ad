"""The nine GLUE tasks, from the hub or from the folder of the official release (Wang et al. 2019, gluebenchmark.com).

Hub: `nyu-mll/glue`. Folder: one sub-folder a task (CoLA, SST-2, …) with `train.tsv` and `dev.tsv`. Both give the
hub's column names and integer labels. The release's own traps are handled here: text is never quoted, CoLA has no
header, MRPC begins with a byte-order mark, MNLI has rows without a gold label, and some lines of QQP are broken in
two.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..user_files import open_text
from .base import Task
from .files import limited, require_header, require_mostly_whole, require_rows
from .names import register_task

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

HUB_DATASET = "nyu-mll/glue"
REMEDY = "the file looks truncated or edited: download it again from the official GLUE release"
DEV_FILES = {"eval": "dev.tsv"}
MNLI_DEV_FILES = {"eval": "dev_matched.tsv", "eval_mismatched": "dev_mismatched.tsv"}
MNLI_HUB_SPLITS = {"train": "train", "eval": "validation_matched", "eval_mismatched": "validation_mismatched"}
HUB_SPLITS = {"train": "train", "eval": "validation"}


@dataclass(frozen=True, kw_only=True)
class Release:
    """Where a task's columns stand in the official release."""

    folder: str
    """Sub-folder of the release."""
    texts: tuple[str, ...]
    """Header names of the text columns, in the order of the task's."""
    label: tuple[str, ...] = ("label",)
    """Header names of the label column, the first present wins."""
    header: tuple[str, ...] | None = None
    """Column names where the file has no header line; None: the first line names them."""
    words: bool = False
    """Whether labels are written as class names; integers otherwise."""
    dropped_labels: tuple[str, ...] = ()
    """Labels whose rows are left out silently, by the release's own rule."""
    skip_malformed: bool = False
    """Whether broken rows are the release's fault: counted and skipped, not an error."""


PAIR = ("sentence1", "sentence2")
RELEASES = {
    "cola": Release(folder="CoLA", texts=("sentence",), header=("source", "label", "mark", "sentence")),
    "sst2": Release(folder="SST-2", texts=("sentence",)),
    "mrpc": Release(folder="MRPC", texts=("#1 String", "#2 String"), label=("Quality",)),
    "stsb": Release(folder="STS-B", texts=PAIR, label=("score",)),
    "qqp": Release(folder="QQP", texts=("question1", "question2"), label=("is_duplicate",), skip_malformed=True),
    "mnli": Release(folder="MNLI", texts=PAIR, label=("gold_label", "label"), words=True, dropped_labels=("-",)),
    "qnli": Release(folder="QNLI", texts=("question", "sentence"), words=True),
    "rte": Release(folder="RTE", texts=PAIR, words=True),
    "wnli": Release(folder="WNLI", texts=PAIR),
}


def load_glue(
    name: str, *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
) -> dict[str, datasets.Dataset]:
    """One task's splits, from the folder of the official release or, without one, from the hub.

    `n_train` keeps that many training rows, drawn with `seed`. Errors: ValueError with the path, line or host and the
    remedy.
    """
    require_rows(n_train)
    splits = _from_hub(name) if glue_dir is None else _from_release(name, Path(glue_dir))
    return {**splits, "train": limited(splits["train"], n_train, seed)}


def _from_hub(name: str) -> dict[str, datasets.Dataset]:
    import datasets  # now, as it takes a second

    task = TASKS[name]
    try:
        loaded = datasets.load_dataset(HUB_DATASET, name)
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # unreachable, not cached, client closed: all mean that there is no data
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"task {name!r}: the hub's {HUB_DATASET} cannot be read ({reason}): "
            "pass --glue_dir FOLDER with the official TSV release, or go online once"
        ) from None
    names = MNLI_HUB_SPLITS if name == "mnli" else HUB_SPLITS
    splits = {
        split: loaded[hub_split].select_columns([*task.text_columns, "label"]) for split, hub_split in names.items()
    }
    return task.validate(splits, source=f"the hub's {HUB_DATASET}")


def _from_release(name: str, glue_dir: Path) -> dict[str, datasets.Dataset]:
    folder = glue_dir / RELEASES[name].folder
    if not folder.is_dir():
        raise ValueError(
            f"task {name!r}: there is no folder {folder}: point --glue_dir at the folder that holds {folder.name}"
        )
    files = {"train": "train.tsv", **(MNLI_DEV_FILES if name == "mnli" else DEV_FILES)}
    for file in files.values():
        if not (folder / file).is_file():
            raise ValueError(
                f"task {name!r}: there is no file {folder / file}: copy it there from the official GLUE release"
            )
    return {split: read_release_file(name, folder / file) for split, file in files.items()}


def read_release_file(name: str, path: Path) -> datasets.Dataset:
    """One file of the official release as a dataset with the hub's columns."""
    import datasets

    task, release = TASKS[name], RELEASES[name]
    texts: dict[str, list[str]] = {column: [] for column in task.text_columns}
    labels, malformed, left_out = [], 0, []
    read_label, allowed = task.likelihood.reader(release.words)
    with open_text(path) as file:
        rows = ((number, line.rstrip("\n").split("\t")) for number, line in enumerate(file, start=1) if line != "\n")
        width, (*text_places, label_place) = _locate(release, path, rows)
        for number, fields in rows:
            written = fields[label_place] if len(fields) == width else ""
            if written in release.dropped_labels or (not written and release.skip_malformed):
                malformed += written not in release.dropped_labels
                left_out.append(number)
                continue
            try:
                labels.append(read_label(written))
            except (KeyError, ValueError):
                fault = f"label {written!r}; {allowed}"
                if len(fields) != width:
                    fault = f"{len(fields)} fields, expected {width}"
                raise ValueError(f"{path}, line {number}: {fault}; {REMEDY}") from None
            for column, place in zip(texts.values(), text_places, strict=True):
                column.append(fields[place])
    require_mostly_whole(path, left_out, len(labels), REMEDY)
    if malformed:
        logger.warning("%s: skipped %d malformed rows, a known fault of the official file", path, malformed)
    if not labels:
        raise ValueError(f"{path} has no rows; {REMEDY}")
    return datasets.Dataset.from_dict({**texts, "label": labels}, features=_features(task))


def _locate(release: Release, path: Path, rows: Iterator[tuple[int, list[str]]]) -> tuple[int, list[int]]:
    """The number of fields of a row, and the places of its texts and, last, of its label."""
    header = release.header or next(rows, (1, []))[1]
    label = next((column for column in release.label if column in header), release.label[0])
    require_header(path, header, (*release.texts, label), REMEDY)
    return len(header), [header.index(column) for column in (*release.texts, label)]


def _features(task: Task) -> datasets.Features:
    import datasets

    texts = {column: datasets.Value("string") for column in task.text_columns}
    return datasets.Features({**texts, "label": task.likelihood.feature})


def _task(
    name: str, text_columns: tuple[str, ...], labels: tuple[str, ...], metric_name: str = "accuracy", **settings: Any
) -> Task:
    load = partial(load_glue, name)
    return Task(name=name, text_columns=text_columns, labels=labels, metric_name=metric_name, load=load, **settings)


TASKS = {  # labels in the hub's order; the headline number is the one that LoRA and AdaLoRA tabulate
    task.name: task for task in (
        _task("cola", ("sentence",), ("unacceptable", "acceptable"), "matthews_correlation"),
        _task("sst2", ("sentence",), ("negative", "positive")),
        _task("mrpc", PAIR, ("not_equivalent", "equivalent")),
        _task("stsb", PAIR, (), "pearson", label_range=(0.0, 5.0)),
        _task("qqp", ("question1", "question2"), ("not_duplicate", "duplicate")),
        _task("mnli", ("premise", "hypothesis"), ("entailment", "neutral", "contradiction")),
        _task("qnli", ("question", "sentence"), ("entailment", "not_entailment")),
        _task("rte", PAIR, ("entailment", "not_entailment")),
        _task("wnli", PAIR, ("not_entailment", "entailment")),
    )
}  # fmt: skip


@register_task("cola")
def cola() -> Task:
    """Is a sentence acceptable English?"""
    return TASKS["cola"]


@register_task("sst2")
def sst2() -> Task:
    """Is a phrase from a film review positive?"""
    return TASKS["sst2"]


@register_task("mrpc")
def mrpc() -> Task:
    """Do two sentences from the news say the same?"""
    return TASKS["mrpc"]


@register_task("stsb")
def stsb() -> Task:
    """How similar are two sentences?"""
    return TASKS["stsb"]


@register_task("qqp")
def qqp() -> Task:
    """Do two questions ask the same?"""
    return TASKS["qqp"]


@register_task("mnli")
def mnli() -> Task:
    """Does a premise entail a hypothesis, contradict it, or neither?"""
    return TASKS["mnli"]


@register_task("qnli")
def qnli() -> Task:
    """Does a sentence answer a question?"""
    return TASKS["qnli"]


@register_task("rte")
def rte() -> Task:
    """Does the first sentence entail the second?"""
    return TASKS["rte"]


@register_task("wnli")
def wnli() -> Task:
    """Does a sentence follow when a pronoun of the first is resolved?"""
    return TASKS["wnli"]
