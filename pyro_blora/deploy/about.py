"""What the card of every export says of its run: base, task, labels, data, allocation, licence. No local path."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from ..bops import at_full_width, expected_bits, expected_bops
from ..config.command_line import command_line
from ..config.naming import portable
from ..config.run_config import RunConfig
from ..layout import ACTIVATIONS, AdapterLayout
from ..models.names import commit_of, public_name
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..tasks.base import has_glue_score
from ..tasks.likelihoods import Likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_GLUE = "nyu-mll/glue"
_OURS = ("acceptability", "pairs")  # tasks with a score whose data is no public set
_README = "README.md"


class About(NamedTuple):
    """base: its public name, revision: its commit on the hub, licence: what its own card says, each "" if unknown.

    command: the line that trained it, without data and folders; "" for a program that no configuration is known of.
    """

    program: BayesianLoRA
    base: str
    revision: str
    licence: str
    task: str
    labels: list[str]
    command: str

    @classmethod
    def of(cls, program: BayesianLoRA, plain: PreTrainedModel, config: RunConfig | None) -> About:
        known: dict = plain.config.id2label or {}
        labels = [str(known.get(index, label)) for index, label in enumerate(program.likelihood.names)]
        task, command = ("", "") if config is None else (config.task, _command(config))
        return cls(program, public_name(plain), commit_of(plain) or "", _licence(plain), task, labels, command)

    @property
    def kind(self) -> Likelihood:
        return self.program.likelihood

    @property
    def layout(self) -> AdapterLayout:
        return self.program.layout

    @property
    def data_set(self) -> str:
        """On the hub, "" for others."""
        return _GLUE if has_glue_score(self.task) and self.task not in _OURS else ""

    @property
    def trained_on(self) -> str:
        """A sentence."""
        of = f" of the task {self.task}" if self.task else ""
        source = f" ({_GLUE})" if self.data_set else ""
        return f"Trained by pyro_blora on {self.program.n_train:,} examples{of}{source}."

    @property
    def at_base(self) -> str:
        return self.base + (f" at revision {self.revision}" if self.revision else "")


def bops_ratio(
    program: BayesianLoRA, *, activations: int | None = None, weights: int | None = None, is_merged: bool = False
) -> float:
    """Bit operations of the deployed allocation, of those of the model at 32 x 32 bit with all ranks.

    activations, weights: 32 where they are computed at full width whatever was learned. is_merged: without adapters.
    """
    layout, (z, g) = program.layout, deployed(program)
    z = z.clone()
    for index, tensor in enumerate(layout.tensors):
        if (activations if tensor in ACTIVATIONS else weights) is not None:
            z[:, index] = 1.0
    if is_merged:
        return float(expected_bops(layout.without_adapters(), z, g).model / at_full_width(layout).model)
    return float(expected_bops(layout, z, g).model_ratio)


def allocation(layout: AdapterLayout, bits: Tensor, ranks: Tensor, tensors: Sequence[str]) -> str:
    """A table: by kind of projection, the bit widths of each tensor and the open ranks.  bits (L, T), ranks (L,)"""
    kinds: dict[str, list[int]] = {}
    for index, projection in enumerate(layout.projections):
        kinds.setdefault(projection.type, []).append(index)
    lines = [f"| projections | number | {' | '.join(tensors)} | ranks |", "|---" * (len(tensors) + 3) + "|"]
    for kind, rows in kinds.items():
        adapted = [i for i in rows if layout.projections[i].adapted]
        cells = []
        for name in tensors:
            having = rows if name in ("input", "base") else adapted
            cells.append(_span(bits[having, layout.tensors.index(name)]))
        lines.append(f"| {kind} | {len(rows)} | {' | '.join([*cells, _span(ranks[adapted])])} |")
    return "\n".join(lines)


def _span(values: Tensor) -> str:
    if not len(values):
        return "none"
    low, high = int(values.min()), int(values.max())
    return str(low) if low == high else f"{low} to {high}, mean {float(values.double().mean()):.1f}"


def deployed_widths(program: BayesianLoRA) -> tuple[Tensor, Tensor]:
    """(bits (L, T), open ranks (L,)) of the deployed allocation; a shared input in every projection that reads it."""
    z, g = deployed(program)
    return expected_bits(program.layout, z).round().long().cpu(), 1 + g.sum(-1).long().cpu()


def _command(config: RunConfig) -> str:
    """The line of a run with no folder of this machine in it."""
    values: dict[str, Any] = portable(dataclasses.asdict(config))
    usual = RunConfig()
    try:
        return command_line(dataclasses.replace(usual, **values))
    except (ValueError, TypeError):  # a part in a file that is not here any more
        return f"pyro-blora train {json.dumps(values)}"


def _licence(plain: PreTrainedModel) -> str:
    """What the card beside the base model says."""
    from huggingface_hub import ModelCard, try_to_load_from_cache

    place = Path(plain.name_or_path or "/nowhere") / _README
    if not place.is_file() and plain.name_or_path:
        with contextlib.suppress(Exception):  # a path is no name of the hub
            found = try_to_load_from_cache(plain.name_or_path, _README, revision=commit_of(plain))
            place = Path(found) if isinstance(found, str) else place
    with contextlib.suppress(Exception):  # no card, or one that is no YAML
        licence = ModelCard.load(place).data.license
        return licence if isinstance(licence, str) else ""
    return ""
