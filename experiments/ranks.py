"""Does `value` keep larger ranks than `query` and `key`, as the seed paper saw? Task by task, with intervals.

    python experiments/ranks.py --glue_dir GLUE --report benchmarks/ranks.md --figures benchmarks/figures

For each backbone, task and seed, from the same LoRA, under priors whose prices do not favour `value`:

    nested          every rank of every projection has the same rate, so that a difference can come from the data only
    bops            a rank costs the bit operations that it adds, of an example in a batch of 32: DeBERTa's positional
                    stream, which runs once a batch through query and key, makes them 1.1 times as dear as value, not 5
    hierarchical    a rate for the ranks of each projection type and for the bits of each tensor role, learned

Differences are of E[rank], layer by layer, and averaged over layers; their intervals are Student's over seeds, and,
beside it, over layers. Finished cells are kept, so the study may be spread out; `--cells` trains some priors only.
"""

import itertools
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
from experiments.studies.compare import rank_differences, spread
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from pyro_blora.build import build
from pyro_blora.config import RunConfig

TASKS = ("sst2", "mrpc", "stsb")  # MiniLM learns nothing on RTE, and nothing on CoLA from 2,000 rows
BACKBONES = ("demo", "demo-deberta")  # MiniLM, and the same weights in DeBERTaV3's architecture
PRIORS = {"nested": {"rate": 1.0, "rank_rate": 1.0}, "bops": {}, "hierarchical": {}}
KINDS = ("query", "key", "value")
COLOURS = {"query": "#0072B2", "key": "#009E73", "value": "#D55E00"}  # Okabe and Ito
Groups = dict[tuple[str, str, str], list[dict]]


def configuration(options, backbone: str, task: str, seed: int, prior: str, settings: dict) -> RunConfig:
    return RunConfig(
        task=task, glue_dir=options.glue_dir, backbone=backbone, seed=seed, max_length=64,
        precision=options.precision, max_train=options.max_train, epochs=options.epochs, kl_warmup=options.kl_warmup,
        draws=2, prior=prior, prior_settings=settings, output_dir=options.output_dir,
    )  # fmt: skip


def study(options) -> list[dict]:
    """One cell for each seed, backbone, task and prior, with these beside what was kept of the run."""
    rows = []
    for seed, backbone, task in itertools.product(options.seeds, options.backbones, options.tasks):
        lora = configuration(options, backbone, task, seed, "fixed", {"bits": 32})
        n_train = None
        for prior, settings in PRIORS.items():
            path = options.keep / "ranks" / f"{Path(backbone).name}-{task}-{seed}-{prior}.json"
            train = prior in options.cells and not options.only_finished
            if train and not path.exists():
                n_train = n_train or build(lora).program.n_train
            config = configuration(options, backbone, task, seed, prior, settings)
            cell = finished(path, config, lora, n_train or 0, train=train)
            if cell is not None:
                rows.append({"backbone": backbone, "task": task, "seed": seed, "prior": prior, **cell})
                print(*list(rows[-1].values())[:4], f"{rank_differences([cell])[0]:+.2f}", flush=True)
    return rows


def grouped(rows: list[dict]) -> Groups:
    """Cells that differ in their seed only, in the order of the first of each."""
    groups: Groups = {}
    for row in sorted(rows, key=lambda row: (row["backbone"], list(PRIORS).index(row["prior"]))):
        groups.setdefault((row["backbone"], row["task"], row["prior"]), []).append(row)
    return groups


def table(groups: Groups) -> str:
    lines = ["| backbone | task | prior | seeds | score | E[rank] query / key / value | value minus mean of query, key "
             "[95 % over seeds] | [95 % over layers] |", "|" + "---|" * 8]  # fmt: skip
    for (backbone, task, prior), cells in groups.items():
        ranks = " / ".join(f"{np.mean([c['summary']['expected_rank'][kind] for c in cells]):.2f}" for kind in KINDS)
        mean, low, high, _ = rank_differences(cells)
        metric = cells[0]["summary"]["metric"]["name"]
        score = spread([c["summary"]["metric"]["value"] for c in cells])
        lines.append(f"| {backbone} | {task} | `{prior}` | {len(cells)} | {metric} {score} | {ranks} | {mean:+.2f} "
                     f"{_written(over_seeds(cells))} | [{low:+.2f}, {high:+.2f}] |")  # fmt: skip
    return "\n".join(lines)


def over_seeds(cells: list[dict]) -> tuple[float, float] | None:
    """The 95 % interval of the mean over layers, over seeds; None of a single one."""
    return rank_differences(cells, over="seeds")[1:3] if len(cells) > 1 else None


def _written(interval: tuple[float, float] | None) -> str:
    return "" if interval is None else f"[{interval[0]:+.2f}, {interval[1]:+.2f}]"


