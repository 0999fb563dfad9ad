"""The page of experiments/weights.py: tables by task, each distribution against its point, claims, a figure."""

import itertools
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.cells import provenance
from experiments.studies.compare import average, intervals, paired, written
from pyro_blora.tasks import get_task

RANKS = (2, 8, 16, 25)
DEVIATIONS = (0, 2, 5, 10, 20)
FRACTIONS = (0.1, 0.25, 0.5)  # of the training rows, in as many steps

Rows = list[dict]  # of `weights.study`


def of(rows: Rows, task: str, path: str, weights: str) -> Rows:
    """By seed."""
    return [row for row in rows if (row["task"], row["path"], row["law"]) == (task, path, weights)]


def by_weights(rows: Rows, task: str) -> dict[tuple[str, str], Rows]:
    """The rows of a task by (path, distribution), a row a seed; trainings on a fraction of the rows apart."""
    found: dict[tuple[str, str], Rows] = {}
    for row in rows:
        if row["task"] == task and "-of-" not in row["path"]:
            found.setdefault((row["path"], row["law"]), []).append(row)
    return found


def spread(values: list[float]) -> str:
    return f"{np.median(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table(rows: Rows, task: str) -> str:
    lines = [
        "| path | weights | seeds | parameters | stored | metric | NLL | NLL, scaled | T | ECE, 20 bins | ECE, scaled "
        "| ECE, adaptive | Brier | entropy | mutual information |",
        "|---" * 15 + "|",
    ]
    for (path, weights), mine in by_weights(rows, task).items():
        columns = [
            [row["metric"] for row in mine],
            *([row[kind]["nll"] for row in mine] for kind in ("scores", "scaled")),
            [row["temperature"] for row in mine],
            *([row[kind]["ece_20"] for row in mine] for kind in ("scores", "scaled")),
            *([row["scores"][key] for row in mine] for key in ("ece_adaptive", "brier", "entropy")),
            [row["scores"]["mutual_information"] for row in mine],
        ]
        named = f"| {path} | {weights} | {len(mine)} | {mine[0]['parameters']:,} | {mine[0]['stored']:,} | "
        lines.append(named + " | ".join(map(spread, columns)) + " |")
    return "\n".join(lines)


def _examples(row: dict, scaled: bool = False) -> dict:
    """What `paired` compares: dev as this row predicts it."""
    odds, label = np.array(row["log_odds"]["eval"]), np.array(row["cell"]["labels"]["eval"])
    odds = odds / row["temperature"] if scaled else odds
    log_likelihood = -np.logaddexp(0, np.where(label == 1, -odds, odds))
    return {"examples": {"label": label, "decision": (odds > 0).astype(int), "log_likelihood": log_likelihood}}


def difference(
    ours: Rows, theirs: Rows, *, scaled: bool = False, both_scaled: bool = False, of: str = "nll"
) -> tuple[float, float, float] | None:
    """Ours minus theirs over the seeds that both have: mean and 95 % interval.

    scaled: theirs at their temperature; both_scaled: ours as well.
    """
    pairs = _of_both(ours, theirs)
    if not pairs:
        return None
    left = [_examples(a, both_scaled) for a, _ in pairs]
    right = [_examples(b, scaled or both_scaled) for _, b in pairs]
    return paired(left, right, get_task(ours[0]["task"]).metric_name, prefix="")[of]


def _of_both(ours: Rows, theirs: Rows) -> list[tuple[dict, dict]]:
    """By seed."""
    known = {row["seed"]: row for row in theirs}
    return [(row, known[row["seed"]]) for row in ours if row["seed"] in known]


def ece_difference(ours: Rows, theirs: Rows) -> tuple[float, float, float] | None:
    """Of the ECE in 20 bins, ours minus theirs: mean and 95 % interval."""
    pairs = [
        tuple(
            {"label": np.array(row["cell"]["labels"]["eval"]), "odds": np.array(row["log_odds"]["eval"])}
            for row in pair
        )
        for pair in _of_both(ours, theirs)
    ]
    return intervals(pairs, lambda pair, counts: [_ece(pair[0], counts) - _ece(pair[1], counts)])[0] if pairs else None


def _ece(examples: dict[str, np.ndarray], counts: np.ndarray, bins: int = 20) -> np.ndarray:
    """Of the examples (E), each taken as often as counts (..., E) says: (...)."""
    odds, label = examples["odds"], examples["label"]
    confidence, right = 1 / (1 + np.exp(-np.abs(odds))), (odds > 0) == label
    which = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = (confidence - right)[:, None] * (which[:, None] == np.arange(bins))  # (E, bins)
    return np.abs(average(counts, gaps)).sum(-1)


