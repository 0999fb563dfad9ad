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

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import pandas as pd
import torch
import transformers

from experiments.bench.networks import Setting, deberta
from experiments.studies.cells import PREDICTED
from experiments.studies.compare import beyond_noise, paired, written
from experiments.studies.positions import model_table, projections_table, streams
from experiments.studies.scripts import run_script
from pyro_blora.config import RunConfig, load_preset
from pyro_blora.evaluation.baselines import NOISE
from pyro_blora.models import backbone_path
from pyro_blora.run import train_run, versions

CONVERTED, ORIGINAL = "demo-deberta", "demo"
TASKS = {  # what differs from the defaults; the demo's are those of its preset
    "acceptability": {key: value for key, value in load_preset("demo").items() if key not in ("task", "backbone")},
    "sst2": {"max_train": 4000, "epochs": 2, "max_length": 64, "draws": 4},  # no sentence has more than 64 tokens
}
LORA = "LoRA"
METHODS = {LORA: {"method": "lora"}, "`bops`, adapted": {"scope": "adapted"}, "`bops`, encoder": {"scope": "encoder"}}
MODELS = {CONVERTED: "MiniLM as DeBERTaV3", ORIGINAL: "MiniLM"}
BACKBONES, GATES, SCOPES = "MiniLM as DeBERTaV3 less MiniLM", "`bops` less LoRA", "scope encoder less adapted"


def settings(options, task: str, backbone: str, method: str) -> dict:
    """The flags of a cell's command."""
    found = {"task": task, "backbone": backbone, **TASKS[task], **METHODS[method]}
    if method == LORA:
        found.pop("prior", None)  # the method's own
    if task != "acceptability":
        found["glue_dir"] = options.glue_dir
    changed = {name: getattr(options, name) for name in ("max_train", "epochs", "draws")}
    return found | {name: value for name, value in changed.items() if value is not None}


def cell(options, task: str, backbone: str, method: str) -> dict | None:
    """What the page needs of a run, which is trained or resumed unless it is finished; or None."""
    flags = settings(options, task, backbone, method)
    config = RunConfig(**flags, output_dir=options.output_dir)
    folder = config.folder
    if not (folder / "summary.json").exists():
        if options.only_finished:
            return None
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


def differences(cells: list[dict]) -> list[tuple[str, str, str, dict]]:
    """(task, what is compared, name, `paired`'s intervals of what is averaged over draws), where both are there."""
    found, at = [], {(x["task"], x["backbone"], x["method"]): x for x in cells}
    for task in dict.fromkeys(x["task"] for x in cells):
        pairs = [(BACKBONES, method, CONVERTED, method, ORIGINAL) for method in METHODS]
        for name in MODELS:
            pairs += [(SCOPES if LORA not in (ours, theirs) else GATES, ours, name, theirs, name)
                      for theirs, ours in itertools.combinations(METHODS, 2)]  # fmt: skip
        for what, ours, backbone, theirs, other in pairs:
            if (task, backbone, ours) in at and (task, other, theirs) in at:
                name = f"{ours}: {backbone} less {other}" if ours == theirs else f"{backbone}: {ours} less {theirs}"
                first, second = at[task, backbone, ours], at[task, other, theirs]
                found.append((task, what, name, paired([first], [second], "accuracy", prefix="")))
    return found


def differences_table(found: list[tuple]) -> str:
    lines = ["| task | difference | of accuracy [95 %] | of NLL [95 %] | beyond noise |", "|---|---|---|---|---|"]
    for task, _, name, intervals in found:
        cells = [*map(written, intervals.values())]
        told = [{"score": "accuracy", "nll": "NLL"}[key] for key, held in intervals.items() if beyond_noise(held)]
        lines.append(f"| {task} | {name} | {' | '.join(cells)} | {', '.join(told) or 'no'} |")
    return "\n".join(lines)


def counts(found: list[tuple]) -> str:
    """How many differences of each sort are beyond noise, a line each."""
    lines = []
    for sort in (BACKBONES, GATES, SCOPES):
        held = [intervals for _, what, _, intervals in found if what == sort]
        accuracy, nll = (sum(beyond_noise(x[key]) for x in held) for key in ("score", "nll"))
        if held:
            lines.append(f"- {sort}: of {len(held)}, {accuracy} beyond noise in accuracy and {nll} in NLL.")
    return "\n".join(lines)


