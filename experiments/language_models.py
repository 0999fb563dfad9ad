"""Decoders, spans and texts: the gates on SmolLM2, on GPT-2's architecture, and on questions, task by task.

    python experiments/language_models.py --data DATA --report benchmarks/language_models.md \\
        --figures benchmarks/figures

DATA has GLUE in `glue/`, the E2E challenge in `e2e/`, SQuAD's `train.json` and `eval.json` of squad_split.py in
`squad/`, and OpenBookQA in `choice/openbookqa/`. For each study and seed, from the same LoRA:

    lora        plain LoRA at 32 bit, every rank
    no_dropout  the same, without dropout from where the gates of the others start, as these have none there
    bops        gates learned, a rung or a rank costs the bit operations that it adds
    nested      gates learned, every gate at the same rate: differences between projections come from the data only
    ptq         that LoRA at 8 bit, ranges fitted after training

Finished cells are kept, so the study may be spread out; `--studies` and `--methods` are for some of them only.
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

import transformers

from experiments.studies.cells import finished, provenance
from experiments.studies.compare import average, half_width, intervals, spread, written
from experiments.studies.pages import study_parser, write_page
from experiments.studies.scripts import run_script
from pyro_blora.build import build
from pyro_blora.config import RunConfig
from pyro_blora.models import backbone_path

RANDOM_GPT2 = "gpt2-random"
ON_DECODER = {"backbone": "demo-decoder", "group_by_length": True, "draws": 2}
OF_SQUAD = {
    "task": "squad", "batch_size": 8, "lr": 2e-3, "max_length": 256, "draws": 2, "group_by_length": True,
    "max_train": 480, "epochs": 3, "task_settings": {"stride": 64, "held_out": 120},
}  # fmt: skip
OF_E2E = {
    "task": "e2e", "max_length": 96, "draws": 2, "group_by_length": True, "epochs": 1, "max_train": 800,
    "task_settings": {"meanings": 20, "drawn": 1},
}  # fmt: skip
OF_CHOICE = {"task": "choice", "max_train": 400, "epochs": 1, "max_length": 160, "task_settings": {"held_out": 200}}
RATE = 0.1  # nats a gate, under `bops` a bit of the dearest tensor: few examples must be able to open 2,000 gates
METHODS = {
    "lora": {"method": "lora"},
    "no_dropout": {"method": "no_dropout"},  # of networks that have dropout
    "bops": {"prior": "bops", "prior_settings": {"rate": RATE}},
    "nested": {"prior": "nested", "prior_settings": {"rate": RATE, "rank_rate": RATE}},
    "ptq": {"method": "ptq", "prior_settings": {"bits": 8}},
}
STUDIES = {  # methods, and what differs from the defaults
    "SST-2, SmolLM2": (
        ["lora", "bops", "nested", "ptq"],
        {**ON_DECODER, "task": "sst2", "max_train": 500, "epochs": 4, "max_length": 64},
    ),
    "E2E, SmolLM2": (["lora", "bops", "nested"], {**OF_E2E, **ON_DECODER}),
    "E2E, GPT-2's architecture": (["lora", "bops"], {**OF_E2E, "backbone": RANDOM_GPT2, "lr": 2e-3}),
    "SQuAD, MiniLM": (["lora", "no_dropout", "bops", "nested"], {**OF_SQUAD, "backbone": "demo"}),
    "SQuAD, MiniLM as DeBERTaV3": (["lora", "no_dropout", "bops", "nested"], {**OF_SQUAD, "backbone": "demo-deberta"}),
    "OpenBookQA, SmolLM2": (["lora", "bops"], {**ON_DECODER, **OF_CHOICE}),
}
KL_WARMUP = 0.5
COLOURS = ("#0072B2", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")  # Okabe and Ito
Groups = dict[tuple[str, str], list[dict]]


def configuration(options, study: str, method: str, seed: int) -> RunConfig:
    settings = {"kl_warmup": KL_WARMUP, **STUDIES[study][1], **METHODS[method], "seed": seed}
    if method == "ptq":
        settings["kl_warmup"] = 1.0  # its gates start when everything else has learned
    if settings["backbone"] == RANDOM_GPT2:
        settings["backbone"] = str(Path(options.output_dir) / RANDOM_GPT2)
    own = settings.pop("task_settings", {}) | data_of(settings["task"], Path(options.data))
    if settings["task"] == "sst2":
        settings["glue_dir"] = own.pop("glue_dir")
    return RunConfig(**settings, task_settings=own, output_dir=options.output_dir)


def data_of(task: str, data: Path) -> dict[str, str]:
    """The flags that say where a task's data are."""
    places = {
        "sst2": {"glue_dir": "glue"}, "e2e": {"e2e_dir": "e2e"}, "choice": {"choice_dir": "choice/openbookqa"},
        "squad": {"squad_train": "squad/train.json", "squad_eval": "squad/eval.json"},
    }  # fmt: skip
    return {flag: str(data / place) for flag, place in places[task].items()}


