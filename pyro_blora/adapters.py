"""Gated, quantized LoRA inside a Hugging Face backbone, built by PEFT; the only file with its custom-module hook.

Gates are drawn once at the top of the program and handed to the layers by the context manager `gates`, which clears
them when it ends: no draw survives a call, and a projection that is called twice in one forward (DeBERTa's content and
positions) sees the same gates both times. Scope `encoder` also quantizes input and weight of every other linear map of
the encoder, without an adapter. The task head stays at 32 bit, and a pooler inside the base model is frozen.

Ranges are one (L, T) parameter, learned as log(range), which `calibrate` sets from data."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .handover import Gated, Handover, Observer, handed_over
from .layout import BASE, BATCH_SIZE, HIDDEN, INPUT, LORA_A, LORA_B, AdapterLayout
from .peft_config import freeze_pooler, lora_config, settle, wrapped
from .processes import whole
from .quantizer import grids, mixture_weights
from .xs import xs_settings

if TYPE_CHECKING:
    import peft

ADAPTERS = ("lora", "xs", "none")
_UNSEEN_RANGE = 1.0  # of an activation before `calibrate`; at 32 bit the range plays no part
_SMALLEST_RANGE = 1e-30  # of a tensor of zeros: the inverse of its 16-bit scale is still a float32
_PERCENTILE = 99.99  # of |activation| that the starting range covers: a handful of outliers would coarsen every grid
_SAMPLE = 1 << 20  # torch.quantile takes at most 2^24 numbers; an even stride through them is enough


class GatedModel(nn.Module):
    """A backbone with gated adapters: call it inside `gates`. `layout` says what carries gates; `peft_model` is PEFT's.

    Parameters: those that PEFT trains (adapters, task head) and `log_range` (L, T).
    `autocast`: dtype of the backbone's arithmetic, None for the caller's.
    `leads_with_examples`: a fact about the network, once somebody has asked (example_axis.py).
    """

    autocast: torch.dtype | None = None
    leads_with_examples: bool | None = None

    def __init__(self, peft_model: peft.PeftModel, layout: AdapterLayout, handover: Handover):
        super().__init__()
        self.peft_model, self.layout, self.handover = peft_model, layout, handover
        device = next(peft_model.parameters()).device
        self.log_range = nn.Parameter(torch.zeros(layout.z_shape[:2], device=device))

    def forward(self, **batch):
        if self.has_cache:  # of keys and values, for a text that goes on: none does here
            batch.setdefault("use_cache", False)
        if self.autocast is None:  # whatever the caller's own autocast says
            return self.peft_model(**batch)
        with torch.autocast(self.log_range.device.type, self.autocast):
            return self.peft_model(**batch)

    @functools.cached_property
    def has_cache(self) -> bool:
        return "use_cache" in inspect.signature(self.backbone.forward).parameters

    def layers(self) -> list[nn.Module]:
        """The gated layers in the layout's order."""
        found = [m for m in self.peft_model.modules() if isinstance(m, Gated)]
        return sorted(found, key=lambda layer: layer.index)

    @property
    def backbone(self) -> nn.Module:
        """What transformers made, with our layers in it."""
        return self.peft_model.base_model.model if self.layout.adapted else self.peft_model

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
        """What the adapter method adds to the loss, nats an example."""
        return 0.0

    def low_rank(self, projection: str) -> tuple[Tensor, Tensor]:
        """(lora_A (R, n), lora_B (m, R)) of an adapted projection, by its name in the layout."""
        return self.backbone.get_submodule(projection).low_rank()

    def random_weights(self) -> dict[tuple[int, str], nn.Parameter]:
        """What a law of the weights may draw, by (projection, name); nothing without gated adapters."""
        layers = [layer for layer in self.layers() if layer.has_adapter]
        return {(layer.index, name): p for layer in layers for name, p in layer.random_weights().items()}

    def gradient_checkpointing_enable(self) -> None:
        """Recompute activations in the backward pass; the gates of the forward are handed over again there."""
        settings = {"use_reentrant": False, "context_fn": self.handover.recomputation}
        backbone = self.backbone
        if hasattr(backbone, "activation_checkpointing_enable"):  # the name since transformers 5.20
            backbone.activation_checkpointing_enable(activation_checkpointing_kwargs=settings)
        else:
            backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs=settings)


