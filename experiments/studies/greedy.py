"""Bits and ranks together by measured sensitivity, greedily: a peer in the manner of AutoQRA, without its search.

For every tensor and width alone, and for every rank, with all others open, it is measured how far predictions move:
their KL divergence from those of the open network. (The rise of the loss on some examples has either sign, and more
noise than most differences between tensors.) Then rungs and ranks are closed one by one, the one of least divergence
per bit operation saved first; every few steps the next candidates are measured again, at the allocation reached. One
path from open to closed serves every budget: the allocation is where the path first meets it, with what still fits
opened again.
Source: what is allocated is as in AutoQRA (Zhou et al. 2026, arXiv:2602.22268), bits and ranks of each layer together,
by measurements. AutoQRA goes on from importances as these with an evolutionary search and Bayesian optimization over
short trainings, for a budget of memory; this is not that search.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_blora import adapters
from pyro_blora.bit_widths import written
from pyro_blora.bops import expected_bops
from pyro_blora.gates import Gates
from pyro_blora.layout import AdapterLayout
from pyro_blora.program import BayesianLoRA
from pyro_blora.progress import phase

FINE = 8  # bits above which rounding is taken to cost nothing
AGAIN, CANDIDATES = 32, 16  # after so many steps, so many are measured again


class Move(NamedTuple):
    """Close the gate of a ladder that is the last open one; t: the tensor, or -1 for the ranks."""

    projection: int
    tensor: int
    depth: int  # open gates then


class Depths(NamedTuple):
    """Open gates of every ladder: z (L, T), g (L,)."""

    z: Tensor
    g: Tensor

    @classmethod
    def opened(cls, layout: AdapterLayout) -> "Depths":
        L, T, K = layout.z_shape
        return cls(torch.full((L, T), K), torch.full((L,), layout.rank - 1))

    def at(self, move: Move) -> int:
        return int(self.z[move.projection, move.tensor] if move.tensor >= 0 else self.g[move.projection])

    def after(self, move: Move) -> "Depths":
        new = Depths(self.z.clone(), self.g.clone())
        if move.tensor >= 0:
            new.z[move.projection, move.tensor] = move.depth
        else:
            new.g[move.projection] = move.depth
        return new

    def gates(self, layout: AdapterLayout) -> Gates[Tensor]:
        z, g = (
            (torch.arange(shape[-1]) < depth[..., None]).float()
            for depth, shape in zip(self, (layout.z_shape, layout.g_shape), strict=True)
        )
        return Gates(z, g)


Measure = Callable[[Depths], float]


def divergence_of(program: BayesianLoRA, batches: Sequence[tuple[dict, Tensor]], ranges: Tensor) -> Measure:
    """KL(open network || network at an allocation) of the batches' labels, nats per example; each tensor has the range
    of its width.

    ranges (*layout.range_shape, K + 1).
    """
    kept = program.net.log_range.detach().exp()

    @torch.no_grad()
    def answers(depths: Depths) -> list[Any]:
        widths = program.layout.by_range(depths.z)[..., None].to(ranges.device)
        adapters.set_ranges(program.net, ranges.gather(-1, widths).squeeze(-1))
        gates = Gates(*(x.to(ranges) for x in depths.gates(program.layout)))
        each = program.each_logits([inputs for inputs, _ in batches], gates)
        found = [program.likelihood(logits, scale=program.log_scale.exp()) for logits in each]
        adapters.set_ranges(program.net, kept)
        return found

    opened = answers(Depths.opened(program.layout))

    def measure(depths: Depths) -> float:
        each = zip(opened, answers(depths), batches, strict=True)
        total = sum(program.likelihood.divergence(a, b, labels).sum().item() for a, b, (_, labels) in each)
        return total / sum(len(labels) for _, labels in batches)

    return measure


def closings(layout: AdapterLayout) -> Iterator[Move]:
    """Every gate that can be closed."""
    L, _, K = layout.z_shape
    for i in range(L):
        yield from (Move(i, t, d) for t in layout.z_mask[i].nonzero().flatten().tolist() for d in reversed(range(K)))
        if layout.projections[i].adapted:
            yield from (Move(i, -1, d) for d in reversed(range(layout.rank - 1)))


def increments_of(layout: AdapterLayout, measure: Measure) -> dict[Move, float]:
    """By gate, what closing it adds to what is measured where all else is open, nats per example.

    Ranks are measured where they halve, and in between shared evenly.
    """
    opened, found = Depths.opened(layout), {}
    every = list(closings(layout))
    measured = [m for m in every if (layout.ladder[m.depth] <= FINE if m.tensor >= 0 else _halves(m.depth + 1, layout))]
    with phase("measuring divergences", len(measured), unit="allocations") as shown:
        base = measure(opened)
        alone = {move: measure(opened.after(move)) - base for move in shown.over(measured)}
    for move in every:
        if move in alone:
            above = min((m.depth for m in alone if m[:2] == move[:2] and m.depth > move.depth), default=opened.at(move))
            rise = alone[move] - alone.get(move._replace(depth=above), 0.0)
            share = above - move.depth if move.tensor < 0 else 1
            found |= {move._replace(depth=move.depth + i): rise / share for i in range(share)}
        else:
            found.setdefault(move, 0.0)
    return found


def _halves(rank: int, layout: AdapterLayout) -> bool:
    return rank in {max(1, layout.rank >> i) for i in range(1, layout.rank.bit_length())}


def closing_path(layout: AdapterLayout, increments: dict[Move, float], measure: Measure | None = None) -> list[Move]:
    """The order in which gates are closed, until none is open; `increments` is brought up to date by `measure`."""
    state, path = Depths.opened(layout), []
    with phase("closing gates", len(increments), unit="gates") as shown:
        while candidates := _next(layout, state, increments):
            if measure is not None and len(path) % AGAIN == 0 and path:
                here = measure(state)
                for move in [m for m in candidates if _is_measured(layout, m)][:CANDIDATES]:
                    increments[move] = measure(state.after(move)) - here
                candidates = _next(layout, state, increments)
            path.append(candidates[0])
            state = state.after(candidates[0])
            shown.advance()
    return path


def _is_measured(layout: AdapterLayout, move: Move) -> bool:
    return move.tensor < 0 or layout.ladder[move.depth] <= FINE


def _next(layout: AdapterLayout, state: Depths, increments: dict[Move, float]) -> list[Move]:
    """The gates that can be closed next, the least rise per bit operation first, of equal ones the largest saving."""
    saved = _slopes(layout, state)
    found = [move for move in increments if state.at(move) == move.depth + 1]

    def price(move: Move) -> tuple[float, float]:
        saving = saved.of(layout, move)
        return max(increments[move], 0.0) / saving, -saving

    return sorted(found, key=price)


class _Slopes(NamedTuple):
    z: Tensor
    g: Tensor

    def of(self, layout: AdapterLayout, move: Move) -> float:
        if move.tensor < 0:
            return float(self.g[move.projection, move.depth])
        return float(self.z[move.projection, move.tensor, move.depth])


def _slopes(layout: AdapterLayout, state: Depths) -> _Slopes:
    """What each gate costs at an allocation, as a share of the model's BOPs: they are linear in each ladder's gates."""
    gates = [x.double().requires_grad_() for x in state.gates(layout)]
    return _Slopes(*torch.autograd.grad(expected_bops(layout, *gates).model_ratio, gates))


def allocation_at(
    layout: AdapterLayout, path: Sequence[Move], increments: dict[Move, float], bops: float
) -> Gates[Tensor]:  # fmt: skip
    """The first allocation of the path whose share of the model's BOPs is at most `bops`, and what fits opened again.

    Errors: ValueError where even the path's end is above it, and for a path of another layout.
    """
    if set(path) != set(closings(layout)):
        raise ValueError(
            f"the path closes {len(set(path))} gates, which are not those of the layout: measure it with bit widths "
            f"{written(layout.ladder)} and rank {layout.rank}"
        )

    def share(state: Depths) -> float:
        return expected_bops(layout, *state.gates(layout)).model_ratio.item()

    state = Depths.opened(layout)
    for move in path:
        if share(state) <= bops:
            break
        state = state.after(move)
    if share(state) > bops:
        raise ValueError(f"bops must be at least {share(state):.3g}, got {bops:g}")
    while True:
        costs, room = _slopes(layout, state), bops - share(state)
        fitting = [m for m in increments if state.at(m) == m.depth and 0 < costs.of(layout, m) <= room]
        gain = max(fitting, key=lambda m: increments[m] / costs.of(layout, m), default=None)
        if gain is None or increments[gain] <= 0:
            return state.gates(layout)
        state = state.after(gain._replace(depth=gain.depth + 1))
