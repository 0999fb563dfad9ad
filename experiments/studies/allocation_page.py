"""The page of `allocation.py`: cells in tables, paired differences, a picture."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.studies.allocations import COLD, EVERY, OPEN, methods_of
from experiments.studies.cells import provenance
from experiments.studies.compare import paired, spread, written

STYLES = {  # colours of Okabe and Ito
    "lora": ("#000000", "*"), "no_dropout": ("#882255", "<"), "uniform": ("#D55E00", "s"), "budget": ("#0072B2", "o"),
    "random": ("#009E73", "^"), "post": ("#CC79A7", "v"), "hessian": ("#E69F00", "D"), "greedy": ("#56B4E9", "P"),
    "exact_hessian": ("#F0E442", "X"), "start": ("#7F7F7F", "h"), "rewound": ("#332288", "p"),
    "rested": ("#999933", "d"),
}  # fmt: skip
OURS = ("rewound", "budget", "rested", "start")
OPERATIONS = "BOPs, deployed (% of the model at 32 x 32 bit)"


def line(row: dict) -> str:
    at = row["deployed"]
    return (f"{row['task']} seed {row['seed']} {row['budget'] or '':5s} {row['method']:8s} {at['metric']['name']} "
            f"{at['metric']['value']:.4f} NLL {at['nll']:.4f} BOPs {row['bops']['deployed']['model_ratio']:.4f} of the "
            f"model; {row['draws']} draws: {row['metric']['value']:.4f} NLL {row['nll']:.4f} BOPs "
            f"{row['bops']['model_ratio']:.4f}; {row['seconds']['training']:.0f} s")  # fmt: skip


def groups(rows: list[dict]) -> dict[tuple, list[dict]]:
    """Cells by (task, budget, method), the seeds together."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault((row["task"], row["budget"], row["method"]), []).append(row)
    return found


def table(rows: list[dict]) -> str:
    lines = [
        "| task | BOPs of | method | seeds | deployed: score | NLL | BOPs | draws: score | NLL | E[BOPs] |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (task, budget, method), cells in groups(rows).items():
        lines.append(
            f"| {task} | {budget or '32 bit'} | `{method}` | {len(cells)} | "
            f"{spread([x['deployed']['metric']['value'] for x in cells])} | "
            f"{spread([x['deployed']['nll'] for x in cells])} | "
            f"{np.mean([x['bops']['deployed']['model_ratio'] for x in cells]):.2%} | "
            f"{spread([x['metric']['value'] for x in cells])} | {spread([x['nll'] for x in cells])} | "
            f"{np.mean([x['bops']['model_ratio'] for x in cells]):.2%} |"
        )
    return "\n".join(lines)


def _rivals(method: str) -> list[str]:
    """What a method is compared with: allocations of gates with all, and of two of them the later with the earlier."""
    if method in OURS:
        return [other for other in EVERY if other not in OURS[: 1 + OURS.index(method)]]
    return ["lora"] if method == "no_dropout" else []


def differences(rows: list[dict]) -> str:
    """Paired differences of the allocations of gates to every other method at the same BOPs, and to LoRA."""
    lines = ["| task | BOPs of | method | minus | seeds | score [95 %] | NLL [95 %] |", "|---|---|---|---|---|---|---|"]
    found = groups(rows)
    for (task, budget, method), cells in found.items():
        mine = {x["seed"]: x for x in cells}
        for other in _rivals(method):
            rivals = {x["seed"]: x for x in found.get((task, None if other in OPEN else budget, other), [])}
            seeds = sorted(mine.keys() & rivals.keys())
            if seeds:
                result = paired([mine[s]["cell"] for s in seeds], [rivals[s]["cell"] for s in seeds],
                                cells[0]["metric"]["name"])  # fmt: skip
                told = " | ".join(map(written, result.values()))
                lines.append(f"| {task} | {budget or '32 bit'} | `{method}` | `{other}` | {len(seeds)} | {told} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """NLL against the BOPs of the model, a panel a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.6), squeeze=False, constrained_layout=True)
    for panel, task in zip(panels[0], tasks, strict=True):
        for method in EVERY:
            points = [cells for (t, _, m), cells in groups(rows).items() if (t, m) == (task, method)]
            points.sort(key=lambda cells: cells[0]["share"])
            if not points:
                continue
            x = [100 * np.mean([c["bops"]["deployed"]["model_ratio"] for c in cells]) for cells in points]
            y = [np.mean([c["deployed"]["nll"] for c in cells]) for cells in points]
            error = [np.std([c["deployed"]["nll"] for c in cells]) for cells in points]
            colour, marker = STYLES[method]
            panel.errorbar(x, y, yerr=error, color=colour, marker=marker, label=method, capsize=2, linewidth=1.2)
        panel.set(xscale="log", xlabel=OPERATIONS, ylabel="NLL (nats an example)")
        panel.set_title(f"{task}: mean and spread over seeds", fontsize=10)
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def training_of(options: argparse.Namespace) -> str:
    """Training rows and epochs of the cells, precision, when gates start, how cold the posterior is, for a page."""
    every, bf16, twice = (
        ", ".join(task for task in options.tasks if task in those)
        for those in (options.all_rows, options.bf16, options.twice)
    )
    return (
        f"at most {options.max_train} training examples"
        + (f" (of {every} all)" if every else "")
        + (f", {bf16} in bfloat16" if bf16 else "")
        + f", {options.epochs} epochs"
        + (f" ({twice} {2 * options.epochs})" if twice else "")
        + f", gates start after {options.kl_warmup:.0%} of the steps, under a KL with weight {COLD:g}"
    )


def report(options: argparse.Namespace, rows: list[dict]) -> str:
    each = [1 if method in OPEN else len(options.budgets) for method in methods_of(options)]
    cells, page = len(options.tasks) * len(options.seeds) * sum(each), options.report.stem
    seconds = [x["seconds"]["training"] for x in rows]
    return f"""# Is the allocation worth anything?

```sh
python experiments/allocation.py --glue_dir GLUE --tasks {" ".join(options.tasks)} \\
    --seeds {" ".join(map(str, options.seeds))} --budgets {" ".join(options.budgets)} \\
    --cells {" ".join(options.cells)} --report benchmarks/{page}.md --figures benchmarks/figures
```

MiniLM, scope `encoder`, {training_of(options)}; \
{len(rows)} of {cells} cells are finished (the rest are not shown, nothing is filled in); \
{np.median(seconds):.0f} s of training a cell in the median, beside other work;
{provenance([row["cell"] for row in rows])}.
`score` is the task's metric on the dev set, mean ± standard deviation over seeds. `deployed` is the one allocation that
is exported, one forward an example; `draws` averages the predictions of {options.draws} draws of the gates. BOPs are of
the model. `hessian` (HAWQ-V2) and `greedy` (a start of AutoQRA) choose widths from training examples where the gates
start, and are then trained as `uniform` is. `start` takes what the gates start from. `budget` learns its allocation in
the first half of the steps after that, and trains at it in the second; `rewound` is that allocation, trained for all of
these steps, as the others are; `rested` trains at the start in the first half, and learns in the second. There is no
rung of 3 bit: under W3A4 and W3A8 weights of every second layer are at 4 bit, the first layer's among them, the others'
at 2 bit. W2A8 has the bit operations of W4A4.

{table(rows)}

Paired differences of what is deployed, with intervals over examples and seeds; a negative NLL is for the method:

{differences(rows)}

![NLL against BOPs](figures/{page}.png)
"""
