"""The fewest bit operations at which a score is within a tolerance of plain LoRA, by a search over budgets.

Points are budgets in order; one is tried with every seed, and is within the tolerance where the paired difference to
LoRA, averaged over seeds, is not below minus the tolerance. Few points are tried one after the other, downwards until
one is not within; many by bisection, which takes the score to rise with the budget: with noise, its end is one of the
places where the difference crosses, which is why every point that was tried is shown.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from experiments.studies.allocations import Budget, Cells
from experiments.studies.compare import paired

TOLERANCE = 0.005  # of the score: half a point
Search = Callable[[int, int, Callable[[int], bool | None]], tuple[int | None, bool]]


class Tried(NamedTuple):
    """A budget with every seed: what was deployed (share of the model's BOPs), and its score minus LoRA's [95 %]."""

    budget: Budget
    share: float
    difference: tuple[float, float, float]

    @property
    def is_within(self) -> bool:
        return bool(self.difference[0] >= -TOLERANCE)  # NumPy's own is not `False`, which a search asks for


@dataclasses.dataclass
class Found:
    """tried: by the place of the point. fewest: the one, None where no point is within; is_finished: or not all ran."""

    task: str
    method: str
    tried: list[Tried]
    fewest: Tried | None
    is_finished: bool
    cells: list[dict]

    @property
    def too_few(self) -> float | None:
        """The largest share whose whole interval is below the tolerance."""
        return max((x.share for x in self.tried if x.difference[2] < -TOLERANCE), default=None)

    @property
    def enough(self) -> float | None:
        """The smallest share whose whole interval is within the tolerance."""
        return min((x.share for x in self.tried if x.difference[1] >= -TOLERANCE), default=None)


def bisect(points: int, top: int, is_within: Callable[[int], bool | None]) -> tuple[int | None, bool]:
    """(the first place that is within, None where none is; whether it is known).

    is_within(place): None where that cannot be told yet, which ends the search. top: the place to begin at; where it is
    not within, the search is above it.
    """
    low, high = -1, top
    first = is_within(top)
    if first is False and top < points - 1:
        low, high = top, points - 1
        first = is_within(high)
    if not first:
        return None, first is False
    while high - low > 1:
        middle = (low + high) // 2
        here = is_within(middle)
        if here is None:
            return high, False
        low, high = (low, middle) if here else (middle, high)
    return high, True


def descend(points: int, top: int, is_within: Callable[[int], bool | None]) -> tuple[int | None, bool]:
    """As `bisect`, one place after the other: upwards from `top` to one that is within, then down until one is not."""
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


def search(
    cells: Cells, task: str, method: str, points: Sequence[Sequence[Budget]], top: int, find: Search = bisect
) -> Found:  # fmt: skip
    """Search over points, each of one or several budgets of the same bit operations, the best of which counts."""
    seeds, known, used = cells.options.seeds, {}, []
    lora = [cells.cell(task, seed, "lora") for seed in seeds]
    metric = next((cell["summary"]["metric"]["name"] for cell in lora if cell), "")

    def tried(budget: Budget) -> Tried | None:
        found = [cells.cell(task, seed, method, budget) for seed in seeds]
        finished = [cell for cell in found if cell is not None]
        plain = [cell for cell in lora if cell is not None]
        if len(finished) < len(seeds) or len(plain) < len(seeds):
            return None
        used.extend(finished)
        share = float(np.mean([cell["summary"]["bops"]["deployed"]["model_ratio"] for cell in finished]))
        mean, low, high = paired(finished, plain, metric)["score"]
        print(f"{task} {method} {budget.name}: BOPs {share:.4f} of the model, score minus LoRA {mean:+.4f} "
              f"[{low:+.4f}, {high:+.4f}]", flush=True)  # fmt: skip
        return Tried(budget, share, (mean, low, high))

    def is_within(place: int) -> bool | None:
        best: Tried | None = None
        for budget in points[place]:
            now = tried(budget)
            if now is None:
                return None
            best = now if best is None or now.difference[0] > best.difference[0] else best
            if best.is_within:
                break
        known[place] = best
        return best is not None and best.is_within

    place, is_finished = find(len(points), top, is_within)
    each = [known[i] for i in sorted(known)]
    return Found(task, method, each, None if place is None else known[place], is_finished, used)


def grid(low: Budget, high: Budget, steps: int) -> tuple[list[list[Budget]], int]:
    """Budgets between two on a log scale, as many again above the higher one; and the place of the higher one.

    steps: halvings from the whole distance to one point.
    """
    n = 2**steps
    shares = [low.share * (high.share / low.share) ** (i / n) for i in range(1, 2 * n + 1)]
    return [[Budget(f"b{i:03d}of{n}", min(share, 1.0))] for i, share in enumerate(shares, start=1)], n - 1


def families(cells: Cells, task: str, names: Sequence[str], top: str) -> tuple[list[list[Budget]], int]:
    """Uniform budgets by their bit operations, those of the same together; and the place of one of them."""
    points: list[list[Budget]] = []
    for budget in sorted((cells.uniform(task, name) for name in names), key=lambda budget: budget.share):
        if points and np.isclose(points[-1][0].share, budget.share, rtol=1e-6):
            points[-1].append(budget)
        else:
            points.append([budget])
    return points, next(i for i, each in enumerate(points) if top in [budget.name for budget in each])
