"""One process per output: a lock file beside it, which names the owner, and a lock on the folder that a run fills.

Both are system locks (flock), which are released however a process ends. The second one still holds if the lock file of
a run in progress is deleted.
"""

import contextlib
import datetime
import errno
import fcntl
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

_WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # file systems that have none
_ANOTHER_RUN = "change --seed or --output_dir"
_TRIES = 10  # at a lock file that is replaced while it is taken


@contextlib.contextmanager
def alone(output: Path, *, what: str = "trained", remedy: str = _ANOTHER_RUN) -> Iterator[None]:
    """Hold the lock file of a file or folder, `.<name>.lock`; it is gone afterwards, and so are folders made for it.

    what: is done to it meanwhile. remedy: for who does not want to wait.
    Errors: ValueError where another process holds it, naming host, process and time.
    """
    path = output.with_name(f".{output.name}.lock")
    missing = [place for place in path.parents if not place.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = _taken(path, f"{output} is being {what} by another process", remedy)
    try:
        with contextlib.suppress(OSError):  # a full disk; the lock holds all the same
            owner = f"process {os.getpid()} on {socket.gethostname()} since {datetime.datetime.now():%Y-%m-%d %H:%M:%S}"
            os.ftruncate(descriptor, 0)
            os.write(descriptor, owner.encode())
        yield
    finally:
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                path.unlink()
        os.close(descriptor)
        with contextlib.suppress(OSError):  # what a refused run would leave; others are not empty
            for place in missing:
                place.rmdir()


@contextlib.contextmanager
def claimed(partial: Path, folder: Path) -> Iterator[Callable[[], None]]:
    """Make and lock the folder in which a run is prepared; gives a check that it is still there, for before its rename.

    A folder that has stayed empty is removed. Errors: ValueError where another process holds it.
    """
    partial.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(partial, os.O_RDONLY)
    try:
        _lock(descriptor, None, f"{folder} is being trained by another process", _ANOTHER_RUN)
        yield same_folder(partial)
    finally:
        with contextlib.suppress(OSError):  # missing, renamed, or with something in it
            partial.rmdir()
        os.close(descriptor)


def same_folder(folder: Path) -> Callable[[], None]:
    """A check that a folder is still the one that it is now.  Errors (of the check): ValueError."""
    before = os.stat(folder)

    def check() -> None:
        with contextlib.suppress(OSError):
            if os.path.samestat(before, os.stat(folder)):
                return
        raise ValueError(
            f"{folder} was removed or replaced while it was in use, and what it held is lost: give the same command "
            "again to start anew"
        )

    return check


def _taken(path: Path, busy: str, remedy: str) -> int:
    for _ in range(_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _lock(descriptor, path, busy, remedy)
            if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor
        except FileNotFoundError:  # deleted by the process that held it until now
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)
    raise ValueError(f"{path} changes all the time: wait for the other processes that write there")


def _lock(descriptor: int, path: Path | None, busy: str, remedy: str) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = path.read_text(encoding="utf-8", errors="replace").strip() if path and path.exists() else ""
        raise ValueError(f"{busy}{f' ({owner})' if owner else ''}: wait for it, or {remedy}") from None
    except OSError as error:
        if error.errno not in _WITHOUT_LOCKS:
            raise
