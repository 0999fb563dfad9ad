"""What a training starts from, as hashes: its configuration, the rows that it learns from, and the frozen weights.

A checkpoint has them in its notes, so that it is never taken up with another backbone or with other labels. Cost: about
a second for 1 GB of frozen weights, once, before they are moved to a device.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
from typing import TYPE_CHECKING

from ..build import Parts
from ..config.run_config import RunConfig
from ..provenance import frozen_hash
from ..registries import CHOSEN
from ..user_code import is_of_file

if TYPE_CHECKING:
    import datasets


def identity(parts: Parts) -> dict[str, str]:
    found = {"config": parts.config.digest, "data": _of_rows(parts.tokens), "backbone": frozen_hash(parts.program)[:16]}
    code = _of_registered(parts.config)
    return found | ({"code": code} if code else {})


def _of_registered(config: RunConfig) -> str:
    """Of the text of parts that a user has registered: the configuration has their names alone. "" without any."""
    digest = hashlib.sha256()
    for kind, registry in CHOSEN.items():
        for name in config.prior_names if kind == "prior" else [getattr(config, kind)]:
            if name in (None, "off") or is_of_file(name) or registry.has_own(name):
                continue
            with contextlib.suppress(OSError, TypeError):  # made by exec, or no function
                digest.update(f"{kind} {name} {inspect.getsource(registry.resolve(name))}".encode())
    return digest.hexdigest()[:16] if digest.digest() != hashlib.sha256().digest() else ""


def _of_rows(tokens: dict[str, datasets.Dataset]) -> str:
    """Of what trains and what chooses among epochs: token ids, masks and labels."""
    digest = hashlib.sha256()
    for split in ("train", "validation"):
        if split not in tokens:
            continue
        table = tokens[split].with_format("arrow")[:]
        for name in sorted(table.column_names):
            digest.update(f"{split} {name} {len(table)} ".encode())
            chunks = table[name].chunks  # not combined: their offsets end at 2^31 values
            while chunks and hasattr(chunks[0], "value_lengths"):
                for chunk in chunks:
                    digest.update(chunk.value_lengths().to_numpy(zero_copy_only=False).tobytes())
                chunks = [chunk.flatten() for chunk in chunks]
            for chunk in chunks:
                digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]
