"""Bit widths of the least summed sensitivity within a budget of bit operations, exactly: an integer program.

Bit operations are products of two widths; the product of one-hot choices u and v is the table p with row sums u and
column sums v, so a table for every matrix product makes the budget linear. One choice is binary, the tables follow.
Source: the integer program of HAWQ-V3 (Yao et al. 2021), with products of widths in place of layers' costs.
"""

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array
from torch import Tensor

from pyro_blora.bit_widths import written
from pyro_blora.bops import at_full_width, expected_bops
from pyro_blora.gates import Gates
from pyro_blora.layout import INPUT, PRODUCTS, AdapterLayout

GAP = 1e-4  # of the optimum, at which it stops
SECONDS = 60.0
_ROUNDING = 1e-6  # of a share of bit operations, a number of single precision


class _Rows:
    """Sparse equality constraints, entry by entry."""

    def __init__(self):
        self.entries: list[tuple[int, int, float]] = []
        self.right: list[float] = []

    def add(self, entries: dict[int, float], right: float) -> None:
        self.entries += [(len(self.right), column, value) for column, value in entries.items()]
        self.right.append(right)

    def constraint(self, columns: int) -> LinearConstraint:
        rows, at, values = zip(*self.entries, strict=True)
        matrix = coo_array((values, (rows, at)), shape=(len(self.right), columns)).tocsr()
        return LinearConstraint(matrix, self.right, self.right)


def cheapest(layout: AdapterLayout, sensitivities: Tensor, bops: float) -> Gates[Tensor]:
    """The gates of the allocation of least summed sensitivity whose share of the model's BOPs is at most `bops`.

    sensitivities (L, T, K + 1); all ranks are open.  Returns z (L, T, K), g (L, R - 1), 0 or 1.
    Errors: ValueError for a budget below that of the lowest width everywhere, one at which none is found in time, and
    sensitivities of another ladder.
    """
    widths, (L, T, K) = layout.ladder, layout.z_shape
    if sensitivities.shape != (L, T, K + 1):
        raise ValueError(
            f"sensitivities {tuple(sensitivities.shape)} do not fit the layout, ({L}, {T}, {K + 1}): measure them with "
            f"its bit widths, {written(widths)}"
        )
    open_ranks = torch.ones(layout.g_shape)
    least = expected_bops(layout, torch.zeros(layout.z_shape), open_ranks).model_ratio.item()
    if bops < least:
        raise ValueError(f"bops must be at least {least:.3g} ({widths[0]} bit, every rank open), got {bops:g}")
    if bops <= least * (1 + _ROUNDING):  # nothing else fits
        return Gates(torch.zeros(layout.z_shape), open_ranks)
    n, rows, first, price, objective = len(widths), _Rows(), {}, {}, []

    def block(size: int) -> int:
        start = len(objective)
        objective.extend([0.0] * size)
        return start

    scale = float(sensitivities.max().clamp(min=1e-300))
    for i, t in layout.z_mask.nonzero().tolist():
        start = first[i, t] = block(n)
        objective[start : start + n] = (sensitivities[i, t] / scale).tolist()
        rows.add(dict.fromkeys(range(start, start + n), 1.0), 1.0)
    binary = len(objective)
    full = at_full_width(layout).model.item()
    for name, macs in layout.product_macs().items():
        left, right = (layout.tensors.index(of) for of in PRODUCTS[name] if of != "rank")
        for i in range(L):
            if macs[i] == 0:
                continue
            owner = int(layout.input_owner[i]) if left == INPUT else i
            start = block(n * n)
            each = macs[i].item() * (layout.rank if "rank" in PRODUCTS[name] else 1) / full
            for a in range(n):
                rows.add({**{start + n * a + b: 1.0 for b in range(n)}, first[owner, left] + a: -1.0}, 0.0)
                rows.add({**{start + n * b + a: 1.0 for b in range(n)}, first[i, right] + a: -1.0}, 0.0)
                price |= {start + n * a + b: each * widths[a] * widths[b] for b in range(n)}
    size = len(objective)
    spent = sum(macs.sum().item() for name, macs in layout.product_macs().items() if "rank" not in PRODUCTS[name])
    rest = widths[-1] ** 2 * (layout.model_macs - spent) / full
    costs = np.zeros(size)
    costs[list(price)] = np.array(list(price.values())) / (bops - rest)  # so that the budget is 1
    solved = milp(
        np.array(objective), bounds=Bounds(0, 1), integrality=(np.arange(size) < binary).astype(int),
        constraints=[rows.constraint(size), LinearConstraint(costs, -np.inf, 1 - 1e-7)],
        options={"mip_rel_gap": GAP, "time_limit": SECONDS},
    )  # fmt: skip
    if solved.x is None:
        raise ValueError(
            f"the integer program found no allocation at {bops:g} of the model's BOPs ({solved.message}): give a "
            "larger budget, or a ladder of fewer bit widths"
        )
    depths = torch.full((L, T), K)
    for (i, t), start in first.items():
        depths[i, t] = int(np.argmax(solved.x[start : start + n]))
    return Gates((torch.arange(K) < depths[..., None]).float(), open_ranks)
