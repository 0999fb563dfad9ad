"""The fewest bit operations at which a score is within a tolerance of LoRA's, by a search over budgets.

LoRA is the better of two: with dropout throughout, or without it from where the others are quantized on, which have
none there. Points are budgets in order; one is tried with every seed, and is within the tolerance where the paired
difference to LoRA, averaged over seeds, is not below minus the tolerance. They are tried one after the other, downwards
until one is not within; between the last that is and that one the search then bisects, which takes the score to rise
with the budget: with noise, its end is one of the places where the difference crosses, which is why all that was tried
is shown.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.studies.allocations import OPEN, Budget, Cells
from experiments.studies.compare import paired

TOLERANCE = 0.005  # of the score: half a point


class Tried(NamedTuple):
    """A budget with every seed: what was deployed (share of the model's BOPs), and its score minus LoRA's [95 %].

    other: the same to the LoRA that is not the better one, None where it is not finished.
    """

    budget: Budget
    share: float
    difference: tuple[float, float, float]
    other: tuple[float, float, float] | None = None

    @property
    def is_within(self) -> bool:
        return bool(self.difference[0] >= -TOLERANCE)  # NumPy's own is not `False`, which a search asks for


@dataclasses.dataclass
class Found:
    """tried: by the place of the point. fewest: the one, None where no point is within; is_finished: or not all ran.

    loras: scores of those that are finished, by seed; the first is the better one.
    """

    task: str
    method: str
    tried: list[Tried]
    fewest: Tried | None
    is_finished: bool
    cells: list[dict]
    loras: dict[str, list[float]]

    @property
    def too_few(self) -> float | None:
        """The largest share whose whole interval is below the tolerance."""
        return max((x.share for x in self.tried if x.difference[2] < -TOLERANCE), default=None)

    @property
    def enough(self) -> float | None:
        """The smallest share whose whole interval is within the tolerance."""
        return min((x.share for x in self.tried if x.difference[1] >= -TOLERANCE), default=None)


def descend(points: int, top: int, is_within: Callable[[int], bool | None]) -> tuple[int | None, bool]:
    """(the first place that is within, None where none is; whether it is known).

    One place after the other, upwards from `top` to one that is within, then down until one is not.
    is_within(place): None where that cannot be told yet, which ends the search.
    """
    found = None
    for place in range(top, points):
        here = is_within(place)
        if here is None:
            return None, False
        if here:
            found = place
            break
    while found == top and top > 0:
        here = is_within(top - 1)
        if not here:
            return found, here is False
        found = top = top - 1
    return found, True


def bisect(
    low: float, high: float, halvings: int, is_within: Callable[[float], bool | None]
) -> tuple[float, bool]:  # fmt: skip
    """(the smallest share of the bit operations that was within; whether all were tried), on a log scale.

    low: a share that is not within; high: one that is.
    """
    for _ in range(halvings):
        middle = math.sqrt(low * high)
        here = is_within(middle)
        if here is None:
            return high, False
        low, high = (low, middle) if here else (middle, high)
    return high, True


def scores(cells: list[dict]) -> list[float]:
    """Of what is deployed."""
    return [cell["summary"]["deployed"]["metric"]["value"] for cell in cells]


class _Trials:
    """Of one task and method: cells with every seed, beside both LoRAs'; what was tried is kept by its point."""

    def __init__(self, cells: Cells, task: str, method: str):
        self.cells, self.task, self.method = cells, task, method
        finished = {name: found for name in OPEN if (found := self._of_every_seed(name))}
        better = sorted(finished, key=lambda name: -np.mean(scores(finished[name])))
        self.loras = {name: finished[name] for name in better}
        self.known: dict[float, Tried] = {}
        self.used: list[dict] = []

    def is_within(self, *budgets: Budget) -> bool | None:
        """Whether one of these is, which have the same bit operations; None where cells are missing."""
        tried: list[Tried] = []
        for budget in budgets:
            now = self._tried(budget)
            if now is None:
                return None
            tried.append(now)
            if now.is_within:
                break
        best = max(tried, key=lambda one: one.difference[0])
        self.known[budgets[0].share] = best
        return best.is_within

    def _of_every_seed(self, method: str, budget: Budget | None = None) -> list[dict] | None:
        found = [self.cells.cell(self.task, seed, method, budget) for seed in self.cells.options.seeds]
        finished = [cell for cell in found if cell is not None]
        return finished if len(finished) == len(found) else None

    def _tried(self, budget: Budget) -> Tried | None:
        found = self._of_every_seed(self.method, budget)
        if found is None or "lora" not in self.loras:
            return None
        self.used.extend(found)
        share = float(np.mean([cell["summary"]["bops"]["deployed"]["model_ratio"] for cell in found]))
        metric = found[0]["summary"]["metric"]["name"]
        (mean, low, high), *other = (paired(found, lora, metric)["score"] for lora in self.loras.values())
        print(f"{self.task} {self.method} {budget.name}: BOPs {share:.4f} of the model, score minus LoRA {mean:+.4f} "
              f"[{low:+.4f}, {high:+.4f}]", flush=True)  # fmt: skip
        return Tried(budget, share, (mean, low, high), *other)


def search(
    cells: Cells, task: str, method: str, points: Sequence[Sequence[Budget]], top: int, halvings: int = 0
) -> Found:  # fmt: skip
    """Search over points, each of one or several budgets of the same bit operations, the best of which counts.

    halvings: of the last distance, by budgets in between; 0 for a method that has these points only.
    """
    trials = _Trials(cells, task, method)
    place, is_finished = descend(len(points), top, lambda place: trials.is_within(*points[place]))
    fewest = None if place is None else points[place][0].share
    if place and fewest and is_finished:
        below = points[place - 1][0].share
        fewest, is_finished = bisect(below, fewest, halvings, lambda share: trials.is_within(between(share)))
    each = [trials.known[share] for share in sorted(trials.known)]
    there = None if fewest is None else trials.known[fewest]
    loras = {name: scores(found) for name, found in trials.loras.items()}
    return Found(task, method, each, there, is_finished, trials.used, loras)


def between(share: float) -> Budget:
    """A budget between those of uniform allocations, called by its share: B0535 is 5.35 %."""
    return Budget(f"B{round(1e4 * share):04d}", share)


def families(cells: Cells, task: str, names: Sequence[str], top: str) -> tuple[list[list[Budget]], int]:
    """Uniform budgets by their bit operations, those of the same together; and the place of one of them."""
    points: list[list[Budget]] = []
    for budget in sorted((cells.uniform(task, name) for name in names), key=lambda budget: budget.share):
        if points and np.isclose(points[-1][0].share, budget.share, rtol=1e-6):
            points[-1].append(budget)
        else:
            points.append([budget])
    return points, next(i for i, each in enumerate(points) if top in [budget.name for budget in each])
