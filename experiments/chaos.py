"""Kill trainings at random moments, finish them by the same command, and compare them with undisturbed ones.

    python experiments/chaos.py --kills 132 --report benchmarks/chaos.md
    python experiments/chaos.py --kills 4 --only bayesian_lora        # the fast form, as in the tests

Exit code 1 where a run was lost, differs, lacks its report or leaves something over. What went wrong is kept in
--folder.
"""

import argparse
import json
import os
import shlex
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch
for name, value in {  # before torch is imported: nothing may start a thread in the process that forks
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYRO_BLORA_COMPILE": "0",
    "HF_HUB_OFFLINE": "1", "GOMP_SPINCOUNT": "1000",
}.items():  # fmt: skip
    os.environ.setdefault(name, value)

import importlib

from experiments.kills.page import write
from experiments.kills.subjects import SUBJECTS, save_backbones
from experiments.kills.trials import Process, is_fine, trial, undisturbed

_NEEDED = (  # what a run imports on its way, so that forked ones need not
    "pyro_blora.run", "pyro_blora.report.page", "transformers.models.bert.modeling_bert", "altair", "vl_convert",
    "transformers.models.deberta_v2.modeling_deberta_v2", "transformers.models.auto", "h5netcdf", "laplace",
    "torch.utils.tensorboard", "matplotlib.pyplot", "pyarrow.parquet", "peft",
    "pyro_blora.adapters.layers", "pyro_blora.tasks.glue_metric", "datasets",
    "torchmetrics.functional.classification", "arviz", "scipy.stats", "scipy.optimize",
)  # fmt: skip


def drive(mine: list[tuple[str, int]], options, backbones: Path, out: Path) -> int:
    """The trials of some subjects, (name, kills wanted), one after another; a line each goes to `out`."""
    wrong = 0
    for name, wanted in mine:
        folder = options.folder / "".join(c if c.isalnum() else "-" for c in name)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            seconds, expected = undisturbed(name, backbones, folder / "whole")
        except RuntimeError as error:
            print(error, file=sys.stderr, flush=True)
            wrong += 1
            continue
        done = number = 0
        while done < wanted and number < 4 * wanted:
            kills = trial(name, number, options.seed, backbones, folder, seconds, expected)
            done, number = done + len(kills), number + 1
            with open(out, "a", encoding="utf-8") as file:
                file.writelines(json.dumps(kill) + "\n" for kill in kills)
            for kill in kills:
                said = "ok   " if is_fine(kill) else "WRONG"
                wrong += not is_fine(kill)
                print(f"{said} {name}: SIG{kill['signal']} in {kill['moment']}", flush=True)
    return min(wrong, 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=132, help="in all, spread over the configurations")
    parser.add_argument("--only", nargs="+", choices=list(SUBJECTS), default=list(SUBJECTS), metavar="NAME")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--at_a_time", type=int, default=1, help="trainings at a time")
    parser.add_argument("--folder", type=Path, help="of the runs (default: one that is removed at the end)")
    parser.add_argument("--report", type=Path, help="page to write")
    options = parser.parse_args(arguments)
    kept = options.folder is not None
    options.folder = (options.folder or Path(tempfile.mkdtemp(prefix="chaos-"))).resolve()
    options.folder.mkdir(parents=True, exist_ok=True)
    for module in _NEEDED:
        importlib.import_module(module)
    backbones = options.folder / "backbones"
    Process(lambda: save_backbones(backbones), options.folder / "backbones.log").end()
    names = options.only[: options.kills]
    wanted = [(name, options.kills // len(names) + (i < options.kills % len(names))) for i, name in enumerate(names)]
    parts = [wanted[i :: options.at_a_time] for i in range(options.at_a_time)]
    outs = [options.folder / f"kills-{i}.jsonl" for i in range(len(parts))]
    for out in outs:
        out.unlink(missing_ok=True)
    drivers = [
        Process(lambda part=part, out=out: drive(part, options, backbones, out), options.folder / f"driver-{i}.log")
        for i, (part, out) in enumerate(zip(parts, outs, strict=True))
    ]
    codes = [driver.wait(float("inf")) for driver in drivers]
    for i in range(len(drivers)):
        sys.stdout.write((options.folder / f"driver-{i}.log").read_text("utf-8", errors="replace"))
    kills = [json.loads(line) for out in outs if out.is_file() for line in out.read_text("utf-8").splitlines()]
    if options.report and kills:
        import torch

        words = [f"--kills {options.kills}", f"--seed {options.seed}", f"--at_a_time {options.at_a_time}"]
        words += [f"--only {shlex.join(options.only)}"] if options.only != list(SUBJECTS) else []
        line = " ".join(["python experiments/chaos.py", *words, f"--report {shlex.quote(str(options.report))}"])
        write(options.report, kills, line, f"cpu ({os.cpu_count()} cores), torch {torch.__version__}")
    code = int(any(codes) or len(kills) < options.kills)
    print(f"{len(kills)} kills, {'something went wrong' if code else 'all resumed, equal and with their reports'}")
    if not kept and not code:
        shutil.rmtree(options.folder)
    return code


if __name__ == "__main__":
    sys.exit(main())
