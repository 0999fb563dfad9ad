"""What a training starts from, as hashes: its configuration, the rows that it learns from, and the frozen weights.

A checkpoint has them in its notes, so that it is never taken up with another backbone or with other labels. Cost: about
a second for 1 GB of frozen weights, once, before they are moved to a device.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from .build import Parts
from .checkpoint import trainable

if TYPE_CHECKING:
    import datasets


def identity(parts: Parts) -> dict[str, str]:
    return {"config": parts.config.digest, "data": _of_rows(parts.tokens), "backbone": _of_frozen(parts.program)}


def _of_rows(tokens: dict[str, datasets.Dataset]) -> str:
    """Of what trains and what chooses among epochs: token ids, masks and labels."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        if split not in tokens:
            continue
        table = tokens[split].with_format("arrow")[:]
        for name in sorted(table.column_names):
            column = table[name].combine_chunks()
            digest.update(f"{split} {name} {len(column)} ".encode())
            if hasattr(column, "flatten") and hasattr(column, "value_lengths"):
                digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                column = column.flatten()
            digest.update(column.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def _of_frozen(program: torch.nn.Module) -> str:
    """Of the tensors that a checkpoint lacks."""
    saved = {id(x) for x in trainable(program, in_training=True).values()}
    frozen = {name: x for name, x in program.net.state_dict(keep_vars=True).items() if id(x) not in saved}
    with ThreadPoolExecutor(max(1, min(8, os.cpu_count() or 1))) as pool:  # hashing lets other threads run
        each = list(pool.map(_of_tensor, frozen.values()))
    return _joined(f"{name} {x}" for name, x in sorted(zip(frozen, each, strict=True)))


def _of_tensor(x: torch.Tensor) -> str:
    raw = x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.sha256(raw).hexdigest()


def _joined(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]
