"""A table of named functions (priors, guides) that a user's own file can join without touching this package.

A name is either registered with the decorator or given as `path/to/file.py:function`, so a law tried out in a scratch
file needs no installation. Settings are checked here against the function's own signature, because a misspelt setting
that is ignored silently makes a wrong experiment look finished.
"""

import ast
import contextlib
import contextvars
import difflib
import hashlib
import importlib.util
import inspect
import math
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

REQUIRED = inspect.Parameter.empty  # the "default" that `describe` reports for a setting without one
_USER_MODULE = "pyro_blora_user_file_"
_ALLOWED = contextvars.ContextVar("functions of files that may run", default=None)  # None: all, the user typed them
NOUNS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "none"}


@contextlib.contextmanager
def only_code(allowed: Iterable[str], source: Path) -> Iterator[None]:
    """Within the block no function of a file runs but those named: the names come from `source`, not from the user.

    Errors (in the block): ValueError for another one, before its file is imported.
    """
    allowed = (allowed,) if isinstance(allowed, str) else tuple(allowed)
    before = _ALLOWED.set((frozenset(map(_origin, allowed)), source))
    try:
        yield
    finally:
        _ALLOWED.reset(before)


class Registry:
    """Named callables of one kind, e.g. `Registry("prior")`; the kind is used in messages only."""

    def __init__(self, kind: str):
        self.kind = kind
        self._functions: dict[str, Callable] = {}

    def register(self, name: str | Callable | None = None) -> Callable:
        """Add a function, as `@registry.register` (its own name is used) or `@registry.register("name")`.

        Errors: ValueError where another function has the name. The same function defined again by a notebook cell, or
        by a user's file that was edited and loaded again, replaces the old one.
        """
        if callable(name):
            return self.register(None)(name)

        def add(function: Callable) -> Callable:
            key = name or function.__name__
            held = self._functions.get(key)
            if held is not None and not _same_origin(held, function):
                raise ValueError(f"{self.kind} {key!r} is registered already by {held.__module__}: choose another name")
            self._functions[key] = function
            return function

        return add

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted(self._functions)

    def resolve(self, name: str | Callable) -> Callable:
        """The function behind a registered name, or behind `path/to/file.py:function`; a function is itself.

        Errors: ValueError for an unknown name, a missing file, a file that fails to import, a missing function.
        """
        if callable(name):
            return name
        if name in self._functions:
            return self._functions[name]
        if ":" in name or name.endswith(".py"):
            return self._from_file(name)
        raise ValueError(f"unknown {self.kind} {name!r}: {suggest(name, self.names())}")

    def describe(self, name: str, *, skip: int | None = None) -> tuple[str, dict[str, Any]]:
        """The first docstring line of a function, and its settings with their defaults (`REQUIRED`: there is none)."""
        function = self.resolve(name)
        line = (inspect.getdoc(function) or "").strip().partition("\n")[0]
        return line, {key: parameter.default for key, parameter in _parameters(function, skip).items()}

    def settings(self, function: Callable, given: Mapping[str, Any], *, skip: int | None = None) -> dict[str, Any]:
        """The given settings, checked against the function's parameters and coerced to their types; ready for `**`.

        The first `skip` positional parameters are the library's (the layout); with None, those without a default are.
        Errors: ValueError for an unknown setting, a missing one, and a value of the wrong type.
        """
        called = self._name_of(function)
        known = _parameters(function, skip)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        unknown = [key for key in given if key not in known]
        if unknown and not open_ended:
            raise ValueError(f"{called}: unknown setting {unknown[0]!r}: {suggest(unknown[0], sorted(known))}")
        missing = [key for key, parameter in known.items() if parameter.default is REQUIRED and key not in given]
        if missing:
            raise ValueError(f"{called}: the setting {missing[0]!r} is required: give --{self.kind}.{missing[0]} VALUE")
        hints = _hints(function)
        checked = dict(given)
        for key in known.keys() & given.keys():
            checked[key] = _coerce(given[key], hints.get(key, REQUIRED), known[key].default, f"{called}: {key}")
        return checked

    def _name_of(self, function: Callable) -> str:
        for name, held in self._functions.items():
            if held is function:
                return f"{self.kind} {name!r}"
        return f"{self.kind} {getattr(function, '__name__', str(function))!r}"

    def _from_file(self, name: str) -> Callable:
        path, colon, attribute = name.rpartition(":")
        if not colon or not attribute:
            raise ValueError(f"{self.kind} {name!r} names a file but no function: write path/to/file.py:function")
        allowed, source = _ALLOWED.get() or (None, None)
        if allowed is not None and _origin(name) not in allowed:
            raise ValueError(
                f"{source} names code, {self.kind} {name!r}, and code never runs because a file names it: look at it, "
                f"and if you trust it name it again, load(folder, allow_code=[{name!r}])"
            )
        module = _load(path, self.kind)
        function = getattr(module, attribute, None)
        if function is None:
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
            raise ValueError(f"{self.kind} file {path} has no {attribute!r}: {suggest(attribute, sorted(own))}")
        if not callable(function):
            raise ValueError(f"{self.kind} {name!r} must be a function, got {type(function).__name__}")
        return function


