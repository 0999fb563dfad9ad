"""Paired comparisons of cells: over the seeds that both methods have, and over the examples of their evaluation set.

What is compared is the one allocation that is deployed, one forward an example at the bit operations of the table; or,
with an empty prefix, what is averaged over draws.

Shapes: E examples, B resamples of a bootstrap. A resample is counts (E), how often it has each example. All that is
compared is a function of averages, and the averages of many resamples are one matrix product.
"""

import functools
from collections.abc import Callable

import numpy as np
from scipy import stats

from pyro_blora.evaluation.weighted_scores import as_scored, known_scores, weighted_score

BOOTSTRAP = 2000
_AT_ONCE = 200  # of these: 64 MB of forty thousand examples
LEVEL = 0.95
ROLES = ("query", "key", "value")


def _arrays(cell: dict, prefix: str, metric: str | None) -> dict[str, np.ndarray]:
    """What is compared, (E) each."""
    names = [f"{prefix}log_likelihood"] + (["label", f"{prefix}decision"] if metric else [])
    return {name: np.asarray(cell["examples"][name]) for name in names}


def score(
    examples: dict[str, np.ndarray], metric: str, prefix: str = "deployed_", counts: np.ndarray | None = None
) -> np.ndarray:
    """Of the decisions (E); 0 where it is undefined.  Errors: ValueError for a metric that resamples do not have.

    counts: (..., E), how often each example is taken; once each where None.   Returns (...).
    """
    values = [np.asarray(examples[name]) for name in ("label", f"{prefix}decision")]
    if metric not in known_scores(0) + known_scores(2):
        known = ", ".join(known_scores(2) + known_scores(0))
        raise ValueError(f"comparisons know {known}, got {metric!r}: add it to evaluation/weighted_scores.py")
    classes = 0
    if metric not in known_scores(0):
        values = [x if metric == "accuracy" else x.astype(int) for x in values]
        classes = 2 if metric == "accuracy" else 1 + max(x.max() for x in values)
    counts = np.ones(len(values[0])) if counts is None else counts
    label, decision = as_scored(metric, *values)
    return weighted_score(metric, np.atleast_2d(counts), label, decision, classes).reshape(counts.shape[:-1])


def average(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Of the values (E) or (E, k) with each example taken as often as counts (..., E) says: (...) or (..., k)."""
    return counts @ values / len(values)


def _differences(pair, counts: np.ndarray, metric: str | None, prefix: str) -> list[np.ndarray]:
    """Of the score, if there is a metric, and of the NLL, (...) each.  counts (..., E)"""
    a, b = pair
    nll = average(counts, b[f"{prefix}log_likelihood"] - a[f"{prefix}log_likelihood"])
    return [*([score(a, metric, prefix, counts) - score(b, metric, prefix, counts)] if metric else []), nll]


def paired(
    ours: list[dict], theirs: list[dict], metric: str | None, *, seed: int = 0, prefix: str = "deployed_"
) -> dict[str, tuple[float, ...]]:
    """Ours minus theirs, of the score, if there is a metric, and the NLL, averaged over seeds: mean and 95 % interval.

    ours, theirs: cells by seed, in the same order.
    """
    pairs = [(_arrays(a, prefix, metric), _arrays(b, prefix, metric)) for a, b in zip(ours, theirs, strict=True)]
    found = intervals(pairs, lambda pair, counts: _differences(pair, counts, metric, prefix), seed=seed)
    return dict(zip(("score", "nll") if metric else ("nll",), found, strict=True))


def intervals(pairs: list[tuple[dict, dict]], differences: Callable, *, seed: int = 0) -> list[tuple[float, ...]]:
    """Means and 95 % intervals of `differences(pair, counts)`, averaged over the pairs, one of each seed.

    pairs: arrays by name, ours and theirs, with the same examples for all: the examples' part is bootstrapped, all
    seeds together; the seeds' part is Student's, as there are few. Both are added in squares; one seed has no part.
    `differences` is given counts (..., E) and gives a sequence of arrays (...).
    """
    size = len(next(iter(pairs[0][0].values())))
    by_seed = np.array([differences(pair, np.ones(size)) for pair in pairs])  # (seeds, differences)
    parts = (counts.astype(float) for counts in _resampled(size, seed, BOOTSTRAP))
    samples = np.concatenate([np.mean([differences(pair, x) for pair in pairs], 0) for x in parts], 1)
    squares = (stats.norm.ppf((1 + LEVEL) / 2) * np.std(samples, 1)) ** 2
    if len(pairs) > 1:
        squares = squares + half_width(by_seed) ** 2
    return [(mean, mean - half, mean + half) for mean, half in zip(by_seed.mean(0), np.sqrt(squares), strict=True)]


@functools.lru_cache(maxsize=4)  # 4 MB of a thousand examples; a page has one set for each task
def _resampled(size: int, seed: int, number: int) -> list[np.ndarray]:
    """How often each example is in each resample, in parts (b, E) of all B."""
    generator, first = np.random.default_rng(seed), size * np.arange(_AT_ONCE)[:, None]
    rows = (generator.integers(size, size=(_AT_ONCE, size)) for _ in range(number // _AT_ONCE))
    counts = (np.bincount((first + x).ravel(), minlength=first.size * size) for x in rows)
    return [x.reshape(_AT_ONCE, size).astype(np.uint16) for x in counts]


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
