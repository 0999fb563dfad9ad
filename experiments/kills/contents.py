"""What a finished run holds, to the bit, without what says when and where it was trained."""

import hashlib
import json
from pathlib import Path

import pandas as pd
from safetensors import safe_open

from pyro_blora.posterior.arviz_compat import group, group_names, read

_WHEN = ("seconds", "peak_memory_bytes", "created_at")


def contents(folder: Path) -> dict[str, str]:
    """A hash for each part of each file, by name: of tensors, variables, columns and lines."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name in ("report.html", "SHA256SUMS") or "tfevents" in path.name or "/pyro-blora/" in f"/{name}":
            continue  # these have seconds in them, and trackers begin a new file
        found |= {f"{name} {part}".strip(): value for part, value in _parts(path).items()}
    return found


def _parts(path: Path) -> dict[str, str]:
    if path.suffix == ".safetensors":
        with safe_open(path, framework="numpy") as file:
            notes = {f"notes.{key}": value for key, value in (file.metadata() or {}).items()}
            raw = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        return notes | {key: _hash(f"{x.dtype} {x.shape}".encode() + x.tobytes()) for key, x in raw.items()}
    if path.suffix == ".nc":
        data = read(path)
        return {f"{name}.{key}": _hash(x.values.tobytes() if x.dtype != object else repr(x.values.tolist()).encode())
                for name in group_names(data) for key, x in group(data, name).variables.items()}  # fmt: skip
    if path.suffix == ".parquet":
        return {key: _hash(repr(column.tolist()).encode()) for key, column in pd.read_parquet(path).items()}
    if path.name == "metrics.jsonl":
        lines = [_timeless(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
        return {f"line {i}": json.dumps(line, sort_keys=True) for i, line in enumerate(lines)}
    if path.name == "summary.json":
        return {
            key: json.dumps(value, sort_keys=True) for key, value in _timeless(json.loads(path.read_text())).items()
        }
    if path.name == "config.json":
        return {"": json.dumps({**json.loads(path.read_text()), "output_dir": ""}, sort_keys=True)}
    return {"": _hash(path.read_bytes())}


def _timeless(table: dict) -> dict:
    return {key: value for key, value in table.items() if key not in _WHEN}


def _hash(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()[:16]
