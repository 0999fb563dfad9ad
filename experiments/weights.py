"""Does uncertainty over the adapter's weights calibrate better than one number, the temperature? Task by task.

    python experiments/weights.py --glue_dir GLUE --report benchmarks/weights.md --figures benchmarks/figures

A path is one training: LoRA or B-LoRA-XS, with weights that are points, Gaussian, or averaged by SWAG, alone or with
gates. Several laws are read off the same path: temperature, dropout, Laplace, SWAG with fewer deviations. An ensemble
is made of LoRA's paths from all seeds. A fifth of the training rows chooses epochs and temperatures, dev is predicted
once. A finished path is one JSON file in --keep, so the study may be spread out over days.
"""

import dataclasses
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from experiments.studies.cells import CODE, kept, provenance
from experiments.studies.pages import study_parser, write_page
from experiments.studies.weight_laws import laws_of
from pyro_blora import calibration
from pyro_blora.config import RunConfig
from pyro_blora.run import versions
from pyro_blora.tasks import get_task
from pyro_blora.training import fit

TASKS = ("rte", "mrpc", "cola", "sst2")
RANKS = (2, 8, 16, 25)
_XS = {"adapter": "xs", "lr": 5e-2}
_LAST = {"weights_settings": {"rank": 20, "snapshots": 20}}  # SWAG of 20 deviations; fewer are its last ones
PATHS = {  # name: what differs from LoRA of rank 8
    "lora": {},
    "lora-gaussian": {"weights": "gaussian"},
    "xs8": _XS,
    "xs8-gaussian": {**_XS, "weights": "gaussian"},
    "xs8-low_rank": {**_XS, "weights": "low_rank"},
    "xs8-gates-gaussian": {**_XS, "weights": "gaussian", "method": "bayesian_lora"},
    **{f"xs{rank}-swag": {**_XS, "rank": rank, "alpha": 2.0 * rank, "weights": "swag", **_LAST} for rank in RANKS},
    "lora-swag": {"weights": "swag", **_LAST},
}


def configuration(options, task: str, path: str, seed: int) -> RunConfig:
    changes = {"method": "lora", "lr": 2e-3, "rank": 8, "alpha": 16.0, **PATHS[path]}
    chosen = changes.get("weights") != "swag" and "gates" not in path  # SWAG averages epochs, gates start half-way
    return RunConfig(
        task=task, glue_dir=options.glue_dir, backbone=options.backbone, max_length=64, max_train=options.max_train,
        epochs=options.epochs, lr_head=5e-3, validation=0.2, choose_epoch=chosen and not options.last_epoch,
        draws=options.draws, seed=seed, data_seed=0, output_dir=options.output_dir, **changes,
    )  # fmt: skip


def trained(options, task: str, path: str, seed: int) -> dict | None:
    """The cell of a path: what its laws predict of dev, and their scores."""
    config, ending = configuration(options, task, path, seed), "-last" if options.last_epoch else ""
    file = options.keep / f"weights-{task}-{path}{ending}-{seed}.json"
    cell = kept(file, config)
    if cell is not None or options.only_finished:
        return cell
    folder = Path(config.output_dir) / f"{task}-{path}{ending}-{seed}"
    run = fit(config, folder=folder)
    cell = {
        "config": dataclasses.asdict(config), "versions": versions(), "code": CODE, "seconds": run.seconds,
        "summary": {"task": task, "device": f"cpu ({torch.get_num_threads()} threads)"}, "laws": laws_of(run.parts),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(cell) + "\n", encoding="utf-8")
    file.with_suffix(".tmp").rename(file)
    return cell


def study(options) -> list[dict]:
    """A row for each task, path, law and seed, with its scores."""
    rows = []
    for seed in options.seeds:
        for task in options.tasks:
            for path in options.paths:
                cell = trained(options, task, path, seed)
                for law, found in (cell["laws"] if cell else {}).items():
                    rows.append({"task": task, "path": path, "law": law, "seed": seed, "cell": cell, **found})
    return rows + ensembles(rows)


def ensembles(rows: list[dict]) -> list[dict]:
    """Of three or more seeds of LoRA: their probabilities averaged, with a temperature of its own."""
    made = []
    for task in dict.fromkeys(row["task"] for row in rows):
        members = [row for row in rows if (row["task"], row["path"], row["law"]) == (task, "lora", "point")]
        if len(members) < 3:
            continue
        probabilities, held_out = (
            torch.tensor([m[split]["probabilities"] for m in members]) for split in ("eval", "validation")
        )
        labels = [torch.tensor(members[0][split]["labels"]) for split in ("eval", "validation")]
        scores = calibration.scores(probabilities, labels[0])
        temperature = calibration.fit_temperature(held_out.mean(0), labels[1])  # the same rows for all seeds
        scaled = calibration.at_temperature(probabilities.mean(0), temperature)[None]
        made.append({**members[0], "law": f"ensemble of {len(members)}", "scores": scores, "temperature": temperature,
                     "scaled": calibration.scores(scaled, labels[0]), "metric": _metric(task, probabilities, labels[0]),
                     "stored": sum(m["stored"] for m in members)})  # fmt: skip
    return made


def _metric(task: str, probabilities: torch.Tensor, labels: torch.Tensor) -> float:
    found = get_task(task)
    decision = probabilities.mean(0).argmax(-1)
    return found.metric().compute(predictions=decision.tolist(), references=labels.tolist())[found.metric_name]


