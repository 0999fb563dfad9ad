"""Figures of the ladder, one message each, in colours that colour-blind readers tell apart (Okabe and Ito)."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from .calibration import LEVEL, STATISTICS, Calibration, ecdf_band
from .rungs import Fit

_COLOURS = ("#000000", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
_MARKERS = "_osD^vP"
_PALETTE = 64  # colours of a saved figure
_BINS = 10  # of equal width, of predicted probability


def _save(figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100, bbox_inches="tight")
    plt.close(figure)
    with Image.open(path) as picture:  # a palette makes half the file
        small = picture.convert("RGB").quantize(_PALETTE)
    small.save(path, optimize=True)


def marginals(fits: list[Fit], names: list[str], path: Path) -> None:
    """P(open) of each gate: the exact posterior as a bar, the fits beside it."""
    figure, axes = plt.subplots(figsize=(8, 3.4))
    places = np.arange(len(names))
    axes.bar(places, fits[0].marginals, width=0.85, color="#DDDDDD", label=fits[0].name)
    for i, fit in enumerate(fits[1:]):
        shift = 0.7 * (i / max(1, len(fits) - 2) - 0.5)
        axes.plot(places + shift, fit.marginals, _MARKERS[1 + i % 6], color=_COLOURS[1 + i % 6], markersize=5,
                  label=f"{fit.name} (worst {fit.error:.2f})")  # fmt: skip
    axes.set(ylabel="P(open)", ylim=(0, 1.05), title=f"Marginals of {fits[0].problem}")
    axes.set_xticks(places, names, rotation=60, ha="right", fontsize=8)
    axes.legend(fontsize=7, ncol=3, loc="upper center", bbox_to_anchor=(0.5, -0.45))
    _save(figure, path)


def ecdf_differences(found: dict[str, Calibration], path: Path) -> None:
    """ECDF of the randomised ranks minus the uniform distribution's, with simultaneous bands."""
    quantities = STATISTICS[1:]
    figure, grid = plt.subplots(len(quantities), len(found), figsize=(2.6 * len(found), 4.4), sharex=True, sharey=True)
    level = LEVEL / len(STATISTICS)
    for column, (name, calibration) in enumerate(found.items()):
        for row, quantity in enumerate(quantities):
            axes, ranks = grid[row, column], np.sort(calibration.ranks[quantity].numpy())
            points, low, high = ecdf_band(len(ranks), level)
            axes.fill_between(points, low, high, color="#DDDDDD", label=f"{1 - level:.1%} simultaneous band")
            axes.axhline(0, color="#888888", linewidth=0.6)
            difference = np.searchsorted(ranks, points, side="right") / len(ranks) - points
            axes.plot(points, difference, color=_COLOURS[2], linewidth=1.2)
            if row == 0:
                axes.set_title(f"{name}\n({len(ranks)} simulations)", fontsize=9)
            if column == 0:
                axes.set_ylabel(f"{quantity}:\nECDF - uniform", fontsize=8)
    grid[0, 0].legend(fontsize=6, loc="upper right")
    figure.supxlabel("rank of the truth among posterior draws (fraction)", fontsize=9)
    figure.tight_layout()
    _save(figure, path)


def reliability(found: dict[str, Calibration], path: Path) -> None:
    """How often gates are open, against their predicted P(open), with two standard errors of the binomial."""
    figure, row = plt.subplots(1, len(found), figsize=(2.6 * len(found), 2.9), sharey=True)
    for axes, (name, calibration) in zip(row, found.items(), strict=True):
        p, truth = calibration.probability.flatten().numpy(), calibration.opened.flatten().numpy()
        which = np.minimum((p * _BINS).astype(int), _BINS - 1)
        axes.plot([0, 1], [0, 1], color="#888888", linewidth=0.8)
        for b in np.unique(which):
            inside = which == b
            mean, rate = p[inside].mean(), truth[inside].mean()
            # gates of one simulation are dependent: count simulations, not events
            error = 2 * np.sqrt(max(mean * (1 - mean), 1e-4) / min(inside.sum(), len(calibration.probability)))
            axes.errorbar(mean, rate, yerr=error, fmt="o", color=_COLOURS[2], markersize=4, capsize=2)
        axes.set(xlabel="predicted P(open)", xlim=(0, 1), ylim=(-0.05, 1.05))
        axes.set_title(name, fontsize=9)
    row[0].set_ylabel("fraction open in truth")
    figure.tight_layout()
    _save(figure, path)


def gap_closed(gaps: dict[str, dict[str, list[tuple[int, float]]]], path: Path) -> None:
    """Nats between the log evidence and the ELBO, by number of components; a panel a problem.

    gaps: problem -> {"exact optimum": [(M, nats)], "trained": [(M, nats)]}, a mean field at M = 1.
    """
    figure, row = plt.subplots(1, len(gaps), figsize=(3.6 * len(gaps), 3), squeeze=False)
    for axes, (problem, series) in zip(row[0], gaps.items(), strict=True):
        for i, (name, points) in enumerate(series.items()):
            sizes, values = zip(*sorted(points), strict=True)
            axes.plot(sizes, values, _MARKERS[1 + i] + "-", color=_COLOURS[2 + 3 * i], label=name)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, map(str, sizes))
        axes.set(xlabel="components M (1: mean field)", ylabel="log evidence - ELBO (nats)", title=problem)
        axes.set_ylim(bottom=0)
        axes.legend(fontsize=8)
    figure.tight_layout()
    _save(figure, path)
