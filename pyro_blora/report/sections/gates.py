"""The sections of a report on the gates: the gate map, and the ranks."""

import math

import numpy as np
import pandas as pd

from ...bops import expected_bits, expected_rank
from ...interval import INTERVAL, PERCENT
from ...posterior.gate_posterior import Posterior
from ...registries import register_section
from .. import charts
from ..run_folder import RunFiles, Section


def cells_of(posterior: Posterior, chain: int = 0) -> pd.DataFrame:
    """One row per existing tensor: its place in the gate map, its distribution, and the text shown on hover."""
    widths, kl, rhat = posterior.depth_probs(chain).z, posterior.kl(chain).z, posterior.rhat().z
    ladder = posterior.layout.ladder
    bits = expected_bits(posterior.layout, widths.flip(-1).cumsum(-1).flip(-1)[..., 1:])
    opened = np.nan_to_num(posterior.constant["z_deployed"].isel(chain=chain).values).sum(-1).astype(int)
    lines = []
    for t, tensor in enumerate(posterior.layout.tensors):
        for i, projection in enumerate(posterior.layout.projections):
            if posterior.masks.z[i, t]:
                width = ladder[opened[i, t]]
                lines.append({
                    "column": f"{projection.type} {tensor}", "layer": projection.layer, "width": width,
                    "doubt": 1 - float(widths[i, t, opened[i, t]]), "tensor": f"{posterior.projections[i]}.{tensor}",
                    "deployed": f"{width} bit", "expected": f"{float(bits[i, t]):.1f} bit",
                    "distribution": "  ".join(
                        f"{b}: {p:.2f}" for b, p in zip(ladder, widths[i, t].tolist(), strict=True)
                    ),
                    "KL to prior": f"{float(kl[i, t]):.2f} nat",
                    "R-hat": "-" if math.isnan(rhat[i, t]) else f"{float(rhat[i, t]):.2f}",
                })  # fmt: skip
    types = list(dict.fromkeys(p.type for p in posterior.layout.projections))
    table = pd.DataFrame(lines)
    return table.sort_values(
        "column", key=lambda c: c.map(lambda name: types.index(name.rsplit(" ", 1)[0])), kind="stable"
    )


@register_section("Gate map", place=20)
def gate_map(run: RunFiles, title: str) -> Section:
    """The deployed bit width of every tensor, and its uncertainty."""
    cells = cells_of(run.posterior)
    text = (
        "A square is a tensor, its colour the bit width that is deployed. The size of the white circle is the "
        "probability of any other width, from 0 to 80 % and more."
    )
    shown = cells[["tensor", "deployed", "expected", "distribution", "KL to prior", "R-hat"]]
    chart = charts.gate_map(cells, run.posterior.layout.ladder)
    return Section(title, [text], charts=[(chart, "Hover or touch a square for details.")],
                   tables=[("The gate map as a table: probabilities of every width", shown, False)])  # fmt: skip


@register_section("Ranks", place=30)
def ranks(run: RunFiles, title: str) -> Section:
    """Open ranks of every adapter, with their intervals."""
    posterior = run.posterior
    if not bool(posterior.masks.g.any()) or posterior.layout.rank == 1:
        raise ValueError("There are no rank gates in this run.")
    probs = posterior.depth_probs().g
    means = expected_rank(probs.flip(-1).cumsum(-1).flip(-1)[..., 1:])
    rows, points = [], []
    for i, projection in enumerate(posterior.layout.projections):
        if not posterior.masks.g[i]:
            continue
        low, high = (int((probs[i].cumsum(-1) < p - 1e-9).sum()) + 1 for p in INTERVAL)
        row = {"projection": posterior.projections[i], "mean": float(means[i]), "interval": f"{low} to {high}"}
        points.append({**row, "layer": projection.layer, "type": projection.type, "low": low, "high": high})
        rows += [{**row, "rank": r + 1, "probability": float(p)} for r, p in enumerate(probs[i])]
    table, means_of_all = pd.DataFrame(rows), pd.DataFrame(points)
    shown = means_of_all[["projection", "mean", "low", "high"]].round(2)
    return Section(
        title, [f"Open ranks of every adapter, exact. Intervals are central, {PERCENT}."],
        charts=[(charts.rank_means(means_of_all), "Mean and interval by layer."),
                (charts.rank_map(table), "Probability of every rank.")],
        tables=[("Ranks as a table", shown, False)],
    )  # fmt: skip
