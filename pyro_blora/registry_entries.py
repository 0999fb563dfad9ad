"""What is known of a part without importing it: read from the text of its module.

A list, help or the check of a flag needs no torch, and runs no file of a user's.
"""

import ast
import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REQUIRED = inspect.Parameter.empty  # the "default" of a setting without one


class Undeclared(ValueError):
    """What a decorator declares is not to be read from the text."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """What is known of a name without importing what it stands for.

    line: the first of the docstring. settings: their defaults, REQUIRED where there is none. The decorator may declare:
    proposes: values of flags where neither the user nor the method sets them. sets: values of flags that follow.
    excludes: flags that must keep their default, each with a sentence that has the reason and the remedy.
    fits, each: the settings that say how many fits a run has, and the name by which each of them is chosen.
    named_after: the setting whose value, a file, names runs. flags: of the line, each a setting with its help.
    place: in a list that has an order, the report's sections, whose last ones have 100 and 110.
    reads: settings that name a file, each with the function, `module:name`, that makes settings of it: a configuration
    has these in place of the name, so that what was read decides its digest, and its runs need the file no more.
    """

    name: str
    module: str = ""
    line: str = ""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    proposes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sets: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    excludes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    fits: str = ""
    each: str = ""
    named_after: str = ""
    flags: Mapping[str, str] = dataclasses.field(default_factory=dict)
    place: float = 90.0
    reads: Mapping[str, str] = dataclasses.field(default_factory=dict)


def written(path: Path, module: str, decorator: str) -> Iterator[tuple[str, Entry]]:
    """(function, entry) of what has the decorator, `@name` or `@package.name`, in a module's text.

    Errors: Undeclared where a keyword of the decorator is no literal.
    """
    text = path.read_text(encoding="utf-8")
    nodes = ast.parse(text).body if decorator in text else []
    for node in (node for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)):
        for by in node.decorator_list:
            call = by if isinstance(by, ast.Call) else ast.Call(by, [], [])
            if decorator in (getattr(call.func, "id", None), getattr(call.func, "attr", None)):
                name = _value(call.args[0]) if call.args else node.name
                declared = {keyword.arg: _literal(path, keyword) for keyword in call.keywords if keyword.arg}
                line = (ast.get_docstring(node) or "").partition("\n")[0]
                yield node.name, Entry(name, module, line, _written_settings(node), **declared)


def _written_settings(node: ast.FunctionDef | ast.ClassDef) -> dict[str, Any]:
    """As `_settings`, from the text."""
    if isinstance(node, ast.ClassDef):
        made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
        own = {argument.arg for part in made for argument in part.args.kwonlyargs}
        return {key: default for part in made for key, default in _written_settings(part).items() if key in own}
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    with_default = zip(positional[len(positional) - len(arguments.defaults) :], arguments.defaults, strict=True)
    found: dict[ast.arg, ast.expr | None] = {arg: value for arg, value in with_default if arg in arguments.args}
    found |= zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    return {argument.arg: REQUIRED if value is None else _value(value) for argument, value in found.items()}


def _literal(path: Path, keyword: ast.keyword) -> Any:
    """Errors: Undeclared for a name or an expression, as the text is read and not run."""
    try:
        return ast.literal_eval(keyword.value)
    except ValueError:
        said = f"{keyword.arg}={ast.unparse(keyword.value)}"
        raise Undeclared(
            f"{path}, line {keyword.value.lineno}: what a decorator declares must be written out there, got {said}"
        ) from None


def _value(node: ast.expr) -> Any:
    """What a literal stands for; of anything else its text."""
    try:
        return ast.literal_eval(node)
    except ValueError:
        return ast.unparse(node)
