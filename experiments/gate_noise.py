"""Can the gates learn in this many steps? The noise of what they learned, beside what decides whether a rung opens.

    python experiments/gate_noise.py RUN [RUN ...] --report benchmarks/gate_noise.md

Of finished runs whose gates learned by natural gradients. A rung opens where its log Bayes factor exceeds its price,
which is what the prior asks for it. Training averages one estimate of that factor a step; the standard error of the
average says what can be told after the steps of the run. It falls with the square root of their number, so it is known
after how many it would be half of the distance between factor and price.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pyro_blora.machine import spin_briefly

spin_briefly()  # before anything imports torch

import torch

from experiments.studies.cells import CHECKPOINT
from experiments.studies.scripts import run_script
from pyro_blora import RunConfig, load
from pyro_blora.checkpoint import read_tensors
from pyro_blora.guides.base import LogBayesFactors
from pyro_blora.training.natural_gradient import standard_error

TENSORS = ("input", "base")
SITE = "gate_guide.z_evidence"


class Noise(NamedTuple):
    """Medians over the free gates of a tensor's rung, nats, and the steps in which gates learned."""

    tensor: str
    rung: str
    steps: int
    factor: float
    learned: float
    price: float
    distance: float
    error: float

    @property
    def enough(self) -> float:
        """The steps after which the standard error is half of the distance."""
        return self.steps * (2 * self.error / self.distance) ** 2


@torch.no_grad()
def noise_of(folder: Path) -> list[Noise]:
    """Of a finished run, of its first component.  Errors: ValueError for one whose gates did not learn so."""
    path = folder / CHECKPOINT
    kept = read_tensors(path)[0] if path.exists() else {}
    program = load(folder)
    guide, layout, found = program.gate_guide, program.layout, []
    if f"mean/{SITE}" not in kept or not isinstance(guide, LogBayesFactors):
        raise ValueError(
            f"{folder} has no averages of natural gradients: give a run with its checkpoints whose gates have learned "
            "by them (of prior budget with --rest or --settle)"
        )
    state = {key: kept[f"{key}/{SITE}"] for key in ("step", "start", "mean", "variance")}
    factors, learned, error = state["start"][0], state["mean"][0], standard_error(state)[0]  # (L, T, K)
    prices = -program.prior().z.depth_log_probs.diff(dim=-1)
    for tensor in TENSORS:
        t = layout.tensors.index(tensor)
        for k, (below, above) in enumerate(zip(layout.ladder, layout.ladder[1:], strict=False)):
            free = guide.z_pins[:, t, k].isnan()
            each = (x[:, t, k][free] for x in (factors, learned, prices, (factors - prices).abs(), error))
            if free.any():
                medians = [x.median().item() for x in each]
                found.append(Noise(tensor, f"{below} to {above} bit", int(state["step"]), *medians))
    return found


def table(runs: list[Path]) -> str:
    lines = [
        "| run | tensor | rung | steps | at the start | learned | price | distance | standard error | steps for half |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for folder in runs:
        config = RunConfig.from_json(folder / "config.json")
        for x in noise_of(folder):
            numbers = " | ".join(f"{value:.1f}" for value in (x.factor, x.learned, x.price, x.distance, x.error))
            run = f"{config.task}, seed {config.seed}"
            lines.append(f"| {run} | {x.tensor} | {x.rung} | {x.steps} | {numbers} | {x.enough:,.0f} |")
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--report", type=Path, default=Path("runs/gate_noise.md"))
    options = parser.parse_args(arguments)
    text = f"""# Can the gates learn in this many steps?

```sh
python experiments/gate_noise.py RUN [RUN ...] --report benchmarks/gate_noise.md
```

A rung opens where its log Bayes factor exceeds its price under the prior. *At the start*: the factor that the gates
start from; *learned*: the average of its estimates in all steps in which gates learned; *distance*: of start and price;
*standard error*: of that average; *steps for half*: after which it would be half of the distance. Medians over the
layers' projections, in nats at the run's KL weight, which scales all of them alike.

{table(options.runs)}
"""
    options.report.parent.mkdir(parents=True, exist_ok=True)
    options.report.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    run_script(main)