def comparisons(rows: Rows, tasks: list[str]) -> dict[tuple[str, str, str], list[tuple[float, float, float] | None]]:
    """By (task, path, weights): NLL less its own point's, that point's at its temperature, the plain training's at
    its; and at its own temperature less the plain training's at its.
    """
    found = {}
    for task in tasks:
        for (path, weights), mine in by_weights(rows, task).items():
            if weights == "point":
                continue
            own, plain = of(rows, task, path, "point"), of(rows, task, path.partition("-")[0], "point")
            if weights.startswith("ensemble"):  # one of all seeds, against each of its members
                mine = [{**mine[0], "seed": row["seed"]} for row in own]
            found[task, path, weights] = [
                difference(mine, own),
                difference(mine, own, scaled=True),
                difference(mine, plain, scaled=True),
                difference(mine, plain, both_scaled=True),
            ]
    return found


def verdicts(compared: dict) -> str:
    lines = [
        "| task | path | weights | less its point's | less its point's, scaled | less the plain training's, scaled "
        "| below: its point, scaled, plain scaled | scaled, less the plain training's, scaled |",
        "|---" * 8 + "|",
    ]
    for names, found in compared.items():
        *three, both_scaled = found
        below = ", ".join("" if each is None else _below(each) for each in three)
        lines.append(f"| {' | '.join(names)} | {' | '.join(map(written, three))} | {below} | {written(both_scaled)} |")
    return "\n".join(lines)


def winners(compared: dict) -> str:
    """By task: the distributions below their point and its temperature; and below the plain training at its, too."""
    lines = [
        "| task | below its point and that at its temperature, in the mean | beyond noise "
        "| below the plain training at its temperature, too, in the mean | beyond noise |",
        "|---" * 5 + "|",
    ]
    for task in dict.fromkeys(task for task, _, _ in compared):
        cells = []
        for count, bound in itertools.product((2, 3), (0, 2)):  # the mean; the upper end of the interval
            won = [
                f"{path} {weights}" for (of_task, path, weights), found in compared.items()
                if of_task == task and None not in found[:count] and max(each[bound] for each in found[:count]) < 0
            ]  # fmt: skip
            cells.append(", ".join(won) or "none")
        lines.append(f"| {task} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _below(found: tuple[float, float, float]) -> str:
    mean, _, high = found
    return "yes" if high < 0 else "no" if mean >= 0 else "within noise"


def half_the_ece(rows: Rows, tasks: list[str]) -> str:
    lines = [
        "| task | LoRA: parameters | ECE | at its temperature | XS, SWAG K = 10: rank | parameters | ECE "
        "| of LoRA's ECE | less LoRA's ECE | of LoRA's parameters |",
        "|---" * 10 + "|",
    ]
    for task in tasks:
        lora = of(rows, task, "lora", "point")
        for rank in RANKS:
            xs = of(rows, task, f"xs{rank}-swag", "K = 10")
            if not (lora and xs):
                continue
            kinds = ((xs, "scores"), (lora, "scores"), (lora, "scaled"))
            ours, theirs, scaled = (np.median([row[kind]["ece_20"] for row in which]) for which, kind in kinds)
            share, less = xs[0]["parameters"] / lora[0]["parameters"], written(ece_difference(xs, lora))
            lines.append(
                f"| {task} | {lora[0]['parameters']:,} | {theirs:.3f} | {scaled:.3f} | {rank} "
                f"| {xs[0]['parameters']:,} | {ours:.3f} | {ours / theirs:.2f} | {less} | {share:.3f} |"
            )
    return "\n".join(lines)


def few_deviations(rows: Rows, tasks: list[str]) -> str:
    lines = ["| task | rank | K | NLL less that of K = 2 | ECE, 20 bins | numbers stored |", "|---" * 6 + "|"]
    for task, rank in itertools.product(tasks, RANKS):
        path = f"xs{rank}-swag-deviations"
        two = of(rows, task, path, "K = 2")
        for deviations in DEVIATIONS:
            mine = of(rows, task, path, f"K = {deviations}")
            if two and mine:
                less = "" if deviations == 2 else written(difference(mine, two))
                ece = spread([row["scores"]["ece_20"] for row in mine])
                lines.append(f"| {task} | {rank} | {deviations} | {less} | {ece} | {mine[0]['stored']:,} |")
    return "\n".join(lines)


def fractions(rows: Rows, tasks: list[str]) -> str:
    lines = [
        "| task | training rows | LoRA | XS, mean of SWAG | XS, SWAG K = 10 | less LoRA | less the mean |",
        "|---" * 7 + "|",
    ]
    for task in tasks:
        for fraction in (*FRACTIONS, 1):
            share = f"-of-{100 * fraction:.0f}"
            lora, of_all = of(rows, task, f"lora{share}", "point"), share if fraction < 1 else ""
            mean, weights = (of(rows, task, f"xs8-swag{of_all}", name) for name in ("point", "K = 10"))
            if lora and weights:
                metrics = " | ".join(spread([row["metric"] for row in which]) for which in (lora, mean, weights))
                less = " | ".join(written(difference(weights, other, of="score")) for other in (lora, mean))
                lines.append(f"| {task} | {weights[0]['cell']['config']['max_train']:,} | {metrics} | {less} |")
    return "\n".join(lines)


def with_gates(rows: Rows, tasks: list[str]) -> str:
    lines = ["| task | bit operations of the adapted projections | NLL less that without gates |", "|---" * 3 + "|"]
    for task in tasks:
        gated, plain = (of(rows, task, path, "draws") for path in ("xs8-gates-gaussian", "xs8-gaussian"))
        if gated:
            share = f"{100 * np.median([row['bops'] for row in gated]):.1f} %"
            lines.append(f"| {task} | {share} | {written(difference(gated, plain))} |")
    return "\n".join(lines)


def figure(rows: Rows, path: Path) -> None:
    """ECE and NLL against stored numbers, a panel a task, medians over seeds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    fig, axes = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks), 6), squeeze=False, constrained_layout=True)
    for column, task in enumerate(tasks):
        for (name, weights), mine in by_weights(rows, task).items():
            colour = "#0072B2" if name.startswith("xs") else "#D55E00"
            marker = "s" if weights[0] == "K" else {"point": "o"}.get(weights, "D" if "ensemble" in weights else "^")
            for axis, key in zip(axes[:, column], ("ece_20", "nll"), strict=True):
                axis.scatter(mine[0]["stored"], np.median([row["scores"][key] for row in mine]), c=colour,
                             marker=marker, s=24, alpha=0.7)  # fmt: skip
        axes[0, column].set_title(task)
        for axis, label in zip(axes[:, column], ("ECE, 20 bins", "NLL, nats an example"), strict=True):
            axis.set_xscale("log")
            axis.set_xlabel("numbers stored")
            axis.set_ylabel(label)
    marks = [
        (marker, colour, f"{adapter}, {weights}") for colour, adapter in (("#0072B2", "XS"), ("#D55E00", "LoRA"))
        for marker, weights in (("o", "point"), ("s", "SWAG"), ("^", "other distributions"), ("D", "ensembles"))
    ]  # fmt: skip
    handles = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=text) for m, c, text in marks]
    axes[0, 0].legend(handles=handles, fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


_INTRODUCTION = """{rows} training rows, of which 200, or a tenth, are held out for epochs,
temperatures and Laplace's prior precision (a fifth of fewer than 1,000 rows; on those no epoch is chosen); {draws}
draws; medians ± standard deviations over seeds, which share their rows. `point` is the mean of the distribution
that was trained; SWAG's is the average of its snapshots. LoRA is on query and value, XS on four projections (4 R² a
layer, as in the paper). Scaled: at the temperature of least NLL on the held-out rows. ECE by equal bins of confidence,
or of equal count (adaptive). Tables have medians, differences are means, with 95 % intervals, paired by example and
seed, over the seeds that both have. Mutual information of an ensemble is between its members. XS's learning rate was
chosen on SST-2, LoRA's is a usual one."""