def random_gpt2(folder: Path) -> Path:
    """A folder with GPT-2's architecture in small, weights that have learned nothing, and SmolLM2's tokenizer."""
    if not folder.exists():
        tokenizer = transformers.AutoTokenizer.from_pretrained(backbone_path("demo-decoder"))
        transformers.set_seed(0)
        shape = {"n_layer": 4, "n_embd": 256, "n_head": 4, "n_positions": 256, "vocab_size": len(tokenizer)}
        ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **ends))
        partial = folder.with_name(folder.name + ".partial")
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        partial.rename(folder)
    return folder


def study(options) -> list[dict]:
    """One cell for each study, seed and method, with these beside what was kept of the run."""
    rows = []
    for name, seed, method in itertools.product(options.studies, options.seeds, options.methods):
        if method not in STUDIES[name][0]:
            continue
        lora, config = (configuration(options, name, each, seed) for each in ("lora", method))
        path = options.keep / "language_models" / f"{file_name(name)}-{seed}-{method}.json"
        n_train = 0
        if not path.exists() and not options.only_finished:
            if STUDIES[name][1]["backbone"] == RANDOM_GPT2:
                random_gpt2(Path(config.backbone))
            n_train = build(lora).program.n_train
        cell = finished(path, config, lora, n_train, train=not options.only_finished)
        if cell is not None:
            rows.append({"study": name, "seed": seed, "method": method, **cell})
            found = cell["summary"]
            print(name, seed, method, found["metric"], f"NLL {found['nll']:.4f}", found["bops"]["deployed"], flush=True)
    return rows


def file_name(study: str) -> str:
    return "".join(x if x.isalnum() else "-" for x in study.lower().replace(", ", "-").replace("'s", ""))


def grouped(rows: list[dict]) -> Groups:
    """Cells that differ in their seed only, in the order of STUDIES and METHODS."""
    groups: Groups = {}
    for row in sorted(rows, key=lambda row: (list(STUDIES).index(row["study"]), list(METHODS).index(row["method"]))):
        groups.setdefault((row["study"], row["method"]), []).append(row)
    return groups


def table(groups: Groups) -> str:
    lines = ["| study | method | seeds | score, deployed | NLL, deployed | NLL, draws | NLL less LoRA's [95 %] | "
             "less that without dropout [95 %] | BOPs / adapted | BOPs / model | expected bits: weights, activations |",
             "|" + "---|" * 11]  # fmt: skip
    for (name, method), cells in groups.items():
        found = [cell["summary"] for cell in cells]
        deployed = [x["deployed"] for x in found]
        metric = found[0]["metric"]["name"]
        bits = {tensor: np.mean([x["expected_bits"][tensor] for x in found]) for tensor in found[0]["expected_bits"]}
        lines.append(
            f"| {name} | {method} | {len(cells)} | {metric} {spread([x['metric']['value'] for x in deployed])} | "
            f"{spread([x['nll'] for x in deployed])} | {spread([x['nll'] for x in found])} | "
            f"{written(less(groups, name, method, 'lora'))} | {written(less(groups, name, method, 'no_dropout'))} | "
            f"{np.mean([x['bops']['deployed']['adapted_ratio'] for x in found]):.1%} | "
            f"{np.mean([x['bops']['deployed']['model_ratio'] for x in found]):.1%} | "
            f"{bits['base']:.1f}, {bits['input']:.1f} |"
        )
    return "\n".join(lines)


def less(groups: Groups, study: str, method: str, rival: str) -> tuple[float, ...] | None:
    """Mean and 95 % interval of the deployed NLL less that of a rival without gates, over the seeds that both have."""
    theirs = {cell["seed"]: cell for cell in groups.get((study, rival), [])}
    pairs = [(cell, theirs[cell["seed"]]) for cell in groups[study, method] if cell["seed"] in theirs]
    if method == rival or not pairs:
        return None
    arrays = [tuple({"score": _scores(cell)} for cell in pair) for pair in pairs]
    return intervals(arrays, lambda pair, counts: (average(counts, pair[1]["score"] - pair[0]["score"]),))[0]


def _scores(cell: dict) -> np.ndarray:
    return np.asarray(cell["examples"]["deployed_log_likelihood"])


def ranks(groups: Groups) -> str:
    """E[rank] by projection type, and value less key where both have as many outputs."""
    lines = ["| study | prior | seeds | E[rank] by type of projection | value less key, mean over layers [95 %] |",
             "|" + "---|" * 5]  # fmt: skip
    for (name, method), cells in groups.items():
        if method in ("bops", "nested"):
            means = {kind: np.mean([c["summary"]["expected_rank"][kind] for c in cells])
                     for kind in cells[0]["summary"]["expected_rank"]}  # fmt: skip
            told = ", ".join(f"{kind} {mean:.2f}" for kind, mean in means.items())
            lines.append(f"| {name} | `{method}` | {len(cells)} | {told} | {written(value_less_key(cells))} |")
    return "\n".join(lines)


