"""A backbone with gated adapters, and the context in which its layers compute with given gates.

Gates are drawn once at the top of the program. The context manager `use_gates` passes them to the layers and clears
them when it ends: no draw outlives a call, and a projection that is called twice in one forward (DeBERTa's content and
positions) sees the same gates both times. Ranges are one parameter, learned as log(range), which `calibrate`
(ranges.py) sets from data: (L, T), or a vector of the ranges of all tensors where weights have one for every row.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..layout import AdapterLayout, Projection
from ..quantizer.grid import Grid, Rows, grids, grids_of_rows, mixture_weights
from ..quantizer.products import Coded
from ..quantizer.reproducible import reproducible
from ..registry import undefined
from ..tasks.heads import SEQUENCE, Head
from .gate_context import GateContext, Gated, LayerGates, Observer, gates_set
from .smoothing import Smoothing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GatedModel(nn.Module):
    """A backbone with an adapter: call it inside `use_gates`. `layout` says what carries gates; `peft_model` is PEFT's,
    or the backbone itself where there is no adapter; `head` how it is called and read.

    An adapter's function returns it. `lora.gated` makes one with gated layers, which define its `low_rank`; one without
    must override `low_rank` (adalora.py). `penalty`, `allocate`, `parameters_per_rank` and `start_from_inputs` have
    defaults here.

    Parameters: those that PEFT trains (adapters, task head), `log_range` (of `layout.range_shape`) and `smoothing`'s.
    """

    autocast: torch.dtype | None = None
    """Of the backbone's arithmetic; None for the caller's."""
    leads_with_examples: bool | None = None
    """Whether all layers do; None until example_axis.py has found out."""
    allocates = False
    """Whether `allocate` is called after every step, for a guide that takes its ranks."""
    start_from_inputs: Callable[[GatedModel, Iterable[dict]], None] | None = None
    """Called once, before the first step, with the net and batches of training inputs; it may make new parameters."""

    def __init__(self, peft_model: nn.Module, layout: AdapterLayout, gate_context: GateContext, head: Head = SEQUENCE):
        super().__init__()
        self.peft_model, self.layout, self.gate_context, self.head = peft_model, layout, gate_context, head
        device = next(peft_model.parameters()).device
        self.log_range = nn.Parameter(torch.zeros(layout.range_shape, device=device))
        self.smoothing: Smoothing | None = None
        if layout.granularity == "channel":  # in buffers, which move with the net: no step copies them
            for name in ("range_owner", "range_order"):
                self.register_buffer(name, getattr(layout, name).to(device), persistent=False)

    def forward(self, **inputs):
        batch: dict[str, Any] = self.head.rows(inputs) if self.head.windows else inputs
        if self.has_cache:  # of keys and values, for a text that goes on: none does here
            batch.setdefault("use_cache", False)
        if self.gate_context.is_exact:
            with reproducible():
                return self.peft_model(**batch)
        if self.autocast is None:  # the caller's own autocast applies
            return self.peft_model(**batch)
        with torch.autocast(self.log_range.device.type, self.autocast):
            return self.peft_model(**batch)

    def logits(self, **batch) -> Tensor:
        """What the likelihood takes, in float32, (B, *, C)."""
        if not self.head.windows:
            return self.head.read(self(**batch)).float()
        return self.head.logits(lambda rows: self(**rows), batch).float()

    @functools.cached_property
    def has_cache(self) -> bool:
        return "use_cache" in inspect.signature(self.backbone.forward).parameters

    def value_range(self, projection: int, tensor: int) -> Tensor:
        """The range of a quantized tensor, (), or by channel of a weight one for each of its rows, (m,)."""
        return self.layout.ranges_of(self.log_range, projection, tensor).exp()

    def smooth(self) -> None:
        """Smooth the inputs from now on.  Errors: ValueError without gated layers."""
        if not self.layers():
            raise ValueError("smoothing is of quantized projections, which this adapter does not have: drop it")
        self.smoothing = self.gate_context.smoothing = Smoothing(self.layout, self.log_range.device)

    def grid_parameters(self) -> list[nn.Parameter]:
        """What learns at the ranges' rate: those, and the smoothing."""
        return [self.log_range, *([] if self.smoothing is None else self.smoothing.parameters())]

    def name_as(self, layout: AdapterLayout) -> None:
        """Take the roles of a stored layout of this network, see `AdapterLayout.named_as`."""
        self.layout = self.layout.named_as(layout)
        if self.layout.share_inputs:
            self.gate_context.owners = self.layout.input_owner.tolist()

    def layers(self) -> list[Gated]:
        """The gated layers in the layout's order."""
        found: list[Gated] = [m for m in self.peft_model.modules() if isinstance(m, Gated)]
        return sorted(found, key=lambda layer: layer.index)

    @property
    def backbone(self) -> PreTrainedModel:
        """What transformers made, with our layers in it."""
        whole: Any = self.peft_model
        backbone: PreTrainedModel = whole.base_model.model if self.layout.adapted else whole
        return backbone

    def adapter_parameters(self) -> list[nn.Parameter]:
        """lora_A and lora_B of every adapted projection; without adapters all of the encoder."""
        return [p for p, of_adapter in self._trained() if of_adapter]

    def head_parameters(self) -> list[nn.Parameter]:
        return [p for p, of_adapter in self._trained() if not of_adapter]

    def _trained(self) -> list[tuple[nn.Parameter, bool]]:
        """What learns, and whether it stands in an adapted projection (without adapters: in the base model)."""
        adapted = [self.backbone.get_submodule(p.name) for p in self.layout.adapted] or [self.backbone.base_model]
        inside = {id(p) for module in adapted for p in module.parameters()}
        return [(p, id(p) in inside) for p in self.peft_model.parameters() if p.requires_grad]

    def penalty(self) -> Tensor | float:
        """What the adapter method adds to the loss, nats per example."""
        return 0.0

    def allocate(self, step: int, steps: int, target_rank: int) -> Tensor:
        """The open ranks of every projection, (L,), after optimizer step `step` (from 1) of `steps`.

        Gradients are in place. target_rank: what the guide wants on average at the end. State is to be in buffers.
        """
        raise undefined(self, "allocate")

    def parameters_per_rank(self, projection: Projection) -> int:
        """Learned parameters that one open rank of an adapted projection uses."""
        return projection.in_features + projection.out_features

    def low_rank(self, projection: str) -> tuple[Tensor, Tensor]:
        """(lora_A (R, n), lora_B (m, R)) of an adapted projection, by its name in the layout."""
        layer: Any = self.backbone.get_submodule(projection)
        found: tuple[Tensor, Tensor] = layer.low_rank()
        return found

    def random_weights(self) -> dict[tuple[int, str], nn.Parameter]:
        """Parameters that may be random, by (projection, name); none without gated adapters."""
        layers = [layer for layer in self.layers() if layer.has_adapter]
        return {(layer.index, name): p for layer in layers for name, p in layer.random_weights().items()}

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass; the same gates are set there."""
        settings = {"use_reentrant": False, "context_fn": self.gate_context.recomputation}
        backbone: Any = self.backbone
        if hasattr(backbone, "activation_checkpointing_enable"):  # the name since transformers 5.20
            backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@contextlib.contextmanager
def use_gates(
    net: GatedModel, z: Tensor, g: Tensor, weights: dict | None = None, *, opened: bool = False,
    at_32: list[bool] | None = None, exact: bool = False,
) -> Iterator[GatedModel]:  # fmt: skip
    """Set the gates z and g in every layer of `net` for the duration of the block, then clear them.

    Shapes: z (L, T, K) bit ladders above the always-open lowest rung; g (L, R - 1) rank ladders after the first rank.
    weights: drawn ones, by the keys of `net.random_weights()`, in place of the parameters; with a leading B, one
    draw per example. opened: the caller knows that everything is open; then z and g are not read. at_32: which
    tensors, L T, a z without gradients leaves at 32 bit, where the caller knows; else the host reads it. exact: without
    gradients, multiply codes (quantizer/products.py) and run the rest in float64 (quantizer/reproducible.py), so that
    the answer for a row depends on nothing but that row. Where nothing is rounded it has no effect.
    Errors: ValueError for another shape (a singleton left by a plate would broadcast silently), and for weights of keys
    that the net has not.
    """
    layout = net.layout
    if tuple(z.shape) != layout.z_shape or tuple(g.shape) != layout.g_shape:
        raise ValueError(
            f"gates z {tuple(z.shape)}, g {tuple(g.shape)} do not fit: expected z {layout.z_shape}, g {layout.g_shape}"
        )
    if weights and (unknown := weights.keys() - net.random_weights().keys()):
        raise ValueError(f"weights of {sorted(map(str, unknown))[0]} are none of net.random_weights(): give its keys")
    kept: dict[tuple[int, int], Tensor] | None = {}
    if torch.is_grad_enabled() or not net.gate_context.keeps_weights:
        kept = None
    by_tensor, ranks = _current(net, z, g, opened, at_32)
    scales = None
    if net.smoothing is not None and any(grid is not None for grid in by_tensor):
        scales = net.smoothing.scales()
    bits: list[int] | None = None
    codes: dict[tuple[int, int], Coded] | None = None
    if exact and any(grid is not None for grid in by_tensor):
        bits = torch.tensor(layout.ladder)[z.sum(-1).long().cpu()].flatten().tolist()
        codes = {} if net.gate_context.keeps_weights else None
    with gates_set(net.gate_context, LayerGates(by_tensor, ranks, kept, weights or {}, scales, bits, codes)):
        yield net


gates = use_gates  # its older name


def _current(
    net: GatedModel, z: Tensor, g: Tensor, opened: bool, at_32: list[bool] | None
) -> tuple[Sequence[Grid | None], Sequence[Tensor] | None]:
    """A grid or None for each (projection, tensor), and the ranks of each projection, or None for all open."""
    if opened:
        return [None] * z[..., 0].numel(), None
    z, g = z.to(net.log_range.device), g.to(net.log_range.device)
    by_tensor: list[Grid | None] = [*_grids(net, mixture_weights(F.pad(z.float(), (1, 0), value=1.0)))]
    if not z.requires_grad:  # nothing to learn from a tensor at 32 bit: leave it alone, as plain LoRA does
        at_32 = at_32 or exact_tensors(z)
        by_tensor = [None if exact else grid for grid, exact in zip(by_tensor, at_32, strict=True)]
    return by_tensor, F.pad(g.float(), (1, 0), value=1.0).unbind(0)


def _grids(net: GatedModel, weights: Tensor) -> list[Grid]:
    """Of each (projection, tensor).  weights (L, T, K + 1)"""
    layout, ranges = net.layout, net.log_range.exp()
    if layout.granularity == "tensor":
        return grids(ranges, weights, layout.ladder)
    rows = Rows(layout.range_sizes, net.get_buffer("range_owner"), net.get_buffer("range_order"))
    return grids_of_rows(ranges, weights, rows, layout.ladder)


def exact_tensors(z: Tensor) -> list[bool]:
    """Which tensors gates leave at 32 bit.  z (L, T, K) -> L T"""
    return (z == 1).all(-1).flatten().tolist()


def open_gates(layout: AdapterLayout, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """z and g with everything open: the 32-bit model at full rank."""
    return torch.ones(layout.z_shape, device=device), torch.ones(layout.g_shape, device=device)


@contextlib.contextmanager
def observed(net: GatedModel, observer: Observer) -> Iterator[GatedModel]:
    """Let `observer` see every forward in the block, without dropout and gates.

    Gradients are to be taken within the block, as the observer sees the recomputation too.
    """
    training, net.gate_context.observer = net.training, observer
    without_dropout(net)
    try:
        yield net
    finally:
        net.gate_context.observer = net.gate_context.shared = None
        net.train(training)


def without_dropout(net: nn.Module) -> None:
    """Put the network into evaluation mode, with gradient checkpointing where it has that.

    Checkpointing reads a block's own training flag, and dropout those of inner layers.
    """
    net.eval()
    for module in net.modules():
        module.training = getattr(module, "gradient_checkpointing", False) and not _drops_itself(module)


def _drops_itself(module: nn.Module) -> bool:
    """Whether a block also reads its own training flag for dropout: BART's and OPT's do."""
    return any(getattr(module, name, 0) for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop")
               if not isinstance(getattr(module, name, 0), nn.Module))  # fmt: skip
