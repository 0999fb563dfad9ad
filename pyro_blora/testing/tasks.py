"""What a task must keep."""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..registries import TASKS
from ..tasks import Task, get_task
from .promises import Refuse, refusing, tried

if TYPE_CHECKING:
    import datasets

_ROWS = 8  # training rows that are asked for


def check_task(
    task: str | Callable | Task, settings: dict | None = None, *, glue_dir: str | Path | None = None
) -> Task:
    """Refuse a task that breaks a promise, with a sentence that names it; returns the task.

    task: a registered name, `file.py:function`, the function itself, or a Task. glue_dir: the folder that its `load`
    gets.
    Errors: ValueError naming the task, what is wrong and the remedy.
    """
    built = task if isinstance(task, Task) else get_task(task, settings)  # refuses what is no Task
    refuse = refusing(TASKS, built.name if isinstance(task, Task) else task)
    built.require_usable()

    def loaded(seed: int = 0, n_train: int = _ROWS) -> dict:
        rows = tried(lambda: built.load(glue_dir=glue_dir, seed=seed, n_train=n_train), "load", refuse)
        return built.validate(rows)  # refuses missing splits and columns, and labels that are none

    rows = loaded()
    _check_rows(built, rows, refuse)
    _check_seeds(rows, loaded, refuse)
    _check_metric(built, rows["eval"]["label"][:], refuse)
    return built


def _check_rows(task: Task, rows: dict, refuse: Refuse) -> None:
    for split, table in rows.items():
        if len(table) == 0:
            refuse(f"split {split!r} has no rows: return some")
        for column in task.text_columns:
            wrong = [text for text in table[column][:] if not task.likelihood.is_text(text)]
            if wrong:
                refuse(f"split {split!r} has {wrong[0]!r} in its text column {column!r}: give texts, or drop the row")
    if len(rows["train"]) > _ROWS:
        refuse(f"load(n_train={_ROWS}) gave {len(rows['train'])} training rows: keep n_train of them, drawn with seed")


def _check_seeds(rows: dict, loaded: Callable[..., dict], refuse: Refuse) -> None:
    again, other = loaded(), loaded(seed=1)
    for split, table in rows.items():
        if _listed(again[split]) != _listed(table):
            refuse(f"two loads with the same seed gave other rows of {split!r}: draw with a generator seeded by seed")
        if split != "train" and _listed(other[split]) != _listed(table):
            refuse(f"split {split!r} depends on seed: runs of several seeds compare row by row, so keep it as it is")
    more = len(loaded(n_train=_ROWS + 1)["train"]) > len(rows["train"])
    if more and _listed(other["train"]) == _listed(rows["train"]):
        refuse(f"load(n_train={_ROWS}) gave the same training rows for two seeds: draw them with seed")


def _listed(table: "datasets.Dataset") -> list:
    return table.to_list()


def _check_metric(task: Task, labels: list, refuse: Refuse) -> None:
    """The headline number is larger for the labels themselves than for the best constant answer."""
    truth = task.likelihood.laid_out(labels)

    def scored(answers: list) -> float:
        with np.errstate(all="ignore"):  # a correlation with a constant is none
            return float(task.metric().compute(predictions=answers, references=truth.tolist())[task.metric_name])

    perfect = tried(lambda: scored(truth.tolist()), "its metric on the labels of split 'eval'", refuse)
    if not math.isfinite(perfect):
        refuse(f"its metric {task.metric_name!r} of perfect predictions is {perfect}: it must be a finite number")
    for constant in task.likelihood.constants(truth):
        value = -math.inf
        with contextlib.suppress(Exception):  # some metrics refuse constants
            value = scored(constant.tolist())
        if value > perfect or (value == perfect and constant.tolist() != truth.tolist()):
            refuse(
                f"its metric {task.metric_name!r} is {perfect:g} for perfect predictions and {value:g} for a constant "
                "answer: the headline number must be larger for better ones, so name another, or its negative"
            )
