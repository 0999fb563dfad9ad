"""Expected cost of an allocation in other units than bit operations: bytes of the packed model, measured seconds.

A cost is a sum of tables over pairs of tensors of a projection, the two factors of a product:

    E[cost] = sum over terms of  E[rank, where the term is by rank] * sum_ij P(width i) P(width j) table[i, j]

which is exact under a mean-field distribution, as ladders are independent there, and differentiable in the marginals:
P(width i) = z_i - z_(i+1). BOPs have this form, too, with table[i, j] = MACs * bits i * bits j (bops.py).
Shapes: L projections, T tensors, K gates of a ladder, D = K + 1 widths, R ranks.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bops import expected_rank
from .cost_table import Times
from .layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B, WITH_HEAD, AdapterLayout

UNITS = {"bytes": "bytes", "latency": "seconds"}  # of each cost
DENOMINATORS = ("adapted", "gated")  # the adapted projections, or all that have gates
_RANGE = 4  # bytes of a range, float32


class Term(NamedTuple):
    """first, second: tensors.  table (L, D, D), by their widths, at one rank where it is by_rank."""

    first: int
    second: int
    table: Tensor
    by_rank: bool = False


class Spent(NamedTuple):
    """What an allocation costs: in `unit`, and as a ratio to the same at full width, the target's denominator."""

    cost: str
    unit: str
    denominator: str
    target: float
    value: float
    ratio: float


class Cost(nn.Module):
    """The expected cost of a distribution of the gates, or the cost of draws.

    name: `bytes` or `latency`. Its tables are buffers, so that they move between devices with the prior.
    joint: a product is cheap only where both of its tensors are narrow: closing a gate of one of them saves nothing.
    """

    owner: Tensor  # (L,) as layout.input_owner

    def __init__(self, layout: AdapterLayout, name: str, terms: list[Term], joint: bool = False):
        super().__init__()
        self.layout, self.name, self.joint = layout, name, joint
        self._kinds = [(term.first, term.second, term.by_rank) for term in terms]
        for i, term in enumerate(terms):
            self.register_buffer(f"table_{i}", term.table, persistent=False)
        self.register_buffer("owner", layout.input_owner.clone(), persistent=False)
        counted = {"adapted": layout.g_mask | ~layout.g_mask.any(), "gated": torch.ones_like(layout.g_mask)}
        opened = self(*(torch.ones(shape, dtype=torch.float64) for shape in (layout.z_shape, layout.g_shape)))
        for denominator, mask in counted.items():
            self.register_buffer(f"of_{denominator}", mask, persistent=False)
            self.register_buffer(f"full_{denominator}", opened[mask].sum(), persistent=False)

    @property
    def unit(self) -> str:
        return UNITS[self.name]

    def forward(self, z_probs: Tensor, g_probs: Tensor) -> Tensor:
        """E[cost] of each projection.  z_probs (..., L, T, K), g_probs (..., L, R - 1) -> (..., L), float64"""
        widths, rank = width_probs(z_probs.double()), expected_rank(g_probs.double())
        owned = widths[..., INPUT, :].index_select(-2, self.owner)
        total = 0.0 * rank  # which may cost nothing, and then has a price of 0
        for i, (first, second, by_rank) in enumerate(self._kinds):
            one, other = (owned if t == INPUT else widths[..., t, :] for t in (first, second))
            each = torch.einsum("...li,...lj,lij->...l", one, other, getattr(self, f"table_{i}"))
            total = total + (each * rank if by_rank else each)
        return total

    def of(self, z_probs: Tensor, g_probs: Tensor, denominator: str) -> tuple[Tensor, Tensor]:
        """(E[cost] of the denominator's projections, its ratio to that at full width).  Shapes as above -> (...)"""
        mask: Tensor = getattr(self, f"of_{denominator}")
        value = self(z_probs, g_probs).masked_fill(~mask, 0.0).sum(-1)
        return value, value / getattr(self, f"full_{denominator}")


