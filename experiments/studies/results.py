"""The table of a finished grid with what its run folders say: predictions, summaries, bit operations."""

import json
from pathlib import Path

import pandas as pd

from experiments.studies.cells import PREDICTED
from pyro_blora.bops import at_full_width
from pyro_blora.checkpoint import read_tensors
from pyro_blora.layout import AdapterLayout


def read(path: Path, axis: str) -> pd.DataFrame:
    """A line a run. The grid's other axes are told in the column `task`, as `sst2, rank 4`: they are not to be pooled.

    Beside the grid's columns: examples (predictions by column), summary, precision, and `adapted` and `model`, the bit
    operations of what is deployed in 10^9: ratios do not compare between runs with different adapters.
    Errors: ValueError for a table that cannot be compared along the axis, or whose runs are gone.
    """
    if not path.is_file():
        raise ValueError(f"{path} does not exist: it is what experiments/grid.py writes")
    table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    if "metric" not in table:
        raise ValueError(f"{path} has no finished run: give the grid's command again")
    labels = list(table.columns[: list(table.columns).index("metric")])
    if axis in ("task", "seed") or any(column not in labels for column in (axis, "task", "seed")):
        raise ValueError(
            f"axis {axis!r} of {path} cannot be compared: it takes a task, a seed and one of the other axes; here are "
            + ", ".join(labels)
        )
    table[labels] = table[labels].astype(str)
    for other in (label for label in labels if label not in (axis, "task", "seed")):
        table["task"] += f", {other} " + table[other]
    if (twice := table.duplicated(["task", axis, "seed"])).any():
        raise ValueError(f"{path} has two runs of {table[twice].iloc[0][['task', axis, 'seed']].tolist()}: drop one")
    for folder in map(Path, table["folder"]):
        if not (folder / "predictions.parquet").is_file():
            raise ValueError(f"run {folder} is gone: give the grid's command again, from where it was given before")
    runs = pd.DataFrame([_run(Path(folder)) for folder in table["folder"]], index=table.index)
    return pd.concat([table, runs], axis=1)


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


def missing(table: pd.DataFrame, axis: str) -> list[str]:
    """Cells of tasks x entries x seeds that are not in the table."""
    wanted = pd.MultiIndex.from_product([dict.fromkeys(table[c]) for c in ("task", axis, "seed")])
    absent = wanted.difference(pd.MultiIndex.from_frame(table[["task", axis, "seed"]]), sort=False)
    return [f"{task} `{entry}` seed {seed}" for task, entry, seed in absent]
