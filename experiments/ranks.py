"""Does `value` keep larger ranks than `query` and `key`, as the seed paper saw? Task by task, with intervals.

    python experiments/ranks.py --glue_dir GLUE --report benchmarks/ranks.md --figures benchmarks/figures

Each task is trained under prior `nested`, where every rank of every projection has the same rate, so that a difference
can come from the data only; and some, from the same LoRA, under `hierarchical`, which learns a rate for the ranks of
each projection type and for the bits of each tensor role, and reports the posterior of these rates.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.cells import finished, provenance
from experiments.studies.compare import rank_differences
from experiments.studies.pages import study_parser, write_page
from pyro_blora.build import build
from pyro_blora.config import RunConfig

TASKS = ("sst2", "mrpc", "stsb", "rte", "cola")
PRIORS = {"nested": {"rate": 1.0, "rank_rate": 1.0}, "hierarchical": {}}
KINDS = ("query", "key", "value")
COLOURS = {"query": "#0072B2", "key": "#009E73", "value": "#D55E00"}  # Okabe and Ito


def configuration(options, task: str, prior: str, settings: dict) -> RunConfig:
    return RunConfig(
        task=task, glue_dir=options.glue_dir, backbone=options.backbone, max_length=64, max_train=options.max_train,
        epochs=options.epochs, kl_warmup=options.kl_warmup, draws=2, prior=prior, prior_settings=settings,
        output_dir=options.output_dir,
    )  # fmt: skip


def study(options) -> list[dict]:
    """One cell for each task and prior, with `task` and `prior` beside what was kept of the run."""
    rows = []
    for task in options.tasks:
        lora = configuration(options, task, "fixed", {"bits": 32})
        n_train = build(lora).program.n_train
        for prior, settings in PRIORS.items():
            if prior == "hierarchical" and task not in options.hierarchical:
                continue
            config = configuration(options, task, prior, settings)
            path = options.keep / f"ranks-{task}-{prior}.json"
            cell = finished(path, config, lora, n_train, train=not options.only_finished)
            if cell is None:
                continue
            rows.append({"task": task, "prior": prior, **cell})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| task | prior | score | E[rank] query / key / value | value minus mean of query, key [95 %] | layers |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        mean, low, high, layers = rank_differences([row])
        ranks = " / ".join(f"{row['summary']['expected_rank'][kind]:.2f}" for kind in KINDS)
        score = row["summary"]["metric"]
        lines.append(
            f"| {row['task']} | `{row['prior']}` | {score['name']} {score['value']:.3f} | {ranks} | "
            f"{mean:+.2f} [{low:+.2f}, {high:+.2f}] | {layers} |"
        )
    return "\n".join(lines)


def rates(rows: list[dict]) -> str:
    """Posterior of the hierarchical rates: mean and central 94 % interval."""
    learned = [row for row in rows if row["prior"] == "hierarchical"]
    if not learned:
        return "No run is finished."
    means = [name for name in learned[0]["summary"]["prior_state"] if not name.endswith(("_low", "_high"))]
    lines = ["| rate of, nats a gate | " + " | ".join(row["task"] for row in learned) + " |",
             "|---|" + "---|" * len(learned)]  # fmt: skip
    for name in means:
        states = [row["summary"]["prior_state"] for row in learned]
        cells = [f"{state[name]:.2f} [{state[f'{name}_low']:.2f}, {state[f'{name}_high']:.2f}]" for state in states]
        lines.append(f"| `{name.removeprefix('rate_')}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def summary(rows: list[dict]) -> str:
    """In how many tasks the interval of `nested` lies above, below or across 0."""
    found = {row["task"]: rank_differences([row])[1:3] for row in rows if row["prior"] == "nested"}
    larger = [task for task, (low, _) in found.items() if low > 0]
    smaller = [task for task, (_, high) in found.items() if high < 0]
    undecided = [task for task in found if task not in larger + smaller]
    found_in = {"keeps larger ranks": larger, "keeps smaller ones": smaller, "is undecided": undecided}
    parts = [f"{verb} in {len(tasks)} ({', '.join(tasks) or 'none'})" for verb, tasks in found_in.items()]
    return f"Under `nested`, of {len(found)} tasks, `value` {', '.join(parts)}."


def figure(rows: list[dict], path: Path) -> None:
    """E[rank] layer by layer under `nested`, a panel a task."""
    mine = [row for row in rows if row["prior"] == "nested"]
    _, panels = plt.subplots(1, len(mine), figsize=(2.6 * len(mine), 2.8), squeeze=False, sharey=True,
                             constrained_layout=True)  # fmt: skip
    for panel, row in zip(panels[0], mine, strict=True):
        for kind in KINDS:
            layers = sorted((int(name.split(".")[0]), rank) for name, rank in row["ranks"].items() if kind in name)
            panel.plot(*np.transpose(layers), color=COLOURS[kind], marker="o", label=kind)
        panel.set(xlabel="layer", title=row["task"])
    panels[0][0].set_ylabel("E[rank]")
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def report(options, rows: list[dict]) -> str:
    return f"""# Does `value` keep larger ranks than `query` and `key`?

```sh
python experiments/ranks.py --glue_dir {options.glue_dir} --tasks {" ".join(options.tasks)} \\
    --hierarchical {" ".join(options.hierarchical)} \\
    --max_train {options.max_train} --epochs {options.epochs} --kl_warmup {options.kl_warmup} \\
    --report benchmarks/ranks.md --figures benchmarks/figures
```

MiniLM, scope `adapted`, at most 8 ranks, {options.max_train} training examples, one seed;
{provenance(rows)}.
Differences are taken layer by layer; intervals are Student's over the layers of one run, so they do not say how another
seed would turn out.

{table(rows)}

{summary(rows)}

![E[rank] by layer](figures/ranks.png)

## The rates that `hierarchical` learns

Posterior mean and central 94 % interval under a Gamma(1, 1) hyperprior; the bits of each tensor role, the ranks of each
projection type.

{rates(rows)}
"""


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "ranks", max_train=2000, output_dir="runs/ranks")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--hierarchical", nargs="+", default=("sst2", "mrpc"), help="tasks to learn the rates on")
    parser.add_argument("--kl_warmup", type=float, default=0.6, help="share of the steps before the gates start")
    options = parser.parse_args(arguments)
    write_page(options, "ranks", study(options), report, figure)


if __name__ == "__main__":
    main(sys.argv[1:])
