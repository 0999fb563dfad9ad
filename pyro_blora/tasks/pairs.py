"""Yes/no questions about pairs of texts from CSV files of one's own, few as they may be: do these proteins interact?

    folder/train.csv   folder/dev.csv   (--task pairs --glue_dir folder)

    first,second,label
    "TP53, cellular tumor antigen p53","MDM2, E3 ubiquitin-protein ligase",yes

A header line with these three columns, in any order and beside others, which are left out; UTF-8; texts with commas or
line breaks in double quotes; labels `yes` and `no`, in either case. What counts where most pairs are `no`: Matthews'
correlation, and specificity (how many of the `no` are found) beside sensitivity (of the `yes`).
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..user_files import open_text
from .base import Task
from .files import limited, require_header, require_rows, require_whole_row
from .names import register_task
from .tabular.delimited import fault_of, read_long_fields

if TYPE_CHECKING:
    import datasets

COLUMNS = ("first", "second")
LABELS = ("no", "yes")
_FILES = {"train": "train.csv", "eval": "dev.csv"}


def load_pairs(
    *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
) -> dict[str, datasets.Dataset]:
    """Both splits from a folder; `n_train` keeps that many training rows, drawn with `seed`.

    Errors: ValueError with the path, the line and the remedy.
    """
    if glue_dir is None:
        raise ValueError("task 'pairs' reads files of yours: pass --glue_dir FOLDER with train.csv and dev.csv")
    require_rows(n_train)
    splits = {split: read_pairs(Path(glue_dir) / file) for split, file in _FILES.items()}
    return {**splits, "train": limited(splits["train"], n_train, seed)}


def read_pairs(path: Path) -> datasets.Dataset:
    """One file.  Errors: ValueError for a file that is missing, or has no such columns, labels or rows."""
    import datasets  # now, as it takes a second

    if path.parent.is_file():
        raise ValueError(
            f"task 'pairs': {path.parent} is a file: pass --glue_dir the folder that has train.csv and dev.csv"
        )
    if not path.is_file():
        raise ValueError(f"task 'pairs': there is no file {path}: it has the columns first, second and label")
    rows: dict[str, list[Any]] = {name: [] for name in (*COLUMNS, "label")}
    read_long_fields()
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or ()
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: {fault_of(error)}") from None
        if not header:
            raise ValueError(f"{path} is empty: its first line names the columns, first,second,label")
        if len(header) == 1 and "\t" in header[0]:
            raise ValueError(f"{path}: its columns are separated by tabs: separate them by commas")
        require_header(path, header, tuple(rows), "name the columns so")
        try:
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                require_whole_row(where, row, header)
                label = row["label"].strip().lower()
                if label not in LABELS:
                    raise ValueError(f"{where}: label {row['label']!r} must be yes or no")
                if not row["first"] or not row["second"]:
                    raise ValueError(f"{where}: a text of the pair is missing: fill it in, or drop the row")
                for name in COLUMNS:
                    rows[name].append(row[name])
                rows["label"].append(LABELS.index(label))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {fault_of(error)}") from None
    if not rows["label"]:
        raise ValueError(f"{path} has no rows under its header: add pairs")
    features = {
        **{name: datasets.Value("string") for name in COLUMNS},
        "label": datasets.ClassLabel(names=list(LABELS)),
    }
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@register_task("pairs")
def pairs() -> Task:
    """A yes/no question about pairs of texts from CSV files of one's own."""
    return Task(
        name="pairs", text_columns=COLUMNS, labels=LABELS, metric_name="matthews_correlation", load=load_pairs
    )  # fmt: skip