@contextlib.contextmanager
def gates(
    net: GatedModel, z: Tensor, g: Tensor, weights: dict | None = None, *, opened: bool = False,
    at_32: list[bool] | None = None,
) -> Iterator[GatedModel]:  # fmt: skip
    """Hand the gates z and g to every layer of `net` for the duration of the block, then clear them.

    Shapes: z (L, T, K) bit chains above the always-open 2-bit rung; g (L, R - 1) rank chains after the first rank.
    weights: drawn ones, by the keys of `net.random_weights()`, in place of the parameters; with a leading B each
    example has its own. opened: the caller knows that everything is open; then z and g are not read. at_32: which
    tensors, L T, a z without gradients leaves at 32 bit, where the caller knows; else the host reads it.
    Errors: ValueError for another shape (a singleton left by a plate would broadcast silently).
    """
    layout = net.layout
    if tuple(z.shape) != layout.z_shape or tuple(g.shape) != layout.g_shape:
        raise ValueError(
            f"gates z {tuple(z.shape)}, g {tuple(g.shape)} do not fit: expected z {layout.z_shape}, g {layout.g_shape}"
        )
    kept = None if torch.is_grad_enabled() or not net.handover.keeps_weights else {}
    with handed_over(net.handover, (*_handed(net, z, g, opened, at_32), kept, weights or {})):
        yield net


def _handed(net: GatedModel, z: Tensor, g: Tensor, opened: bool, at_32: list[bool] | None) -> tuple[list, list | None]:
    """A grid or None for each (projection, tensor), and the ranks of each projection, or None for all open."""
    if opened:
        return [None] * z[..., 0].numel(), None
    z, g = z.to(net.log_range.device), g.to(net.log_range.device)
    by_tensor = grids(net.log_range.exp(), mixture_weights(F.pad(z.float(), (1, 0), value=1.0)))
    if not z.requires_grad:  # nothing to learn from a tensor at 32 bit: leave it alone, as plain LoRA does
        at_32 = at_32 or exact_tensors(z)
        by_tensor = [None if exact else grid for grid, exact in zip(by_tensor, at_32, strict=True)]
    return by_tensor, F.pad(g.float(), (1, 0), value=1.0).unbind(0)


def exact_tensors(z: Tensor) -> list[bool]:
    """Which tensors gates leave at 32 bit.  z (L, T, K) -> L T"""
    return (z == 1).all(-1).flatten().tolist()


def open_gates(layout: AdapterLayout, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """z and g with everything open: the 32-bit model at full rank."""
    return torch.ones(layout.z_shape, device=device), torch.ones(layout.g_shape, device=device)


def attach(
    backbone: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: str | Iterable[str] | None = None,
    adapter: str = "lora",
    scope: str = "adapted",
    sequence_length: int = 128,
    init_lora_weights: str = "default",
    share_inputs: bool = False,
    adapter_settings: dict | None = None,
    batch_size: int = BATCH_SIZE,
) -> GatedModel:
    """Put gated adapters into a Hugging Face backbone (in place) and freeze the rest but the task head.

    rank: maximal rank R. alpha: LoRA's scale, the update is multiplied by alpha / R whatever the number of open ranks.
    target_modules: None for the architecture's preset (query, key, value), names, or a regular expression.
    scope: `adapted` quantizes the adapted projections, `encoder` every linear map of the encoder.
    sequence_length, batch_size: tokens and examples of the forward whose MACs are counted, per example.
    adapter: `lora`; `xs` (B-LoRA-XS, with adapter_settings of xs.py); or `none`: no projection has an adapter, and the
    whole backbone learns.
    init_lora_weights: `default`, as in PEFT, or `eva`: see spectra.py. share_inputs: see `AdapterLayout`.
    Errors: ValueError, see `AdapterLayout.of`; nothing is changed in the backbone then.
    """
    from .layers import GatedLinear, QuantizedLinear, XSLinear  # now, as PEFT takes seconds to import

    if adapter not in ADAPTERS:
        raise ValueError(f"unknown adapter {adapter!r}: known adapters are {', '.join(ADAPTERS)}")
    layout = AdapterLayout.of(
        backbone, rank=rank, alpha=alpha, target_modules=target_modules, scope=scope, sequence_length=sequence_length,
        share_inputs=share_inputs, batch_size=batch_size,
    )  # fmt: skip
    settle(backbone)
    checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in backbone.modules())
    handover = Handover(layout.input_owner.tolist() if share_inputs else None)
    if adapter == "none":
        layout = layout.without_adapters()
        model = backbone.requires_grad_(True)
    else:
        model = _with_lora(backbone, layout, init_lora_weights, XSLinear if adapter == "xs" else GatedLinear)
    modules = dict(backbone.named_modules())
    for index, projection in enumerate(layout.projections):
        module = modules[projection.name]
        if projection.adapted:
            if not isinstance(module, GatedLinear):
                raise RuntimeError(f"PEFT put a {type(module).__name__} at {projection.name} instead of a gated layer")
            module.handover, module.index = handover, index
            if adapter == "xs":
                module.start(xs_settings(**(adapter_settings or {})))
        else:
            parent, _, child = projection.name.rpartition(".")
            setattr(modules[parent], child, QuantizedLinear(module, handover, index))
    net = GatedModel(model, layout, handover)
    _start_ranges(net, {})
    if checkpointing:
        net.gradient_checkpointing_enable()
    return net


