"""Data sets of the library `datasets`: folders that it saved, and names on the hub."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import datasets

FORMATS = {".csv": "csv", ".tsv": "tsv", ".tab": "tsv", ".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
"""Of files, by their endings."""
_OTHERS = (".json", ".txt", ".xlsx", ".xls", ".gz", ".zip", ".arrow", ".pkl")  # endings of no data set on the hub
_HUB = re.compile(r"[\w.-]+(/[\w.-]+){0,2}")  # name, owner/name, owner/name/configuration
_SPLIT = re.compile(r"(.+):(\w+)")


def splits_of(source: str) -> tuple[str, ...]:
    """The splits of a folder or of a data set on the hub; () for anything else, and where a split is named."""
    found = _found(source)
    return tuple(map(str, found)) if isinstance(found, dict) else ()


def dataset_of(source: str, split: str | None = None) -> datasets.Dataset | None:
    """The rows of a folder or of the hub; None for a source that is neither.  split: also behind a colon of the source.

    Errors: ValueError for several splits of which none is named, and for a folder or a name that has no data set.
    """
    found, base = _found(source), source
    if found is None and not Path(source).expanduser().exists() and (named := _SPLIT.fullmatch(source)):
        base, split = named.groups()
        found = _found(base)
    if isinstance(found, dict):
        split = split or (next(iter(found)) if len(found) == 1 else None)
        if split not in found:
            given = "several splits" if split is None else f"no split {split!r}"
            raise ValueError(f"{base} has {given}: give one of {', '.join(f'{base}:{name}' for name in found)}")
        return found[split]
    return found


def _found(source: str) -> datasets.Dataset | datasets.DatasetDict | None:
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_disk(path)
    is_name = _HUB.fullmatch(source) and not path.exists() and path.suffix.lower() not in (*FORMATS, *_OTHERS)
    return _from_hub(source) if is_name else None


def _from_disk(folder: Path) -> datasets.Dataset | datasets.DatasetDict:
    import datasets

    if not any((folder / name).is_file() for name in ("dataset_info.json", "dataset_dict.json")):
        files = sorted(x.name for x in folder.iterdir() if x.suffix.lower() in FORMATS)
        remedy = f"name one of its files: {', '.join(files[:5])}" if files else "name a file"
        raise ValueError(f"{folder} is no folder of datasets.save_to_disk: {remedy}")
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a damaged folder makes of pyarrow and json
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{folder} cannot be read ({what}): save it anew with datasets.save_to_disk") from None


def _from_hub(name: str) -> datasets.Dataset | datasets.DatasetDict:
    import datasets

    owner, _, rest = name.partition("/")
    own, _, configuration = rest.partition("/")
    try:
        return datasets.load_dataset(f"{owner}/{own}" if own else owner, configuration or None)
    except Exception as error:  # of the network, the hub, or the data set
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ValueError(
            f"there is no file {name}, and no such data set came from the hub ({what}): see the path, or the network"
        ) from None
