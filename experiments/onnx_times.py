"""Size, memory and time of exported ONNX models, in turn in one process, one thread.

python experiments/onnx_times.py FOLDER FOLDER --batch 1 --length 32
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

from experiments.bench.deployed_child import measured
from experiments.bench.systems import System, opened, some_inputs
from experiments.bench.timing import in_turn, spread
from experiments.studies.scripts import run_script
from pyro_blora.deploy.onnx_file import MODEL


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="by pyro-blora export --format onnx; the first is 1.00")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--vocabulary", type=int, default=30_000, help="tokens are below it")
    parser.add_argument("--seconds", type=float, default=30.0, help="of timing, in all")
    options = parser.parse_args(arguments)
    for folder in options.folders:
        if not (folder / MODEL).is_file():
            raise ValueError(f"{folder} has no {MODEL}: give a folder that pyro-blora export --format onnx wrote")
    systems = [System(folder.name, "onnx", str(folder / MODEL)) for folder in options.folders]
    batch = options.batch, options.length, options.vocabulary
    memory = [measured(system, batch)["resident"] for system in systems]
    calls = [opened(system, 1) for system in systems]
    inputs, size = some_inputs(*batch), f"{options.batch} x {options.length}"
    timed = {str(i): lambda call=call: call(inputs) for i, call in enumerate(calls)}
    taken = list(in_turn(timed, seconds=options.seconds).values())
    print(f"| model | MB | resident, MB | {size}, ms (quartiles) | of the first |\n|---|---|---|---|---|")
    for system, resident, seconds in zip(systems, memory, taken, strict=True):
        median, low, high = spread([1e3 * x for x in seconds])
        ratio, *_ = spread([own / first for own, first in zip(seconds, taken[0], strict=True)])
        cells = [system.name, f"{system.bytes / 1e6:.1f}", f"{resident / 1e6:.0f}"]
        print(f"| {' | '.join(cells)} | {median:.1f} ({low:.1f} to {high:.1f}) | {ratio:.2f} |")


if __name__ == "__main__":
    run_script(main)