def _with_lora(backbone: nn.Module, layout: AdapterLayout, init_lora_weights: str, layer: type) -> peft.PeftModel:
    import peft

    eva = {"init_lora_weights": "eva", "eva_config": peft.EvaConfig(rho=1.0)} if init_lora_weights == "eva" else {}
    config = lora_config(backbone, layout, **eva)
    config._register_custom_module({nn.Linear: layer})
    return freeze_pooler(wrapped(backbone, config))


@contextlib.contextmanager
def observed(net: GatedModel, observer: Observer) -> Iterator[GatedModel]:
    """Let `observer` see every forward in the block, in evaluation mode, without gates.

    Gradient checkpointing goes on where it asks a block's own flag, and dropout those of the layers inside. Gradients
    are to be taken within the block, as the observer sees the recomputation too.
    """
    training, net.handover.observer = net.training, observer
    net.eval()
    for module in net.modules():
        module.training = getattr(module, "gradient_checkpointing", False) and not _drops_itself(module)
    try:
        yield net
    finally:
        net.handover.observer = net.handover.shared = None
        net.train(training)


def _drops_itself(module: nn.Module) -> bool:
    """Whether a block asks its own flag for dropout as well: BART's and OPT's do."""
    return any(getattr(module, name, 0) for name in ("dropout", "activation_dropout", "attention_dropout", "layerdrop")
               if not isinstance(getattr(module, name, 0), nn.Module))  # fmt: skip


class _Extent(Observer):
    """The largest range that any batch needed, by (projection, tensor)."""

    def __init__(self):
        self.ranges: dict[tuple[int, int], Tensor] = {}

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        magnitude = x.detach().float().abs().flatten()
        covering = magnitude[:: max(1, magnitude.numel() // _SAMPLE)].quantile(_PERCENTILE / 100)
        key = (projection, tensor)
        self.ranges[key] = torch.maximum(self.ranges.get(key, covering), covering)
        return x


@torch.no_grad()
def calibrate(net: GatedModel, batches: Iterable[dict]) -> None:
    """Start every range from data: weights by their maximum, activations by the 99.99th percentile of |x|.

    While lora_B is zero, which says nothing about the size it will have, it takes lora_A's range.
    """
    extent = _Extent()
    with observed(net, extent):
        for batch in batches:
            net(**batch)
    _start_ranges(net, extent.ranges)


@torch.no_grad()
def _start_ranges(net: GatedModel, observed: dict) -> None:
    ranges = torch.full_like(net.log_range, _UNSEEN_RANGE)
    for layer in net.layers():
        index = layer.index
        for tensor in (INPUT, HIDDEN):
            ranges[index, tensor] = observed.get((index, tensor), _UNSEEN_RANGE)
        if layer.has_adapter:
            ranges[index, BASE] = whole(layer.get_base_layer().weight.abs().max())
            down, up = (side.abs().max() for side in layer.low_rank())
            ranges[index, LORA_A], ranges[index, LORA_B] = down, torch.where(up > 0, up, down)
        else:
            ranges[index, BASE] = whole(layer.weight.abs().max())
    set_ranges(net, ranges)


@torch.no_grad()
def set_ranges(net: GatedModel, ranges: Tensor) -> None:
    """ranges (L, T) >= 0; zero becomes the smallest positive range."""
    net.log_range.copy_(ranges.clamp(min=_SMALLEST_RANGE).log())
