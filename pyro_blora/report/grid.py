"""The sections of a grid's page: its runs by task, what they compare at equal seeds, and what has no result."""

from pathlib import Path

import numpy as np
import pandas as pd

from ..evaluation.baselines import NOISE
from ..evaluation.verdicts import beside, ece_by_chance, nothing_learned, of_score
from ..files import REPORT
from ..interval import PERCENT
from . import charts
from .glossary import glossary
from .run_folder import Link, RunFiles, Section

Cards = list[tuple[str, str, str]]


def grid_page(folder: Path) -> tuple[Cards, list[Section]]:
    """Cards and sections of a grid's folder.  Errors: ValueError for one without runs."""
    finished = sorted(path.parent for path in folder.glob("*/summary.json"))
    logs = sorted((folder / "logs").glob("*.json"))
    if not finished and not logs:
        raise ValueError(f"{folder} is neither a finished run nor a grid's folder: it has no summary.json and no runs")
    rows, broken, labels = [], [], _labels(folder)
    for path in finished:
        try:
            rows.append(_row(RunFiles(path), labels.get(path.name)))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            broken.append({"run": path.name, "what is wrong": str(error)})
    done = {path.name for path in finished}
    broken += [{"run": log.stem, "what is wrong": _last_line(log)} for log in logs if log.stem not in done]
    sections = [_failed(broken)] if broken else []
    if rows:
        table = _distinct(pd.DataFrame(rows))
        tasks = [(str(name), mine) for name, mine in table.groupby("task", sort=False)]
        sections += [_overview(tasks), *(_of_task(*each) for each in tasks)]
    cards = [
        ("runs", str(len(rows)), "finished"),
        ("failed or unfinished", str(len(broken)), "listed below" if broken else "none"),
    ]
    return cards, [*sections, glossary(folder)]


def _last_line(log: Path) -> str:
    """The last line that a run of a grid printed."""
    text = log.with_suffix(".txt")
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines() if text.is_file() else []
    last = next((line.split("\r")[-1].strip() for line in reversed(lines) if line.strip()), "")
    return last or "it printed nothing"


def _labels(folder: Path) -> dict[str, str]:
    """The labels of the grid's axes but task and seed, by name of the run's folder."""
    path = folder / "results.parquet"
    try:
        table = pd.read_parquet(path) if path.is_file() else pd.DataFrame()
    except (OSError, ValueError):  # runs have names without it
        return {}
    if "metric" not in table:
        return {}
    axes = [name for name in table.columns[: list(table.columns).index("metric")] if name not in ("task", "seed")]
    labels = [", ".join(f"{name} {row[name]}" for name in axes) for _, row in table.iterrows()]
    return dict(zip(table["folder"].map(lambda place: Path(place).name), labels, strict=True)) if axes else {}


def _row(run: RunFiles, label: str | None) -> dict:
    s = run.summary
    low, high = s["bops"]["interval"]
    method = s["prior"] if s.get("method", "bayesian_lora") == "bayesian_lora" else s["method"]
    try:
        log_scores = run.predictions["log_likelihood"].to_numpy()
    except (ValueError, KeyError):  # its differences have no standard error then
        log_scores = None
    return {
        "folder": run.folder.name, "task": s["task"], "run": label or f"{method}, {s['guide']}", "seed": s["seed"],
        "metric": run.metric, "score": s["metric"]["value"], "error": beside(s, run.metric),
        "deployed": s["deployed"]["metric"]["value"], "nll": s["nll"],
        "ece": s["ece"]["value"], "bops": s["bops"]["adapted_ratio"], "low": low, "high": high,
        "interval": f"{low:.2%} to {high:.2%}", "parameters": s["adapter_parameters"], "summary": s,
        "log_scores": log_scores, "has_page": (run.folder / REPORT).is_file(),
    }  # fmt: skip


def _distinct(table: pd.DataFrame) -> pd.DataFrame:
    """Runs of the same name and seed, which differ in something else, get the end of their folder's name."""
    twins = table.duplicated(["task", "run", "seed"], keep=False)
    names = table["run"] + " (" + table["folder"].str.rsplit("-", n=1).str[-1] + ")"
    return table.assign(run=table["run"].where(~twins, names))


def _failed(broken: list[dict]) -> Section:
    text = f"{len(broken)} runs of this grid have no result: the grid's command goes on with them. The rest is below."
    return Section("Failed or unfinished", warnings=[text], tables=[("", pd.DataFrame(broken), True)])


def _overview(tasks: list[tuple[str, pd.DataFrame]]) -> Section:
    text = [sentence for task, mine in tasks for sentence in _compared(task, mine)]
    note = "`experiments/compare.py` gives paired differences of all runs, with intervals over seeds and examples."
    return Section("In plain words", [*text, note], warnings=[x for each in tasks if (x := _nothing_learned(*each))])


