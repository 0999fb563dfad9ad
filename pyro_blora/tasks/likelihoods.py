"""Kinds of outcome: everything that depends on what is predicted is asked of one object, a `Likelihood`.

    categorical.py   one of several classes
    normal.py        a number in a range
    multi_label.py   any of several labels

A task has one; a kind of one's own is a subclass with `@register_likelihood("name")`. Nothing outside this folder asks
which kind it is.
Shapes: S draws, E examples, B batch, C outputs of the head.
"""

from __future__ import annotations

import abc
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import pyro.distributions as dist
import torch
from torch import Tensor

from ..registries import LIKELIHOODS, register_likelihood  # noqa: F401 (for the files of kinds)

if TYPE_CHECKING:
    import datasets
    import pandas as pd


class Likelihood(abc.ABC):
    """The distribution of a label given the head's outputs, and what follows from it.

    names: of the head's outputs, which are the model's `id2label`; () where they have none.
    """

    names: ClassVar[tuple[str, ...]] = ()
    problem_type: ClassVar[str]  # in transformers
    metric: ClassVar[str] = "GlueScore('sst2')"  # one of glue_metric.py that serves, as a task would make it
    constant: ClassVar[str] = "label frequencies"  # in words, what the best constant answer says
    observed: ClassVar[str] = "label"  # of ArviZ's constant data; posterior/arviz.py has its dimensions
    has_confidence: ClassVar[bool] = False  # one probability of being right: ECE, temperature, selection mean something
    curvature: ClassVar[str | None] = None  # laplace-torch's name of the likelihood; None: it has none

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """Of the head, C."""

    @abc.abstractmethod
    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> dist.Distribution:
        """Of the labels, in float32 whatever the autocast.  logits (..., C), scale () > 0 -> batch shape (...)"""

    # --- labels -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def allows(self, labels: np.ndarray) -> np.ndarray:
        """(E, ...) -> (E,) bool, False for whatever is no label; nan never is one."""

    @property
    @abc.abstractmethod
    def allowed_labels(self) -> str:
        """The labels in words, for messages."""

    @property
    @abc.abstractmethod
    def feature(self) -> datasets.Features:
        """Of the column `label`."""

    @property
    @abc.abstractmethod
    def examples(self) -> list:
        """Some labels, every kind of them, to try a metric on."""

    # --- predictions --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def averaged(self, distribution: dist.Distribution) -> Tensor:
        """What is averaged over draws: probabilities, or a mean.  -> (..., C)"""

    @abc.abstractmethod
    def decision(self, mean: Tensor) -> Tensor:
        """The answer at averages (E, C) -> (E,), or as a label is."""

    @abc.abstractmethod
    def columns(self, outputs: Tensor) -> dict[str, np.ndarray]:
        """Columns of predictions.parquet beside the decision.  (S, E, C)"""

    @abc.abstractmethod
    def read(self, table: pd.DataFrame) -> Tensor:
        """The averages (E, C) from such a table."""

    @abc.abstractmethod
    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Variables of ArviZ's group `predictions`, by a name that posterior/arviz.py has dimensions for.  (S, E, C)"""

    # --- scores -------------------------------------------------------------------------------------------------------

    classes: ClassVar[int] = 0  # of scores that baselines.py computes itself; 0: values

    @abc.abstractmethod
    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        """Answers that are the same for every example, among which is the best one: each as the labels."""

    @abc.abstractmethod
    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        """(E,) log density of the labels under their own frequencies, whatever the input.  Nats."""

    def right(self, decision: Tensor, labels: Tensor) -> float | None:
        """Share of the decisions that are right; None where a decision is not right or wrong."""
        return None

    def details(self, mean: Tensor, labels: Tensor) -> dict:
        """What else a summary says of predictions."""
        return {}

    # --- curvature (Laplace) ------------------------------------------------------------------------------------------

    def linearized(self, logits: Tensor, scale: Tensor) -> Tensor:
        """What is linear in the weights under Laplace: the logits, or what stands for them.  (B, C) -> (B, C)"""
        return logits

    def noise_std(self, scale: Tensor) -> Tensor | None:
        """Standard deviation of a label about its mean, where it is one number."""
        return None

    def gauss_newton_rows(self, J: Tensor, logits: Tensor) -> Tensor:
        """(B C, D) rows U with U^T U = sum over examples of J^T H J, H of -log p(label) about the linearized outputs.

        J (B, C, D), logits (B, C).   Errors: ValueError where laplace-torch has no such likelihood.
        """
        raise ValueError(f"weights 'laplace' has no curvature for {self.problem_type}: choose other --weights")

    # --- words --------------------------------------------------------------------------------------------------------

    @property
    def card(self) -> str:
        """How the outputs of an exported model are read; empty where their names say it."""
        return ""

    def require_outputs(self, logits: Tensor) -> None:
        if logits.shape[-1] != self.outputs:
            raise ValueError(
                f"the likelihood needs logits of shape (..., {self.outputs}), not {tuple(logits.shape)}: build the "
                f"head with num_labels={self.outputs}"
            )
