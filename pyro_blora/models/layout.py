"""The AdapterLayout of a Hugging Face model: which of its linear maps carry gates, and their MACs."""

import dataclasses
import logging
import math
import re
import warnings
from collections.abc import Iterable, Sequence

from torch import nn

from ..bit_widths import LADDER, ladder_of
from ..layout import BATCH_SIZE, GRANULARITIES, READ_ALIKE, SCOPES, WITH_HEAD, AdapterLayout, Projection
from ..tasks.heads import SEQUENCE, Head
from .architectures import encoder_linears, vocabulary_map
from .conv1d import sizes
from .macs import cost
from .targets import matched, other_maps, type_of

log = logging.getLogger(__name__)
_CROSS = re.compile(r"EncDecAttention|encoder_attn|cross_att")  # maps of a decoder that read its encoder


def layout_of(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float = 16.0,
    target_modules: str | Iterable[str] | None = None,
    scope: str = "adapted",
    sequence_length: int = 128,
    share_inputs: bool = False,
    batch_size: int = BATCH_SIZE,
    ladder: Sequence[int] = LADDER,
    granularity: str = GRANULARITIES[0],
    head: Head = SEQUENCE,
) -> AdapterLayout:
    """The layout of a Hugging Face model.

    target_modules: None for the architecture's preset (`TARGETS`), names (matched as the end of a module's path),
    or one regular expression (matched against the whole path). head: how the model is called and read, of a task's
    `likelihood`. ladder: the bit widths that a tensor can have. granularity: see `AdapterLayout`.
    Errors: ValueError for targets that match nothing, a rank below 1 or above a target's size, an alpha that is no
    positive number, a batch or sequence without a token, an unknown scope or granularity, a ladder that is none; for
    scope `encoder+head` of a model without such a head.
    """
    require_scope(scope, head)
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}: known are {', '.join(GRANULARITIES)}")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be a whole number of at least 1, got {rank}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be a number above 0, got {alpha}: 2 * rank is usual")
    if min(batch_size, sequence_length) < 1:
        raise ValueError(f"batch_size and sequence_length must be at least 1, got {batch_size} and {sequence_length}")
    ladder = ladder_of(ladder)
    if not hasattr(model, str(model.base_model_prefix)):
        raise ValueError(
            f"{type(model).__name__} has no task head: load the backbone with a class such as {head.auto_class}"
        )
    architecture = getattr(model.config, "model_type", type(model).__name__)
    linears, targets = encoder_linears(model), matched(model, target_modules, architecture, head)
    for name in linears:
        n, m = sizes(linears[name])
        if name in targets and rank > min(n, m):
            raise ValueError(f"rank {rank} exceeds the size of {name} ({m} x {n}): choose at most {min(n, m)}")
    tokens, model_macs, uses, reaching = cost(model, sequence_length, batch_size, head)
    _require_reached(targets, reaching)
    if scope == WITH_HEAD:
        of_head = vocabulary_map(model)
        if not reaching.intersection(of_head):
            raise ValueError(
                f"{type(model).__name__} has no linear map to its vocabulary that could be quantized: --scope encoder "
                "leaves its head at 32 bit"
            )
        linears |= of_head
    if scope != "adapted" and (others := other_maps(model)):
        log.warning("scope %s quantizes linear maps: others stay at 32 bit, %s", scope, others)
    projections = []
    for name, linear in linears.items():
        if name not in reaching or (name not in targets and scope == "adapted"):
            continue
        layer, (n, m) = re.search(r"\.(\d+)\.", name), sizes(linear)
        projections.append(
            Projection(
                name=name, type=type_of(name), layer=int(layer[1]) if layer else 0, in_features=n, out_features=m,
                tokens=tokens[name], adapted=name in targets, uses=uses[name],
            )
        )  # fmt: skip
    layout = AdapterLayout(
        architecture=architecture, projections=_told_apart(projections), rank=rank, alpha=float(alpha), scope=scope,
        sequence_length=sequence_length, model_macs=model_macs, share_inputs=share_inputs, batch_size=batch_size,
        ladder=ladder, granularity=granularity,
    )  # fmt: skip
    if share_inputs and len(layout.input_owner.unique()) == len(projections):
        raise ValueError(
            f"share_inputs shares nothing here: no layer has more than one of {', '.join(READ_ALIKE)} among its "
            f"quantized projections ({', '.join(sorted({p.type for p in projections}))}): drop --share_inputs"
        )
    return layout


def require_scope(scope: str, head: Head) -> None:
    """Errors: ValueError for an unknown scope, and for `encoder+head` where the head is learned for the task."""
    if scope not in SCOPES:
        raise ValueError(f"unknown scope {scope!r}: known scopes are {', '.join(SCOPES)}")
    if scope == WITH_HEAD and head.is_new:
        raise ValueError(
            f"scope {WITH_HEAD!r} quantizes the pretrained head of a language model, and this task has a head of its "
            "own, which is learned at 32 bit: --scope encoder quantizes all below it"
        )


def _told_apart(projections: list[Projection]) -> tuple[Projection, ...]:
    """Roles of their own for a decoder that reads an encoder (T5, BART), and layers counted through where those of
    several blocks have the same numbers (Funnel), so that a layer has one projection of a role; others stay."""
    if len({(p.layer, p.type) for p in projections}) == len(projections):
        return tuple(projections)
    if any(_CROSS.search(p.name) for p in projections):
        return tuple(
            dataclasses.replace(p, type=f"{'cross' if _CROSS.search(p.name) else 'decoder'}.{p.type}")
            if ".decoder." in p.name else p
            for p in projections
        )  # fmt: skip
    numbers = [tuple(re.findall(r"\.(\d+)(?=\.)", p.name)) for p in projections]
    order, are_of_layers = list(dict.fromkeys(numbers)), len({len(n) for n in numbers}) == 1  # none of parts of one
    counted = [dataclasses.replace(p, layer=order.index(n)) for p, n in zip(projections, numbers, strict=True)]
    is_better = are_of_layers and len({(p.layer, p.type) for p in counted}) == len(projections)
    return tuple(counted if is_better else projections)


def _require_reached(targets: set[str], reaching: frozenset[str]) -> None:
    """Leave out targets that no logit depends on, with a warning.  Errors: ValueError where none is left."""
    idle = sorted(targets - reaching)
    if not idle:
        return
    names = ", ".join(idle[:4]) + (f" and {len(idle) - 4} more" if len(idle) > 4 else "")
    if len(idle) == len(targets):
        raise ValueError(f"the logits do not depend on {names}: nothing would be learned there, choose other targets")
    warnings.warn(f"the logits do not depend on {names}: left out, as nothing would be learned there", stacklevel=4)
