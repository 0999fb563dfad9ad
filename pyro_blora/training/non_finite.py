"""Optimizer steps whose gradient is not finite are left out, on the device, without synchronizing with the host.

The fused AdamW has an input for this, `found_inf`, made for gradient scalers: at 1 it changes neither parameters nor
moments nor its step count. What was left out is counted on the device, and read where a line is logged or a checkpoint
is due.
"""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

_SHARE = 4  # at most a quarter of a run's steps is left out in a row


@contextlib.contextmanager
def unvalidated() -> Iterator[None]:
    """Distributions accept numbers that are not finite: checking would synchronize with the device, and end the run."""
    base = torch.distributions.Distribution
    before = base._validate_args  # there is a function to set it, and none to get it
    base.set_default_validate_args(False)
    try:
        yield
    finally:
        base.set_default_validate_args(before)


class FiniteSteps:
    """Counts of steps that were left out: in all, in the present row, in the longest row, and where these two began.

    tolerated: steps in a row, see RunConfig.max_skipped_steps.
    """

    def __init__(self, tolerated: int, total: int, device: torch.device):
        self.tolerated = min(tolerated, total // _SHARE)
        self.counts = torch.zeros(5, dtype=torch.long, device=device)

    def step(self, optimizer: torch.optim.Optimizer, step: int, norm: Tensor, others: Iterable[nn.Parameter]) -> Tensor:
        """Take the optimizer's step unless a gradient is not finite; returns whether it was left out, on the device.

        norm: of the gradients that were clipped; others: the parameters beside those.
        """
        slopes = [p.grad for p in others if p.grad is not None and p.numel()]
        norms = torch._foreach_norm(slopes, torch.inf) if slopes else []  # largest values: their squares could overflow
        bad = ~torch.stack([norm, *norms]).isfinite().all()
        optimizer.grad_scale = None  # type: ignore[attr-defined]  # set by a gradient scaler, whose place this takes
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        optimizer.step()
        self._count(step, bad)
        return bad

    def _count(self, step: int, bad: Tensor) -> None:
        total, row, longest, began, where = self.counts
        began = torch.where(bad & (row == 0), step, began)
        row = (row + 1) * bad
        where = torch.where(row > longest, began, where)
        self.counts = torch.stack([total + bad, row, torch.maximum(row, longest), began, where])

    def read(self) -> tuple[int, int, int]:
        """(steps left out, in the longest row, the step at which it began); synchronizes with the device."""
        total, _, longest, _, where = self.counts.tolist()
        return total, longest, where

    @property
    def state(self) -> str:
        """For a checkpoint's notes."""
        return " ".join(map(str, self.counts.tolist()))

    def restore(self, state: str | None) -> None:
        if state is not None:
            self.counts = torch.tensor([int(x) for x in state.split()], device=self.counts.device)
