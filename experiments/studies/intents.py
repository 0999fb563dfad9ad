"""Intents as tasks, with rows outside of their scope: BANKING77 without some of its intents, and CLINC150.

FOLDER/banking77/train.csv and test.csv have the columns text and category. 20 of the 77 intents, drawn once, are left
out of training: their test rows are outside. Another data set's rows would be too easy, as they share no words with
banking, or in scope, as CLINC150 has the same questions about cards and transfers.
FOLDER/clinc/data_small.json has lists of [text, intent]; its authors collected the rows outside.
"""

import csv
import json
from functools import partial
from pathlib import Path

import datasets
import numpy as np

from pyro_blora.tasks import Task, register_task
from pyro_blora.tasks.files import limited

LEFT_OUT = 20  # of the 77 intents
SETS = ("banking77", "clinc150")
_SCOPE = ("inside", "outside")  # a task has two labels; of rows outside nothing but the text is used
Rows = list[tuple[str, str]]  # text, intent


def outside_of(name: str) -> str:
    """The name of the task of rows outside, for `--ood_task`."""
    return f"{name}-outside"


def register(folder: Path) -> None:
    """Make both data sets, and the rows outside of each, known as tasks.

    Errors: OSError for a file that is missing, ValueError for one with other columns.
    """
    for name, read in zip(SETS, (_banking77, _clinc150), strict=True):
        train, test, outside = read(folder)
        labels = tuple(sorted({intent for _, intent in train}))
        _register(name, labels, {"train": train, "eval": test})
        rows = [(text, "outside") for text, _ in outside]
        _register(outside_of(name), _SCOPE, {"train": rows, "eval": rows})


def _register(name: str, labels: tuple[str, ...], splits: dict[str, Rows]) -> None:
    tables = {split: _table(rows, labels) for split, rows in splits.items()}
    load = partial(_load, tables)
    register_task(Task(name=name, text_columns=("text",), labels=labels, metric_name="accuracy", load=load))


def _load(tables: dict[str, datasets.Dataset], *, glue_dir=None, seed=0, n_train=None) -> dict[str, datasets.Dataset]:
    return {**tables, "train": limited(tables["train"], n_train, seed)}


def _table(rows: Rows, labels: tuple[str, ...]) -> datasets.Dataset:
    texts, intents = zip(*rows, strict=True)
    return datasets.Dataset.from_dict({"text": texts, "label": [labels.index(intent) for intent in intents]})


def _banking77(folder: Path) -> tuple[Rows, Rows, Rows]:
    train, test = (_csv(folder / "banking77" / f"{split}.csv") for split in ("train", "test"))
    intents = sorted({intent for _, intent in train})
    out = set(np.random.default_rng(0).choice(intents, LEFT_OUT, replace=False))
    inside, outside = ([row for row in test if (row[1] in out) == wanted] for wanted in (False, True))
    return [row for row in train if row[1] not in out], inside, outside


def _csv(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames != ["text", "category"]:
            raise ValueError(f"{path}: expected the columns text and category, got {reader.fieldnames}")
        return [(row["text"], row["category"]) for row in reader]


def _clinc150(folder: Path) -> tuple[Rows, Rows, Rows]:
    path = folder / "clinc" / "data_small.json"
    found = json.loads(path.read_text(encoding="utf-8"))
    missing = {"train", "test", "oos_test"} - set(found)
    if missing:
        raise ValueError(f"{path}: there is no {', '.join(sorted(missing))}")
    return tuple([(text, intent) for text, intent in found[split]] for split in ("train", "test", "oos_test"))
