"""Is the allocation worth anything? The learned bit widths and ranks against others with the same bit operations.

    python experiments/allocation.py --glue_dir GLUE --report benchmarks/allocation.md --figures benchmarks/figures

For each task, seed and budget (the BOPs of uniform W8A8, W4A8 and W4A4, scope `encoder`), in the same loop, data order
and number of steps, each from the same LoRA that the first part of training gives:

    budget      prior `budget` at the BOPs of the uniform allocation, a cold posterior, its deployed allocation
    uniform     quantization-aware LoRA: every weight at one width, every activation at one width
    post        the same widths, but set after training: ranges are fitted in the last step only
    random      rungs closed at random down to the same BOPs, then as `uniform`
    lora        no quantization

Methods are compared by the one allocation that each deploys: one forward an example. Averages over draws of the gates,
an ensemble of several forwards, stand beside it. Each cell is a run of `pyro-blora train`; what comes before its gates
start is shared between the cells of a task and seed. Finished cells are kept, so the study may be
spread out; `--cells` runs some of them only.
"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.cells import finished, provenance
from experiments.studies.compare import paired, spread
from experiments.studies.pages import study_parser, write_page
from pyro_blora.bops import expected_bops
from pyro_blora.build import build
from pyro_blora.config import RunConfig

BUDGETS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
STYLES = {  # colours of Okabe and Ito
    "lora": ("#000000", "*"), "uniform": ("#D55E00", "s"), "budget": ("#0072B2", "o"), "random": ("#009E73", "^"),
    "post": ("#CC79A7", "v"),
}  # fmt: skip
METHODS = ("lora", "uniform", "budget", "random", "post")
COLD = 0.1  # weight of the KL: what is deployed is one allocation, so the posterior is kept near its mode


def configuration(options, task: str, seed: int, method: str, budget: str | None = None, bops: float = 0.0):
    """The run of one cell; `bops` is the share of the model's bit operations that the uniform allocation takes."""
    weights, activations = BUDGETS.get(budget, (32, 32))
    uniform = {"bits": weights, "activation_bits": activations}
    changes = {
        "lora": {"prior": "fixed", "prior_settings": {"bits": 32}},
        "uniform": {"prior": "fixed", "prior_settings": uniform},
        "post": {"prior": "fixed", "prior_settings": uniform, "kl_warmup": 0.9999},
        "random": {"prior": "random", "prior_settings": {"bops": bops, "denominator": "model", "seed": seed}},
        "budget": {"prior": "budget", "prior_settings": {"bops": bops, "denominator": "model"}, "kl_weight": COLD},
    }[method]
    return RunConfig(**{
        "task": task, "glue_dir": options.glue_dir, "backbone": options.backbone, "scope": "encoder", "seed": seed,
        "max_train": options.max_train, "epochs": options.epochs, "kl_warmup": options.kl_warmup, "max_length": 64,
        "draws": options.draws, "lr_gates": 2e-2, "output_dir": options.output_dir, **changes,
    })  # fmt: skip


def share_of(config: RunConfig) -> tuple[float, int]:
    """The BOPs of the model that a fixed allocation takes, and the number of training examples."""
    program = build(config).program
    return expected_bops(
        program.layout, *(distribution.mean for distribution in program.prior())
    ).model_ratio.item(), program.n_train


def study(options) -> list[dict]:
    """One row a cell, in the order of the table; runs what is missing among `options.cells`."""
    rows = []
    for seed in options.seeds:
        for task in options.tasks:
            lora = configuration(options, task, seed, "lora")
            _, n_train = share_of(lora)
            for budget in (None, *options.budgets):
                share = share_of(configuration(options, task, seed, "uniform", budget))[0] if budget else 1.0
                for method in METHODS:
                    if (method == "lora") != (budget is None):
                        continue
                    config = lora if method == "lora" else configuration(options, task, seed, method, budget, share)
                    path = options.keep / f"{task}-{seed}-{budget or 'full'}-{method}.json"
                    train = method in options.cells and not options.only_finished
                    cell = finished(path, config, lora, n_train, train=train)
                    if cell is None:
                        continue
                    names = {"task": task, "seed": seed, "budget": budget, "method": method, "share": share}
                    rows.append({**names, "cell": cell, **cell["summary"], **names})
                    print(line(rows[-1]), flush=True)
    return rows


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


