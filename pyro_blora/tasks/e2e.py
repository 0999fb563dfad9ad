"""The task `e2e`: a sentence on a restaurant from its attributes, the E2E NLG challenge.

    pyro-blora train --task e2e --e2e_dir FOLDER --backbone demo-decoder

The folder has the challenge's own files, `trainset.csv` and `devset.csv`, with the columns `mr` (a meaning
representation, "name[The Eagle], eatType[pub]") and `ref` (a text that says it). Most meanings have several texts.
Source: Novikova et al., The E2E dataset (2017), CC BY-SA 4.0.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import TYPE_CHECKING

from ..user_files import open_text
from .base import Task
from .causal_lm import CausalLM
from .files import limited, require_header, require_rows, require_whole_row
from .names import register_task
from .tabular.delimited import read_long_fields
from .writing import require_packages

if TYPE_CHECKING:
    import datasets

FILES = {"train": "trainset.csv", "eval": "devset.csv"}
COLUMNS = ("mr", "ref")
_REMEDY = "give the challenge's own files"


@register_task(
    "e2e", proposes={"group_by_length": True},  # its texts differ in length, and padding passes the vocabulary's matrix
    flags={"e2e_dir": "FOLDER of the E2E NLG challenge: trainset.csv and devset.csv"},
)  # fmt: skip
def e2e(*, e2e_dir: str, meanings: int | None = None, longest: int = 64, drawn: int = 3) -> Task:
    """Texts on restaurants from their attributes (E2E NLG); scored by perplexity, BLEU, NIST and ROUGE-L.

    meanings: to validate on, evenly spaced in the file, each with all its texts; None: all. longest: tokens of a text
    that is written. drawn: draws of the posterior that write texts to score, beside the deployed allocation.
    """
    require_packages("e2e")
    for name, value, least in (("meanings", meanings, 1), ("longest", longest, 1), ("drawn", drawn, 0)):
        if value is not None and value < least:
            raise ValueError(f"--task.{name} must be at least {least}, got {value}")
    folder = Path(e2e_dir).expanduser()

    def load(
        *, glue_dir: str | Path | None = None, seed: int = 0, n_train: int | None = None
    ) -> dict[str, datasets.Dataset]:
        require_rows(n_train)
        splits = {split: _read(folder / file) for split, file in FILES.items()}
        return {"train": limited(splits["train"], n_train, seed), "eval": _of_meanings(splits["eval"], meanings)}

    kind = CausalLM(longest=longest, drawn=drawn)
    return Task(name="e2e", text_columns=("mr",), kind=kind, metric_name="accuracy", load=load)


def _read(path: Path) -> datasets.Dataset:
    """Errors: ValueError naming the file, the row and the remedy."""
    import datasets

    if not path.is_file():
        raise ValueError(f"there is no file {path}: point --e2e_dir at the folder that has it, {_REMEDY}")
    rows: dict[str, list[str]] = {"mr": [], "label": []}
    read_long_fields()
    with open_text(path, newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            header = reader.fieldnames or ()
            require_header(path, header, COLUMNS, _REMEDY)
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                require_whole_row(where, row, header)
                for column, own in zip(COLUMNS, rows, strict=True):
                    text = " ".join(row[column].split())
                    if not text:
                        called = "reference" if column == "ref" else "meaning representation"
                        raise ValueError(f"{where}: an empty {called} (column {column!r}): drop the row, or write it")
                    rows[own].append(text)
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: no row of a CSV file ({error}); {_REMEDY}") from None
    if not rows["mr"]:
        raise ValueError(f"{path} has no rows: {_REMEDY}")
    return datasets.Dataset.from_dict(rows)


def _of_meanings(rows: datasets.Dataset, count: int | None) -> datasets.Dataset:
    """All rows of as many meanings."""
    each = list(dict.fromkeys(rows["mr"]))
    if count is None or count >= len(each):
        return rows
    step = len(each) / count
    kept = {each[int(i * step)] for i in range(count)}  # the file is sorted by length
    return rows.select([i for i, mr in enumerate(rows["mr"]) if mr in kept])