def _nothing_learned(task: str, runs: pd.DataFrame) -> str:
    names = [
        f"{row['run']} (seed {row['seed']}: {row['score']:.3f})"
        for _, row in runs.iterrows() if nothing_learned(row["summary"])
    ]  # fmt: skip
    if not names:
        return ""
    metric = runs["metric"].iloc[0]
    constant = beside(runs["summary"].iloc[0], metric, "constant")
    return (
        f"{task}: {metric} is not better than that of one answer for every example, {constant:.3f}: {', '.join(names)}."
    )


def _compared(task: str, runs: pd.DataFrame) -> list[str]:
    """The lowest NLL and the fewest bit operations among the runs of a task, at the seeds that all of them have."""
    if runs["run"].nunique() == 1:
        return [f"{task}: only {runs['run'].iloc[0]} has a result, nothing to compare it with."]
    by_seed = runs.pivot(index="run", columns="seed", values="nll").reindex(runs["run"].unique())
    seeds = list(by_seed.columns[by_seed.notna().all()])
    if not seeds:
        return [f"{task}: no seed has a result of every run, so they are not compared."]
    same = runs[runs["seed"].isin(seeds)].groupby("run", sort=False)
    means = same[["nll", "bops"]].mean()
    best, cheapest = str(means["nll"].idxmin()), str(means["bops"].idxmin())
    after = str(means["nll"].drop(best).idxmin())
    gap = means["nll"][after] - means["nll"][best]
    at = f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {', '.join(map(str, seeds))}, means"
    sentences = [
        f"{task}, at {at}: {best} has the lowest NLL, {means['nll'][best]:.4f}, at {means['bops'][best]:.1%} of the "
        f"adapted projections' bit operations. It is ahead of {after} by {gap:.4f}{_noise(same, best, after, gap)}."
    ]
    if cheapest != best:
        sentences.append(
            f"{task}: {cheapest} takes the fewest bit operations, {means['bops'][cheapest]:.1%}, at NLL "
            f"{means['nll'][cheapest]:.4f}."
        )
    left = len(runs) - len(seeds) * len(means)
    if left:
        sentences.append(f"{task}: {left} runs of other seeds are not in these sentences.")
    return sentences


def _noise(runs, one: str, other: str, gap: float) -> str:
    """The standard error of a difference of NLLs over the examples, where all have been predicted alike."""
    each = [list(runs.get_group(name).sort_values("seed")["log_scores"]) for name in (one, other)]
    arrays = [x for scores in each for x in scores]
    if any(x is None for x in arrays) or len({len(x) for x in arrays}) > 1:
        return ""
    differences = np.mean(each[0], 0) - np.mean(each[1], 0)
    error = differences.std(ddof=1) / len(differences) ** 0.5
    return f" ± {error:.4f} over examples" + (", which is noise" if gap <= NOISE * error else "")


def _of_task(task: str, runs: pd.DataFrame) -> Section:
    metric, summaries = runs["metric"].iloc[0], list(runs["summary"])
    shown = pd.DataFrame({
        "run": runs["run"], "seed": runs["seed"], metric: [of_score(s, metric) for s in summaries],
        "deployed": [of_score(s["deployed"], metric) for s in summaries],
        "NLL": [of_score(s, "nll") for s in summaries], "ECE": [_ece(s) for s in summaries],
        "E[BOPs]": runs["bops"].map("{:.2%}".format), PERCENT: runs["interval"],
        "parameters": runs["parameters"].map("{:,}".format),
        "folder": [
            Link.to_file(name, name, REPORT) if has_page else name
            for name, has_page in zip(runs["folder"], runs["has_page"], strict=True)
        ],
    })  # fmt: skip
    plain = runs.drop(columns=["folder", "has_page", "summary", "log_scores"])
    caption = f"{metric} against expected bit operations of the adapted projections, a point per run."
    if runs["error"].notna().any():
        caption += " Vertical lines: ± a standard error."
    return Section(task, _constants(summaries[0], metric), charts=[(charts.trade_off(plain, metric), caption)],
                   tables=[("", shown, True)])  # fmt: skip


def _constants(summary: dict, metric: str) -> list[str]:
    constants = [(what, beside(summary, name, "constant")) for what, name in ((metric, metric), ("NLL", "nll"))]
    known = [f"{what} {value:.4f}" for what, value in constants if value is not None]
    return [f"One answer for every example has {', '.join(known)}."] if known else []


def _ece(summary: dict) -> str:
    value, chance = summary["ece"]["value"], ece_by_chance(summary)
    if value is None:
        return "-"
    return f"{value:.4f}" + (f" (by chance up to {chance['high']:.4f})" if chance else "")