def differences(rows: list[dict]) -> str:
    """Paired differences of `budget` to every other method at the same BOPs, and to LoRA."""
    lines = ["| task | BOPs of | `budget` minus | seeds | score [95 %] | NLL [95 %] |", "|---|---|---|---|---|---|"]
    found = groups(rows)
    for (task, budget, method), cells in found.items():
        mine = {x["seed"]: x for x in cells}
        for other in METHODS if method == "budget" else ():
            rivals = {x["seed"]: x for x in found.get((task, None if other == "lora" else budget, other), [])}
            seeds = sorted(mine.keys() & rivals.keys())
            if other != "budget" and seeds:
                result = paired([mine[s]["cell"] for s in seeds], [rivals[s]["cell"] for s in seeds],
                                cells[0]["metric"]["name"])  # fmt: skip
                told = " | ".join(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in result.values())
                lines.append(f"| {task} | {budget} | `{other}` | {len(seeds)} | {told} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """NLL against the BOPs of the model, a panel a task."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    _, panels = plt.subplots(1, len(tasks), figsize=(4.4 * len(tasks), 3.6), squeeze=False, constrained_layout=True)
    for panel, task in zip(panels[0], tasks, strict=True):
        for method in METHODS:
            points = [cells for (t, _, m), cells in groups(rows).items() if (t, m) == (task, method)]
            points.sort(key=lambda cells: cells[0]["share"])
            if not points:
                continue
            x = [100 * np.mean([c["bops"]["deployed"]["model_ratio"] for c in cells]) for cells in points]
            y = [np.mean([c["deployed"]["nll"] for c in cells]) for cells in points]
            error = [np.std([c["deployed"]["nll"] for c in cells]) for cells in points]
            colour, marker = STYLES[method]
            panel.errorbar(x, y, yerr=error, color=colour, marker=marker, label=method, capsize=2, linewidth=1.2)
        panel.set(xscale="log", xlabel="BOPs, deployed (% of the model at 32 x 32 bit)", ylabel="NLL (nats an example)")
        panel.set_title(f"{task}: mean and spread over seeds", fontsize=10)
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def report(options, rows: list[dict]) -> str:
    cells = len(options.tasks) * len(options.seeds) * (1 + len(options.budgets) * (len(METHODS) - 1))
    seconds = [x["seconds"]["training"] for x in rows]
    return f"""# Is the allocation worth anything?

```sh
python experiments/allocation.py --glue_dir {options.glue_dir} --tasks {" ".join(options.tasks)} --seeds \\
    {" ".join(map(str, options.seeds))} --report benchmarks/allocation.md --figures benchmarks/figures
```

MiniLM, scope `encoder`, {options.max_train} training examples, {options.epochs} epochs, gates start after \
{options.kl_warmup:.0%} of the steps; {len(rows)} of {cells} cells are finished (the rest are not shown, nothing is
filled in); {np.median(seconds):.0f} s of training a cell in the median, beside other work;
{provenance([row["cell"] for row in rows])}.
`score` is the task's metric on the dev set, mean ± standard deviation over seeds. `deployed` is the one allocation that
is exported, one forward an example; `draws` averages the predictions of {options.draws} draws of the gates. BOPs are of
the model.

{table(rows)}

Paired differences of what is deployed, with intervals over examples and seeds; a negative NLL is in favour of `budget`:

{differences(rows)}

![NLL against BOPs](figures/allocation.png)
"""


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "allocation", max_train=4000, output_dir="runs/allocation")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--cells", nargs="+", default=METHODS, choices=METHODS, help="methods to run where missing")
    parser.add_argument("--kl_warmup", type=float, default=0.7, help="share of the steps before the gates start")
    parser.add_argument("--draws", type=int, default=2)
    options = parser.parse_args(arguments)
    write_page(options, "allocation", study(options), report, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
