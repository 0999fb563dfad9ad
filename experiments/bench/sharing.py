"""What OpenMP's spinning threads cost beside other programs: seconds of a training step, as it is and with fewer spins.

    python -m experiments.bench.sharing                 # beside none and beside 3 busy programs
    python -m experiments.bench.sharing --beside 8 --steps 3

A step is plain LoRA of MiniLM's size on every processor, in a process of its own; the busy programs compute nothing
and never sleep. Medians, taken in turn: `machine.spin_briefly` is what the command line and the tests do.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_SETTINGS = {"as libgomp has it": {}, "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"}}
_CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


def one_process(steps: int) -> None:
    """Print the seconds of every step after the first."""
    from experiments.bench.networks import Setting
    from experiments.bench.subjects import STEPS

    step = STEPS["PEFT LoRA"](Setting(batch=8, length=32))
    step()
    for _ in range(steps):
        began = time.perf_counter()
        step()
        print(time.perf_counter() - began, flush=True)


def median_of(steps: int, environment: dict[str, str]) -> float:
    """Seconds of a step in a process of its own."""
    command = [sys.executable, "-m", "experiments.bench.sharing", "--steps", str(steps), "--alone"]
    kept = {name: value for name, value in os.environ.items() if name not in _CHOSEN}
    done = subprocess.run(command, cwd=ROOT, env=kept | environment, stdout=subprocess.PIPE, check=True, text=True)
    return statistics.median(map(float, done.stdout.split()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beside", type=int, nargs="*", default=[0, 3], help="busy programs (default: 0 3)")
    parser.add_argument("--steps", type=int, default=12, help="of each measurement (default: 12)")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # the measured process
    options = parser.parse_args()
    if options.alone:
        one_process(options.steps)
        return
    print(
        f"| busy programs beside it, on {len(os.sched_getaffinity(0))} cores | {' | '.join(_SETTINGS)} |\n|---|---|---|"
    )
    for busy in options.beside:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        try:
            found = [median_of(options.steps, environment) for environment in _SETTINGS.values()]
        finally:
            for other in others:
                other.kill()
                other.wait()
        print(f"| {busy} | {' | '.join(f'{1000 * seconds:,.0f} ms' for seconds in found)} |", flush=True)


if __name__ == "__main__":
    main()