def summary(groups: Groups) -> str:
    """By prior, where the interval over seeds lies above, below or across 0."""
    lines = []
    for prior in PRIORS:
        found = {
            f"{task} on {backbone}": interval
            for (backbone, task, of), cells in groups.items()
            if of == prior and (interval := over_seeds(cells))
        }
        larger = [name for name, (low, _) in found.items() if low > 0]
        smaller = [name for name, (_, high) in found.items() if high < 0]
        undecided = [name for name in found if name not in larger + smaller]
        told = {"keeps larger ranks": larger, "keeps smaller ones": smaller, "is undecided": undecided}
        parts = [f"{verb} in {len(names)} ({', '.join(names) or 'none'})" for verb, names in told.items()]
        if found:
            lines.append(f"- Under `{prior}`, of {len(found)}, `value` {', '.join(parts)}.")
    return "\n".join(lines) or "No backbone, task and prior has two seeds."


def rates(groups: Groups) -> str:
    """Posterior means of the hierarchical rates, mean and standard deviation over seeds."""
    learned = {key: cells for key, cells in groups.items() if key[2] == "hierarchical"}
    if not learned:
        return "No run is finished."
    state = next(iter(learned.values()))[0]["summary"]["prior_state"]
    lines = ["| rate of, nats a gate | " + " | ".join(f"{task}, {backbone}" for backbone, task, _ in learned) + " |",
             "|---|" + "---|" * len(learned)]  # fmt: skip
    for name in (name for name in state if not name.endswith(("_low", "_high"))):
        values = (spread([c["summary"]["prior_state"][name] for c in cells], 2) for cells in learned.values())
        lines.append(f"| `{name.removeprefix('rate_')}` | " + " | ".join(values) + " |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """E[rank] layer by layer, a row of panels a backbone and prior, a column a task; thin lines are seeds."""
    groups = grouped(rows)
    tasks = list(dict.fromkeys(task for _, task, _ in groups))
    lines = list(dict.fromkeys((backbone, prior) for backbone, _, prior in groups))
    size = 2.6 * len(tasks), 2.4 * len(lines)
    _, panels = plt.subplots(len(lines), len(tasks), figsize=size, squeeze=False, sharey=True, constrained_layout=True)
    for (backbone, prior), row in zip(lines, panels, strict=True):
        for task, panel in zip(tasks, row, strict=True):
            for kind in KINDS:
                each = [_by_layer(cell, kind) for cell in groups.get((backbone, task, prior), [])]
                for values in each:
                    panel.plot(values, color=COLOURS[kind], linewidth=0.6, alpha=0.5)
                if each:
                    panel.plot(np.mean(each, axis=0), color=COLOURS[kind], marker="o", label=kind)
            panel.set_title(f"{task}, {backbone}, {prior}", fontsize=8)
            panel.set(xlabel="layer")
        row[0].set_ylabel("E[rank]")
    panels[0][0].legend(frameon=False, fontsize=8)
    plt.savefig(path, dpi=110)
    plt.close()


def _by_layer(cell: dict, kind: str) -> list[float]:
    found = {int(name.split(".")[0]): rank for name, rank in cell["ranks"].items() if name.endswith(kind)}
    return [found[layer] for layer in sorted(found)]


def report(options, rows: list[dict]) -> str:
    groups, expected = grouped(rows), len(options.seeds) * len(options.backbones) * len(options.tasks) * len(PRIORS)
    return f"""# Does `value` keep larger ranks than `query` and `key`?

```sh
python experiments/ranks.py --glue_dir GLUE --backbones {" ".join(options.backbones)} \\
    --tasks {" ".join(options.tasks)} --seeds {" ".join(map(str, options.seeds))} \\
    --max_train {options.max_train} --epochs {options.epochs} --kl_warmup {options.kl_warmup} \\
    --precision {options.precision} --report benchmarks/ranks.md --figures benchmarks/figures
```

{summary(groups)}

`demo` is MiniLM, `demo-deberta` the same weights in DeBERTaV3's architecture. Scope `adapted`, at most 8 ranks,
{options.max_train} training examples, in {options.precision}; {len(rows)} of {expected} cells are finished,
{provenance(rows)}.
`nested` charges every gate {PRIORS["nested"]["rank_rate"]:g} nat; `bops` charges a rank in proportion to the bit
operations that it adds in a batch of 32; `hierarchical` learns the rates under a Gamma(1, 1) hyperprior.

{table(groups)}

![E[rank] by layer](figures/ranks.png)

## The rates that `hierarchical` learns

Posterior means over seeds; the bits of each tensor role, the ranks of each projection type.

{rates(groups)}
"""


def main(arguments: list[str]) -> None:
    parser = study_parser(__doc__, "ranks", max_train=2000, output_dir="runs/ranks")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument("--backbones", nargs="+", default=BACKBONES)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--cells", nargs="+", default=[*PRIORS], choices=[*PRIORS], help="priors to train under")
    parser.add_argument("--kl_warmup", type=float, default=0.6, help="share of the steps before the gates start")
    parser.add_argument("--precision", default="float32", help="of the backbone: float32 or bf16")
    options = parser.parse_args(arguments)
    write_page(options, "ranks", study(options), report, figure)


if __name__ == "__main__":
    run_script(main)