def command(flags: dict) -> str:
    return "python experiments/train.py " + " ".join(f"--{name} {value}" for name, value in flags.items())


def architectures() -> dict:
    """Configurations by name: that of the converted model, and DeBERTaV3-base's own."""
    with torch.device("meta"):
        base = deberta(Setting(backbone="deberta")).config
    converted = transformers.AutoConfig.from_pretrained(backbone_path(CONVERTED))
    return {MODELS[CONVERTED]: converted, "DeBERTaV3-base": base}


def page(options, cells: list[dict]) -> str:
    threads = ", ".join(str(count) for count in sorted({x["threads"] for x in cells}))
    devices = ", ".join(sorted({x["summary"]["device"] for x in cells}))
    packages = ", ".join(f"{name} {version}" for name, version in versions().items())
    rows, found = streams(architectures(), options.lengths), differences(cells)
    listed = "\n".join(command(x["flags"]) for x in cells)
    return f"""# DeBERTaV3's architecture on real weights

`--backbone demo-deberta` is MiniLM (`demo`) converted exactly into DeBERTaV3's architecture: the same function, but
query and key project content and positions. Plain LoRA (rank 8, 32 bit), and the `bops` prior at both scopes, are
trained on both. This page is written by

```sh
python experiments/demo_deberta.py --glue_dir GLUE --table benchmarks/demo_deberta.md
```

on {devices}, {threads} thread(s), beside other work; {packages}. One seed (0).

## Scores and bit operations

{scores_table(cells)}

Accuracy and NLL are averaged over draws of the gates; deployed is the one allocation of all gates that are likelier
open than closed. BOPs are expected, of 64 tokens in a batch of 32, against 32 x 32 bit. Ratios of the two backbones
have different denominators, as DeBERTaV3 has more MACs (below). † within two standard errors of the constant answer.
{len(cells)} of {len(TASKS) * len(MODELS) * len(METHODS)} combinations have been trained.

{differences_table(found)}

{counts(found)}

Intervals are over the examples of the evaluation set, paired, not over seeds: how far two trainings of the same
settings lie apart is not in them, so one beyond noise may be an accident of its seed. One interval in twenty misses
zero by chance, and differences that share a run are not independent. A negative difference of NLL favours the first.
Training seconds are not comparable: other work took turns on the same cores.

What is not seen here: the conversion sets the layer norm of the distances' embeddings to zero, and training leaves it
there, so what is projected of positions is zero and comes out as the biases (`test_positions.py`). Its products
are computed and counted as in any DeBERTaV3, and priors pay for them, but neither adapters nor bit widths act on
anything in them. What rounding does to positions that carry something is a question for a published checkpoint.

Each line of the first table, by its command:

```sh
{listed}
```

## MACs of the positional stream

A forward projects 2 x span = 512 relative positions by the matrices of query and key, once for all examples of its
batch. Layouts, and so priors and BOPs, count a batch of 32, whatever the run's own: 16 positions for each example.
Counted: the layout of the model less that of the same configuration without relative attention, on the meta device
(`experiments/studies/positions.py`). Formula: 512 / batch positions at d x d MACs, d the hidden size, in every layer.
MACs are per example, of all layers, in a batch of 32. The longest input that a run takes is what its layout counts: the
trainings above had batches of 16 and mostly shorter sentences, so positions were more of what they computed.

{projections_table(rows)}

Content and positions share one ladder for each tensor, so the share of positions in a projection's bit
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
    parser.add_argument("--only_finished", action="store_true", help="train nothing: write the page of finished cells")
    parser.add_argument("--output_dir", default="runs/demo_deberta")
    parser.add_argument(
        "--table", type=Path, default=Path("runs/demo_deberta/table.md"), help="where the page is written"
    )
    options = parser.parse_args(arguments)
    every = itertools.product(options.tasks, options.backbones, METHODS)
    cells = [found for names in every if (found := cell(options, *names)) is not None]
    if not cells:
        raise ValueError(f"no cell is finished in {options.output_dir}: run it without --only_finished")
    options.table.parent.mkdir(parents=True, exist_ok=True)
    options.table.write_text(page(options, cells), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
