"""The table of a finished grid with what its run folders say: predictions, summaries, bit operations."""

import json
from pathlib import Path

import pandas as pd

from experiments.studies.cells import PREDICTED
from experiments.studies.grid_file import CELLS
from pyro_blora.bops import at_full_width
from pyro_blora.checkpoint import read_tensors
from pyro_blora.layout import AdapterLayout


def read(path: Path, axis: str) -> pd.DataFrame:
    """A line a run. The grid's other axes are told in the column `task`, as `sst2, rank 4`: they are not to be pooled.

    Beside the grid's columns: examples (predictions by column), summary, precision, and `adapted` and `model`, the bit
    operations of what is deployed in 10^9: ratios do not compare between runs with different adapters.
    Errors: ValueError for a table that cannot be compared along the axis, or whose runs are gone, or of other examples.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: it is what experiments/grid.py writes")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if "metric" not in table:
        raise ValueError(f"{path} has no finished run: give the grid's command again")
    labels = _labels(table)
    if axis in ("task", "seed") or any(column not in labels for column in (axis, "task", "seed")):
        raise ValueError(
            f"axis {axis!r} of {path} cannot be compared: it takes a task, a seed and one of the other axes; here are "
            + ", ".join(labels)
        )
    table[labels] = table[labels].astype(str)
    table["task"] = _told(table[labels], axis)
    if (twice := table.duplicated(["task", axis, "seed"])).any():
        raise ValueError(f"{path} has two runs of {table[twice].iloc[0][['task', axis, 'seed']].tolist()}: drop one")
    for folder in map(Path, table["folder"]):
        if not (folder / "predictions.parquet").is_file():
            raise ValueError(f"run {folder} is gone: give the grid's command again, from where it was given before")
    runs = pd.DataFrame([_run(Path(folder)) for folder in table["folder"]], index=table.index)
    table = pd.concat([table, runs], axis=1)
    _require_same_examples(table)
    return table


def _require_same_examples(table: pd.DataFrame) -> None:
    """Errors: ValueError for runs of one task that were evaluated on other examples: they are paired by position."""
    for _, runs in table.groupby("task", sort=False):
        labels = [list(map(str, examples["label"])) for examples in runs["examples"]]
        for folder, mine in zip(runs["folder"], labels, strict=True):
            if mine != labels[0]:
                raise ValueError(
                    f"{folder} was evaluated on other examples than {runs['folder'].iloc[0]}: their data differ, "
                    "move one of them away, and give the grid's command again"
                )


def _labels(table: pd.DataFrame) -> list[str]:
    """The grid's axes: they stand before what was measured."""
    return list(table.columns[: list(table.columns).index("metric")])


def _told(labels: pd.DataFrame, axis: str) -> pd.Series:
    """The task of every row, with its labels of all axes that are not compared."""
    told = labels["task"].copy()
    for other in (label for label in labels if label not in (axis, "task", "seed")):
        told += f", {other} " + labels[other]
    return told


def _run(folder: Path) -> dict:
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    _, notes = read_tensors(folder / "adapter" / "gates.safetensors")
    full = at_full_width(AdapterLayout.from_dict(json.loads(notes["layout"])))
    shares = summary["bops"]["deployed"]
    return {
        "examples": pd.read_parquet(folder / "predictions.parquet", columns=["label", *PREDICTED]).to_dict("list"),
        "summary": summary,
        "precision": json.loads((folder / "config.json").read_text(encoding="utf-8"))["precision"],
        "adapted": shares["adapted_ratio"] * float(full.adapted) / 1e9,
        "model": shares["model_ratio"] * float(full.model) / 1e9,
    }


def groups(table: pd.DataFrame, axis: str) -> dict[tuple[str, str], pd.DataFrame]:
    """Runs by (task, entry of the axis), ordered by seed; entries in the order of the file."""
    return {key: rows.sort_values("seed") for key, rows in table.groupby(["task", axis], sort=False)}


def wanted(path: Path, table: pd.DataFrame, axis: str) -> pd.DataFrame | None:
    """(task, entry, seed) of every cell of the grid that left the table, as `read` tells them in it.

    None where no `cells.json` is beside it, as of older grids, or one of another grid.
    """
    file, labels = path.with_name(CELLS), _labels(table)
    found = pd.DataFrame(json.loads(file.read_text(encoding="utf-8")) if file.is_file() else [])
    if set(found) != set(labels):
        return None
    cells = found.assign(task=_told(found[labels], axis))[["task", axis, "seed"]]
    return cells if _index(table, axis).isin(_index(cells, axis)).all() else None


def _index(table: pd.DataFrame, axis: str) -> pd.MultiIndex:
    return pd.MultiIndex.from_frame(table[["task", axis, "seed"]])


def missing(table: pd.DataFrame, axis: str, cells: pd.DataFrame | None) -> str:
    """A sentence that names the cells without a run; without `wanted`, of tasks x entries x seeds of those that have.

    cells: what `wanted` gives.
    """
    if cells is None:
        among = "among the entries and seeds that have a run"
        every = pd.MultiIndex.from_product([dict.fromkeys(table[name]) for name in ("task", axis, "seed")])
    else:
        among, every = "of the grid", _index(cells, axis)
    absent = every.difference(_index(table, axis), sort=False)
    told = (f"{task} `{entry}` seed {seed}" for task, entry, seed in absent)
    return f"Missing {among}: {', '.join(told) or 'none'}."
