"""AdapterLayout: which linear maps of a model carry gates, and what they cost. Plain data, no model inside.

It is the pivot of the package: priors see costs through it, guides take their shapes from it, BOPs, ArviZ coordinates
and export read the same fields. `models.layout_of(model, ...)` reads it off a Hugging Face model.

Shape letters: L gated projections, T = 5 tensors each, K random bit gates (4: the lowest rung, 2 bit, is always open),
R ranks (the first is always open). Units: MACs are per example, of a forward of `batch_size` examples of
`sequence_length` tokens (macs.py counts them). DeBERTa's positional stream passes through `query` and `key` a second
time, 512 positions once a batch, whatever the examples: each of 32 examples has 16 of them, so `tokens` exceeds the
sequence length there. The batch size is a constant, not the run's own, so that figures of all runs compare.
"""

import dataclasses
import importlib
import itertools
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .bit_widths import LADDER

TENSORS = ("input", "base", "lora_A", "lora_B", "hidden")
INPUT, BASE, LORA_A, LORA_B, HIDDEN = range(len(TENSORS))  # their places in the T dimension
ACTIVATIONS = ("input", "hidden")  # the others are weights
OF_EVERY_PROJECTION = ("input", "base")  # the others are an adapter's
PRODUCTS = {  # of a projection, and what their bit operations are proportional to; those by rank are an adapter's
    "W x": ("input", "base"),
    "A x": ("rank", "input", "lora_A"),
    "B h": ("rank", "hidden", "lora_B"),
}
WITH_HEAD = "encoder+head"  # the linear map to the vocabulary, too
SCOPES = ("adapted", "encoder", WITH_HEAD)
GRANULARITIES = ("tensor", "channel")  # what has a range of its own
BATCH_SIZE = 32  # examples of the forward whose MACs are counted: the batch size of the presets
READ_ALIKE = ("query", "key", "value")  # types of projections that read the same input


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear map y = W x + b with W of shape (out_features, in_features).

    `tokens` is how many vectors pass through it per example (what passes once a batch is shared by its examples),
    `adapted` whether it has a low-rank adapter, `uses` how often a forward passes an example through it: more than once
    where layers share their weights (ALBERT). `tokens` counts every use.
    """

    name: str
    type: str
    layer: int
    in_features: int
    out_features: int
    tokens: float
    adapted: bool
    uses: int = 1

    @property
    def macs(self) -> float:
        return self.tokens * self.in_features * self.out_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """The gated projections of a model, in model order, and the MACs of everything.

    `model_macs` counts every matrix product of the plain model per example, attention products and head included.
    `share_inputs`: query, key and value of a layer share one ladder for their input, which is the first one's.
    `batch_size`: examples of the forward that was counted. `ladder`: bit widths, rising; the last is unquantized.
    `granularity`: whether a weight has one range, or one for each output channel (row); activations have one.
    """

    architecture: str
    projections: tuple[Projection, ...]
    rank: int
    alpha: float
    scope: str
    sequence_length: int
    model_macs: float
    tensors: tuple[str, ...] = TENSORS
    ladder: tuple[int, ...] = LADDER
    share_inputs: bool = False
    batch_size: int = BATCH_SIZE
    granularity: str = GRANULARITIES[0]

    @classmethod
    def of(cls, model: nn.Module, **settings: Any) -> "AdapterLayout":
        """The layout of a Hugging Face model, see `models.layout_of`, which has the settings."""
        models = importlib.import_module(".models", __package__)  # by name, as models builds on this module
        layout: AdapterLayout = models.layout_of(model, **settings)
        return layout

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AdapterLayout":
        projections = tuple(Projection(**p) for p in data["projections"])
        tuples = {"tensors": tuple(data["tensors"]), "ladder": tuple(data["ladder"]), "projections": projections}
        return cls(**{"batch_size": 1, **data, **tuples})  # older layouts were counted at batch 1

    def without_adapters(self) -> "AdapterLayout":
        """The same projections for full fine-tuning."""
        return dataclasses.replace(
            self, projections=tuple(dataclasses.replace(p, adapted=False) for p in self.projections)
        )

    def named_as(self, other: "AdapterLayout") -> "AdapterLayout":
        """Another layout if it differs by nothing but roles, layers and uses, which older versions named otherwise."""
        alike = (
            dataclasses.replace(p, type=q.type, layer=q.layer, uses=q.uses)
            for p, q in zip(self.projections, other.projections, strict=False)
        )
        return other if dataclasses.replace(self, projections=tuple(alike)) == other else self

    @property
    def sharing(self) -> str:
        """A sentence on layers that share their weights (ALBERT); empty where none do."""
        uses = max((p.uses for p in self.projections), default=1)
        if uses == 1:
            return ""
        return (
            f"Layers share their weights: what is used {uses} times has one adapter and one set of gates, and bit "
            "operations count every use."
        )

    @property
    def adapted(self) -> tuple[Projection, ...]:
        return tuple(p for p in self.projections if p.adapted)

    @cached_property
    def names(self) -> list[str]:
        """Of the projections: `7.value`, or their full path where that is not unique."""
        short = [f"{p.layer}.{p.type}" for p in self.projections]
        return short if len(set(short)) == len(short) else [p.name for p in self.projections]

    @property
    def z_shape(self) -> tuple[int, int, int]:
        """(L, T, K): the bit gates."""
        return len(self.projections), len(self.tensors), len(self.ladder) - 1

    @property
    def g_shape(self) -> tuple[int, int]:
        """(L, R - 1): the rank gates."""
        return len(self.projections), self.rank - 1

    @cached_property
    def range_sizes(self) -> tuple[int, ...]:
        """L T: how many ranges each (projection, tensor) has. By channel, the rows of a weight; else 1."""
        rows = [{"base": p.out_features, "lora_A": self.rank, "lora_B": p.out_features} for p in self.projections]
        exist = self.z_mask.tolist()
        return tuple(
            of.get(tensor, 1) if self.granularity == "channel" and exist[i][t] else 1
            for i, of in enumerate(rows)
            for t, tensor in enumerate(self.tensors)
        )

    @cached_property
    def range_owner(self) -> Tensor:
        """(V,) the tensor, counted from 0 to L T, that each range is of; V ranges by projection, tensor and row."""
        return torch.arange(len(self.range_sizes)).repeat_interleave(torch.tensor(self.range_sizes))

    @property
    def range_shape(self) -> tuple[int, ...]:
        """Of what has a number for every range: (L, T), by channel (V,)."""
        return self.z_shape[:2] if self.granularity == "tensor" else (sum(self.range_sizes),)

    def by_range(self, each: Tensor) -> Tensor:
        """What each tensor has, for each of its ranges.  (L, T, ...) -> (*range_shape, ...)"""
        return each if self.granularity == "tensor" else each.flatten(0, 1)[self.on(each.device, "range_owner")]

    def ranges_of(self, ranges: Tensor, projection: int, tensor: int) -> Tensor:
        """Those of one tensor: a view, without a dimension of rows where it has one range.

        (*range_shape, ...) -> (...), or (rows, ...)
        """
        if self.granularity == "tensor":
            return ranges[projection, tensor]
        index = projection * len(self.tensors) + tensor
        start, size = self._range_starts[index], self.range_sizes[index]
        return ranges[start] if size == 1 else ranges[start : start + size]

    @cached_property
    def range_order(self) -> Tensor:
        """(V + L T (K + 1),) where [ranges, mixture weights] of tensor after tensor stand among all ranges, then all
        weights."""
        starts, widths, order = self._range_starts, len(self.ladder), []
        for i, size in enumerate(self.range_sizes):
            first = starts[-1] + i * widths
            order += [*range(starts[i], starts[i] + size), *range(first, first + widths)]
        return torch.tensor(order)

    @cached_property
    def _range_starts(self) -> list[int]:
        return [0, *itertools.accumulate(self.range_sizes)]

    @cached_property
    def g_mask(self) -> Tensor:
        """(L,) bool: the projections that have an adapter, hence rank gates."""
        return torch.tensor([p.adapted for p in self.projections])

    @cached_property
    def input_owner(self) -> Tensor:
        """(L,) the projection that has the input's ladder: itself, or with `share_inputs` the first of its layer."""
        first: dict[tuple[str, int], int] = {}
        owners = []
        for i, p in enumerate(self.projections):
            module = p.name.rpartition(".")[0], p.in_features
            owners.append(first.setdefault(module, i) if self.share_inputs and p.type in READ_ALIKE else i)
        return torch.tensor(owners)

    @cached_property
    def z_mask(self) -> Tensor:
        """(L, T) bool: the ladders that exist. A projection without an adapter has none of an adapter's."""
        always = torch.tensor([t in OF_EVERY_PROJECTION for t in self.tensors])
        mask = self.g_mask[:, None] | always
        mask[:, INPUT] = self.input_owner == torch.arange(len(self.projections))
        return mask

    @cached_property
    def macs(self) -> Tensor:
        """(L,) MACs of W x."""
        return torch.tensor([p.macs for p in self.projections], dtype=torch.float64)

    @cached_property
    def rank_macs(self) -> Tensor:
        """(L, 2) MACs that one open rank adds: in A x, and in B h; 0 where there is no adapter."""
        sizes = [(p.in_features, p.out_features) if p.adapted else (0, 0) for p in self.projections]
        tokens = torch.tensor([p.tokens for p in self.projections], dtype=torch.float64)
        return tokens[:, None] * torch.tensor(sizes, dtype=torch.float64)

    def product_macs(self, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """(L,) MACs of each of the PRODUCTS, of those by rank at one rank."""
        macs, rank_macs = (self.on(device, name) for name in ("macs", "rank_macs"))
        return {"W x": macs, "A x": rank_macs[:, 0], "B h": rank_macs[:, 1]}

    @cached_property
    def ladder_steps(self) -> Tensor:
        """(K,) bits that each open gate adds to the first rung's."""
        return torch.tensor(self.ladder, dtype=torch.float64).diff()

    def on(self, device: torch.device | str, name: str) -> Tensor:
        """One of this layout's tensors by name on a device, copied there once, as every copy synchronizes."""
        copies: dict[tuple[torch.device | str, str], Tensor] = self.__dict__.setdefault("_copies", {})
        if (device, name) not in copies:
            copies[device, name] = getattr(self, name).to(device)
        return copies[device, name]

    @cached_property
    def tensor_macs(self) -> Tensor:
        """(L, T) MACs of the products that each tensor takes part in, at full rank; a shared input in every one."""
        each = {
            name: (self.rank if "rank" in PRODUCTS[name] else 1) * macs for name, macs in self.product_macs().items()
        }
        taking_part = [[each[name] for name, of in PRODUCTS.items() if t in of] for t in self.tensors]
        found = torch.stack([torch.stack(products).sum(0) for products in taking_part], -1)
        read = found[:, INPUT].clone()
        found[:, INPUT] = torch.zeros_like(read).index_add(0, self.input_owner, read)
        return found
