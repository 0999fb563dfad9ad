"""Models that are made once from a package's files, and kept in the cache as transformers' folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError

from ..machine import cache_folder

_SUM = "model.sha256"


def converted(kind: str, version: str, sources: Iterable[Path], write: Callable[[Path], None]) -> Path:
    """The folder of a converted model and its tokenizer, which `write` fills where there is none, or a damaged one.

    kind: the name of the folder that has all of these. version: of the conversion. sources: files that it reads, by
    whose content, with the version, a folder is found again.
    Errors: ValueError where the cache cannot be written.
    """
    import transformers

    digest = hashlib.sha256(f"{version} {transformers.__version__}".encode())
    for path in sources:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    folder = cache_folder() / kind / digest.hexdigest()[:16]
    if folder.is_dir():
        if _is_whole(folder):
            return folder
        shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as partial:
            _put(write, Path(partial) / "whole", folder)
    except (OSError, SafetensorError) as error:  # the latter is a full disk's, too
        raise ValueError(
            f"the converted model cannot be kept in {folder.parent} ({error}): name another folder in PYRO_BLORA_CACHE"
        ) from None
    return folder


def _put(write: Callable[[Path], None], partial: Path, folder: Path) -> None:
    partial.mkdir()
    write(partial)
    (partial / _SUM).write_text(_sum_of(partial))
    try:
        os.replace(partial, folder)
    except OSError:
        if not _is_whole(folder):  # or another process was faster: its folder is the same
            raise


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / _SUM).read_text() == _sum_of(folder)
    return False


def _sum_of(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
