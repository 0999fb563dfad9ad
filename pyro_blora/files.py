"""Files that are whole: on the disk before they have their name, replaced in one rename, and checked when read.

SHA256SUMS of a finished run holds the hash of each of its files but the report, as `sha256sum -c SHA256SUMS` reads it.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from .run_lock import alone

SUMS, REPORT = "SHA256SUMS", "report.html"
_UNLISTED = (SUMS, REPORT)  # a report may be written again at any time
_REFUSALS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


class NotWritten(OSError):
    """The disk does not take a file; the text is one sentence that names it."""


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors: NotWritten where the disk is full, or refuses for another reason.

    Libraries raise exceptions of many kinds for this, whose texts contain the system's message.
    """
    try:
        yield
    except NotWritten:
        raise
    except Exception as error:
        code = next((c for c in _REFUSALS if getattr(error, "errno", None) == c or os.strerror(c) in str(error)), None)
        if code is None:
            raise
        is_full = code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room" if is_full else "choose a place that can be written"
        raise NotWritten(
            f"{path} could not be written ({os.strerror(code)}): {remedy}, and give the same command again; what was "
            "saved before is whole"
        ) from error


def replace(path: Path, write: Callable[[Path], object], rename: Callable[[], None] | None = None) -> None:
    """Write a file under another name, force it to the disk and rename it: a kill or a full disk leaves the old one.

    rename: called before the old file is replaced, for one who keeps it.
    """
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        try:
            write(partial)
            sync(partial)
            if rename is not None:
                rename()
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise
        sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    replace(path, lambda partial: partial.write_text(text, encoding="utf-8"))


@contextlib.contextmanager
def new_folder(folder: Path, what: str) -> Iterator[Path]:
    """A temporary folder beside, which takes this name when the block has ended; nothing is left where it fails.

    what: is never overwritten, for the message.
    Errors: FileExistsError for a folder that is there; ValueError where another process writes it; NotWritten.
    """

    def require_new() -> None:
        if folder.exists():
            raise FileExistsError(f"{folder} exists already: give another folder, {what} is never overwritten")

    require_new()
    with writing(folder), alone(folder, what="written", remedy="give another folder"):
        require_new()  # by the process that held the lock
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
        try:
            partial.mkdir()
            yield partial
            sync_tree(partial)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> None:
    """Write SHA256SUMS of all files in the folder and those below it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in _UNLISTED)
    lines = [f"{sha256(path)}  {path.relative_to(folder).as_posix()}\n" for path in paths]
    replace_text(folder / SUMS, "".join(lines))


def require_whole(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files with their hashes in SHA256SUMS, all or those of some names; older runs have none.

    Errors: ValueError naming the first that is missing or is not what the run wrote.
    """
    if not (folder / SUMS).is_file():
        return
    lines = (folder / SUMS).read_text(encoding="utf-8", errors="replace").splitlines()
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    for name in sums if names is None else names:
        path = folder / name
        found = sha256(path) if path.is_file() else None
        if name in sums and found != sums[name]:
            what = "is missing" if found is None else "is not what the run wrote"
            raise ValueError(
                f"{path} {what} (its hash in {SUMS} is another): restore the run folder from a copy, or train again"
            )
