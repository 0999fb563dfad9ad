"""Learning rates, temperature, phases, seeds: pure functions of the step, so no checkpoint holds them."""

import dataclasses
import hashlib
import math
from typing import cast

from ..config.run_config import RunConfig
from ..program import Held
from ..weights.base import Weights, whole_steps

_SPREAD_RATE = 0.02  # first learning rate of log standard deviations, whatever that of their means
_LAST_RATE = 0.01  # of the gates' learning rate, at the last step, of the first
_COOLED_BY = 0.75  # the temperature reaches its end at this fraction of the steps, the rest trains at it


def step_seed(*numbers: int) -> int:
    """A seed that differs whenever one of the numbers does."""
    return int.from_bytes(hashlib.sha256(repr(numbers).encode()).digest()[:7], "big")


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Everything that changes with the optimizer step, as pure functions of it."""

    config: RunConfig
    steps: int  # in the whole run
    steps_per_epoch: int
    constant_from: float = 1.0  # the fraction of the steps from which the learning rate stays, where it does
    plateau: float = 1.0  # what it then is, as a fraction of its peak

    @classmethod
    def of(cls, config: RunConfig, n_train: int, processes: int = 1, weights: Weights | None = None) -> "Schedule":
        per_step = config.batch_size * config.accumulation * processes
        if n_train < per_step:
            raise ValueError(
                f"{n_train} training examples do not fill one step of {per_step} (batch size x accumulation x "
                "processes): lower --batch_size, or train on more rows"
            )
        own = () if weights is None else (weights.constant_from, weights.plateau)
        return cls(config, config.epochs * (n_train // per_step), n_train // per_step, *own)

    @property
    def opening(self) -> int:
        """The step at which the gates start."""
        return whole_steps(cast(float, self.config.kl_warmup), self.steps)  # which RunConfig has set

    @property
    def learning(self) -> int:
        """The step at which gates begin to learn, after a rest at the allocation that they start from."""
        return min(self.settling, self.opening + round(cast(float, self.config.rest) * self.steps))

    @property
    def settling(self) -> int:
        """The step from which the gates rest at the deployed allocation, to the end."""
        return max(self.opening, whole_steps(1 - cast(float, self.config.settle), self.steps))

    def held(self, step: int) -> Held | None:
        """The allocation at which the gates are held, where they are."""
        if step < self.opening:
            return "open"
        return None if self.learning <= step < self.settling else "deployed"

    def require(self, gates_are_random: bool, start_from_data: bool) -> None:
        """Errors: ValueError for gates that rest where there is nothing to decide, or nothing has decided it."""
        fractions = {name: cast(float, getattr(self.config, name)) for name in ("rest", "settle")}
        told = " and ".join(f"{name} {fraction:g}" for name, fraction in fractions.items() if fraction)
        if told and not gates_are_random:
            raise ValueError(
                f"{told}: random gates would rest at what is deployed, and this run has none: give --rest 0 --settle 0"
            )
        if told and not start_from_data and (self.config.rest or self.settling <= self.opening < self.steps):
            raise ValueError(
                f"{told}: gates would rest before they have learned, and those of guide {self.config.guide!r} do not "
                "start from the data: give --rest 0, and a smaller --settle"
            )

    def gates_move(self, step: int) -> float:
        """How far natural gradients move the gates, from their start at 0 to the average of their targets at 1.

        From the middle of the steps in which gates are free, linearly to the last of these.
        """
        gone = 2 * (step + 1) - (self.learning + self.settling)
        return min(1.0, max(0, gone) / max(1, self.settling - self.learning))

    def temperature(self, step: int) -> float:
        start, end = self.config.temperature_start, self.config.temperature_end
        return start * (end / start) ** min(1.0, step / max(1.0, _COOLED_BY * self.steps))

    def learning_rate(self, group: str, step: int) -> float:
        """Adapter, weights and head: linear warm-up and decay, to 0 or (SWAG) to a plateau.

        From the opening on, ranges are constant; gates fall to 1 %, and are at 0 where they rest.
        At a constant rate, Adam's noise would keep the gates away from their posterior: benchmarks/posterior.md.
        """
        if group in ("gates", "ranges"):
            if group == "ranges":
                return self.config.lr_ranges if step >= self.opening else 0.0
            gone = (step - self.learning) / max(1, self.settling - self.learning)
            return cast(float, self.config.lr_gates) * _LAST_RATE**gone if self.held(step) is None else 0.0
        peaks = {"head": self.config.lr if self.config.lr_head is None else self.config.lr_head, "spread": _SPREAD_RATE}
        peak = cast(float, peaks.get(group, self.config.lr))
        warm = max(1, math.ceil(self.config.warmup * self.steps - 1e-6))  # .07 of 100 is 7, as in `whole_steps`
        if self.constant_from < 1:
            first = max(warm + 1, whole_steps(self.constant_from, self.steps))
            gone = min(1.0, max(0, step - warm) / (first - warm))
            return peak * min((step + 1) / warm, 1 - (1 - self.plateau) * gone)
        return peak * min((step + 1) / warm, (self.steps - step) / max(1, self.steps - warm))
