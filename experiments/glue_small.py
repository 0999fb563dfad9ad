"""Small GLUE on MiniLM: plain LoRA against the `bops` prior with its default settings, in the same loop.

    python experiments/glue_small.py --glue_dir path/to/glue --table benchmarks/glue_small.md

Each cell is a run of `pyro-blora train`, the same as from the command line; finished cells are kept, so the study may
be spread out. The table gives the dev metric averaged over draws, the BOPs, and what always answering the most frequent
label (or the mean) would score.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.studies.scripts import run_script
from pyro_blora.config import RunConfig
from pyro_blora.run import train_run, versions
from pyro_blora.tasks import get_task

TASKS = ("sst2", "cola", "mrpc", "stsb", "qnli", "rte", "wnli")
PRIORS = {"LoRA (`fixed`, 32 bit, rank 8)": ("fixed", {"bits": 32, "rank": 8}), "`bops`, defaults": ("bops", {})}


def command(config: RunConfig) -> str:
    settings = "".join(f" --prior.{key} {value}" for key, value in config.prior_settings.items())
    named = ("task", "glue_dir", "backbone", "max_train", "epochs", "draws", "prior")
    flags = " ".join(f"--{name} {getattr(config, name)}" for name in named)
    return f"python experiments/train.py {flags}{settings}"


def majority(task_name: str, glue_dir: str) -> float:
    """The headline metric of the constant answer that is best on the training set."""
    task = get_task(task_name)
    rows = task.load(glue_dir=glue_dir)
    labels = torch.tensor(rows["train"]["label"])
    constant = labels.mean().item() if not task.labels else labels.mode().values.item()
    references = list(rows["eval"]["label"])
    scores = task.metric().compute(predictions=[constant] * len(references), references=references)
    return scores[task.metric_name]


def learned(result: dict, floor: float) -> bool:
    """Whether the score exceeds the constant answer's by two standard errors of an evaluation of this size."""
    spread = 0.5 if result["metric"]["name"] == "accuracy" else 1.0  # of one example: at most, and of a correlation
    return result["metric"]["value"] > floor + 2 * spread / result["n_eval"] ** 0.5


def finished(config: RunConfig) -> dict:
    folder = config.folder
    if not (folder / "summary.json").exists():
        train_run(config)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", required=True, help="folder of the official TSV release")
    parser.add_argument("--tasks", nargs="+", default=TASKS, help="names, or name:examples to use fewer of them")
    parser.add_argument("--backbone", default="demo", help="what to adapt: a name or a folder")
    parser.add_argument("--max_train", type=int, default=4000, help="training examples where a task names none")
    parser.add_argument("--max_length", type=int, default=128, help="longest input, in tokens")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--draws", type=int, default=15)
    parser.add_argument("--output_dir", default="runs/glue_small")
    parser.add_argument("--table", default="runs/glue_small/table.md", help="where the Markdown table is written")
    options = parser.parse_args(arguments)
    lines, commands, device = [], [], ""
    for name in options.tasks:
        task, _, examples = name.partition(":")
        floor = majority(task, options.glue_dir)
        for label, (prior, settings) in PRIORS.items():
            config = RunConfig(
                task=task, glue_dir=options.glue_dir, backbone=options.backbone,
                max_train=int(examples or options.max_train), max_length=options.max_length, epochs=options.epochs,
                draws=options.draws, prior=prior, prior_settings=settings, output_dir=options.output_dir,
            )  # fmt: skip
            result = finished(config)
            mark = "" if learned(result, floor) else " †"
            bits = " / ".join(f"{value:.1f}" for value in result["expected_bits"].values())
            rank = " / ".join(f"{value:.1f}" for value in result["expected_rank"].values())
            lines.append(
                f"| {task} | {result['n_train']} | {label} | {result['metric']['name']} | "
                f"{result['metric']['value']:.3f}{mark} | {floor:.3f} | {result['nll']:.3f} | "
                f"{result['bops']['adapted_ratio']:.1%} | {result['bops']['model_ratio']:.1%} | {bits} | {rank} | "
                f"{result['seconds']['training']:.0f} |"
            )
            commands.append(command(config))
            device = result["device"]
        _write(Path(options.table), lines, commands, device)


def _write(path: Path, lines: list[str], commands: list[str], device: str) -> None:
    head = (
        "| task | examples | method | metric | dev | constant answer | NLL | BOPs / adapted | BOPs / model | "
        "E[bits] input / base / A / B / hidden | E[rank] query / key / value | training (s) |"
    )
    rule = "|---|---|---|---|---|---|---|---|---|---|---|---|"
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    text = f"""# Small GLUE on MiniLM

Written by `experiments/glue_small.py` on {device}; {found}. One seed (0).

{head}
{rule}
{chr(10).join(lines)}

† MiniLM learns nothing here: no better than the constant answer by two standard errors of the dev set.

Each line, by its command:

```sh
{chr(10).join(commands)}
```
"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
