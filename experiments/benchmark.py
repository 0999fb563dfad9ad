"""How fast it is, against what a user would run instead, in the same process: one command, one table.

    python experiments/benchmark.py                       # every part, on the GPU where there is one
    python experiments/benchmark.py --only quantizer step # parts of it

The page says what each figure is compared with, and which ones the machine could not take. Networks have the exact
configuration of MiniLM (CPU) or DeBERTaV3-base (GPU, bf16) and random weights.
"""

import argparse
import dataclasses
import functools
import shlex
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.bench import page, quantizers, subjects
from experiments.bench.networks import Setting
from experiments.studies.scripts import run_script
from pyro_blora.machine import keep_freed_memory

CPU = Setting()
GPU = Setting(backbone="deberta", length=128, device="cuda", precision="bf16")


def parts(device: str, factor: float) -> dict:
    """Every measurement by name, as a function without arguments that gives rows; seconds times a factor."""
    whole = GPU if device == "cuda" else CPU
    small = whole if device == "cuda" else dataclasses.replace(whole, batch=8, length=32)
    return {
        "quantizer": functools.partial(quantizers.measure, device, 8 * factor),
        "gates": functools.partial(subjects.program_overhead, whole, 6 * factor),
        "step": functools.partial(subjects.steps, whole, 24 * factor),
        "profile": functools.partial(subjects.where_time_goes, whole),
        "predictions": functools.partial(subjects.predictive, small, 8 * factor),
        "growth": functools.partial(subjects.growth, small, 1.0 * factor),
        "memory": functools.partial(subjects.memory, whole),
        "prediction_memory": functools.partial(subjects.predictive_memory, small),
        "first_step": functools.partial(subjects.first_step, small),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--only", nargs="+", choices=list(parts("cpu", 1.0)), help="parts to measure; none: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="factor on the time that each part takes")
    parser.add_argument("--output_dir", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--report", type=Path, help="the page; none: benchmark.md in output_dir")
    parser.add_argument("--figures", type=Path, help="folder of the plot; none: output_dir")
    options = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", category=FutureWarning)  # of other libraries
    torch.manual_seed(0)
    keep_freed_memory()  # as the command line does
    chosen = {name: part for name, part in parts(options.device, options.seconds).items()
              if options.only is None or name in options.only}  # fmt: skip
    rows = []
    for name, part in chosen.items():
        print(f"measuring {name}", file=sys.stderr)  # a bar's thread would be measured, too
        rows += part()
    command = shlex.join(["python", "experiments/benchmark.py", *sys.argv[1:]])
    report = options.report or options.output_dir / "benchmark.md"
    missing = subjects.not_taken(options.device) if options.only is None else ["parts that --only left out"]
    page.write(options.output_dir, report, options.figures or options.output_dir, rows, page.machine(options.device),
               missing, command)  # fmt: skip
    print(report.read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_script(main)
