"""`pyro-blora push`: a run's adapter with its posterior, or any exported folder, to the hub.

Sent are files of an export alone (`hub_names.PATTERNS`), whole by their hashes, and without a token or a path of this
machine in what they say; `load("user/name")` reads them back.
"""

from __future__ import annotations

import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..files import SUMS
from ..progress import phase
from . import onnx_file, packed
from .exporting import export_run
from .hub_names import HUB_NAME, PATTERNS
from .loading import require_exported
from .manifest import CARD, read_manifest
from .peft import GATES_FILE

_REPLACED = (  # of another export, where one was pushed before; what else is there stays
    "packed.*", "onnx.json", "model.onnx", "*.safetensors*", "adapter_config.json", "config.json",
    "generation_config.json", "draw-*/*", "tokenizer*", "*.jinja", SUMS,
)  # fmt: skip
_WORDS = (  # of any text
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "bpe.codes", "spiece.model", "spm.model",
)  # fmt: skip
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_PATH = re.compile(r"(?<![\w.:/])(?:/(?:home|root|Users|tmp|private)/[\w.-]+|[A-Z]:\\\\?Users\\)[^\s\"'`]*")
_SHOWN = 100  # characters of what is refused


def push(
    run: str | Path, name: str, *, private: bool = False, revision: str | None = None, allow_code: Iterable[str] = (),
    backbone: str | None = None,
) -> str:  # fmt: skip
    """Send a folder to the hub as the model `name`, `user/name`, which is made if it is new; returns its address.

    run: a finished run, of which the adapter of PEFT with the posterior is exported and sent; or a folder of `export`,
    as it is. private: of a new model. revision: a branch, made if it is new; None: main. allow_code, backbone: as in
    `load`, for a run.
    Errors: ValueError offline, without a login, for a folder that is not whole or that says too much, and with the
    hub's own words where it refuses.
    """
    from huggingface_hub import HfApi, constants, get_token

    if not HUB_NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name on the hub: give user/name, or organization/name")
    if constants.is_offline_mode():
        raise ValueError("a push needs the hub, and HF_HUB_OFFLINE is set: unset it, where there is a network")
    if not get_token():
        raise ValueError("a push needs a login: `hf auth login`, or a token that may write in HF_TOKEN")
    folder = Path(run).expanduser()
    with tempfile.TemporaryDirectory() as place:
        if (folder / "config.json").is_file() and (folder / "adapter" / GATES_FILE).is_file():
            folder, _ = export_run(folder, Path(place) / "adapter", format="peft", allow_code=allow_code,
                                   backbone=backbone)  # fmt: skip
        files = require_sendable(folder)
        api = HfApi(library_name="pyro_blora")
        try:
            with phase(f"sending {folder.name} to {name}", still=True):
                api.create_repo(name, private=private or None, exist_ok=True)
                if revision is not None:
                    api.create_branch(name, branch=revision, exist_ok=True)
                sent = api.upload_folder(
                    repo_id=name, folder_path=folder, revision=revision, allow_patterns=files,
                    delete_patterns=list(_REPLACED), commit_message=f"{_kind(folder)} by pyro_blora",
                )  # fmt: skip
        except Exception as error:  # of HTTP, in any of its libraries
            raise ValueError(f"{name} was not pushed: {_said(error, get_token())}") from None
    return str(sent.commit_url)


def require_sendable(folder: Path) -> list[str]:
    """The names of a folder's files, all of them.

    Errors: ValueError for a folder that is no export or not whole, for a file that is none of an export's, and for a
    token or a path of this machine in one.
    """
    kind = _kind(folder)
    if kind == "packed model":
        read_manifest(folder / packed.MANIFEST, schema=packed.SCHEMA, version=packed.VERSION)
    elif kind == "ONNX model":
        read_manifest(folder / onnx_file.MANIFEST, schema=onnx_file.SCHEMA, version=onnx_file.VERSION)
    elif kind == "adapter with its posterior":
        require_exported(folder)
    names = []
    for path in sorted(path for path in folder.rglob("*") if not path.is_dir() or path.is_symlink()):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink() or not any(fnmatch(path.name, each) for each in PATTERNS) or path.name.startswith("."):
            raise ValueError(f"{path} is no file of an export, and nothing of it is sent: move it away")
        if path.name not in _WORDS:
            for text in _texts(path):
                _require_silent(path, text)
        names.append(name)
    return names


def _kind(folder: Path) -> str:
    """What is in a folder, in words.  Errors: ValueError for what is no export."""
    draws = [*folder.glob("draw-*/adapter_config.json")]
    has = {
        "packed model": packed.is_packed(folder), "ONNX model": (folder / onnx_file.MANIFEST).is_file(),
        "adapter with its posterior": (folder / GATES_FILE).is_file(), "ensemble of adapters": bool(draws),
        "merged model": (folder / "config.json").is_file() and (folder / "model.safetensors").is_file(),
    }  # fmt: skip
    found = next((kind for kind, is_it in has.items() if is_it), None)
    if found is None or not (folder / CARD).is_file():
        raise ValueError(
            f"{folder} is neither a finished run nor a folder of `pyro-blora export` with its card: export it first"
        )
    return found


def _texts(path: Path) -> Iterator[str]:
    """What a file says beside numbers: all of it, or the head of a safetensors file."""
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, framework="pt") as file:
            yield json.dumps(file.metadata() or {}).replace('\\"', '"')
    elif path.suffix == ".onnx":
        with path.open("rb") as raw:
            yield from (part.decode() for part in re.findall(rb"[ -~]{6,4096}", raw.read()))
    else:
        yield path.read_text(encoding="utf-8", errors="replace")


def _require_silent(path: Path, text: str) -> None:
    from huggingface_hub import get_token

    token, here = get_token(), (str(Path.home()), str(Path.cwd()), str(path.resolve().parent))
    if _TOKEN.search(text) or (token and token in text):
        raise ValueError(f"{path} has a token of the hub in it, and nothing is sent: take it out, and revoke it")
    known = (place for place in here if place.count("/") > 1 and place in text)
    found = next(itertools.chain(known, (match[0] for match in _PATH.finditer(text))), None)
    if found is not None:
        raise ValueError(f"{path} names a place on this machine, {found[:_SHOWN]!r}, and nothing is sent: take it out")


def _said(error: Exception, token: str | None) -> str:
    """An error of the hub's in a line, without the token."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()] or [type(cause).__name__]
    said = " ".join(lines[:3])[:300]
    return said.replace(token, "...") if token else said
