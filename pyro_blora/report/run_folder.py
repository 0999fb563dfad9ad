"""A finished run's files as its report reads them, and the parts of a page.

Summaries of older versions have no `beside` (what every score is read beside): it is computed from the predictions.
"""

import contextlib
import dataclasses
import importlib.metadata
import math
import os
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import pandas as pd
import torch

from ..config.run_config import RunConfig
from ..evaluation import baselines
from ..files import require_whole
from ..posterior.arviz_compat import group, read
from ..posterior.calibration import chance_level
from ..posterior.gate_posterior import Posterior
from ..tasks.likelihoods import Likelihood
from ..tasks.outcomes import kind_of, older_kind
from ..user_files import load_json, open_text, read_json
from ..user_values import shown

_CHECKOUT = Path(__file__).resolve().parents[2]
_DOCS = "docs/tutorial/reading-the-posterior.md"


class Link(NamedTuple):
    """A cell of a table that leads to a file below the page's folder, or a place on the page; see `to_file`."""

    text: str
    href: str

    @classmethod
    def to_file(cls, text: str, *path: str) -> "Link":
        """To a file below the page's folder; no name, whatever it is, becomes a URL's scheme or query."""
        return cls(text, "/".join([".", *(quote(part, safe="") for part in path)]))

    def __str__(self) -> str:
        return self.text

    @property
    def is_safe(self) -> bool:
        """Whether it leads to a file beside the page, to a place on it, or to a page of the web."""
        return self.href.startswith(("./", "../", "#", "https://"))


def docs_link(folder: Path) -> Link | None:
    """To the page that teaches to read a report: in the checkout that the folder is in, or at the project's address."""
    folder, text = folder.resolve(), "How to read this page"
    if folder.is_relative_to(_CHECKOUT) and (_CHECKOUT / _DOCS).is_file():
        return Link(text, Path(os.path.relpath(_CHECKOUT / _DOCS, folder)).as_posix())
    try:
        urls = importlib.metadata.metadata("pyro-blora").get_all("Project-URL") or []
    except importlib.metadata.PackageNotFoundError:
        urls = []
    found = dict(url.split(", ", 1) for url in urls)
    return Link(text, found["Documentation"]) if "Documentation" in found else None


@dataclasses.dataclass
class Section:
    """Part of a page. charts: (specification, caption); tables: (caption, table, open); missing: why there are none.

    Texts may hold `code` in backticks. Cells of tables are texts, numbers, or a Link.
    """

    title: str
    paragraphs: list[str] = dataclasses.field(default_factory=list)
    warnings: list[str] = dataclasses.field(default_factory=list)
    charts: list[tuple[dict, str]] = dataclasses.field(default_factory=list)
    tables: list[tuple[str, pd.DataFrame, bool]] = dataclasses.field(default_factory=list)
    links: list[Link] = dataclasses.field(default_factory=list)
    code: str = ""
    missing: str = ""


def read_summary(folder: Path) -> dict:
    """The summary of a finished run.  Errors: ValueError for a folder that has none, and for one of another form."""
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: `pyro-blora train` prints that of its run, in runs/ by default")
    try:
        summary = read_json(folder / "summary.json")
        _require_form(summary)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        what = f"it lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{folder} is not a finished run: no readable summary.json ({what})") from None
    return summary


