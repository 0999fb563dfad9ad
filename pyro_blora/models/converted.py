"""Models that are made once from a package's files, and kept in the cache as transformers' folders."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

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
        partial = Path(tempfile.mkdtemp(dir=folder.parent))
    except OSError as error:
        raise ValueError(
            f"the converted model cannot be kept in {folder.parent} ({error}): name another folder in PYRO_BLORA_CACHE"
        ) from None
    try:
        write(partial)
        (partial / _SUM).write_text(_sum_of(partial))
        partial.chmod(0o755)
        with contextlib.suppress(OSError):  # another process was faster: its folder is the same
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _is_whole(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return (folder / _SUM).read_text() == _sum_of(folder)
    return False


def _sum_of(folder: Path) -> str:
    with (folder / "model.safetensors").open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
