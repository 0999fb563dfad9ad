"""What the doubts of a cell of experiments/uncertainty.py are worth, and how two cells differ.

A cell is what `uncertainty.cell_of` keeps. Rows are test rows, inside the scope, then rows outside, which no answer of
the network is right for. Differences are paired: the same rows are drawn for both sides of a bootstrap.
"""

import numpy as np
import torch
from scipy.stats import rankdata

from experiments.studies.compare import intervals
from pyro_blora.posterior import calibration

DOUBTS = {"doubt": "1 - p", "entropy": "entropy", "information": "mutual information"}  # p: greatest probability
AREAS = ("AURC", "AURC, all rows")
AUROC = {name: f"AUROC, {title}" for name, title in DOUBTS.items()}
MEASURES = ("accuracy", "NLL", "NLL, scaled", *AREAS, *AUROC.values())
LESS_IS_BETTER = ("NLL", "NLL, scaled", *AREAS)
_NORMAL = 1.96  # standard errors in half a 95 % interval

Rows = dict[str, np.ndarray]
Interval = tuple[float, float, float]


def rows_of(cell: dict) -> Rows:
    """Test rows, then rows outside, (E,) each; `label`: 1 inside, 0 outside, where there is no likelihood."""
    inside, outside = cell["inside"], cell["outside"]
    absent = np.full(len(outside["doubt"]), np.nan)
    return {
        **{name: np.r_[inside[name], outside[name]] for name in DOUBTS},
        "right": np.r_[inside["right"], np.zeros(len(absent))],
        "log_likelihood": np.r_[inside["log_likelihood"], absent],
        "scaled": np.r_[cell["scaled"]["log_likelihood"], absent],
        "label": np.r_[np.ones(len(inside["right"])), np.zeros(len(absent))],
    }


def aurc(doubt: np.ndarray, right: np.ndarray) -> float:
    return calibration.aurc(-torch.from_numpy(doubt), torch.from_numpy(right))


def auroc(doubt: np.ndarray, outside: np.ndarray) -> float:
    """`calibration.auroc` from ranks, fast enough for a bootstrap."""
    positive, negative = outside.sum(), (~outside).sum()
    return float((rankdata(doubt)[outside].sum() - positive * (positive + 1) / 2) / (positive * negative))


def areas(x: Rows, doubt: str) -> list[float]:
    """[AURC of the rows inside, AURC of all rows], answered in the order of a doubt."""
    inside = x["label"] == 1
    return [aurc(x[doubt][inside], x["right"][inside]), aurc(x[doubt], x["right"])]


def measures(x: Rows) -> dict[str, float]:
    """By name. AURC is of answers in the order of `doubt`; of all rows, too, where those outside are wrong answers."""
    inside = x["label"] == 1
    return {
        "accuracy": x["right"][inside].mean(),
        "NLL": -x["log_likelihood"][inside].mean(),
        "NLL, scaled": -x["scaled"][inside].mean(),
        **dict(zip(AREAS, areas(x, "doubt"), strict=True)),
        **{AUROC[name]: auroc(x[name], ~inside) for name in DOUBTS},
    }


def errors(cell: dict) -> dict[str, float]:
    """Standard errors of the measures: of a share, a mean and an AUROC by formula, of an AURC by bootstrap."""
    x = rows_of(cell)
    inside, found = x["label"] == 1, measures(x)
    n, outside = int(inside.sum()), int((~inside).sum())
    spread = intervals([(x, x)], lambda pair, rows: areas(_at(pair[0], rows), "doubt"))
    return {
        "accuracy": calibration.share_error(found["accuracy"], n),
        **{name: x[column][inside].std() / n**0.5 for name, column in
           (("NLL", "log_likelihood"), ("NLL, scaled", "scaled"))},
        **{name: (high - mean) / _NORMAL for name, (mean, _, high) in zip(AREAS, spread, strict=True)},
        **{name: calibration.auroc_error(found[name], outside, n) for name in AUROC.values()},
    }  # fmt: skip


def differences(ours: dict, theirs: dict) -> dict[str, Interval]:
    """Ours minus theirs by measure: mean and 95 % interval, from a bootstrap of the rows.

    Where theirs has no mutual information, its entropy stands for it; where ours has none, it is left out.
    """
    mutual, entropy = AUROC["information"], AUROC["entropy"]
    names = [name for name in MEASURES if name != mutual or any(ours["inside"]["information"])]
    theirs_has = any(theirs["inside"]["information"])

    def of(pair: tuple[Rows, Rows], rows) -> list[float]:
        a, b = (measures(_at(x, rows)) for x in pair)
        return [a[name] - b[entropy if name == mutual and not theirs_has else name] for name in names]

    return dict(zip(names, intervals([(rows_of(ours), rows_of(theirs))], of), strict=True))


def of_doubts(cell: dict) -> dict[str, dict[str, Interval]]:
    """Entropy and mutual information in place of 1 - greatest probability: what AURC and AUROC gain, by name."""
    others = ("entropy", "information")

    def of(pair: tuple[Rows, Rows], rows) -> np.ndarray:
        x = _at(pair[0], rows)
        outside = x["label"] == 0
        plain, *found = ([*areas(x, name), auroc(x[name], outside)] for name in ("doubt", *others))
        return np.subtract(found, plain).ravel()

    x, columns = rows_of(cell), (*AREAS, "AUROC")
    found = intervals([(x, x)], of)
    return {name: dict(zip(columns, found[i * len(columns) :], strict=False)) for i, name in enumerate(others)}


def _at(x: Rows, rows) -> Rows:
    return {name: values[rows] for name, values in x.items()}


def sign(found: Interval, less_is_better: bool) -> int:
    """1: better, -1: worse, 0: the interval has both."""
    _, low, high = found
    above = int(low > 0) - int(high < 0)
    return -above if less_is_better else above
