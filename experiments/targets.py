"""Does the budget prior meet its target? Runs over targets and tasks; the path of the rate is drawn.

    python experiments/targets.py --glue_dir GLUE --report benchmarks/targets.md --figures benchmarks/figures

The runs of a task start from the same LoRA. A run counts as met if E[BOPs] at its last step is within 5 % (relative) of
the target. What is deployed, every gate of probability above one half, is another number, and stands beside it: the
flatter the posterior, the further they are apart. Finished cells are kept.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.studies.cells import finished, provenance
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from pyro_blora.build import build
from pyro_blora.config import RunConfig

TARGETS = (0.5, 0.1, 0.03)
TASKS = ("acceptability", "sst2", "cola", "mrpc", "stsb", "rte")
TOLERANCE = 0.05


def configuration(options, task: str, **changes) -> RunConfig:
    return RunConfig(
        task=task, glue_dir=options.glue_dir if task != "acceptability" else None, backbone=options.backbone,
        estimator="relaxed", max_length=64, max_train=options.max_train, epochs=options.epochs,
        kl_warmup=options.kl_warmup, settle=0.0, draws=2, output_dir=options.output_dir, **changes,
    )  # fmt: skip


def study(options) -> list[dict]:
    rows = []
    for task in options.tasks:
        lora = configuration(options, task, prior="fixed", prior_settings={"bits": 32})
        n_train = build(lora).program.n_train
        for target in options.targets:
            settings = {"bops": target, "denominator": "adapted"}
            config = configuration(options, task, prior="budget", prior_settings=settings, logging_steps=1)
            path = options.keep / f"target-{task}-{target:g}.json"
            cell = finished(path, config, lora, n_train, train=not options.only_finished)
            if cell is None:
                continue
            opening = int(config.kl_warmup * cell["log"][-1]["step"])
            gated = [line for line in cell["log"] if line["step"] > opening]
            rows.append({"task": task, "target": target, "gated": gated, "cell": cell})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def error(row: dict) -> float:
    return row["gated"][-1]["bops_adapted"] / row["target"] - 1


def table(rows: list[dict]) -> str:
    lines = ["| task | score | KL (nats) | target | E[BOPs] at the end | relative error | within 5 % | "
             "largest on the way | rate | deployed BOPs |", "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        result, last = row["cell"]["summary"], row["gated"][-1]
        on_the_way = max(abs(x["bops_adapted"] / row["target"] - 1) for x in row["gated"])
        lines.append(
            f"| {row['task']} | {result['metric']['name']} {result['metric']['value']:.3f} | "
            f"{last['kl_z'] + last['kl_g']:.1f} | {row['target']:g} | {last['bops_adapted']:.4f} | {error(row):+.2%} | "
            f"{'yes' if abs(error(row)) <= TOLERANCE else 'NO'} | {on_the_way:.2%} | {last['rate']:.3g} | "
            f"{result['bops']['deployed']['adapted_ratio']:.4f} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    picture, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), constrained_layout=True)
    for row in (row for row in rows if row["task"] == tasks[0]):
        steps = [x["step"] for x in row["gated"]]
        left.plot(steps, [x["rate"] for x in row["gated"]], label=f"target {row['target']:g}")
        right.plot(steps, [x["bops_adapted"] / row["target"] for x in row["gated"]])
    left.set_yscale("symlog", linthresh=10)
    left.set(xlabel="step", ylabel="rate (nats for all BOPs of `adapted`)")
    right.set(xlabel="step", ylabel="E[BOPs] / target")
    right.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="0.9", zorder=0)
    left.set_title(f"{tasks[0]}: path of the rate", fontsize=10)
    right.set_title("E[BOPs] / target (band: 5 %)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "targets", max_train=2000, output_dir="runs/targets")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    parser.add_argument("--kl_warmup", type=float, default=0.6, help="share of the steps before the gates start")
    options = parser.parse_args(arguments)
    write_page(options, "targets", study(options), report, figure)


def report(options, rows: list[dict]) -> str:
    met = sum(abs(error(row)) <= TOLERANCE for row in rows)
    return f"""# Does the budget prior meet its target?

```sh
python experiments/targets.py --glue_dir GLUE --tasks {" ".join(options.tasks)} \\
    --targets {" ".join(map(str, options.targets))} --max_train {options.max_train} --epochs {options.epochs} \\
    --kl_warmup {options.kl_warmup} --report benchmarks/targets.md --figures benchmarks/figures
```

`--prior budget --prior.denominator adapted`, scope `adapted`, MiniLM, {options.max_train} examples;
{provenance([row["cell"] for row in rows])}.
{met} of {len(rows)} runs end within 5 % of their target, none was restarted. A rate below 0 spends bits that the data
do not ask for; "largest on the way" is the largest relative error at any gated step.

{table(rows)}

![Path of the rate](figures/targets.png)
"""


if __name__ == "__main__":
    run_script(main)
