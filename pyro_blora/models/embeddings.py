"""A backbone's tables of embeddings at few bits: rounded when it is loaded, so before anything is learned on them.

They are most of a small model's bytes and multiply nothing, so they have no gates and no bit operations. Every row of a
table has a range of its own, its largest number. What is trained, deployed and packed (deploy/packing.py) has the same
tables, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizer.packing import WIDEST, Scale

EXACT = 32  # bits of a table that is left as it is
_RANGE, _BITS = "row_range", "row_bits"  # of a rounded table, on its module


def require_bits(bits: int, name: str = "embeddings") -> None:
    """Errors: ValueError for a width that no table can have."""
    if bits != EXACT and not 2 <= bits <= WIDEST:
        raise ValueError(f"{name} have 2 to {WIDEST} bit, or {EXACT} as they are, got {bits}")


def tables(model: nn.Module) -> Iterator[tuple[str, nn.Embedding]]:
    """The names of their weights, and the modules; a table that two modules share once."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, nn.Embedding) and id(module.weight) not in seen:
            seen.add(id(module.weight))
            yield f"{path}.weight", module


@torch.no_grad()
def round_tables(model: nn.Module, bits: int) -> None:
    """Round every table to `bits`, in place; a head that shares one has it rounded, too.

    Errors: ValueError for a width that no table can have, and for a model without one.
    """
    require_bits(bits, "embedding_bits:")
    if bits == EXACT:
        return
    found = [module for _, module in tables(model)]
    if not found:
        raise ValueError(f"{type(model).__name__} has no table of embeddings to round: drop --embedding_bits")
    for module in found:
        value_range = range_of(module.weight)
        module.weight.copy_(Scale.of(value_range, bits).rounded(module.weight))
        module.register_buffer(_RANGE, value_range, persistent=False)
        setattr(module, _BITS, bits)


def range_of(table: Tensor) -> Tensor:
    """The largest number of every row, (rows, 1), above 0 also for a row of zeros, as of padding."""
    return table.detach().abs().amax(1, keepdim=True).clamp(min=torch.finfo(table.dtype).tiny)


def rounded_to(module: nn.Embedding) -> tuple[int, Tensor | None]:
    """The bits of a table and its ranges (rows, 1); EXACT and None where it was not rounded."""
    return getattr(module, _BITS, EXACT), getattr(module, _RANGE, None)


def bits_of(model: nn.Module) -> int:
    """Of a model's tables."""
    return min((rounded_to(module)[0] for _, module in tables(model)), default=EXACT)


def is_tied(model: nn.Module, name: str) -> bool:
    """Whether the weight of a linear map, by path, is also a table of embeddings."""
    weight = model.get_submodule(name).weight
    return any(table.weight is weight for _, table in tables(model))


def untie(model: nn.Module) -> None:
    """Make a model of transformers one whose output matrix and input embedding are two tensors; nothing is copied."""
    whole: Any = model
    whole.config.tie_word_embeddings, whole.all_tied_weights_keys = False, {}
