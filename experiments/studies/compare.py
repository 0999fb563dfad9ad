"""Paired comparisons of cells: over the seeds that both methods have, and over the examples of their evaluation set.

What is compared is the one allocation that is deployed, one forward an example at the bit operations of the table; or,
with an empty prefix, what is averaged over draws.
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

BOOTSTRAP = 2000
LEVEL = 0.95
_CORRELATIONS = ("pearson", "matthews_correlation")  # of two classes, Matthews' is Pearson's
ROLES = ("query", "key", "value")


def _arrays(cell: dict) -> dict[str, np.ndarray]:
    return {name: np.asarray(values) for name, values in cell["examples"].items()}


def score(examples: dict[str, np.ndarray], metric: str, prefix: str = "deployed_") -> float:
    """Of the decisions: accuracy, or a correlation.  Errors: ValueError for another metric."""
    decision, label = examples[f"{prefix}decision"], examples["label"]
    if metric == "accuracy":
        return float((decision == label).mean())
    if metric in _CORRELATIONS:
        spread = decision.std() * label.std()
        return float(((decision - decision.mean()) * (label - label.mean())).mean() / spread) if spread > 0 else 0.0
    raise ValueError(f"comparisons know accuracy, {', '.join(_CORRELATIONS)}, got {metric!r}: add it to compare.py")


def _differences(pair, rows, metric: str, prefix: str) -> tuple[float, float]:
    """Of the score and of the NLL, at some of the examples."""
    a, b = ({name: x[rows] for name, x in table.items()} for table in pair)
    nll = (b[f"{prefix}log_likelihood"] - a[f"{prefix}log_likelihood"]).mean()
    return score(a, metric, prefix) - score(b, metric, prefix), float(nll)


def paired(
    ours: list[dict], theirs: list[dict], metric: str, *, seed: int = 0, prefix: str = "deployed_"
) -> dict[str, tuple[float, ...]]:
    """Ours minus theirs, of the score and of the NLL, averaged over seeds: mean and 95 % interval.

    ours, theirs: cells by seed, in the same order.
    """
    pairs = [(_arrays(a), _arrays(b)) for a, b in zip(ours, theirs, strict=True)]
    found = intervals(pairs, lambda pair, rows: _differences(pair, rows, metric, prefix), seed=seed)
    return dict(zip(("score", "nll"), found, strict=True))


def intervals(pairs: list[tuple[dict, dict]], differences: Callable, *, seed: int = 0) -> list[tuple[float, ...]]:
    """Means and 95 % intervals of `differences(pair, rows)`, averaged over the pairs, one of each seed.

    pairs: arrays by name, ours and theirs, with the same examples for all: the examples' part is bootstrapped, all
    seeds together; the seeds' part is Student's, as there are few. Both are added in squares; one seed has no part.
    """
    size, generator = len(pairs[0][0]["label"]), np.random.default_rng(seed)
    by_seed = np.array([differences(pair, slice(None)) for pair in pairs])  # (seeds, differences)
    drawn = (generator.integers(size, size=size) for _ in range(BOOTSTRAP))
    samples = [np.mean([differences(pair, rows) for pair in pairs], 0) for rows in drawn]
    squares = (stats.norm.ppf((1 + LEVEL) / 2) * np.std(samples, 0)) ** 2
    if len(pairs) > 1:
        squares = squares + _half_width(by_seed) ** 2
    return [(mean, mean - half, mean + half) for mean, half in zip(by_seed.mean(0), np.sqrt(squares), strict=True)]


def spread(values, digits: int = 3) -> str:
    """Mean, and ± the standard deviation where there are several."""
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _half_width(values: np.ndarray) -> np.ndarray:
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
    half = float(_half_width(values))
    return float(values.mean()), float(values.mean()) - half, float(values.mean()) + half, len(values)
