"""DeBERTaV3's architecture on real weights: the demo and SST-2 on MiniLM converted into it, beside MiniLM itself.

    python experiments/demo_deberta.py --glue_dir path/to/glue --table benchmarks/demo_deberta.md

Each cell is a run of `pyro-blora train`, the same as from the command line; finished cells are kept, so the study may
be spread out. The page has scores, bit operations, paired differences, and the MACs of the positional stream.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.host import spin_briefly

spin_briefly()  # before anything imports torch

import pandas as pd
import torch
import transformers

from experiments.bench.networks import Setting, deberta
from experiments.studies.cells import PREDICTED
from experiments.studies.compare import paired
from experiments.studies.positions import model_table, projections_table, streams
from pyro_blora.backbone import backbone_path
from pyro_blora.baselines import NOISE
from pyro_blora.config import RunConfig
from pyro_blora.flags import load_preset
from pyro_blora.run import train_run, versions

CONVERTED, ORIGINAL = "demo-deberta", "demo"
TASKS = {  # what differs from the defaults; the demo's are those of its preset
    "acceptability": {key: value for key, value in load_preset("demo").items() if key not in ("task", "backbone")},
    "sst2": {"max_train": 4000, "epochs": 2, "max_length": 64, "draws": 4},  # no sentence has more than 64 tokens
}
METHODS = {"LoRA": {"method": "lora"}, "`bops`, adapted": {"scope": "adapted"}, "`bops`, encoder": {"scope": "encoder"}}
MODELS = {CONVERTED: "MiniLM as DeBERTaV3", ORIGINAL: "MiniLM"}


def settings(options, task: str, backbone: str, method: str) -> dict:
    """The flags of a cell's command."""
    found = {"task": task, "backbone": backbone, **TASKS[task], **METHODS[method]}
    if method == "LoRA":
        found.pop("prior", None)  # the method's own
    if task != "acceptability":
        found["glue_dir"] = options.glue_dir
    changed = {name: getattr(options, name) for name in ("max_train", "epochs", "draws")}
    return found | {name: value for name, value in changed.items() if value is not None}


def cell(options, task: str, backbone: str, method: str) -> dict:
    """What the page needs of a run, which is trained or resumed unless it is finished."""
    flags = settings(options, task, backbone, method)
    config = RunConfig(**flags, output_dir=options.output_dir)
    folder = config.folder
    if not (folder / "summary.json").exists():
        train_run(config)
    examples = pd.read_parquet(folder / "predictions.parquet", columns=["label", *PREDICTED])
    return {
        "task": task, "backbone": backbone, "method": method, "flags": flags,
        "summary": json.loads((folder / "summary.json").read_text(encoding="utf-8")),
        "threads": json.loads((folder / "config.json").read_text(encoding="utf-8"))["threads"],
        "examples": {name: column.tolist() for name, column in examples.items()},
    }  # fmt: skip


def scores_table(cells: list[dict]) -> str:
    head = (
        "| task | rows | backbone | method | accuracy ± standard error | constant answer | NLL | deployed accuracy | "
        "BOPs / adapted | BOPs / model | E[rank] query / key / value | training (s) |"
    )
    lines = [head, f"|{'---|' * 12}"]
    for found in cells:
        result = found["summary"]
        name, value = result["metric"].values()
        beside = result["beside"][name]
        mark = "" if value > beside["constant"] + NOISE * beside["gain_error"] else " †"
        rank = " / ".join(f"{x:.1f}" for x in result["expected_rank"].values())
        lines.append(
            f"| {found['task']} | {result['n_train']} | {found['backbone']} | {found['method']} | "
            f"{value:.3f} ± {beside['standard_error']:.3f}{mark} | {beside['constant']:.3f} | {result['nll']:.3f} | "
            f"{result['deployed']['metric']['value']:.3f} | {result['bops']['adapted_ratio']:.1%} | "
            f"{result['bops']['model_ratio']:.1%} | {rank} | {result['seconds']['training']:.0f} |"
        )
    return "\n".join(lines)


def differences_table(cells: list[dict]) -> str:
    """Between backbones with the same method, and between methods on the same backbone, where both are there."""
    lines = ["| task | difference | of accuracy [95 %] | of NLL [95 %] | beyond noise |", "|---|---|---|---|---|"]
    at = {(found["task"], found["backbone"], found["method"]): found for found in cells}
    for task in dict.fromkeys(found["task"] for found in cells):
        pairs = [(method, CONVERTED, method, ORIGINAL) for method in METHODS]
        pairs += [(ours, name, theirs, name) for name in MODELS for theirs, ours in itertools.combinations(METHODS, 2)]
        for ours, backbone, theirs, other in pairs:
            first, second = at.get((task, backbone, ours)), at.get((task, other, theirs))
            if first and second:
                same = ours == theirs
                name = f"{ours}: {backbone} less {other}" if same else f"{backbone}: {ours} less {theirs}"
                lines.append(f"| {task} | {name} | {_difference(first, second)} |")
    return "\n".join(lines)


