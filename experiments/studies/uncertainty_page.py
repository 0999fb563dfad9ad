"""The page of experiments/uncertainty.py: scores of each way, differences between ways, measures of doubt, a figure."""

import itertools
from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.cells import provenance
from experiments.studies.compare import written
from experiments.studies.doubts import (
    ALL,
    AURC,
    AUROC,
    DOUBTS,
    LESS_IS_BETTER,
    Interval,
    error,
    has_information,
    interval,
    resampled,
    rows_of,
    sign,
)
from pyro_blora.posterior import calibration

DEPLOYED = "deployed"  # ends the name of a way without draws of the gates
AGAINST = ("lora", "temperature")  # what any way has to beat
_PAIRS = [("gates", "gates, deployed"), ("gates and weights", "gates"), ("gates and weights", "ensemble")]
_COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")  # Okabe and Ito
_STYLES = ("-", "--", ":", "-", "--", "-", "-.")

_SHOWN = ("accuracy", "NLL", "NLL, scaled", AURC["doubt"], ALL["doubt"], *AUROC.values())

Cells = list[dict]  # of one set, but for those of `figure` and `report`
Found = dict[str, dict[str, np.ndarray]]  # of `resampled`


def table(cells: Cells, found: Found) -> str:
    lines = [
        "| way | bit operations | accuracy | NLL | T | NLL, scaled | ECE | by chance below | ECE, scaled | "
        f"{' | '.join(_SHOWN[3:])} |",
        "|---" * 14 + "|",
    ]
    for cell in cells:
        scores, scaled = cell["scores"], cell["scaled"]["scores"]
        said = {name: f"{x[0]:.4f} ± {error(x):.4f}" for name, x in found[cell["way"]].items()}
        if not has_information(cell):
            said[AUROC["information"]] = "none"
        columns = [
            cell["way"], _share(cell), said["accuracy"], said["NLL"], f"{cell['temperature']:.2f}",
            said["NLL, scaled"], f"{scores['ece_15']:.4f}", f"{scores['chance']['ece_15']['high']:.4f}",
            f"{scaled['ece_15']:.4f}", *(said[name] for name in _SHOWN[3:]),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(columns)} |")
    return "\n".join(lines)


def _share(cell: dict) -> str:
    """Of one forward pass for each draw, in plain LoRA's; of an ensemble of all members.

    Older cells have the expectation over draws for what is deployed, too: none is shown.
    """
    if cell["way"].endswith(DEPLOYED) and cell.get("bops_of") != DEPLOYED:
        return "-"
    return f"{100 * sum(cell['bops']):.1f} %"


def abstention(cells: Cells, _: Found) -> str:
    """Accuracy at the shares that `calibration.scores` answers."""
    shares = [f"{share:g}" for share in sorted(calibration.COVERAGES, reverse=True)]
    lines = [
        f"| way | {' | '.join(f'{100 * float(s):.0f} % answered' for s in shares)} |",
        "|---" * (len(shares) + 1) + "|",
    ]
    for cell in cells:
        values, errors = cell["scores"]["selective_accuracy"], cell["scores"]["errors"]["selective_accuracy"]
        lines.append(f"| {cell['way']} | {' | '.join(f'{values[s]:.4f} ± {errors[s]:.4f}' for s in shares)} |")
    return "\n".join(lines)


def compared(cells: Cells, found: Found, pairs: list[tuple[str, str]]) -> dict[tuple[str, str], dict[str, Interval]]:
    """The first of each pair of ways less the second, where both are there.

    Where the second has no mutual information, its entropy stands for it; where the first has none, it is left out.
    """
    by_way, differences = {cell["way"]: cell for cell in cells}, {}
    for ours, theirs in (pair for pair in pairs if set(pair) <= set(by_way)):
        names = {name: name for name in _SHOWN}
        if not has_information(by_way[theirs]):
            names[AUROC["information"]] = AUROC["entropy"]
        if not has_information(by_way[ours]):
            del names[AUROC["information"]]
        differences[ours, theirs] = {a: interval(found[ours][a] - found[theirs][b]) for a, b in names.items()}
    return differences


