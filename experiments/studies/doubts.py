"""What the doubts of experiments/uncertainty.py are worth, and how its cells differ, by one bootstrap of the rows.

A cell is what `uncertainty.cell_of` keeps. Rows are test rows, inside the scope, then rows outside, which no answer of
the network is right for. All cells of a set see the same resamples of its rows, so their differences are paired.
Shapes: E rows, M measures, 1 + S rows of numbers: the measures of the rows themselves, then of S resamples.
"""

import numpy as np
import torch
from scipy import stats

from experiments.studies import compare
from pyro_blora.posterior import calibration

DOUBTS = {"doubt": "1 - p", "entropy": "entropy", "information": "mutual information"}  # p: greatest probability
AURC, ALL, AUROC = ({name: f"{what}, {title}" for name, title in DOUBTS.items()}
                    for what in ("AURC", "AURC of all rows", "AUROC"))  # fmt: skip
MEASURES = ("accuracy", "NLL", "NLL, scaled", *AURC.values(), *ALL.values(), *AUROC.values())
LESS_IS_BETTER = ("NLL", "NLL, scaled", *AURC.values(), *ALL.values())

Rows = dict[str, np.ndarray]
Interval = tuple[float, float, float]  # mean, low, high


def rows_of(cell: dict) -> Rows:
    """Test rows, then rows outside, (E,) each; `inside` says which, and those outside have no likelihood."""
    inside, outside = cell["inside"], cell["outside"]
    absent = np.full(len(outside["doubt"]), np.nan)
    return {
        **{name: np.r_[inside[name], outside[name]] for name in DOUBTS},
        "right": np.r_[inside["right"], np.zeros(len(absent))],
        "log_likelihood": np.r_[inside["log_likelihood"], absent],
        "scaled": np.r_[cell["scaled"]["log_likelihood"], absent],
        "inside": np.arange(len(inside["right"]) + len(absent)) < len(inside["right"]),
    }


def measures(x: Rows) -> list[float]:
    """In the order of MEASURES. An AURC is of answers in the order of a doubt; of all rows, those outside are wrong."""
    inside = x["inside"]
    right = x["right"][inside]
    return [
        right.mean(), -x["log_likelihood"][inside].mean(), -x["scaled"][inside].mean(),
        *(_aurc(x[name][inside], right) for name in DOUBTS),
        *(_aurc(x[name], x["right"]) for name in DOUBTS),
        *(auroc(x[name], ~inside) for name in DOUBTS),
    ]  # fmt: skip


def _aurc(doubt: np.ndarray, right: np.ndarray) -> float:
    return calibration.aurc(-torch.from_numpy(doubt), torch.from_numpy(right))


def auroc(doubt: np.ndarray, outside: np.ndarray) -> float:
    """`calibration.auroc` from ranks, fast enough for a bootstrap."""
    positive, negative = outside.sum(), (~outside).sum()
    ranks = stats.rankdata(doubt)[outside].sum()
    return float((ranks - positive * (positive + 1) / 2) / (positive * negative))


def resampled(cells: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """By way and measure, (1 + S,).  cells: of one set, whose rows are the same."""
    rows = {cell["way"]: rows_of(cell) for cell in cells}
    size, generator = len(rows[cells[0]["way"]]["inside"]), np.random.default_rng(0)
    found: dict[str, list] = {way: [measures(x)] for way, x in rows.items()}
    for _ in range(compare.BOOTSTRAP):
        drawn = generator.integers(size, size=size)
        for way, x in rows.items():
            found[way].append(measures({name: values[drawn] for name, values in x.items()}))
    return {way: dict(zip(MEASURES, np.array(values).T, strict=True)) for way, values in found.items()}


def interval(values: np.ndarray) -> Interval:
    """95 %, by the spread over the resamples."""
    half = stats.norm.ppf((1 + compare.LEVEL) / 2) * error(values)
    return float(values[0]), float(values[0] - half), float(values[0] + half)


def error(values: np.ndarray) -> float:
    return float(values[1:].std())


def has_information(cell: dict) -> bool:
    """Whether it has more than one prediction of a row."""
    return any(cell["inside"]["information"])


def sign(found: Interval, less_is_better: bool) -> int:
    """1: better, -1: worse, 0: the interval has both."""
    _, low, high = found
    above = int(low > 0) - int(high < 0)
    return -above if less_is_better else above