def width_probs(z_probs: Tensor) -> Tensor:
    """Probability of each width.  z_probs (..., K) marginals, which fall along the ladder -> (..., K + 1)"""
    return nn.functional.pad(z_probs, (1, 0), value=1.0) - nn.functional.pad(z_probs, (0, 1))


def packed_bytes(layout: AdapterLayout) -> Cost:
    """Bytes of codes and ranges as the packed format has them, without the last byte that fills up a tensor.

    Activations have no codes there, only their ranges; biases and what has no gates are left out.
    """
    widths = torch.tensor(layout.ladder, dtype=torch.float64)
    ranges = _RANGE * (widths < layout.ladder[-1]).double()  # (D,)
    sizes = torch.tensor(layout.range_sizes, dtype=torch.float64).view(layout.z_shape[:2])
    adapted = layout.g_mask.double()
    m, n = torch.tensor([(p.out_features, p.in_features) for p in layout.projections], dtype=torch.float64).T
    by_channel = layout.granularity == "channel"

    def table(first: Tensor, second: Tensor) -> Tensor:
        """(L, D, D) of what the widths of the first (D,) and of the second tensor (L, D) cost."""
        return first[None, :, None] + second[:, None, :]

    def on(each: Tensor, of_width: Tensor) -> Tensor:
        return each[:, None] * of_width

    none = torch.zeros_like(ranges)
    of_rows, at_once = (ranges, none) if by_channel else (none, ranges)  # of lora_A, whose rows are the ranks
    return Cost(layout, "bytes", [
        Term(INPUT, BASE, table(ranges, on(m * n, widths / 8) + on(sizes[:, BASE], ranges))),
        Term(INPUT, LORA_A, table(none, on(adapted * n, widths / 8) + on(adapted, of_rows)), by_rank=True),
        Term(INPUT, LORA_A, table(none, on(adapted, at_once))),
        Term(HIDDEN, LORA_B, table(none, on(adapted * m, widths / 8)), by_rank=True),
        Term(HIDDEN, LORA_B, adapted[:, None, None] * table(ranges, on(sizes[:, LORA_B], ranges))),
    ])  # fmt: skip


def latency(layout: AdapterLayout, times: Times) -> Cost:
    """Seconds of the projections of one forward, by a table of measured products (`pyro-blora measure-costs`).

    Closed ranks are zeros in an exported model, so they take the time of open ones.
    Errors: ValueError for a product or a width that the table does not have.
    """
    if layout.scope == WITH_HEAD:
        raise ValueError(
            f"prior 'budget': cost 'latency' has no times of an output matrix, which measure-costs does not measure: "
            f"--scope encoder, or --prior.cost bytes in scope {WITH_HEAD!r}"
        )
    places = times.places(layout.ladder)
    shares = torch.tensor([p.tokens / layout.sequence_length for p in layout.projections], dtype=torch.float64)

    def stacked(sizes: list[tuple[int, int]], rounded: bool, only: Tensor) -> Tensor:
        """(L, D, D) of products (m, n), with the rounding of their inputs; only (L,): the share that counts."""
        found = []
        for (m, n), share in zip(sizes, only.tolist(), strict=True):
            each = torch.zeros(len(places), len(places), dtype=torch.float64)
            if share:
                each = times.product(m, n)[places][:, places] + (times.rounding(n)[places, None] if rounded else 0.0)
            found.append(share * each)
        return torch.stack(found)

    of, adapted = layout.projections, layout.g_mask.double() * shares
    return Cost(layout, "latency", [
        Term(INPUT, BASE, stacked([(p.out_features, p.in_features) for p in of], True, shares)),
        Term(INPUT, LORA_A, stacked([(layout.rank, p.in_features) for p in of], False, adapted)),
        Term(HIDDEN, LORA_B, stacked([(p.out_features, layout.rank) for p in of], True, adapted)),
    ], joint=True)  # fmt: skip
