"""The sections of a run's report, in order.

Every section is a function of `RunFiles` and its title; where what it needs is missing or damaged it raises ValueError
with a sentence, which the page shows in its place.
"""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd

from . import charts
from .calibration_sections import calibration
from .findings import in_words, of_training, warnings
from .flags import command_line
from .gate_sections import bit_operations, gate_map, ranks
from .glossary import glossary
from .run_files import RunFiles, Section
from .verdicts import beside, nothing_learned, of_score

_STEPS = 300  # points of a curve, at most
_ROWS = 10  # of the examples that are named
_CURVES = (  # logged numbers, title of their axis, caption, whether the axis is logarithmic
    (("loss", "nll"), "nats per example", "Loss and NLL of single batches.", False),
    (("kl_z", "kl_g"), "KL, nats", "KL of the gates from their prior: bits (z) and ranks (g).", True),
    (("expected_bits", "expected_rank"), "bits, ranks", "Expected bits and ranks, means over all tensors.", False),
    (("bops_adapted", "bops_model"), "E[BOPs], ratio", "Expected bit operations, of those at 32 x 32 bit.", False),
    (("grad_norm", "gate_gradient"), "norm", "Norms of the gradients of adapter and gates.", True),
    (("gate_noise", "temperature"), "share, temperature",
     "Share of the gates' gradient that is noise, and the temperature of the relaxation.", False),
)  # fmt: skip


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
    name, ece, at_mode = metric["name"], summary["ece"]["value"], summary["deployed"]
    chance = beside(summary, "ece", "chance")
    remark = f"{summary['ece']['bins']} bins" + (f"; by chance up to {chance['high']:.4f}" if chance else "")
    verdict = "; nothing was learned" if nothing_learned(summary) else ""
    return [
        (name, f"{metric['value']:.4f}",
         f"{_error(summary, name)}{_constant(summary, name)}deployed {of_score(at_mode, name)}{verdict}"),
        ("NLL", f"{summary['nll']:.4f}",
         f"{_error(summary, 'nll')}{_constant(summary, 'nll')}deployed {of_score(at_mode, 'nll')}; nats per example"),
        ("ECE", "-" if ece is None else f"{ece:.4f}", "regression: no confidence" if ece is None else remark),
        (
            "E[BOPs]",
            f"{bops['adapted_ratio']:.2%}",
            f"94 % interval {low:.2%} to {high:.2%}, of the adapted projections",
        ),
        ("E[BOPs], model", f"{bops['model_ratio']:.2%}", "of every matrix product of a forward"),
        ("adapter", f"{summary['adapter_parameters']:,}", "parameters deployed"),
    ]  # fmt: skip


def _error(summary: dict, name: str) -> str:
    error = beside(summary, name)
    return "" if error is None else f"± {error:.4f}; "


def _constant(summary: dict, name: str) -> str:
    constant = beside(summary, name, "constant")
    return "" if constant is None else f"constant answer {constant:.4f}; "


def _words(run: RunFiles, title: str) -> Section:
    try:
        posterior = run.posterior
    except ValueError as error:
        return Section(title, in_words(run.summary), [*warnings(run.summary, None), str(error)])
    return Section(title, in_words(run.summary), warnings(run.summary, posterior))


def _training(run: RunFiles, title: str) -> Section:
    log = run.log
    if log.empty:
        raise ValueError("metrics.jsonl has no lines: no curves.")
    warned = of_training(log)
    log = log.replace([np.inf, -np.inf], np.nan)  # which a chart cannot show
    log = log.iloc[np.unique(np.linspace(0, len(log) - 1, min(len(log), _STEPS)).round().astype(int))]
    made = []
    absent = []
    for wanted, axis, caption, log_scale in _CURVES:
        names = [name for name in wanted if name in log]
        shown = log.assign(**{n: log[n].where(log[n] > 0) for n in names}) if log_scale else log
        if names and shown[names].notna().any(axis=None):
            made.append((charts.curves(shown, names, axis, caption, log_scale), caption))
        elif names:
            absent += names
    text = ["Before the gates start they are open and the KL does not count."]
    if absent:
        text.append(f"Without a curve, as they are 0 throughout: {', '.join(absent)}.")
    return Section(title, text, warned, made)


def _wrong(run: RunFiles, title: str) -> Section:
    table = run.predictions
    answers = ("idx", "label", "decision", "deployed_decision")
    text = [n for n in table if table[n].dtype.kind not in "fiub" and n not in answers]
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
        [f"{len(wrong)} of {len(table)} answers are wrong; these are the most confident."],
        tables=[("", shown, True)],
    )


def _restarts(run: RunFiles, title: str) -> Section:
    others = run.summary.get("restarts", [])
    if not others:
        raise ValueError("One fit: --restarts 3 adds two more from other seeds, and R-hat says whether they agree.")
    rows = [
        {"seed": s["seed"], run.metric: of_score(s, run.metric), "NLL": of_score(s, "nll"),
         "ELBO per example": round(s["elbo_per_example"], 4), "E[BOPs], adapted": f"{s['bops']['adapted_ratio']:.2%}"}
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
    threads = f", {values['threads']} threads" if "threads" in values else ""
    text = f"The same numbers again, with {versions} on {run.summary['device']}{threads}:"
    return Section(title, [text], code=command_line(run.config))


def _glossary(run: RunFiles, title: str) -> Section:
    return glossary(run.folder, title)


_SECTIONS: dict[str, Callable[[RunFiles, str], Section]] = {
    "In plain words": _words,
    "Gate map": gate_map,
    "Ranks": ranks,
    "Calibration": calibration,
    "Bit operations": bit_operations,
    "Training": _training,
    "Restarts": _restarts,
    "Confidently wrong": _wrong,
    "Repeat this run": _repeat,
    "Glossary": _glossary,
}