def differences_table(found: dict[tuple[str, str], dict[str, Interval]]) -> str:
    lines = [f"| way | less | {' | '.join(_SHOWN)} |", "|---" * (len(_SHOWN) + 2) + "|"]
    for ways, values in found.items():
        columns = [written(values[name], 4) if name in values else "" for name in _SHOWN]
        lines.append(f"| {' | '.join([*ways, *columns])} |")
    return "\n".join(lines)


def verdicts(found: dict[tuple[str, str], dict[str, Interval]]) -> str:
    """By measure: which ways are better or worse than each that they are compared with, beyond noise."""
    lines = ["| | less | better, beyond noise | worse, beyond noise | within noise |", "|---" * 5 + "|"]
    for name, rival in itertools.product(_SHOWN, dict.fromkeys(theirs for _, theirs in found)):
        values = {ours: x[name] for (ours, theirs), x in found.items() if theirs == rival and name in x}
        signs = {ours: sign(x, name in LESS_IS_BETTER) for ours, x in values.items()}
        columns = [", ".join(f"`{ours}`" for ours, each in signs.items() if each == s) or "none" for s in (1, -1, 0)]
        lines.append(f"| {name} | {rival} | {' | '.join(columns)} |")
    return "\n".join(lines)


def doubts_table(cells: Cells, found: Found) -> str:
    lines = ["| way | in place of 1 - p | AURC | AURC of all rows | AUROC |", "|---" * 5 + "|"]
    for cell in cells:
        x = found[cell["way"]]
        for name in ("entropy", "information") if has_information(cell) else ("entropy",):
            gains = [written(interval(x[what[name]] - x[what["doubt"]]), 4) for what in (AURC, ALL, AUROC)]
            lines.append(f"| {' | '.join([cell['way'], DOUBTS[name], *gains])} |")
    return "\n".join(lines)


def by_set(cells: Cells) -> dict[str, Cells]:
    found: dict[str, Cells] = {}
    for cell in cells:
        found.setdefault(cell["summary"]["task"], []).append(cell)
    return found


