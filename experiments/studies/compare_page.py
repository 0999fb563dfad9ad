"""Tables of the page of experiments/compare.py: of a grid's runs, entry by entry of one of its axes.

table: runs as `results.read` gives them. axis: the grid's axis that is compared.
"""

import numpy as np
import pandas as pd

from experiments.studies.compare import beyond_noise, paired, score, spread, written
from experiments.studies.results import groups
from pyro_blora.posterior.arviz_compat import arviz_itself, held_out

Interval = tuple[float, ...]  # mean, low, high
Differences = dict[tuple[str, str], tuple[int, list[Interval | None]]]  # (task, entry) -> seeds, score and NLL
_MEASURED = ("score", "NLL", "score of draws", "NLL of draws")


def means(table: pd.DataFrame, axis: str) -> str:
    head = "deployed: score | NLL | 10^9 BOPs, adapted | model | draws: score | NLL | ECE"
    lines = [f"| task | {axis} | seeds | {head} | training (s) |", "|" + "---|" * 11]
    for (task, entry), runs in groups(table, axis).items():
        seeds = ", ".join(map(str, runs["seed"]))
        ece = spread(runs["ece"]) if runs["ece"].notna().all() else "-"
        lines.append(
            f"| {task} | `{entry}` | {seeds} | {spread(runs['deployed_score'])} | {spread(runs['deployed_nll'])} | "
            f"{runs['adapted'].mean():.1f} | {runs['model'].mean():.1f} | "
            f"{spread(runs['score'])} | {spread(runs['nll'])} | {ece} | {runs['seconds'].median():.0f} |"
        )
    return "\n".join([*lines, *constants(table)])


def constants(table: pd.DataFrame) -> list[str]:
    """What always answering the most frequent label of the held-out examples scores, where the metric is accuracy."""
    told = []
    for task, runs in table.groupby("task", sort=False):
        if runs["metric"].iloc[0] == "accuracy":
            label = pd.Series(runs["examples"].iloc[0]["label"])
            told.append(f"{task} {(label == label.mode().iloc[0]).mean():.3f}")
    return ["", f"Always answering the most frequent label scores: {', '.join(told)}."] if told else []


def compared(table: pd.DataFrame, axis: str, against: str) -> Differences:
    """Every entry minus one of them, over the seeds that both have: how many, and score and NLL, deployed and of draws.

    (task, entry) -> (seeds, four of mean, low, high; none without a seed in common).  A score is None where the metric
    is not one that resamples have.
    """
    found, differences = groups(table, axis), {}
    for (task, entry), runs in found.items():
        rivals = found.get((task, against))
        if entry == against or rivals is None:
            continue
        metric = runs["metric"].iloc[0]
        pairs = runs.merge(rivals, on="seed", suffixes=("", "_theirs"))
        ours, theirs = ([{"examples": x} for x in pairs[column]] for column in ("examples", "examples_theirs"))
        told: list[Interval | None] = []
        for prefix in ("deployed_", "") if len(pairs) else ():
            known = _is_its_metric(runs, metric, prefix) and _is_its_metric(rivals, metric, prefix)
            both = paired(ours, theirs, metric if known else None, prefix=prefix)
            told += [both.get("score"), both["nll"]]
        differences[task, entry] = len(pairs), told
    return differences


def _is_its_metric(runs: pd.DataFrame, metric: str, prefix: str) -> bool:
    """Whether resamples have the score of the metric's name, and it is what the runs' own metric says."""
    try:
        scores = [score(x, metric, prefix) for x in runs["examples"]]
    except (ValueError, TypeError):  # another name, or answers that are no numbers
        return False
    return np.allclose(np.array(scores, float), runs[f"{prefix}score"].to_numpy(float), rtol=1e-6, atol=1e-6)


def differences(found: Differences, axis: str, against: str) -> str:
    lines = [
        f"| task | {axis} minus `{against}` | seeds | deployed: score [95 %] | NLL [95 %] | "
        "draws: score [95 %] | NLL [95 %] |",
        "|" + "---|" * 7,
    ]
    for (task, entry), (seeds, told) in found.items():
        cells = " | ".join(written(x) or "-" for x in told) or " | | |"
        lines.append(f"| {task} | `{entry}` | {seeds or 'none in common'} | {cells} |")
    return "\n".join(lines)