def by_law(rows: list[dict], task: str) -> dict[tuple[str, str], list[dict]]:
    """The rows of a task by (path, law), a row a seed."""
    found: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        if row["task"] == task:
            found.setdefault((row["path"], row["law"]), []).append(row)
    return found


def spread(values: list[float]) -> str:
    return f"{np.median(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def table(rows: list[dict], task: str) -> str:
    lines = [
        "| path | law | seeds | parameters | stored | metric | NLL | NLL, scaled | T | ECE, 20 bins | ECE, scaled "
        "| Brier | entropy | mutual information |",
        "|---" * 14 + "|",
    ]
    for (path, law), mine in by_law(rows, task).items():
        columns = [
            [row["metric"] for row in mine],
            *([row[kind]["nll"] for row in mine] for kind in ("scores", "scaled")),
            [row["temperature"] for row in mine],
            *([row[kind]["ece_20"] for row in mine] for kind in ("scores", "scaled")),
            *([row["scores"][key] for row in mine] for key in ("brier", "entropy", "mutual_information")),
        ]
        named = f"| {path} | {law} | {len(mine)} | {mine[0]['parameters']:,} | {mine[0]['stored']:,} | "
        lines.append(named + " | ".join(map(spread, columns)) + " |")
    return "\n".join(lines)


def verdicts(rows: list[dict], tasks: list[str]) -> str:
    """For each law: whether its NLL is below that of its own point, and of the point at its temperature."""
    lines = [
        "| task | path | law | NLL less the point's | less the scaled point's | lower than both, of seeds |",
        "|---" * 6 + "|",
    ]
    for task in tasks:
        found = by_law(rows, task)
        for (path, law), mine in found.items():
            points = {row["seed"]: row for row in found.get((path, "point"), [])}
            if law == "point" or law.startswith("ensemble"):
                continue
            pairs = [(row, points[row["seed"]]) for row in mine if row["seed"] in points]
            alone = [row["scores"]["nll"] - p["scores"]["nll"] for row, p in pairs]
            scaled = [row["scores"]["nll"] - p["scaled"]["nll"] for row, p in pairs]
            both = sum(a < 0 and b < 0 for a, b in zip(alone, scaled, strict=True))
            lines.append(f"| {task} | {path} | {law} | {spread(alone)} | {spread(scaled)} | {both} of {len(pairs)} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """ECE and NLL against stored numbers, a panel a task, medians over seeds."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    fig, axes = plt.subplots(2, len(tasks), figsize=(3.2 * len(tasks), 6), squeeze=False, constrained_layout=True)
    for column, task in enumerate(tasks):
        for (name, law), mine in by_law(rows, task).items():
            colour = "#0072B2" if name.startswith("xs") else "#D55E00"
            marker = "o" if law == "point" else "s" if law.startswith("K") else "^"
            for axis, key in zip(axes[:, column], ("ece_20", "nll"), strict=True):
                axis.scatter(mine[0]["stored"], np.median([row["scores"][key] for row in mine]), c=colour,
                             marker=marker, s=24, alpha=0.7)  # fmt: skip
        axes[0, column].set_title(task)
        for axis, label in zip(axes[:, column], ("ECE, 20 bins", "NLL, nats an example"), strict=True):
            axis.set_xscale("log")
            axis.set_xlabel("numbers stored")
            axis.set_ylabel(label)
    marks = [
        ("o", "#0072B2", "XS, point"), ("s", "#0072B2", "XS, SWAG"), ("^", "#0072B2", "XS, other laws"),
        ("o", "#D55E00", "LoRA, point"), ("s", "#D55E00", "LoRA, SWAG"), ("^", "#D55E00", "LoRA, other laws"),
    ]  # fmt: skip
    handles = [plt.Line2D([], [], marker=m, color=c, linestyle="", label=text) for m, c, text in marks]
    axes[0, 0].legend(handles=handles, fontsize=7)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def report(options, rows: list[dict]) -> str:
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    cells = [row["cell"] for row in rows]
    parts = [
        "# Laws of the adapter's weights, and a temperature",
        f"`python experiments/weights.py --glue_dir GLUE --max_train {options.max_train} --epochs {options.epochs}`, "
        f"{provenance(cells)}.",
        f"{options.max_train} training rows a task, a fifth of them held out for epochs and temperatures; "
        f"{options.draws} draws; medians ± standard deviations over seeds, which share their rows. `point` is the mean "
        "of the law beside it. Scaled: at the temperature of least NLL on the held-out rows. ECE by equal bins of "
        "confidence.",
        *(f"## {task}\n\n{table(rows, task)}" for task in tasks),
        f"## Is a law better than its own point, and than the point at its temperature?\n\n{verdicts(rows, tasks)}",
        "![ECE and NLL against stored numbers](figures/weights.png)",
    ]
    return "\n\n".join(parts) + "\n"


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "weights", max_train=1000, output_dir="runs/weights")
    parser.set_defaults(epochs=8)
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--paths", nargs="+", default=tuple(PATHS), choices=tuple(PATHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=15)
    parser.add_argument("--last_epoch", action="store_true", help="keep the last epoch, not the best: other cells")
    options = parser.parse_args(arguments)
    write_page(options, "weights", study(options), report, figure)
    print(options.report)


if __name__ == "__main__":
    main(sys.argv[1:])
