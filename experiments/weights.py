"""Does uncertainty over the adapter's weights calibrate better than one number, the temperature? Task by task.

    python experiments/weights.py --glue_dir GLUE --report benchmarks/weights.md --figures benchmarks/figures

A path is one training: LoRA or B-LoRA-XS, with weights that are points, Gaussian, or averaged by SWAG, alone or with
gates, on all rows or a fraction of them. Several distributions are read off one path: the point, dropout, Laplace, SWAG
with fewer deviations. An ensemble is made of LoRA's paths from all seeds. Held-out training rows choose epochs and
temperatures, dev is predicted once. A finished path is one JSON file in --keep, so the study may be spread out over
days.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.studies.cells import CODE, kept, settings_of
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from experiments.studies.weight_distributions import WeightDistribution, distributions_of, ensembles
from experiments.studies.weights_page import DEVIATIONS, FRACTIONS, RANKS, figure, report
from pyro_blora.config import RunConfig
from pyro_blora.run import versions
from pyro_blora.tasks import get_task
from pyro_blora.training import fit

TASKS = {"rte": (1000, 6), "mrpc": (2000, 4), "cola": (8551, 4), "sst2": (1000, 6)}  # training rows, epochs
_HELD_OUT = 200  # of these rows: at least a tenth, at most a fifth
_FOUR = ("query", "value", "attention.output.dense", "output.dense")  # B-LoRA-XS's, so that a layer has 4 R^2
_XS = {"adapter": "xs", "lr": 5e-3, "target_modules": _FOUR}
_COLD = {"weights": "gaussian", "weights_settings": {"kl_weight": 0.01, "prior_std": 0.1}}
_SWAG = {"weights": "swag", "weights_settings": {"rank": 10, "snapshots": 20}}
_SWEEP = {"weights": "swag", "weights_settings": {"rank": 20, "snapshots": 20}}  # fewer deviations are its last ones
PATHS: dict[
    str, tuple[dict, tuple[WeightDistribution, ...]]
] = {  # name: what differs from LoRA of rank 8, and what is read off it
    "lora": ({}, ("dropout", "laplace")),
    "lora-gaussian": (_COLD, ("draws",)),
    "lora-swag": (_SWAG, (10,)),
    "xs8": (_XS, ("laplace",)),
    "xs8-gaussian": ({**_XS, **_COLD}, ("draws",)),
    "xs8-low_rank": ({**_XS, **_COLD, "weights": "low_rank"}, ("draws",)),
    **{f"xs{r}-swag": ({**_XS, **_SWAG, "rank": r, "alpha": 2.0 * r}, (10,)) for r in RANKS},
    **{f"xs{r}-swag-deviations": ({**_XS, **_SWEEP, "rank": r, "alpha": 2.0 * r}, DEVIATIONS) for r in RANKS},
    "xs8-gates-gaussian": ({**_XS, **_COLD, "method": "bayesian_lora"}, ("draws",)),
    **{f"lora-of-{100 * f:.0f}": ({"fraction": f}, ()) for f in (*FRACTIONS, 1)},
    **{f"xs8-swag-of-{100 * f:.0f}": ({**_XS, **_SWAG, "fraction": f}, (10,)) for f in FRACTIONS},
}


def configuration(options, task: str, path: str, seed: int) -> RunConfig:
    changes = {"target_modules": ("query", "value"), "method": "lora", "lr": 1e-3, "rank": 8, "alpha": 16.0}
    changes |= PATHS[path][0]
    fraction = changes.pop("fraction", 1.0)
    usual = TASKS.get(task, (1000, 6))
    rows = round(fraction * (options.max_train or usual[0]))
    held_out = min(0.2, max(0.1, _HELD_OUT / rows))
    chosen = changes.get("weights") != "swag" and "-of-" not in path  # SWAG averages epochs; few rows choose by chance
    return RunConfig(
        task=task, glue_dir=options.glue_dir, backbone=options.backbone, estimator="relaxed", max_length=64,
        group_by_length=True, max_train=rows, validation=held_out,
        epochs=round((options.epochs or usual[1]) / fraction), lr_head=5e-3,
        choose_epoch=chosen and not options.last_epoch, draws=options.draws, seed=seed, data_seed=0,
        output_dir=options.output_dir, **changes,
    )  # fmt: skip


def trained(options, task: str, path: str, seed: int) -> dict | None:
    """The cell of a path: what its distributions predict of dev, and their scores."""
    config, ending = configuration(options, task, path, seed), "-last" if options.last_epoch else ""
    file = options.keep / f"weights-{task}-{path}{ending}-{seed}.json"
    cell = kept(file, config)
    if cell is not None or options.only_finished:
        return cell
    folder = Path(config.output_dir) / f"{task}-{path}{ending}-{seed}"
    run = fit(config, folder=folder)
    labels = {split: run.parts.rows[split]["label"] for split in ("eval", "validation")}
    cell = {
        "config": settings_of(config), "versions": versions(), "code": CODE, "seconds": run.seconds,
        "summary": {"task": task, "device": f"cpu ({torch.get_num_threads()} threads)"},
        "labels": {split: list(x) for split, x in labels.items()}, "laws": distributions_of(run.parts, PATHS[path][1]),
    }  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".tmp").write_text(json.dumps(cell) + "\n", encoding="utf-8")
    file.with_suffix(".tmp").rename(file)
    return cell


def study(options) -> list[dict]:
    """A row for each task, path, distribution and seed, with its scores."""
    rows = []
    for seed in options.seeds:
        for task in options.tasks:
            for path in options.paths:
                cell = trained(options, task, path, seed)
                for distribution, found in (cell["laws"] if cell else {}).items():
                    rows.append({"task": task, "path": path, "law": distribution, "seed": seed, "cell": cell, **found})
    return rows + ensembles(rows)


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "weights", max_train=None, output_dir="runs/weights")
    parser.set_defaults(epochs=None)
    parser.add_argument("--tasks", nargs="+", default=tuple(TASKS), help="of two classes")
    parser.add_argument("--paths", nargs="+", default=tuple(PATHS), choices=tuple(PATHS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--draws", type=int, default=15)
    parser.add_argument("--last_epoch", action="store_true", help="keep the last epoch, not the best: other cells")
    options = parser.parse_args(arguments)
    for task in options.tasks:
        if len(get_task(task).labels) != 2:
            raise ValueError(
                f"task {task!r} is not of two classes, whose log odds are what is kept: give --tasks others, as of "
                f"{', '.join(TASKS)}"
            )
    write_page(options, "weights", study(options), report, figure)
    print(options.report)


if __name__ == "__main__":
    run_script(main)