def value_less_key(cells: list[dict]) -> tuple[float, ...] | None:
    """E[rank] of value less key, over layers, each averaged over seeds; None where they are one fused map."""
    by_type = [by_layer(cell) for cell in cells]
    if not all({"key", "value"} <= set(found) for found in by_type):
        return None
    each = np.mean([np.subtract(found["value"], found["key"]) for found in by_type], axis=0)
    half = float(half_width(each))
    return each.mean(), each.mean() - half, each.mean() + half


def by_layer(cell: dict) -> dict[str, list[float]]:
    found: dict[str, dict[int, float]] = {}
    for name, rank in cell["ranks"].items():
        layer, _, kind = name.partition(".")
        found.setdefault(kind, {})[int(layer)] = rank
    return {kind: [ranks[i] for i in sorted(ranks)] for kind, ranks in found.items()}


def texts(groups: Groups) -> str:
    """Scores of the texts that were written with the deployed allocation."""
    lines = ["| study | method | seeds | texts | scores |", "|" + "---|" * 5]
    for (name, method), cells in groups.items():
        written = [cell["summary"]["written"] for cell in cells if "written" in cell["summary"]]
        if written:
            scores = {key: spread([x["scores"][key] for x in written]) for key in written[0]["scores"]}
            told = ", ".join(f"{key} {value}" for key, value in scores.items())
            lines.append(f"| {name} | {method} | {len(cells)} | {written[0]['texts']} | {told} |")
    return "\n".join(lines)


def figure(rows: list[dict], path: Path) -> None:
    """E[rank] by layer under `nested` and `bops`, a column a study."""
    groups = grouped(rows)
    studies = list(dict.fromkeys(name for name, method in groups if method in ("bops", "nested")))
    size = 3.0 * max(1, len(studies)), 4.6
    _, panels = plt.subplots(2, max(1, len(studies)), figsize=size, squeeze=False, sharey=True, constrained_layout=True)
    for prior, line in zip(("nested", "bops"), panels, strict=True):
        for name, panel in zip(studies, line, strict=False):
            cells = [by_layer(cell) for cell in groups.get((name, prior), [])]
            for kind, colour in zip(cells[0] if cells else (), COLOURS, strict=False):
                panel.plot(np.mean([found[kind] for found in cells], 0), color=colour, marker=".", label=kind)
            panel.set_title(f"{name}, {prior}", fontsize=8)
            panel.set(xlabel="layer")
            panel.set_visible(bool(cells))
            if cells:
                panel.legend(frameon=False, fontsize=7)
        line[0].set_ylabel("E[rank]")
    plt.savefig(path, dpi=110)
    plt.close()


def report(options, rows: list[dict]) -> str:
    groups = grouped(rows)
    return f"""# Decoders, spans and texts

```sh
python experiments/language_models.py --data DATA --seeds {" ".join(map(str, options.seeds))} \\
    --report benchmarks/language_models.md --figures benchmarks/figures
```

What two cores can show of the gates on other networks and kinds of outcome than an encoder's classes: SmolLM2-135M,
whose weights were rounded to 4 bit before they came here (by groups, as a GGUF file); GPT-2's architecture with weights
that have learned nothing, so that its scores say that the commands work, and nothing else; and answers as spans of a
text. A few hundred training examples, scope `adapted`, 8 ranks. All methods of a study and seed go on from one LoRA;
gates start when {KL_WARMUP:.0%} of its steps are over; a rate is {RATE:g} nats (`nested`: of a gate; `bops`: of one
more bit of the dearest tensor). {len(rows)} cells,
{provenance(rows)}.

{table(groups)}

Deployed is the one allocation of all gates that are likelier open than closed. The interval is over the held-out
examples, paired, and over seeds where there are several; a negative difference favours the gates. BOPs are of the
deployed allocation, against 32 x 32 bit; `ptq` is 8 bit everywhere. LoRA has dropout to its end, learned gates have
none once they start, nor has `no_dropout`, LoRA without it from there: the second difference is what the gates do.
SmolLM2 has no dropout to begin with.

## Which projections keep their ranks

{ranks(groups)}

Under `nested` every rank costs the same, so that a difference comes from the data. Key and value have as many outputs
as each other in these networks; query has three times as many in SmolLM2, so that `bops` makes its ranks dearer. The
interval is of the mean over layers of a seed's average. Under `bops`, at {RATE:g} nats a bit of the dearest tensor,
few ranks close, so it says little; [ranks](ranks.md) has dearer gates, on encoders.

![E[rank] by layer](figures/language_models.png)

## Texts that were written

{texts(groups)}

The most probable token each time, of the deployed allocation; [what the scores are](../docs/how-to/language-models.md).
"""


def main(arguments: list[str]) -> None:
    data = ("--data", "folder with glue/, e2e/, squad/ and choice/")
    parser = study_parser(__doc__, "language_models", max_train=None, output_dir="runs/language_models", data=data)
    parser.add_argument("--studies", nargs="+", default=[*STUDIES], choices=[*STUDIES])
    parser.add_argument("--methods", nargs="+", default=[*METHODS], choices=[*METHODS], help="of the cells")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    options = parser.parse_args(arguments)
    write_page(options, "language_models", study(options), report, figure)


if __name__ == "__main__":
    run_script(main)
