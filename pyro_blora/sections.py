"""The sections of a run's report, in order.

Every section is a function of `RunFiles` and its title; where what it needs is missing or damaged it raises ValueError
with a sentence, which the page shows in its place.
"""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import scipy.stats

from . import charts
from .diagnostics import INTERVAL
from .findings import in_words, warnings
from .flags import command_line
from .gate_sections import bit_operations, gate_map, ranks
from .run_files import RunFiles, Section

_STEPS = 300  # points of a curve, at most
_ROWS = 10  # of the examples that are named
_CURVES = (  # logged numbers, what their axis says, whether it is logarithmic
    (("loss", "nll"), "nats an example", False),
    (("kl_z", "kl_g"), "KL to the prior, nats", True),
    (("expected_bits", "expected_rank"), "expected bits and ranks", False),
    (("bops_adapted", "bops_model"), "expected BOPs, ratio", False),
    (("grad_norm", "gate_gradient"), "norms of gradients", True),
    (("gate_noise", "temperature"), "noise of the gates' gradient; temperature", False),
)


def sections_of(run: RunFiles) -> list[Section]:
    """All sections in order; one that cannot be made says why."""
    found = []
    for title, make in _SECTIONS.items():
        try:
            section = make(run, title)
            json.dumps([spec for spec, _ in section.charts], allow_nan=False)  # a chart of something else is none
            found.append(section)
        except Exception as error:  # whatever pandas, Altair and we make of files that somebody has edited
            said = f"This run's files have something else where this is kept ({type(error).__name__}: {error})."
            said = f"This run's files lack {error}." if isinstance(error, KeyError) else said
            found.append(Section(title, missing=str(error) if isinstance(error, ValueError) else said))
    return found


def headline(summary: dict) -> list[tuple[str, str, str]]:
    """(what, value, remark) of the page's first line."""
    bops, metric = summary["bops"], summary["metric"]
    low, high = bops["interval"]
    ece = summary["ece"]["value"]
    return [
        (metric["name"], f"{metric['value']:.4f}", f"deployed {summary['deployed']['metric']['value']:.4f}"),
        ("NLL", f"{summary['nll']:.4f}", f"nats an example; deployed {summary['deployed']['nll']:.4f}"),
        ("ECE", "-" if ece is None else f"{ece:.4f}", f"{summary['ece']['bins']} bins"),
        (
            "E[BOPs]",
            f"{bops['adapted_ratio']:.2%}",
            f"94 % interval {low:.2%} to {high:.2%}, of the adapted projections",
        ),
        ("E[BOPs], model", f"{bops['model_ratio']:.2%}", "of every matrix product of a forward"),
        ("adapter", f"{summary['adapter_parameters']:,}", "parameters deployed"),
    ]


def _words(run: RunFiles, title: str) -> Section:
    try:
        posterior = run.posterior
    except ValueError as error:
        return Section(title, in_words(run.summary), [*warnings(run.summary, None), str(error)])
    return Section(title, in_words(run.summary), warnings(run.summary, posterior))


def reliability_bins(run: RunFiles) -> pd.DataFrame:
    """Accuracy and confidence in equal bins of confidence, those of ECE, with Jeffreys intervals of the accuracy."""
    probabilities = run.probabilities.to_numpy()
    bins = run.summary["ece"]["bins"]
    confidence, right = probabilities.max(1), (run.predictions["decision"] == run.predictions["label"]).to_numpy()
    index = np.minimum((confidence * bins).astype(int), bins - 1)
    lines = []
    for i in np.unique(index):
        mine = index == i
        n, hits = int(mine.sum()), int(right[mine].sum())
        low, high = scipy.stats.beta.ppf(INTERVAL, hits + 0.5, n - hits + 0.5)
        lines.append({
            "bin": f"{i / bins:.2f} to {(i + 1) / bins:.2f}", "confidence": confidence[mine].mean(),
            "accuracy": hits / n, "low": low, "high": high, "examples": n,
        })  # fmt: skip
    return pd.DataFrame(lines)


def _calibration(run: RunFiles, title: str) -> Section:
    bins = reliability_bins(run)
    gap = (bins["examples"] * (bins["accuracy"] - bins["confidence"]).abs()).sum() / bins["examples"].sum()
    text = (
        f"Below the diagonal it is surer than it is right. ECE {gap:.4f} is the mean distance from it, weighted by "
        f"examples; Brier score {run.summary['brier']:.4f}."
    )
    made = [(charts.reliability(bins), "A point a bin, as large as its share of the examples.")]
    tables = [("The bins as a table", bins.round(4), False)]
    if found := run.summary.get("calibration"):  # older runs have none
        said = run.summary["averaging"]
        tables.insert(0, (f"Averaged: {said}. Scaled: at the temperature of least NLL on rows held out of training.",
                          calibration_table(found), True))  # fmt: skip
    return Section(title, [text], charts=made, tables=tables)


