"""Levers that could raise the score at given bit operations, as changes of a configuration, and their cells.

Budgets are shares of bit operations without any lever, so that a row is at the same bit operations with and without it.
Cells without a lever are those of `allocation.py`.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from experiments.studies.allocations import OPEN, Budget, Cells
from pyro_blora.config import RunConfig

NONE, ALL = "none", "all"
ALONE: dict[str, dict[str, Any]] = {
    "distillation": {"distillation": 0.5},
    "smoothing": {"smoothing": True},
    "granularity": {"granularity": "channel"},
    "rungs": {"bit_widths": "2,3,4,6,8,16,32"},
    "adapters": {"target_modules": "all-linear"},
    "rank": {"rank": 24, "alpha": 48.0},  # as many parameters as `adapters`, at query, key and value
}
BEFORE = ("target_modules", "rank", "alpha")  # fields that change the network before gates start: LoRA has them, too
_TOGETHER = {field: value for changes in ALONE.values() for field, value in changes.items() if field not in BEFORE}
LEVERS = {NONE: {}, **ALONE, ALL: _TOGETHER}
NEEDS_GATES = ("distillation",)  # fields that a run whose gates all stay open refuses


class LeverCells(Cells):
    """The cells of one lever, in a folder of its name in `--keep`; those of none are in `--without`."""

    def __init__(self, options: argparse.Namespace, lever: str):
        super().__init__(options)
        self.lever, self.changes = lever, LEVERS[lever]
        self.folder = options.without if lever == NONE else options.keep / lever

    @property
    def has_own_lora(self) -> bool:
        """Whether LoRA at 32 bit is another network with this lever, or there is none."""
        return self.lever == NONE or not self.changes.keys().isdisjoint(BEFORE)

    def lora(self, task: str, seed: int) -> RunConfig:
        before = {field: value for field, value in self.changes.items() if field in BEFORE}
        return super()._config(task, seed, {**before, "prior": "fixed", "prior_settings": {"bits": 32}})

    def opened(self, task: str, seed: int) -> RunConfig:
        some = {field: value for field, value in self.changes.items() if field not in NEEDS_GATES}
        return dataclasses.replace(self.lora(task, seed), **some)

    def _config(self, task: str, seed: int, changes: dict[str, Any]) -> RunConfig:
        return super()._config(task, seed, {**self.changes, **changes})

    def at(self, task: str, name: str, share: float) -> Budget:
        """The uniform allocation of that name on this lever's ladder, and a share for prior `budget`."""
        return dataclasses.replace(self.uniform(task, name), share=share)

    def path(self, task: str, seed: int, method: str, budget: Budget | None = None) -> Path:
        path = super().path(task, seed, method, budget)
        return path if method not in OPEN or self.has_own_lora else self.options.without / path.name