def _difference(ours: dict, theirs: dict) -> str:
    """Of what is averaged over draws, paired by example."""
    found = paired([ours], [theirs], "accuracy", prefix="")
    cells = [f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]" for mean, low, high in found.values()]
    told = [name for name, (_, low, high) in found.items() if low > 0 or high < 0]
    names = {"score": "accuracy", "nll": "NLL"}
    return " | ".join([*cells, ", ".join(names[name] for name in told) or "no"])


def command(flags: dict) -> str:
    return "python experiments/train.py " + " ".join(f"--{name} {value}" for name, value in flags.items())


def architectures() -> dict:
    """Configurations by name: that of the converted model, and DeBERTaV3-base's own."""
    with torch.device("meta"):
        base = deberta(Setting(backbone="deberta")).config
    converted = transformers.AutoConfig.from_pretrained(backbone_path(CONVERTED))
    return {MODELS[CONVERTED]: converted, "DeBERTaV3-base": base}


def page(options, cells: list[dict]) -> str:
    threads = ", ".join(str(count) for count in sorted({found["threads"] for found in cells}))
    devices = ", ".join(sorted({found["summary"]["device"] for found in cells}))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows = streams(architectures(), options.lengths)
    listed = "\n".join(command(found["flags"]) for found in cells)
    return f"""# DeBERTaV3's architecture on real weights

`--backbone demo-deberta` is MiniLM (`demo`) converted exactly into DeBERTaV3's architecture: the same function, but
query and key project content and positions. Plain LoRA (rank 8, 32 bit), and the `bops` prior at both scopes, are
trained on either. This page is written by

```sh
python experiments/demo_deberta.py --glue_dir {options.glue_dir} --table benchmarks/demo_deberta.md
```

on {devices}, {threads} thread(s), beside other work; {packages}. One seed (0).

## Scores and bit operations

{scores_table(cells)}

Accuracy and NLL are averaged over draws of the gates; deployed is the one allocation of all gates that are likelier
open than closed. BOPs are expected, of 64 tokens in a batch of 32, against 32 x 32 bit. Ratios of the two backbones
have different denominators, as DeBERTaV3 has more MACs (below). † within two standard errors of the constant answer.

{differences_table(cells)}

Intervals are over the examples of the evaluation set, paired, not over seeds: how far two trainings of the same
settings lie apart is not in them. A negative difference of NLL favours the first.

Each line of the first table, by its command:

```sh
{listed}
```

## MACs of the positional stream

A forward projects 2 x span = 512 relative positions by the matrices of query and key, once for all examples of its
batch. Layouts, and so priors and BOPs, count a batch of 32, whatever the run's own: 16 positions for each example.
Counted: the layout of the model less that of the same configuration without relative attention, on the meta device
(`experiments/studies/positions.py`). Formula: 512 / batch positions at d x d MACs, d the hidden size, in every layer.
MACs are per example, of all layers, in a batch of 32.

{projections_table(rows)}

Content and positions share one chain of gates for each tensor, so the share of positions in a projection's bit
operations is that in its MACs, whatever the gates are. Positions are also multiplied with the content (c2p and p2c,
2 x tokens x 512 x d MACs a layer). These products are no projections: they stay at 32 bit in both scopes.

{model_table(rows)}
"""


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", help="folder of the official TSV release, for sst2")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--backbones", nargs="+", default=list(MODELS), help="names or folders")
    parser.add_argument("--max_train", type=int, help="training examples; none: the task's own number")
    parser.add_argument("--epochs", type=int, help="none: the task's own number")
    parser.add_argument("--draws", type=int, help="of the gates; none: the task's own number")
    parser.add_argument("--lengths", nargs="+", type=int, default=[64, 128], help="tokens at which MACs are counted")
    parser.add_argument("--output_dir", default="runs/demo_deberta")
    parser.add_argument(
        "--table", type=Path, default=Path("runs/demo_deberta/table.md"), help="where the page is written"
    )
    options = parser.parse_args(arguments)
    cells = [
        cell(options, task, backbone, method)
        for backbone in options.backbones for task in options.tasks for method in METHODS
    ]  # fmt: skip
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(page(options, cells), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
