"""Deployed models side by side: size, memory, time, metric and NLL; and how good a proxy of time bit operations are.

    python experiments/deploy_benchmark.py --glue_dir GLUE --report benchmarks/deployed.md --figures benchmarks/figures
    python experiments/deploy_benchmark.py --glue_dir GLUE --quick    # few rows and rounds, to see that it runs

MiniLM, scope `encoder`, SST-2 and STS-B: trains what is missing (bench/artefacts.py has the runs), makes every
artefact, opens each in a fresh process, runs all of them in turn in one process, on one and two threads, and scores
them on the whole dev set. Finished rows are kept as JSON, so that it may be resumed; delete them to measure again.
Needs the extras `demo` and `onnx`. torchao's row is there where torchao is. As PEFT imports it whenever it is
installed, it is best beside the environment: pip install --no-deps -c constraints.txt --target runs/torchao torchao,
and PYTHONPATH=runs/torchao in front of the command.
"""

import argparse
import os
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.bench import deployed_page, proxies
from experiments.bench.artefacts import Studied
from experiments.bench.deployed import SIZES, Measuring
from experiments.studies.scripts import run_script
from pyro_blora.machine import keep_freed_memory

TASKS = ("sst2", "stsb")
QUICK = ((1, 32), (8, 128))  # sizes, texts and tokens


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glue_dir", required=True, help="folder of the official TSV release")
    parser.add_argument("--quick", action="store_true", help="64 rows, one epoch, few rounds; kept in output_dir")
    parser.add_argument("--max_train", type=int, default=1500)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.10, 0.06], help="of the model's bit operations")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--seconds", type=float, default=12.0, help="of timing at each size and number of threads")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/deployed"), help="of runs and artefacts")
    parser.add_argument("--keep", type=Path, default=Path("benchmarks/cells/deployed"), help="folder of finished rows")
    parser.add_argument("--report", type=Path, help="the page; none: deployed.md in output_dir")
    parser.add_argument("--figures", type=Path, help="folder of the figures; none: output_dir")
    options = parser.parse_args(arguments)
    if options.quick:
        options.output_dir = options.output_dir / "quick"
        options.keep, options.max_train, options.epochs, options.seconds = options.output_dir / "cells", 64, 1, 1.0
    keep_freed_memory()
    folder = options.output_dir
    studied = Studied(options.glue_dir, folder, options.max_train, options.epochs, tuple(options.budgets))
    sizes = QUICK if options.quick else SIZES
    measuring = Measuring(studied, options.keep, options.seconds, tuple(options.threads), sizes)
    rows = [row for task in options.tasks for row in measuring.rows(task)]
    timed = measuring.times(options.tasks[0])
    profiles = measuring.profiles(options.tasks[0], *QUICK[-1])
    run = studied.configs(options.tasks[0])["lora"].folder
    allocated = proxies.finished(options.keep / "proxies.json", run, folder / "proxies", 3 * options.seconds,
                                 options.quick)  # fmt: skip
    report, figures = options.report or folder / "deployed.md", options.figures or folder
    command = shlex.join(["python", "experiments/deploy_benchmark.py", *arguments]).replace(options.glue_dir, "GLUE")
    deployed_page.write(report, figures, rows, timed, profiles, allocated, measuring.told(), command)
    print(report)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    run_script(main)