def _require_form(summary: dict) -> None:
    """That what every table and page shows is there, and a number where a number is meant."""
    metric, deployed, bops = summary["metric"], summary["deployed"], summary["bops"]
    numbers = {
        "metric.value": metric["value"], "nll": summary["nll"], "draws": summary["draws"], "seed": summary["seed"],
        "n_eval": summary["n_eval"], "deployed.nll": deployed["nll"], "brier": summary.get("brier") or 0.0,
        "deployed.metric.value": deployed["metric"]["value"], "adapter_parameters": summary["adapter_parameters"],
        "ece.value": summary["ece"]["value"] or 0.0, "ece.bins": summary["ece"]["bins"],
        "deployed.ece.value": deployed["ece"]["value"] or 0.0,
        **{f"bops.{name}": bops[name] for name in ("adapted_ratio", "model_ratio")},
        **{f"bops.deployed.{name}": bops["deployed"][name] for name in ("adapted_ratio", "model_ratio")},
        **dict(zip(("bops.interval, low", "bops.interval, high"), bops["interval"], strict=True)),
        **{f"expected_bits.{role}": value for role, value in summary["expected_bits"].items()},
        **{f"expected_rank.{kind}": value for kind, value in summary["expected_rank"].items()},
    }  # fmt: skip
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"{name} must be a finite number, got {shown(value)}")
    words = {"metric.name": metric["name"], **{x: summary[x] for x in ("task", "backbone", "prior", "guide")}}
    for name, value in words.items():
        if not isinstance(value, str):
            raise ValueError(f"{name} must be a word, got {shown(value)}")


class RunFiles:
    """A finished run's files, each read on first use.  Errors: ValueError for a folder without a summary."""

    def __init__(self, folder: Path):
        self.folder = folder
        require_whole(folder, ["summary.json"])
        self.summary = read_summary(folder)
        self.metric = self.summary["metric"]["name"]
        if "beside" not in self.summary:
            try:
                self._complete()
            except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError):  # none, or of other types
                self.summary.pop("beside", None)
        if "constant_answer" not in self.summary:
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError):
                self.summary["constant_answer"] = older_kind(self.predictions).constant

    def _complete(self) -> None:
        """What newer versions have in a summary: `beside`, of what is averaged and of what is deployed."""
        summary, table = self.summary, self.predictions
        labels, kind = table["label"].to_numpy(), older_kind(table)
        mean = kind.read(table).numpy() if kind.has_confidence else None
        decision, log_scores = table["decision"].to_numpy(), table["log_likelihood"].to_numpy()
        found: dict[str, Any] = baselines.beside(
            summary["scores"], decision, labels, log_scores, kind=kind, probabilities=mean
        )  # fmt: skip
        if mean is not None:
            found["ece"] = {"chance": chance_level(torch.tensor(mean), summary["ece"]["bins"])}
        deployed, at_mode = summary["deployed"], table["deployed_decision"].to_numpy()
        log_scores = table["deployed_log_likelihood"].to_numpy()
        deployed["beside"] = baselines.beside(deployed["scores"], at_mode, labels, log_scores, kind=kind)
        deployed["difference_error"] = baselines.difference_error(
            self.metric, labels, decision, at_mode, kind, value=deployed["metric"]["value"]
        )
        summary["beside"] = found

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
            with open_text(path) as file:
                lines = [load_json(line, f"line {number}") for number, line in enumerate(file, start=1)]
        except (OSError, ValueError) as error:
            raise ValueError(f"metrics.jsonl cannot be read ({error}): no curves.") from None
        for number, line in enumerate(lines, start=1):
            if not isinstance(line, dict) or not all(isinstance(x, int | float) for x in line.values()):
                raise ValueError(f"metrics.jsonl, line {number} is no table of numbers: no curves.")
        if lines:
            require_whole(self.folder, [path.name])
        return pd.DataFrame(lines)

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
        """(E, C), a column a class in the order of the labels.  Errors: ValueError for a task without classes."""
        found = None if self.likelihood is None else self.likelihood.probabilities(self.predictions)
        if found is None:
            raise ValueError("This task has no classes: there is no confidence to calibrate.")
        return found

    @cached_property
    def likelihood(self) -> Likelihood | None:
        """The kind of its outcome; None for one that is not registered in this process."""
        return kind_of(self.summary["outcome"]) if "outcome" in self.summary else older_kind(self.predictions)

    @property
    def left_out(self) -> tuple[str, ...]:
        """Titles of sections that mean nothing for it."""
        kind = kind_of(self.summary.get("outcome", {}))
        return () if kind is None else kind.left_out
