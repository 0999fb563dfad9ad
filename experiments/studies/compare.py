"""Paired comparisons of cells: over the seeds that both methods have, and over the examples of their evaluation set.

What is compared is the one allocation that is deployed, one forward an example at the bit operations of the table; or,
with an empty prefix, what is averaged over draws.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

BOOTSTRAP = 2000
_AT_ONCE = 200  # of these: 2 MB of row numbers for a thousand examples
LEVEL = 0.95
_CORRELATIONS = ("pearson", "matthews_correlation")  # of two classes, Matthews' is Pearson's
ROLES = ("query", "key", "value")


def _arrays(cell: dict, prefix: str) -> dict[str, np.ndarray]:
    """What is compared: a bootstrap takes rows of every array, two thousand times."""
    names = ("label", f"{prefix}decision", f"{prefix}log_likelihood")
    return {name: np.asarray(cell["examples"][name]) for name in names}


def score(examples: dict[str, np.ndarray], metric: str, prefix: str = "deployed_") -> np.ndarray:
    """Of the decisions (..., B): accuracy, or a correlation, (...).  Errors: ValueError for another metric."""
    decision, label = examples[f"{prefix}decision"], examples["label"]
    if metric == "accuracy":
        return (decision == label).mean(-1)
    if metric in _CORRELATIONS:
        a, b = (x - x.mean(-1, keepdims=True) for x in (decision, label))
        spread = decision.std(-1) * label.std(-1)
        return np.divide((a * b).mean(-1), spread, out=np.zeros(spread.shape), where=spread > 0)
    raise ValueError(f"comparisons know accuracy, {', '.join(_CORRELATIONS)}, got {metric!r}: add it to compare.py")


def _differences(pair, rows, metric: str, prefix: str) -> tuple[np.ndarray, np.ndarray]:
    """Of the score and of the NLL, at some of the examples, (..., n)."""
    a, b = ({name: x[rows] for name, x in table.items()} for table in pair)
    nll = (b[f"{prefix}log_likelihood"] - a[f"{prefix}log_likelihood"]).mean(-1)
    return score(a, metric, prefix) - score(b, metric, prefix), nll


def paired(
    ours: list[dict], theirs: list[dict], metric: str, *, seed: int = 0, prefix: str = "deployed_"
) -> dict[str, tuple[float, ...]]:
    """Ours minus theirs, of the score and of the NLL, averaged over seeds: mean and 95 % interval.

    ours, theirs: cells by seed, in the same order.
    """
    pairs = [(_arrays(a, prefix), _arrays(b, prefix)) for a, b in zip(ours, theirs, strict=True)]
    found = intervals(pairs, lambda pair, rows: _differences(pair, rows, metric, prefix), seed=seed)
    return dict(zip(("score", "nll"), found, strict=True))


def intervals(pairs: list[tuple[dict, dict]], differences: Callable, *, seed: int = 0) -> list[tuple[float, ...]]:
    """Means and 95 % intervals of `differences(pair, rows)`, averaged over the pairs, one of each seed.

    pairs: arrays by name, ours and theirs, with the same examples for all: the examples' part is bootstrapped, all
    seeds together; the seeds' part is Student's, as there are few. Both are added in squares; one seed has no part.
    `differences` is given rows (..., n) and gives a sequence of arrays (...).
    """
    size, generator = len(pairs[0][0]["label"]), np.random.default_rng(seed)
    by_seed = np.array([differences(pair, np.arange(size)) for pair in pairs])  # (seeds, differences)
    drawn = (generator.integers(size, size=(_AT_ONCE, size)) for _ in range(BOOTSTRAP // _AT_ONCE))
    samples = np.concatenate([np.mean([differences(pair, rows) for pair in pairs], 0) for rows in drawn], 1)
    squares = (stats.norm.ppf((1 + LEVEL) / 2) * np.std(samples, 1)) ** 2
    if len(pairs) > 1:
        squares = squares + half_width(by_seed) ** 2
    return [(mean, mean - half, mean + half) for mean, half in zip(by_seed.mean(0), np.sqrt(squares), strict=True)]


def spread(values, digits: int = 3) -> str:
    """Mean, and ± the standard deviation where there are several."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def written(interval: tuple[float, ...] | None, digits: int = 3) -> str:
    """Mean and 95 % interval; nothing of None."""
    return "" if interval is None else "{:+.{n}f} [{:+.{n}f}, {:+.{n}f}]".format(*interval, n=digits)


def beyond_noise(interval: tuple[float, ...]) -> bool:
    """Whether a difference has zero outside of its interval."""
    _, low, high = interval
    return low > 0 or high < 0


def half_width(values: np.ndarray) -> np.ndarray:
    """Of Student's interval for the mean over the first dimension."""
    n = len(values)
    return stats.t.ppf((1 + LEVEL) / 2, n - 1) * values.std(0, ddof=1) / n**0.5


def rank_differences(cells: list[dict], over: str = "layers") -> tuple[float, float, float, int]:
    """E[rank] of `value` minus the mean of `query` and `key`: mean and 95 % interval (Student).

    cells: runs of one task that differ in their seed. over: layers, each averaged over seeds first, or seeds, each
    averaged over layers.   Returns (mean, low, high, how many of these).
    """
    differences = []
    for cell in cells:
        layers = sorted({name.rpartition(".")[0] for name in cell["ranks"]})
        of = {kind: np.array([cell["ranks"][f"{layer}.{kind}"] for layer in layers]) for kind in ROLES}
        differences.append(of["value"] - (of["query"] + of["key"]) / 2)
    values = np.mean(differences, axis=1 if over == "seeds" else 0)
    half = float(half_width(values))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, len(values)
