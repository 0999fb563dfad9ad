"""Kinds of outcome: everything that depends on what is predicted is asked of one object, a `Likelihood`.

Those of the package are categorical.py, normal.py, multi_label.py, token_labels.py, spans.py, and of language models
causal_lm.py and multiple_choice.py. A task has one; a kind of one's own is a subclass with
`@register_likelihood("name")`, in a file of its own. Nothing outside this folder asks which kind it is.
Shapes: S draws, E examples, B batch, C outputs, `*` further dimensions: of a label none, (C,) labels, (T,) tokens."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Distribution, kl_divergence

from ..registries import LIKELIHOODS as LIKELIHOODS
from ..registries import register_likelihood as register_likelihood  # for the files of kinds
from ..user_values import is_encodable
from .columns import least_expected
from .fisher import in_eigenbasis
from .heads import Head

if TYPE_CHECKING:
    import datasets
    import pandas as pd
    from transformers import PreTrainedTokenizerBase

    from .conformal import Conformal

IGNORED = -100  # a label where nothing is asked, as in transformers; labels are padded with it
Rows = Mapping[str, list[Any]]  # columns of a task's rows, or of what a tokenizer makes of them
Collate = Callable[[list[dict[str, Any]]], dict[str, Tensor]]  # encoded rows -> the network's inputs, and `labels`
PAD_TO = 8  # lengths in steps of eight: few shapes, and what tensor cores like


class Likelihood(abc.ABC):
    """The distribution of an example's label given the network's output, and what follows from it.

    names: of the head's outputs, which are the model's `id2label`; () where they have none.
    """

    names: tuple[str, ...] = ()
    head: ClassVar[Head] = Head()
    problem_type: ClassVar[str | None] = None  # in transformers, where it has a word for it
    constant: ClassVar[str] = "label frequencies"  # in words, what the best constant answer says
    averages: ClassVar[str] = "predicted probabilities"  # in words, what is averaged over draws
    has_confidence: ClassVar[bool] = False  # one probability of being right: ECE, temperature, selection mean something
    no_confidence: ClassVar[str] = "no single confidence"  # in words, why not
    curvature: ClassVar[str | None] = None  # laplace-torch's name of the likelihood; None: it has none
    example_texts: ClassVar[tuple[Any, ...]] = ()  # one for each text column, where those of columns differ in form
    starting_std: float = 1.0  # of a label where it is learned, in the unit of the labels
    one_row: ClassVar[bool] = True  # whether an example has one row of logits, (C,), as many in every batch

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """Of the head, C."""

    @abc.abstractmethod
    def __call__(self, logits: Tensor, *, scale: Tensor | None = None) -> Distribution:
        """Of the labels, in float32 whatever the autocast.  logits (..., B, *, C), scale () > 0 -> batch shape (..., B)

        Its `log_prob` takes labels as the collator makes them, and leaves out those that are IGNORED.
        """

    # --- head ---------------------------------------------------------------------------------------------------------

    @property
    def title(self) -> str:
        """The kind in a word, for messages."""
        return self.problem_type or type(self).__name__

    @property
    def head_settings(self) -> dict[str, Any]:
        """Fields of the model's configuration that its head is built from."""
        return {"num_labels": self.outputs, "problem_type": self.problem_type}

    def card(self, labels: Sequence[str]) -> str:
        """How the outputs of an exported model are read, in a sentence; labels: their names in the exported model."""
        return f"Its outputs are the logits of {', '.join(f'`{x}`' for x in labels)}, in this order." if labels else ""

    @property
    def averaged_in_code(self) -> str | None:
        """What is averaged over draws, in PyTorch and of `logits` (B, ...) alone; None where these do not give it."""
        return None

    # --- labels -------------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def allows(self, labels: np.ndarray) -> np.ndarray:
        """(E,) bool, False for whatever is no label; nan never is one.

        labels: the column `label` of a task's rows; of lists of several lengths, an array of them.
        """

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
    def examples(self) -> list[Any]:
        """Some labels, every kind of them, to try a metric on."""

    def laid_out(self, labels: Sequence[Any]) -> np.ndarray:
        """The column `label` as one array, as `scored` labels are: shorter rows are padded with IGNORED.  (E, *)"""
        return np.asarray(labels)

    def is_text(self, cell: object) -> bool:
        """Whether a cell of a text column is one."""
        return isinstance(cell, str) and bool(cell.strip()) and is_encodable(cell)

    def reader(self, by_name: bool) -> tuple[Callable[[str], Any], str]:
        """(what turns a label of a text file into one, or raises KeyError or ValueError; the allowed ones in words).

        by_name: labels are written as names; else as numbers. Errors: NotImplementedError where one is no single word.
        """
        raise NotImplementedError(f"a label of kind {self.title} is not read from one column of text")

    # --- batches ------------------------------------------------------------------------------------------------------

    def encode(self, tokenizer: PreTrainedTokenizerBase, rows: Rows, columns: tuple[str, ...], max_length: int) -> Rows:
        """Token ids of rows, cut at max_length, pairs joined as the tokenizer does; of tokens' labels, `label` anew."""
        encoded: Rows = tokenizer(*(rows[column] for column in columns), truncation=True, max_length=max_length)
        return encoded

    def collator(self, tokenizer: PreTrainedTokenizerBase) -> Collate:
        """What makes a batch of encoded rows: the network's inputs, and `labels`."""
        from transformers import DataCollatorWithPadding

        return DataCollatorWithPadding(tokenizer, pad_to_multiple_of=PAD_TO)

    # --- predictions --------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def averaged(self, distribution: Any, labels: Tensor) -> Tensor:
        """What is kept of every draw and averaged over draws: probabilities, or a mean.  -> (..., B, *)

        distribution: what the object itself returned. labels: of the batch, which say where something is asked. Where
        sizes of `*` differ between batches, shorter ones are padded with 0.
        """

    def scored(self, labels: Tensor) -> Tensor:
        """A batch's labels, laid out as `averaged` is; shorter ones are padded with IGNORED."""
        return labels

    def mean(self, outputs: Tensor) -> Tensor:
        """What was kept, averaged over draws.  (S, E, *) -> (E, *)"""
        return outputs.mean(0)

    @abc.abstractmethod
    def decision(self, mean: Tensor) -> Tensor:
        """The answer at averages (E, *), as `scored` labels are."""

    def cells(self, answers: Tensor) -> np.ndarray | list[Any]:
        """Decisions as a column of predictions.parquet: one value, or one list, an example."""
        return answers.numpy() if answers.dim() == 1 else answers.tolist()

    @abc.abstractmethod
    def columns(self, outputs: Tensor) -> Mapping[str, np.ndarray | list[Any]]:
        """Columns of predictions.parquet beside the decision.  (S, E, *)"""

    @abc.abstractmethod
    def read(self, table: pd.DataFrame) -> Tensor:
        """The averages (E, *) from such a table."""

    # --- answers to new texts -----------------------------------------------------------------------------------------

    def placeholder(self, texts: Sequence[Any]) -> Any:
        """A label for an example that has none, which `averaged` needs where it is asked which outputs there are."""
        return self.examples[0]

    def answers(self, outputs: Tensor, scale: Tensor) -> dict[str, Any]:
        """Columns of a table of predictions, the answer first.  outputs (S, E, *), scale () or of every draw (S, 1)"""
        return {"decision": self.cells(self.decision(self.mean(outputs))), **self.columns(outputs)}

    def in_words(self, found: dict[str, Any], texts: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
        """Columns of answers, with what their numbers stand for in the texts of each example."""
        return found

    def conformal(self, mean: Tensor, labels: Tensor, coverage: float) -> Conformal:
        """Prediction sets, from held-out averages (E, *) and labels.  Errors: ValueError for too few, or no sets."""
        raise ValueError(f"there are no prediction sets for a label of kind {self.title}: leave out coverage")

    # --- ArviZ --------------------------------------------------------------------------------------------------------

    observed: ClassVar[str] = "label"  # variable of predictions_constant_data: the labels
    dims: ClassVar[dict[str, tuple[str, ...]]]  # of `observed`, and after (chain, draw) of what `predicted` returns

    @abc.abstractmethod
    def predicted(self, outputs: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
        """Variables of ArviZ's group `predictions`.  (S, E, *)"""

    @property
    def coords(self) -> dict[str, list[str]]:
        """Coordinates of those dimensions that have names; others are numbered."""
        return {"class": list(self.names)} if self.names else {}

    # --- scores -------------------------------------------------------------------------------------------------------

    @property
    def classes(self) -> int:
        """Of an answer that is one class, C; 0 for other answers."""
        return 0

    @abc.abstractmethod
    def metric(self) -> Any:
        """What scores decisions where a task names nothing else: it has compute(predictions=, references=)."""

    def metric_on(self, rows: pd.DataFrame, columns: tuple[str, ...]) -> Any:
        """The same of rows whose texts it may need."""
        return self.metric()

    @abc.abstractmethod
    def constants(self, labels: np.ndarray) -> list[np.ndarray]:
        """Answers that are the same for every example, among which is the best one: each as the scored labels."""

    @abc.abstractmethod
    def constant_log_scores(self, labels: np.ndarray) -> np.ndarray:
        """(E,) log density of the labels under their own frequencies, whatever the input.  Nats."""

    def right(self, decision: Tensor, labels: Tensor) -> float | None:
        """Share of the decisions that are right; None where a decision is not right or wrong."""
        return None

    def details(self, mean: Tensor, labels: Tensor) -> dict[str, Any]:
        """What else a summary says of predictions (E, *); `tables` in it, rows by caption, are shown in the report."""
        return {}

    # --- report -------------------------------------------------------------------------------------------------------

    left_out: ClassVar[tuple[str, ...]] = ()  # titles of the report's sections that mean nothing here

    def probabilities(self, table: pd.DataFrame) -> pd.DataFrame | None:
        """(E, C) of predictions.parquet, a column a class in the order of the labels; None without a confidence."""
        return None

    def worst(self, table: pd.DataFrame, count: int) -> tuple[str, pd.DataFrame]:
        """(a sentence, the examples of predictions.parquet that went most wrong)."""
        return least_expected(table, count)

    # --- the gates' start, distillation -------------------------------------------------------------------------------

    def fisher_directions(self, logits: Tensor, labels: Tensor, scale: Tensor) -> Tensor:
        """Random v, of the logits' shape, with E[v v'] = the Fisher information of an example's label about its logits.

        labels: where something is asked; what they are is not looked at. Here v is the slope of the log-probability of
        a label drawn from the distribution itself; independent groups of outputs have less noise in `in_eigenbasis`.
        """
        with torch.enable_grad():
            here = logits.detach().clone().requires_grad_()
            distribution = self(here, scale=scale)
            (slope,) = torch.autograd.grad(distribution.log_prob(distribution.sample()).sum(), here)
        return slope

    def in_eigenbasis(self, logits: Tensor, scale: Tensor) -> Tensor:
        """Such directions where groups of outputs along the last dimension are independent.  (..., C) -> (..., C)"""
        return in_eigenbasis(lambda x: self(x, scale=scale), logits)

    def divergence(self, teacher: Distribution, student: Distribution, labels: Tensor) -> Tensor:
        """KL(teacher || student) of an example's label, nats, (..., B); both are what the object itself returned.

        labels: as `log_prob` takes them. Errors: NotImplementedError where torch knows no divergence between the two.
        """
        return kl_divergence(teacher, student)

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
        raise ValueError(f"weights 'laplace' has no curvature for {self.title}: choose other --weights")

    # --- checks -------------------------------------------------------------------------------------------------------

    def require_outputs(self, logits: Tensor) -> None:
        if logits.shape[-1] != self.outputs:
            raise ValueError(
                f"the likelihood needs logits of shape (..., {self.outputs}), not {tuple(logits.shape)}: build the "
                f"head with num_labels={self.outputs}"
            )