_NOISE = """Each distribution is compared with its own point, with that point at its temperature, and with the plain
training at its temperature. Beyond noise: all these intervals are below zero. None: no distribution is shown to beat a
temperature, a single number. XS of ranks 2, 16 and 25 has no plain training and is left out. A distribution may be
scaled, too: in the last column of the second table both are. An ensemble is below the mean of its members whatever they
predict (Jensen's inequality): the informative comparison is that with their temperatures."""


def report(options, rows: Rows) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = [row["cell"] for row in rows]
    compared = comparisons(rows, tasks)
    seeds, finished = " ".join(map(str, options.seeds)), " --only_finished" if options.only_finished else ""
    used = {task: max(row["cell"]["config"]["max_train"] for row in rows if row["task"] == task) for task in tasks}
    parts = [
        "# Distributions of the adapter's weights, and a temperature",
        f"`python experiments/weights.py --glue_dir GLUE --seeds {seeds}{finished}`, {provenance(cells)}.",
        _INTRODUCTION.format(
            rows=", ".join(f"{count:,} ({task})" for task, count in used.items()), draws=options.draws
        ),
        *(f"## {task}\n\n{table(rows, task)}" for task in tasks),
        "## Is a distribution better than its own point, and than the point at its temperature? NLL",
        f"{_NOISE}\n\n{winners(compared)}",
        verdicts(compared),
        f"## Half the ECE at a tenth of the parameters?\n\n{half_the_ece(rows, tasks)}",
        f"## Are two deviations enough? B-LoRA-XS\n\n{few_deviations(rows, tasks)}",
        f"## Does it help where rows are few? The task's metric, in as many steps\n\n{fractions(rows, tasks)}",
        f"## Gates and weights together: B-LoRA-XS of rank 8, Gaussian\n\n{with_gates(rows, tasks)}",
        "![ECE and NLL against stored numbers](figures/weights.png)",
    ]
    return "\n\n".join(parts) + "\n"
