"""Functions in Python files of a user's, `path/to/file.py:function`: imported only if they are named."""

import contextlib
import contextvars
import hashlib
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

_MODULE = "pyro_blora_user_file_"  # and a hash of the path: the name under which a file is imported


class _Limit(NamedTuple):
    allowed: frozenset[tuple[Path, str]]
    source: Path


_LIMIT: contextvars.ContextVar[_Limit | None] = contextvars.ContextVar("functions of files that may run", default=None)
_HELD: contextvars.ContextVar[bool] = contextvars.ContextVar("imported files stay as they are", default=False)


@contextlib.contextmanager
def only_code(allowed: Iterable[str], source: Path) -> Iterator[None]:
    """Within the block no function of a file runs but those named: the names come from `source`, not from the user.

    Errors (in the block): ValueError for another one, before its file is imported.
    """
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    before = _LIMIT.set(_Limit(frozenset(map(_origin, allowed)), source))
    try:
        yield
    finally:
        _LIMIT.reset(before)


@contextlib.contextmanager
def held(names: Iterable[str]) -> Iterator[None]:
    """Within the block a file that was imported stays as it is, also where it is edited: a run has one code.

    names: of the functions that will be used, of which what was imported before an edit is imported again, now.
    """
    for name in names:
        if content_in_use(name) not in (None, content_of(name)):
            module_of(name, "code")
    before = _HELD.set(True)
    try:
        yield
    finally:
        _HELD.reset(before)


def is_of_file(name: str) -> bool:
    """Whether a name is that of a function in a file."""
    return ":" in name or name.endswith(".py")


def file_of(name: str) -> tuple[Path, str]:
    """The file and the function that `path/to/file.py:function` names."""
    path, _, attribute = str(name).rpartition(":")
    return Path(os.path.expanduser(path)), attribute


def require_allowed(name: str, kind: str) -> None:
    """Errors: ValueError where a name without a function, or a function that may not run here, is to be imported."""
    path, attribute = file_of(name)
    if path == Path() or not attribute:
        raise ValueError(f"{kind} {name!r} names a file but no function: write path/to/file.py:function")
    limit = _LIMIT.get()
    if limit is not None and not may_run(name):
        raise ValueError(
            f"{limit.source} names code, {kind} {name!r}, and code never runs because a file names it: look at it, "
            f"and if you trust it name it again, load(folder, allow_code=[{name!r}]), on the command line --allow_code "
            f"{name}"
        )


def may_run(name: str) -> bool:
    """Whether a function of a file may run here: outside of `only_code` each may."""
    limit = _LIMIT.get()
    return limit is None or _origin(name) in limit.allowed


def module_of(name: str, kind: str) -> types.ModuleType:
    """The file's module, imported once per content (see also `held`), so that two calls return the same function.

    Errors: ValueError for a file that is missing, that is no Python file, or that fails to import.
    """
    path = str(name).rpartition(":")[0]
    file = file_of(name)[0].resolve()
    imported_as = _imported_as(file)
    loaded = sys.modules.get(imported_as)
    if loaded is not None and _HELD.get():
        return loaded
    if not file.is_file():
        raise ValueError(f"{kind} file {path} does not exist (looked for {file})")
    source = file.read_bytes()
    content = hashlib.sha256(source).hexdigest()
    if loaded is not None and vars(loaded).get("__content__") == content:
        return loaded
    spec = importlib.util.spec_from_file_location(imported_as, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{kind} file {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    vars(module)["__content__"] = content
    sys.modules[imported_as] = module  # before the import: dataclasses look their module up while they are made
    try:
        exec(compile(source, str(file), "exec", dont_inherit=True), vars(module))  # bytecode is looked up by the second
    except Exception as error:
        sys.modules.pop(imported_as, None)
        raise ValueError(f"{kind} file {path} fails to import: {type(error).__name__}: {error}") from error
    return module


def content_in_use(name: str) -> str | None:
    """The hash of the file of a function as it was imported, whatever has become of it since; None where it was not."""
    module = sys.modules.get(_imported_as(file_of(name)[0].resolve()))
    return None if module is None else vars(module).get("__content__")


def content_of(name: str) -> str:
    """The hash of the file that a function is in, "" without one: it is identified by that, not by its name alone."""
    if _HELD.get() and (content := content_in_use(name)):
        return content
    file, _ = file_of(name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else ""


def _imported_as(file: Path) -> str:
    return _MODULE + hashlib.sha256(str(file).encode()).hexdigest()[:12]


def place_of(error: BaseException) -> str | None:
    """ "FILE, line N" of the user's file in which an error was raised, at its innermost; None for other errors."""
    place, trace = None, error.__traceback__
    while trace is not None:
        if str(trace.tb_frame.f_globals.get("__name__", "")).startswith(_MODULE):
            place = f"{trace.tb_frame.f_code.co_filename}, line {trace.tb_lineno}"
        trace = trace.tb_next
    return place


def replaces(new: Callable, old: Callable) -> bool:
    """Whether `new` is `old` from a notebook's cell that ran again, or from a user's file that was edited."""
    module = new.__module__ or ""  # none in code that was given to exec
    reloadable = module == "__main__" or module.startswith(_MODULE)
    return reloadable and (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _origin(name: str) -> tuple[Path, str]:
    """The same however the path is written."""
    path, attribute = file_of(name)
    return path.resolve(), attribute
