"""Does the budget prior meet its target? Short runs over targets and tasks; the path of the rate is drawn.

    python experiments/targets.py --glue_dir GLUE --report benchmarks/targets.md --figures benchmarks/figures

A run counts as met if E[BOPs] at its last step is within 5 % (relative) of the target. Finished cells are kept.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.studies.cells import finished
from experiments.studies.pages import study_parser, write_page
from pyro_blora.config import RunConfig
from pyro_blora.run import versions

TARGETS = (0.5, 0.2, 0.1, 0.05, 0.03)
TASKS = ("acceptability", "sst2", "cola", "mrpc", "stsb", "rte")
TOLERANCE = 0.05


def configuration(options, task: str, target: float) -> RunConfig:
    return RunConfig(
        task=task, glue_dir=options.glue_dir if task != "acceptability" else None, backbone=options.backbone,
        max_length=64, max_train=options.max_train, epochs=options.epochs, prior="budget", draws=2, logging_steps=1,
        prior_settings={"bops": target, "denominator": "adapted"}, output_dir=options.output_dir,
    )  # fmt: skip


def study(options) -> list[dict]:
    rows = []
    for task in options.tasks:
        for target in options.targets:
            config = configuration(options, task, target)
            cell = finished(options.keep / f"target-{task}-{target:g}.json", config, None)
            gated = [x for x in cell["log"] if x["step"] > config.kl_warmup * cell["log"][-1]["step"]]
            rows.append({"task": task, "target": target, "gated": gated, "device": cell["summary"]["device"]})
            print(table(rows[-1:]).splitlines()[-1], flush=True)
    return rows


def error(row: dict) -> float:
    return row["gated"][-1]["bops_adapted"] / row["target"] - 1


def table(rows: list[dict]) -> str:
    lines = ["| task | target | E[BOPs] at the end | relative error | within 5 % | largest error on the way | rate |",
             "|---|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows:
        on_the_way = max(abs(x["bops_adapted"] / row["target"] - 1) for x in row["gated"])
        lines.append(
            f"| {row['task']} | {row['target']:g} | {row['gated'][-1]['bops_adapted']:.4f} | {error(row):+.2%} | "
            f"{'yes' if abs(error(row)) <= TOLERANCE else 'NO'} | {on_the_way:.2%} | {row['gated'][-1]['rate']:.3g} |"
        )
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    picture, (left, right) = plt.subplots(1, 2, figsize=(8.5, 3.4), constrained_layout=True)
    for row in (row for row in rows if row["task"] == tasks[0]):
        steps = [x["step"] for x in row["gated"]]
        left.plot(steps, [x["rate"] for x in row["gated"]], label=f"target {row['target']:g}")
        right.plot(steps, [x["bops_adapted"] / row["target"] for x in row["gated"]])
    left.set(yscale="log", xlabel="step", ylabel="rate (nats for all BOPs of `adapted`)")
    right.set(xlabel="step", ylabel="E[BOPs] / target")
    right.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="0.9", zorder=0)
    left.set_title(f"{tasks[0]}: path of the rate", fontsize=10)
    right.set_title("met from the first gated step on (band: 5 %)", fontsize=10)
    left.legend(frameon=False, fontsize=8)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "targets", max_train=320, output_dir="runs/targets")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--targets", nargs="+", type=float, default=TARGETS)
    options = parser.parse_args(arguments)
    rows = study(options)
    write_page(options, "targets", report(options, rows), lambda path: figure(rows, path))


def report(options, rows: list[dict]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    met = sum(abs(error(row)) <= TOLERANCE for row in rows)
    return f"""# Does the budget prior meet its target?

```sh
python experiments/targets.py --glue_dir {options.glue_dir} --targets {" ".join(map(str, options.targets))} \\
    --max_train {options.max_train} --epochs {options.epochs} \\
    --report benchmarks/targets.md --figures benchmarks/figures
```

`--prior budget --prior.denominator adapted`, scope `adapted`, MiniLM, {options.max_train} examples, on
{rows[0]["device"]}; {found}. {met} of {len(rows)} runs end within 5 % of their target, none was restarted.

{table(rows)}

![Path of the rate](figures/targets.png)
"""


if __name__ == "__main__":
    main(sys.argv[1:])
