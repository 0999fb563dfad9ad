"""The JSON file of an artefact: what it is, by a schema with a version, and which other files belong to it.

Loading an artefact runs no code: it is this file, safetensors and a tokenizer's JSON. The file has sizes and SHA-256 of
the others and of its own content, so that a damaged byte ends in a sentence. Names of files are plain names: nothing
outside the folder is read.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from ..files import replace_text, sha256
from ..user_files import read_json

CARD = "README.md"  # for people: not read, and free to be edited
SUM = "sha256"
_RESTORE = "copy or export the folder again"
_PLAIN = re.compile(r"\w[\w.-]*")
_SHOWN = 60  # characters of a value in a message


class Refused(ValueError):
    """An artefact that is not read; the text is one sentence that says why."""


def write_manifest(path: Path, content: dict[str, Any]) -> None:
    """Write the manifest of a folder in which all other files are."""
    others = sorted(x for x in path.parent.iterdir() if x.name not in (CARD, path.name))
    files = {x.name: {"bytes": x.stat().st_size, SUM: sha256(x)} for x in others}
    whole = json.loads(json.dumps({**content, "files": files}))  # as it is read: keys are text, and sorted as that
    replace_text(path, json.dumps({**whole, SUM: _sum_of(whole)}, indent=1, sort_keys=True) + "\n")


def read_manifest(path: Path, *, schema: str, version: int) -> dict[str, Any]:
    """The content of a manifest, by the schema of that name beside this module, when every file is whole.

    version: the newest that is read.

    Errors: Refused saying what is wrong: a newer version, no manifest of this kind, a damaged or missing file.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise Refused(f"{path} cannot be read ({' '.join(str(error).split())}): {_RESTORE}") from None
    if not isinstance(content, dict) or content.get("schema") != schema:
        raise Refused(f"{path} is no description of a model by {schema}: {_RESTORE}")
    if content.get("version") not in range(1, version + 1):
        raise Refused(
            f"{path} has version {str(content.get('version'))[:_SHOWN]!r} of {schema}, this package reads 1 to "
            f"{version}: install a newer one, or export again"
        )
    if content.pop(SUM, None) != _sum_of(content):
        raise Refused(f"{path} is not what was written, its hash is another: {_RESTORE}")
    _require_schema(path, content, schema)
    for name, expected in content["files"].items():
        _require_whole(path.parent, name, expected)
    return content


def content_sum(tensors: dict[str, Any]) -> str:
    """SHA-256 of tensors: names, types, shapes and bytes."""
    import torch

    digest = hashlib.sha256()
    for name, x in sorted(tensors.items()):
        digest.update(f"{name} {x.dtype} {tuple(x.shape)} ".encode())
        digest.update(x.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sum_of(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _require_schema(path: Path, content: dict[str, Any], schema: str) -> None:
    """Errors: Refused naming the first place that is not as the schema says."""
    import jsonschema

    rules = json.loads(Path(__file__).with_name(f"{schema}.schema.json").read_text(encoding="utf-8"))
    error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(rules).iter_errors(content))
    if error is not None:
        place = "/".join(map(str, error.absolute_path)) or "the whole"
        wanted = json.dumps(error.validator_value)
        raise Refused(
            f"{path}, {place}: {json.dumps(error.instance)[:_SHOWN]} is not as version {content['version']} of "
            f"{schema} has it ({error.validator}: {wanted[:_SHOWN]}): {_RESTORE}"
        )


def _require_whole(folder: Path, name: str, expected: dict[str, Any]) -> None:
    if not _PLAIN.fullmatch(name):
        raise Refused(f"{folder} lists a file {name[:_SHOWN]!r}, which is no plain name: {_RESTORE}")
    path = folder / name
    if not path.is_file():
        raise Refused(f"{path} is missing: {_RESTORE}")
    size = path.stat().st_size
    if size != expected["bytes"]:
        raise Refused(f"{path} has {size:,} bytes, not {expected['bytes']:,}: {_RESTORE}")
    if sha256(path) != expected[SUM]:
        raise Refused(f"{path} is not what was written, its hash is another: {_RESTORE}")