def _origin(name: str) -> tuple[Path, str]:
    """The file and the function that `path/to/file.py:function` names, however the path is written."""
    path, _, attribute = str(name).rpartition(":")
    return Path(os.path.expanduser(path)).resolve(), attribute


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'lora'? `, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """For a message about an unknown name: the nearest that is known, and all that are."""
    known = list(known)
    return f"{nearest(name, known)}Known: {', '.join(known) or '(none)'}"


def _same_origin(old: Callable, new: Callable) -> bool:
    """Whether both come from the same notebook or the same user's file, so that the newer one may replace the older."""
    reloadable = new.__module__ == "__main__" or new.__module__.startswith(_USER_MODULE)
    return reloadable and (old.__module__, old.__qualname__) == (new.__module__, new.__qualname__)


def _load(path: str, kind: str) -> types.ModuleType:
    """Import a user's file once per content, so that a run that asks twice gets the same function."""
    file = Path(os.path.expanduser(path)).resolve()
    if not file.is_file():
        raise ValueError(f"{kind} file {path} does not exist (looked for {file})")
    content = hashlib.sha256(file.read_bytes()).hexdigest()
    name = _USER_MODULE + hashlib.sha256(str(file).encode()).hexdigest()[:12]
    loaded = sys.modules.get(name)
    if loaded is not None and getattr(loaded, "__content__", None) == content:
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ValueError(f"{kind} file {path} is not a Python file: its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    module.__content__ = content
    sys.modules[name] = module  # before the import: dataclasses look their module up while they are made
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        raise ValueError(f"{kind} file {path} fails to import: {type(error).__name__}: {error}") from error
    return module


def _parameters(function: Callable, skip: int | None) -> dict[str, inspect.Parameter]:
    """The parameters that are settings: keyword-only ones, and positional ones that the library does not fill."""
    found = {}
    for index, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
        positional = parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        library = parameter.default is REQUIRED if skip is None else index < skip
        if parameter.kind is parameter.KEYWORD_ONLY or (positional and not library):
            found[name] = parameter
    return found


def _hints(function: Callable) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target)
    except Exception:  # an annotation that cannot be evaluated is a comment: the default's type is used instead
        return {}


def _coerce(value: Any, annotation: Any, default: Any, where: str) -> Any:
    """The value as one of the annotated types (the default's type without an annotation); ValueError if none fits."""
    if annotation is REQUIRED:
        if default is REQUIRED or default is None:
            return value
        annotation = type(default)
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    allowed = typing.get_args(annotation) if union else (annotation,)
    literals = [choice for a in allowed if typing.get_origin(a) is typing.Literal for choice in typing.get_args(a)]
    plain = [a for a in allowed if a in NOUNS]
    if len(plain) + sum(typing.get_origin(a) is typing.Literal for a in allowed) < len(allowed):
        return value  # a richer type (a list, a callable): the function itself is the judge
    if literals and (match := [choice for choice in literals if choice == value and type(choice) is type(value)]):
        return match[0]
    if type(value) in plain and not (isinstance(value, float) and math.isnan(value)):
        return value
    for kind in (type(None), int, float, bool, str):
        if kind in plain:
            found = converted(value, kind)
            if found is not REQUIRED:
                return found
    if literals:
        raise ValueError(f"{where} must be one of {', '.join(map(str, literals))}, got {value!r}")
    raise ValueError(f"{where} must be {' or '.join(NOUNS[kind] for kind in plain)}, got {value!r}")


def converted(value: Any, kind: type) -> Any:
    """The value as `kind` where nothing is lost on the way, else REQUIRED (no value at all)."""
    text = value.strip().lower() if isinstance(value, str) else None
    if kind is type(None):
        return None if text in ("none", "null") else REQUIRED
    if kind is bool:
        return {"true": True, "false": False}.get(text, REQUIRED)
    if kind is str:
        return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else REQUIRED
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return REQUIRED
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return REQUIRED
    if math.isnan(number) or (kind is int and not number.is_integer()):  # is_integer is False for infinities
        return REQUIRED
    return kind(number)


def registered(path: Path, kind: str) -> list[tuple[str, str]]:
    """Name and a line for each function under `@register_<kind>("name")` in a module's text, which is not run."""
    found = []
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        for decorator in getattr(node, "decorator_list", ()):
            if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") == f"register_{kind}":
                settings = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
                shown = ", ".join(f"{arg.arg}={ast.unparse(default)}" for arg, default in settings)
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                found.append((decorator.args[0].value, f"{line} ({shown})" if shown else line))
    return sorted(found)
