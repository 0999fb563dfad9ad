"""The page of `levers.py`: cells in tables, paired differences to no lever, a picture."""

import argparse
from collections.abc import Iterator
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.allocation_page import training_of
from experiments.studies.cells import provenance
from experiments.studies.compare import paired, spread, written
from experiments.studies.levers import LEVERS, NONE

COLOURS = {"uniform": "#D55E00", "start": "#0072B2", "lora": "#000000"}  # of Okabe and Ito
Group = tuple[str, str | None, str]  # task, budget, method


def groups(rows: list[dict]) -> dict[Group, dict[str, list[dict]]]:
    """Cells by (task, budget, method) and lever, the seeds together."""
    found: dict[Group, dict[str, list[dict]]] = {}
    for row in rows:
        by_lever = found.setdefault((row["task"], row["budget"], row["method"]), {})
        by_lever.setdefault(row["lever"], []).append(row)
    return found


def table(rows: list[dict]) -> str:
    lines = ["| task | BOPs of | method | lever | seeds | score | NLL | BOPs |", "|---|---|---|---|---|---|---|---|"]
    for (task, budget, method), by_lever in groups(rows).items():
        for lever, cells in by_lever.items():
            lines.append(
                f"| {task} | {budget or '32 bit'} | `{method}` | {lever} | {len(cells)} | "
                f"{spread([x['deployed']['metric']['value'] for x in cells])} | "
                f"{spread([x['deployed']['nll'] for x in cells])} | "
                f"{np.mean([x['bops']['deployed']['model_ratio'] for x in cells]):.2%} |"
            )
    return "\n".join(lines)


def differences(rows: list[dict]) -> Iterator[tuple[Group, str, int, dict[str, tuple[float, ...]]]]:
    """(group, lever, seeds, paired differences of score and NLL to the runs without a lever)."""
    for group, by_lever in groups(rows).items():
        for lever, cells in by_lever.items():
            ours, theirs = by_seed(cells, by_lever.get(NONE, []))
            if lever != NONE and ours:
                yield group, lever, len(ours), paired(ours, theirs, cells[0]["metric"]["name"])


def by_seed(rows: list[dict], others: list[dict]) -> tuple[list[dict], list[dict]]:
    """The cells of the seeds that both have, in one order."""
    one, other = ({row["seed"]: row["cell"] for row in each} for each in (rows, others))
    seeds = sorted(one.keys() & other.keys())
    return [one[seed] for seed in seeds], [other[seed] for seed in seeds]


def compared(rows: list[dict]) -> str:
    lines = ["| task | BOPs of | method | lever | seeds | score [95 %] | NLL [95 %] |", "|---|---|---|---|---|---|---|"]
    for (task, budget, method), lever, seeds, found in differences(rows):
        told = " | ".join(map(written, found.values()))
        lines.append(f"| {task} | {budget or '32 bit'} | `{method}` | {lever} | {seeds} | {told} |")
    return "\n".join(lines)


def to_lora(rows: list[dict]) -> str:
    """Paired differences of every quantized run to LoRA at 32 bit: without a lever and dropout, and with the lever."""
    head = (
        "| task | BOPs of | method | lever | seeds | score minus LoRA's [95 %] | minus LoRA's with the lever [95 %] |"
    )
    found, lines = groups(rows), [head, "|---|---|---|---|---|---|---|"]
    for (task, budget, method), by_lever in found.items():
        open_runs = found.get((task, None, "no_dropout"), {}).get(NONE, [])
        of_lever = found.get((task, None, "lora"), {})
        for lever, cells in by_lever.items() if budget else ():
            told = []
            for loras in (open_runs, of_lever.get(lever, []) if lever != NONE else []):
                ours, theirs = by_seed(cells, loras)
                told.append(written(paired(ours, theirs, cells[0]["metric"]["name"])["score"]) if ours else "")
            lines.append(f"| {task} | {budget} | `{method}` | {lever} | {len(cells)} | {' | '.join(told)} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """Differences of NLL to no lever with their intervals, a panel a task, of the first budget."""
    tasks, found = list(dict.fromkeys(row["task"] for row in rows)), list(differences(rows))
    first = next((row["budget"] for row in rows if row["budget"]), None)
    names = [lever for lever in LEVERS if lever != NONE]
    _, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.2), squeeze=False, constrained_layout=True)
    for panel, task in zip(panels[0], tasks, strict=True):
        for offset, method in ((-0.12, "uniform"), (0.12, "start")):
            of = [(lever, x["nll"]) for (t, b, m), lever, _, x in found if (t, b, m) == (task, first, method)]
            if of:
                places = [names.index(lever) + offset for lever, _ in of]
                mean, low, high = np.array([x for _, x in of]).T
                panel.errorbar(mean, places, xerr=[mean - low, high - mean], fmt="o", color=COLOURS[method],
                               label=method, capsize=2)  # fmt: skip
        panel.axvline(0, color="grey", linewidth=0.8)
        panel.set(yticks=range(len(names)), yticklabels=names, xlabel="NLL minus that without (nats an example)")
        panel.invert_yaxis()
        panel.set_title(f"{task}, BOPs of {first}", fontsize=10)
    if found:
        panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def report(options: argparse.Namespace, rows: list[dict]) -> str:
    changes = "\n".join(
        f"- `{lever}`: {', '.join(f'`--{field} {value}`' for field, value in LEVERS[lever].items())}"
        for lever in LEVERS if lever != NONE
    )  # fmt: skip
    return f"""# What raises the score at given bit operations?

```sh
python experiments/levers.py --glue_dir GLUE --tasks {" ".join(options.tasks)} \\
    --seeds {" ".join(map(str, options.seeds))} --budgets {" ".join(options.budgets)} \\
    --methods {" ".join(options.methods)} \\
    --levers {" ".join(options.levers)} --report benchmarks/levers.md --figures benchmarks/figures
```

Levers, as flags of `pyro-blora train`:

{changes}

MiniLM, scope `encoder`, {training_of(options)}; {provenance([row["cell"] for row in rows])}.
Numbers are of the one allocation that is deployed, on the dev set: mean ± standard deviation over seeds, and BOPs of
the model. `uniform` has every weight at one width and every activation at one, `start` has the widths and ranks that
prior `budget` starts from, at the same bit operations. Where a lever changes LoRA at 32 bit, it has a row with it, too.
Rows of different numbers of seeds compare by the paired differences below only.

{table(rows)}

Paired differences to the same run without a lever, with intervals over examples and seeds; a positive score and a
negative NLL are in favour of the lever:

{compared(rows)}

![Differences of NLL](figures/levers.png)

The same runs against LoRA at 32 bit: of no lever, without dropout from where the others are quantized, as these have
none there; and, where a lever changes LoRA, against LoRA with it (and with dropout):

{to_lora(rows)}
"""
