"""Parts chosen by name: a table of functions per kind (priors, guides, ...), to which users can add their own.

A name is that of a function with a decorator, or `path/to/file.py:function`, so that a part that is tried out in a
scratch file needs no installation. The package's own names are read from the text of its modules, and a module is
imported on first use of one of its names: lists and help need no torch. Settings are checked against the function's
own signature, because a misspelt setting that is ignored silently makes a wrong experiment look finished.
`registries.py` has the tables.
"""

import importlib
import inspect
import typing
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from .registry_entries import REQUIRED, Entry, Undeclared, written
from .user_code import file_of, is_of_file, module_of, replaces, require_allowed
from .user_values import as_word, coerce, suggest

_PACKAGE = Path(__file__).parent
Base = typing.TypeVar("Base")
Maker = typing.TypeVar("Maker", bound=Callable[..., Any])


class Registry:
    """Named functions of one kind: `Registry("prior", "priors")` has those under `@register_prior` in priors/.

    kind: the word in messages, and the flag. modules: files or folders of this package that have some. decorator: its
    name, where it is not register_KIND.
    """

    def __init__(self, kind: str, *modules: str, decorator: str = ""):
        self.kind, self._modules, self._decorator = kind, modules, decorator or f"register_{kind}"
        self._functions: dict[str, Callable] = {}
        self._entries: dict[str, Entry] = {}

    @typing.overload
    def register(self, name: str | None = None, **declared: Any) -> Callable[[Maker], Maker]: ...

    @typing.overload
    def register(self, name: Maker, **declared: Any) -> Maker: ...

    def register(self, name: Any = None, **declared: Any) -> Any:
        """Add a function, as `@register_KIND` (its own name is used) or `@register_KIND("name")`.

        declared: what else `Entry` has.
        Errors: ValueError where another function has the name. The same function defined again by a notebook cell, or
        by a user's file that was edited and loaded again, replaces the old one.
        """
        if callable(name):
            return self.register(None, **declared)(name)

        def add(function: Maker) -> Maker:
            key = name or function.__name__
            held = self._functions[key].__module__ if key in self._functions else self.entry(key).module
            again = key in self._functions and replaces(function, self._functions[key])
            first = key not in self._functions and held in ("", function.__module__)
            if not first and not again:
                raise ValueError(f"{self.kind} {key!r} is registered already by {held}: choose another name")
            line = (inspect.getdoc(function) or "").strip().partition("\n")[0]
            self._entries[key] = Entry(key, function.__module__, line, _settings(function), **declared)
            self._functions[key] = function
            return function

        return add

    def forget(self, name: str) -> None:
        """Remove what a user has registered under a name, if anything."""
        self._functions.pop(name, None)
        self._entries.pop(name, None)

    def names(self) -> list[str]:
        """The registered names, sorted."""
        return sorted({*self._own, *self._functions})

    def has_own(self, name: str) -> bool:
        """Whether a name is of this package, so that every process knows it."""
        return name in self._own

    def entries(self) -> list[Entry]:
        """What is known of every name, by place and name."""
        return sorted(map(self.entry, self.names()), key=lambda entry: entry.place)

    def entry(self, name: str) -> Entry:
        """The entry of a name; that of a function in a file is read from the text, which is not run.

        Errors: ValueError where what its decorator declares is not written out.
        """
        known = self._entries.get(name) or self._own.get(name)
        if known is None and is_of_file(name) and file_of(name)[0].is_file():
            try:
                found = written(file_of(name)[0], "", self._decorator)
                known = next((entry for function, entry in found if function == file_of(name)[1]), None)
            except Undeclared:
                raise
            except Exception:  # `resolve` reports what is wrong with it
                known = None
        return known or Entry(name)

    def read_files(self, name: str, settings: dict[str, Any], prefix: str = "") -> None:
        """Put what the files of the part's settings hold in place of their names (`Entry.reads`).

        prefix: of the settings that are the part's.   Errors: ValueError for a file that cannot be read.
        """
        for setting, reader in self.entry(name).reads.items():
            if (path := settings.pop(prefix + setting, None)) is not None:
                module, _, function = reader.partition(":")
                found = getattr(importlib.import_module(module), function)(str(path))
                if twice := [key for key in found if prefix + key in settings]:
                    raise ValueError(
                        f"{self.kind} {name!r}: {setting} {path} sets {twice[0]!r}, which is set already: drop one"
                    )
                settings |= {prefix + key: value for key, value in found.items()}

    def require_known(self, name: str) -> None:
        """Errors: ValueError for a name that is neither registered nor that of a function in a file."""
        if name not in self._functions and name not in self._own and not is_of_file(name):
            raise ValueError(f"unknown {self.kind} {name!r}: {suggest(name, self.names())}")

    def resolve(self, name: str | Callable) -> Callable:
        """The function behind a registered name, or behind `path/to/file.py:function`; a function is itself.

        Errors: ValueError for an unknown name, a missing file, a file that fails to import, a missing function.
        """
        if callable(name):
            return name
        self.require_known(name)
        if name not in self._functions and name in self._own:
            importlib.import_module(self._own[name].module)
        return self._functions[name] if name in self._functions else self._from_file(name)

    def settings(self, function: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
        """The given settings, checked against the function's parameters and coerced to their types; ready for `**`.

        Settings are the keyword-only parameters, and those with a default that are not positional-only.
        Errors: ValueError for an unknown setting, a missing one, and a value of the wrong type.
        """
        called, known = f"{self.kind} {self.called(function)!r}", _settings(function)
        open_ended = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
        unknown = [key for key in given if key not in known and not open_ended]
        if unknown:
            remedy = suggest(unknown[0], sorted(known)) if known else f"it has none, drop --{self.kind}.{unknown[0]}"
            raise ValueError(f"{called}: unknown setting {unknown[0]!r}: {remedy}")
        missing = [key for key, default in known.items() if default is REQUIRED and key not in given]
        if missing:
            raise ValueError(f"{called}: the setting {missing[0]!r} is required: give --{self.kind}.{missing[0]} VALUE")
        hints, checked = _hints(function), dict(given)
        for key in known.keys() & given.keys():
            default = known[key]
            guess = object if default is REQUIRED or default is None else type(default)  # object takes anything
            annotation = hints.get(key, guess)
            checked[key] = coerce(as_word(given[key], annotation), annotation, f"{called}: {key}")
        return checked

    def called(self, part: str | Callable) -> str:
        """What messages call a part."""
        if isinstance(part, str):
            return part
        names = [name for name, held in self._functions.items() if held is part]
        return names[0] if names else getattr(part, "__name__", str(part))

    @cached_property
    def _own(self) -> dict[str, Entry]:
        """The package's own, from the text of its modules."""
        paths = (path for module in self._modules for path in _files(module))
        each = (entry for path in paths for _, entry in written(path, _dotted(path), self._decorator))
        return {entry.name: entry for entry in each}

    def _from_file(self, name: str) -> Callable:
        require_allowed(name, self.kind)
        (_, attribute), path = file_of(name), name.rpartition(":")[0]
        module = module_of(name, self.kind)
        function = vars(module).get(attribute)
        if function is None:
            own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
            raise ValueError(f"{self.kind} file {path} has no {attribute!r}: {suggest(attribute, own)}")
        if not callable(function):
            raise ValueError(f"{self.kind} {name!r} must be a function, got {type(function).__name__}")
        return function


def _files(module: str) -> Iterable[Path]:
    """The Python files of a folder or of a module of this package."""
    folder = _PACKAGE / module
    return sorted(folder.rglob("*.py")) if folder.is_dir() else filter(Path.is_file, [folder.with_suffix(".py")])


def _dotted(path: Path) -> str:
    return ".".join([_PACKAGE.name, *path.relative_to(_PACKAGE).with_suffix("").parts]).removesuffix(".__init__")


def _settings(function: Callable) -> dict[str, Any]:
    """The defaults of the parameters that are settings: what the library fills has none, or is positional-only.

    Of a class, the keyword-only ones.
    """
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        by_name = parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is not REQUIRED
        if parameter.kind is parameter.KEYWORD_ONLY or (by_name and not inspect.isclass(function)):
            found[name] = parameter.default
    return found


def _hints(function: Callable) -> dict[str, Any]:
    target = function.__init__ if inspect.isclass(function) else function
    try:
        return typing.get_type_hints(target)
    except Exception:  # an annotation that cannot be evaluated is a comment: the default's type is used instead
        return {}


def undefined(part: object, method: str) -> NotImplementedError:
    """The error of a part without a method that its base class requires, or that something else it declares needs."""
    base = next(each for each in type(part).__mro__ if method in vars(each))
    return NotImplementedError(
        f"{type(part).__name__} does not define {method}(): {base.__module__}.{base.__qualname__}.{method} says what "
        "it must return"
    )


def adopted(part: Any, base: type[Base]) -> Base:
    """The part itself as one of `base`, whose defaults it gets for what its own class lacks.

    So a user's plain nn.Module serves as a subclass of `Prior` or `Guide` does, and keeps its attributes and state.
    """
    if not isinstance(part, base):
        own = type(part)
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
        part.__class__ = type(own.__name__, (own, base), names)
    return part
