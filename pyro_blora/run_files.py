"""A finished run's files as its report reads them, and the parts of a page."""

import dataclasses
import json
from functools import cached_property
from pathlib import Path

import pandas as pd

from .arviz_data import group, read
from .config import RunConfig
from .diagnostics import Posterior
from .files import require_whole


@dataclasses.dataclass
class Section:
    """Part of a page. charts: (specification, caption); tables: (caption, table, open); missing: why there are none."""

    title: str
    paragraphs: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    charts: list[tuple[dict, str]] = dataclasses.field(default_factory=list)
    tables: list[tuple[str, pd.DataFrame, bool]] = dataclasses.field(default_factory=list)
    code: str = ""
    missing: str = ""


class RunFiles:
    """A finished run's files, each read when it is asked for.  Errors: ValueError for a folder without a summary."""

    def __init__(self, folder: Path):
        self.folder = folder
        require_whole(folder, ["summary.json"])
        try:
            self.summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
            self.metric = self.summary["metric"]["name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{folder} is not a finished run: no readable summary.json ({error})") from None

    @cached_property
    def config(self) -> RunConfig:
        path = self.folder / "config.json"
        if not path.is_file():
            raise ValueError("config.json is missing: the command that repeats the run is not known.")
        require_whole(self.folder, [path.name])
        return RunConfig.from_json(path)

    @cached_property
    def posterior(self) -> Posterior:
        found = read(self.folder)
        require_whole(self.folder, ["posterior.nc"])
        if group(found, "posterior").sizes.get("draw", 0) == 0:
            raise ValueError("posterior.nc has no draws: train with --draws 1 or more.")
        return Posterior(found)

    @cached_property
    def log(self) -> pd.DataFrame:
        path = self.folder / "metrics.jsonl"
        try:
            found = pd.DataFrame([json.loads(line) for line in path.read_text("utf-8").splitlines()])
        except (OSError, ValueError) as error:
            raise ValueError(f"metrics.jsonl cannot be read ({error}): no curves.") from None
        if not found.empty:
            require_whole(self.folder, [path.name])
        return found

    @cached_property
    def predictions(self) -> pd.DataFrame:
        try:
            found = pd.read_parquet(self.folder / "predictions.parquet")
        except (OSError, ValueError) as error:
            raise ValueError(f"predictions.parquet cannot be read ({error}).") from None
        require_whole(self.folder, ["predictions.parquet"])
        return found

    @property
    def probabilities(self) -> pd.DataFrame:
        """(E, C), a column a class in the order of the labels.  Errors: ValueError for a regression."""
        columns = [name for name in self.predictions if name.startswith("p_")]
        if not columns:
            raise ValueError("This task is a regression: there is no confidence to calibrate.")
        return self.predictions[columns]