def what_differs(found: Differences, against: str) -> str:
    """By task, what differs from one of the entries by more than the interval, as deployed and averaged over draws."""
    lines = []
    for task in dict.fromkeys(task for task, _ in found):
        told = [
            f"`{entry}` {name} {written(interval)}{' (one seed)' if seeds == 1 else ''}"
            for (of, entry), (seeds, intervals) in found.items()
            if of == task
            for i, (name, interval) in enumerate(zip(_MEASURED, intervals, strict=False))
            if interval is not None
            and beyond_noise(interval)
            and interval not in intervals[:i]  # draws of what has no gates are what is deployed
        ]
        lines.append(f"- **{task}**, minus `{against}`: {'; '.join(told) or 'nothing'} beyond noise.")
    return "\n".join(lines)


def kept(table: pd.DataFrame, axis: str) -> str:
    """Expected bits by tensor role and expected ranks by projection type, over seeds; `-` where an entry has none."""
    roles, types = (
        list(dict.fromkeys(key for summary in table["summary"] for key in summary[name]))
        for name in ("expected_bits", "expected_rank")
    )
    titles = [f"E[bits] {roles[0]}", *roles[1:], *(f"E[rank] {name}" for name in types[:1]), *types[1:]]
    lines = [f"| task | {axis} | {' | '.join(titles)} |", "|" + "---|" * (2 + len(titles))]
    for (task, entry), runs in groups(table, axis).items():
        values = [
            [summary[name][key] for summary in runs["summary"] if key in summary[name]]
            for name, keys in (("expected_bits", roles), ("expected_rank", types))
            for key in keys
        ]
        lines.append(f"| {task} | `{entry}` | {' | '.join(spread(x, 1) if x else '-' for x in values)} |")
    return "\n".join(lines)


def elpd(table: pd.DataFrame, axis: str) -> str:
    """ArviZ's `compare` of the log scores of held-out examples, averaged over the seeds that every entry has."""
    lines = [f"| task | {axis} | elpd | difference | its standard error | stacking weight |", "|" + "---|" * 6]
    for task, runs in table.groupby("task", sort=False):
        shared = set.intersection(*(set(rows["seed"]) for _, rows in runs.groupby(axis)))
        if not shared:
            continue
        scores = {
            entry: held_out(
                np.mean([x["log_likelihood"] for x in rows["examples"]], 0), rows["summary"].iloc[0]["draws"]
            )
            for entry, rows in runs[runs["seed"].isin(shared)].groupby(axis, sort=False)
        }
        if len(scores) > 1:
            for entry, row in arviz_itself().compare(scores, method="stacking").iterrows():
                value = row.get("elpd_loo", row.get("elpd"))
                behind = f"{row['elpd_diff']:.1f} | {row['dse']:.1f} | {row['weight']:.2f}"
                lines.append(f"| {task} | `{entry}` | {value:.1f} | {behind} |")
    return "\n".join(lines)


def at_every_rank(table: pd.DataFrame, axis: str) -> str:
    """A section with the scores of runs that were evaluated at every rank (DyLoRA)."""
    lines = []
    for (task, entry), runs in groups(table, axis).items():
        for rows in zip(*(summary.get("by_rank", []) for summary in runs["summary"]), strict=True):
            values = [row["metric"]["value"] for row in rows], [row["nll"] for row in rows]
            share = rows[0]["bops"]["adapted_ratio"]
            told = " | ".join(map(spread, values))
            lines.append(f"| {task} | `{entry}` | {rows[0]['rank']} | {told} | {share:.2%} |")
    if not lines:
        return ""
    head = [f"| task | {axis} | rank | score | NLL | BOPs / adapted |", "|" + "---|" * 6]
    return "\n".join(["", "## At every rank", "", *head, *lines, ""])
