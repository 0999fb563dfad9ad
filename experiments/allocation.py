"""Is the allocation worth anything? The learned bit widths and ranks against others with the same bit operations.

    python experiments/allocation.py --glue_dir GLUE --report benchmarks/allocation.md --figures benchmarks/figures

For each task, seed and budget (the BOPs of uniform W8A8, W4A8 and W4A4, scope `encoder`), in the same loop, data order
and number of steps, each from the same LoRA that the first part of training gives:

    budget      prior `budget` at the BOPs of the uniform allocation, a cold posterior, its deployed allocation
    uniform     quantization-aware LoRA: every weight at one width, every activation at one width
    post        the same widths, but set after training: ranges are fitted in the last step only
    random      rungs closed at random down to the same BOPs, then as `uniform`
    lora        no quantization

Each cell is a run of `pyro-blora train`; what comes before its gates start is shared between the cells of a task and
seed (the run goes through the same bits as if it had been trained alone). Finished cells are kept, so the study may be
spread out; `--cells` runs some of them only.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.bops import expected_bops
from pyro_blora.build import build
from pyro_blora.checkpoint import trainable
from pyro_blora.config import RunConfig
from pyro_blora.run import train_run
from pyro_blora.training import Schedule, fit

CHECKPOINT = Path("checkpoints/state.safetensors")
BUDGETS = {"W8A8": (8, 8), "W4A8": (4, 8), "W4A4": (4, 4)}
METHODS = ("lora", "uniform", "budget", "random", "post")
COLD = 0.1  # weight of the KL: what is deployed is one allocation, so the posterior is kept near its mode


def configuration(options, task: str, seed: int, method: str, budget: str | None = None, bops: float = 0.0):
    """The run of one cell; `bops` is the share of the model's bit operations that the uniform allocation takes."""
    weights, activations = BUDGETS.get(budget, (32, 32))
    uniform = {"bits": weights, "activation_bits": activations}
    changes = {
        "lora": {"prior": "fixed", "prior_settings": {"bits": 32}},
        "uniform": {"prior": "fixed", "prior_settings": uniform},
        "post": {"prior": "fixed", "prior_settings": uniform, "kl_warmup": 0.9999},
        "random": {"prior": "random", "prior_settings": {"bops": bops, "denominator": "model", "seed": seed}},
        "budget": {"prior": "budget", "prior_settings": {"bops": bops, "denominator": "model"}, "kl_weight": COLD},
    }[method]
    return RunConfig(**{
        "task": task, "glue_dir": options.glue_dir, "backbone": "demo", "scope": "encoder", "seed": seed,
        "max_train": options.max_train, "epochs": options.epochs, "kl_warmup": options.kl_warmup, "max_length": 64,
        "draws": options.draws, "output_dir": options.output_dir, **changes,
    })  # fmt: skip


def share_of(config: RunConfig) -> tuple[float, int]:
    """The BOPs of the model that a fixed allocation takes, and the number of training examples."""
    program = build(config).program
    return expected_bops(program.layout, *(law.mean for law in program.prior())).model_ratio.item(), program.n_train


def finished(config: RunConfig, lora: RunConfig, n_train: int) -> dict:
    """The summary of a cell, trained from the shared LoRA if it is not there."""
    folder = Path(config.output_dir) / config.folder_name
    partial = folder.with_name(f".{folder.name}.partial")
    if not folder.exists():
        if not partial.exists():
            warm(config, trunk(lora, Schedule.of(config, n_train)), partial)
        train_run(config)
    return json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def trunk(lora: RunConfig, schedule: Schedule) -> Path:
    """The checkpoint of `lora` at the step where the gates of `schedule` start, going on from an earlier one."""
    steps = min(schedule.opening, schedule.steps - 1)
    root = Path(lora.output_dir) / f".trunk-{lora.folder_name}"
    folder = root / str(steps)
    if not (folder / CHECKPOINT).exists():
        earlier = [int(path.name) for path in root.glob("[0-9]*") if int(path.name) < steps]
        if earlier and not folder.exists():
            shutil.copytree(root / str(max(earlier)), folder)
        fit(lora, folder=folder, until=steps)
    return folder / CHECKPOINT


def warm(config: RunConfig, source: Path, partial: Path) -> None:
    """Put a state of LoRA where the run of `config` resumes: until then both are the same."""
    program = build(config).program
    shared = {name for name in trainable(program) if name.startswith("net.") or name == "log_scale"}
    with safe_open(source, framework="pt") as file:
        notes = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys() if key.partition("/")[2] in shared}  # noqa: SIM118 (not a dict)
    own = {f"parameter/{name}": x.detach().clone() for name, x in trainable(program).items() if name not in shared}
    (partial / CHECKPOINT).parent.mkdir(parents=True)
    waiting = partial / CHECKPOINT.with_suffix(".tmp")
    save_file(tensors | own, waiting, metadata=notes)
    waiting.rename(partial / CHECKPOINT)


def study(options) -> list[dict]:
    """One row a cell, in the order of the table; runs what is missing among `options.cells`."""
    rows = []
    for seed in options.seeds:
        for task in options.tasks:
            lora = configuration(options, task, seed, "lora")
            _, n_train = share_of(lora)
            for budget in (None, *options.budgets):
                share = share_of(configuration(options, task, seed, "uniform", budget))[0] if budget else 1.0
                for method in METHODS:
                    if (method == "lora") != (budget is None):
                        continue
                    config = lora if method == "lora" else configuration(options, task, seed, method, budget, share)
                    there = (Path(config.output_dir) / config.folder_name).exists()
                    if not there and method not in options.cells:
                        continue
                    result = finished(config, lora, n_train)
                    rows.append(
                        {"task": task, "seed": seed, "budget": budget, "method": method, "share": share, **result}
                    )
                    print(line(rows[-1]), flush=True)
    return rows


def line(row: dict) -> str:
    at = row["deployed"]
    return (f"{row['task']} seed {row['seed']} {row['budget'] or '':5s} {row['method']:8s} {at['metric']['name']} "
            f"{at['metric']['value']:.4f} NLL {at['nll']:.4f} BOPs {row['bops']['deployed']['model_ratio']:.4f} of the "
            f"model; {row['draws']} draws: {row['metric']['value']:.4f} NLL {row['nll']:.4f} BOPs "
            f"{row['bops']['model_ratio']:.4f}; {row['seconds']['training']:.0f} s")  # fmt: skip


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", required=True, help="folder of the official TSV release")
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), choices=list(BUDGETS))
    parser.add_argument("--cells", nargs="+", default=METHODS, choices=METHODS, help="methods to run where missing")
    parser.add_argument("--max_train", type=int, default=4000)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--kl_warmup", type=float, default=0.7, help="share of the steps before the gates start")
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--output_dir", default="runs/allocation")
    options = parser.parse_args(arguments)
    study(options)


if __name__ == "__main__":
    main(sys.argv[1:])