def figure(cells: Cells, path: Path) -> None:
    """Accuracy against the share of rows that is answered: of rows inside, and of all rows; a row of panels a set."""
    sets = by_set(cells)
    fig, axes = plt.subplots(len(sets), 2, figsize=(9, 3.6 * len(sets)), squeeze=False, constrained_layout=True)
    for panels, (name, mine) in zip(axes, sets.items(), strict=True):
        for cell, colour, style in zip(mine, _COLOURS, _STYLES, strict=False):
            x = rows_of(cell)
            for panel, which in zip(panels, (x["inside"], np.full(len(x["inside"]), True)), strict=True):
                right = x["right"][which][np.argsort(x["doubt"][which], kind="stable")]
                count = np.arange(1, len(right) + 1)
                shown = count > 0.2 * len(right)  # shares of a few rows are noise
                panel.plot(count[shown] / len(right), (right.cumsum() / count)[shown], style, color=colour, lw=1.2,
                           label=cell["way"])  # fmt: skip
        for panel, what in zip(panels, ("test rows", "test rows and rows out of scope"), strict=True):
            panel.set(xlabel="share answered, the most confident first", ylabel="accuracy", title=f"{name}: {what}")
    axes[0, 0].legend(fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def _size(cell: dict) -> str:
    rows, outside = len(cell["inside"]["right"]), len(cell["outside"]["doubt"])
    return (
        f"{cell['summary']['task']} has {cell['config']['max_train']:,} training rows, {rows:,} test rows and "
        f"{outside:,} out of scope"
    )


_INTRODUCTION = """{sizes}. A tenth of the training rows is held out for the temperatures.

The backbone is MiniLM, with LoRA of rank 8 and {epochs} epochs; {draws} draws of gates, of weights and of dropout
masks, three LoRAs in the ensemble; seed {seed}. One seed: errors and intervals are over the rows, not over trainings.
The prior of the gates is `bops` at its usual rate, the weights are a cold Gaussian (`kl_weight` 0.01). Laplace is left
out: with so many classes, its Jacobians take a backward pass for each of them. What follows from the numbers is in
[Findings](../docs/explanation/findings.md#abstention-and-rows-out-of-scope).

Of BANKING77, 20 intents are left out of training and their test rows are out of scope: the same bank, the same words,
other questions. Rows of CLINC150 would be a poor choice: some ask BANKING77's questions, the others share no words with
it. Of CLINC150, the rows out of scope are its authors'.

Bit operations are of the adapted projections in one draw, in plain LoRA's; of an ensemble all members'; of what is
deployed its own, "-" where a cell is of before they were kept. NLL is in nats per example. T is the temperature of
least NLL on the held-out rows, below 1 where predictions are too cautious; scaled: at it. ECE is in 15 bins; that of
calibrated predictions is below the next column in 95 % of cases. AURC is the share of wrong answers among the most
confident rows, averaged over all shares answered (less is better); of all rows, where any answer to a row out of scope
is wrong. AUROC is the probability that a row out of scope has more doubt than a test row, by three measures: 1 - p with
the greatest probability p, the entropy, and the mutual information of label and draw. ± are standard errors by
bootstrap of the rows, inside and out of scope together."""

_PAIRED = """Each way less plain LoRA, as it is and at its temperature, a single number. Intervals (95 %) are from a
bootstrap of the rows, the same for both sides. `NLL, scaled` compares both at temperatures of their own. A mutual
information is compared with an entropy of theirs, as a single prediction has none."""

_BETWEEN = "The same differences between other ways: what averaging over draws adds, and what random weights add."

_DOUBTS = """What is gained where rows are refused by entropy or by mutual information, rather than by the greatest
probability of the same predictions. A positive difference of AURC is a loss, of AUROC a gain. Single predictions
have no mutual information."""


def report(options, cells: Cells) -> str:
    config = cells[0]["config"]
    sets = by_set(cells)
    parts = [
        "# What uncertainty is good for: abstention and rows out of scope",
        f"`python experiments/uncertainty.py --data INTENTS`, {provenance(cells)}.",
        _INTRODUCTION.format(
            sizes="; ".join(_size(mine[0]) for mine in sets.values()),
            epochs=config["epochs"], draws=config["draws"], seed=config["seed"],
        ),
    ]  # fmt: skip
    sections: list[tuple[str, str, Callable[[Cells, Found], str]]] = [
        ("## Is it better than plain LoRA, and than a temperature?", _PAIRED, _against_one_number),
        ("## Do draws help?", _BETWEEN, _between),
        ("## Which doubt? Entropy, mutual information, greatest probability", _DOUBTS, doubts_table),
        ("## Accuracy against the share answered", "Of test rows, the most confident first.", abstention),
    ]
    found = {name: resampled(mine) for name, mine in sets.items()}
    parts += [f"## {name}\n\n{table(mine, found[name])}" for name, mine in sets.items()]
    for title, text, section in sections:
        parts += [f"{title}\n\n{text}", *(f"### {name}\n\n{section(mine, found[name])}" for name, mine in sets.items())]
    return "\n\n".join([*parts, "![Accuracy against the share answered](figures/uncertainty.png)"]) + "\n"


def _against_one_number(cells: Cells, found: Found) -> str:
    ways = [cell["way"] for cell in cells if cell["way"] != AGAINST[0]]
    pairs = [(way, rival) for rival in AGAINST for way in ways if way != rival]
    differences = compared(cells, found, pairs)
    return f"{verdicts(differences)}\n\n{differences_table(differences)}"


def _between(cells: Cells, found: Found) -> str:
    return differences_table(compared(cells, found, _PAIRS))