def calibration_table(found: dict) -> pd.DataFrame:
    """Averaged and deployed predictions, and both at their temperatures, as columns."""
    columns = {}
    for name, scores in found.items():
        columns[name] = scores
        if "scaled" in scores:
            columns[f"{name}, scaled"] = scores["scaled"] | {"temperature": scores["temperature"]}
    rows = {
        "NLL": "nll", "Brier score": "brier", "ECE, 15 bins": "ece_15", "ECE, 20 bins": "ece_20",
        "ECE, bins of equal counts": "ece_adaptive", "predictive entropy": "entropy",
        "mutual information": "mutual_information", "AUROC of its errors by entropy": "auroc_of_errors",
        "temperature": "temperature",
    }  # fmt: skip
    table = {line: {column: scores.get(key) for column, scores in columns.items()} for line, key in rows.items()}
    table["temperature"] = {column: scores.get("temperature", 1.0) for column, scores in columns.items()}
    for column in (name for name in found if "scaled" in found[name]):
        table["temperature"][column] = 1.0
    for share in found["averaged"]["selective_accuracy"]:
        line = f"accuracy on the surest {float(share):.0%}"
        table[line] = {column: scores["selective_accuracy"][share] for column, scores in columns.items()}
    for name in found["averaged"].get("out_of_distribution", ()):
        line = f"AUROC of other sentences by {name.replace('_', ' ')}"
        table[line] = {c: scores.get("out_of_distribution", {}).get(name) for c, scores in columns.items()}
    frame = pd.DataFrame(table).T.astype(float).round(4)
    return frame.rename_axis("").reset_index()


def _training(run: RunFiles, title: str) -> Section:
    log = run.log
    if log.empty:
        raise ValueError("metrics.jsonl has no lines: no curves.")
    log = log.iloc[np.unique(np.linspace(0, len(log) - 1, min(len(log), _STEPS)).round().astype(int))]
    made = []
    for wanted, caption, log_scale in _CURVES:
        names = [name for name in wanted if name in log]
        if names:
            shown = log.assign(**{n: log[n].where(log[n] > 0) for n in names}) if log_scale else log
            made.append((charts.curves(shown, names, caption, log_scale), caption))
    return Section(title, ["Before the gates start they are open and the KL does not count."], charts=made)


def _wrong(run: RunFiles, title: str) -> Section:
    table = run.predictions
    text = [n for n in table if table[n].dtype.kind not in "fiub" and n not in ("idx",)]
    try:
        probabilities = run.probabilities
    except ValueError:
        worst = table.sort_values("log_likelihood").head(_ROWS)
        return Section(
            title,
            ["The examples whose value was least expected."],
            tables=[("", worst[[*text, "label", "decision"]].round(2), True)],
        )
    names = [name.removeprefix("p_") for name in probabilities]
    wrong = table.assign(confidence=probabilities.max(axis=1))[table["decision"] != table["label"]]
    worst = wrong.sort_values("confidence", ascending=False).head(_ROWS)
    label, answer = (worst[column].map(lambda i: names[int(i)]) for column in ("label", "decision"))
    shown = worst[text].assign(label=label, answer=answer, confidence=worst["confidence"].map("{:.3f}".format))
    return Section(
        title,
        [f"{len(wrong)} of {len(table)} answers are wrong; these are the surest of them."],
        tables=[("", shown, True)],
    )


def _restarts(run: RunFiles, title: str) -> Section:
    others = run.summary.get("restarts", [])
    if not others:
        raise ValueError("One fit: --restarts 3 adds two more from other seeds, and R-hat says whether they agree.")
    rows = [
        {"seed": s["seed"], run.metric: round(s["metric"]["value"], 4), "NLL": round(s["nll"], 4),
         "ELBO an example": round(s["elbo_per_example"], 4), "E[BOPs], adapted": f"{s['bops']['adapted_ratio']:.2%}"}
        for s in [run.summary, *others]
    ]  # fmt: skip
    rhat = run.posterior.rhat()
    lines = [("bits", rhat.z[run.posterior.free().z]), ("ranks", rhat.g[run.posterior.free().g])]
    told = [f"{name}: median {float(x.quantile(0.5)):.2f}, worst {float(x.max()):.2f}" for name, x in lines if len(x)]
    text = f"R-hat between {run.posterior.chains} fits, at infinitely many draws. {'; '.join(told)}."
    return Section(title, [text], tables=[("", pd.DataFrame(rows), True)])


def _repeat(run: RunFiles, title: str) -> Section:
    values = json.loads((run.folder / "config.json").read_text(encoding="utf-8")) if run.config else {}
    versions = ", ".join(f"{name} {version}" for name, version in values.get("versions", {}).items())
    return Section(
        title, [f"The same numbers again, with {versions} on {run.summary['device']}:"], code=command_line(run.config)
    )


_SECTIONS: dict[str, Callable[[RunFiles, str], Section]] = {
    "In plain words": _words,
    "Gate map": gate_map,
    "Ranks": ranks,
    "Calibration": _calibration,
    "Bit operations": bit_operations,
    "Training": _training,
    "Restarts": _restarts,
    "Confidently wrong": _wrong,
    "Repeat this run": _repeat,
}
