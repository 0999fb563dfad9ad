"""What a range for every output channel, rungs of 3 and 6 bit, and bfloat16 cost: time and memory of a training step.

    python -m experiments.bench.choices                  # MiniLM, 8 x 32 and 32 x 64 tokens, every projection
    python -m experiments.bench.choices --seconds 60

Ratios to the same step with one range a tensor and five bit widths in float32, taken in turn; peaks are of processes of
their own.
"""

import argparse
import dataclasses

from .child import run
from .networks import Setting
from .subjects import STEPS
from .timing import in_turn, spread

_USUAL = "gated, every projection"
_OTHERS = {  # what is shown: (kind of step, what is set for it)
    f"{_USUAL}, by channel": (f"{_USUAL}, by channel", {}),
    f"{_USUAL}, seven widths": (f"{_USUAL}, seven widths", {}),
    f"{_USUAL}, bfloat16": (_USUAL, {"precision": "bf16"}),
}
_SIZES = ((8, 32), (32, 64))  # sentences, tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing at each size")
    options = parser.parse_args()
    for batch, length in _SIZES:
        setting = Setting(batch=batch, length=length)
        each = {_USUAL: (_USUAL, setting)} | {
            name: (kind, dataclasses.replace(setting, **changes)) for name, (kind, changes) in _OTHERS.items()
        }
        taken = in_turn({name: STEPS[kind](own) for name, (kind, own) in each.items()}, seconds=options.seconds)
        peaks = {name: run(kind, dataclasses.asdict(own))["bytes"] for name, (kind, own) in each.items()}
        for name in _OTHERS:
            ratios = [mine / theirs for mine, theirs in zip(taken[name], taken[_USUAL], strict=True)]
            middle, low, high = spread(ratios)
            print(
                f"{batch} x {length}, {name}: {middle:.3f} [{low:.3f}, {high:.3f}] of the time in {len(ratios)} rounds "
                f"(fastest {min(taken[name]) / min(taken[_USUAL]):.3f}), {peaks[name] / peaks[_USUAL]:.3f} of the "
                f"{peaks[_USUAL] / 2**20:.0f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
