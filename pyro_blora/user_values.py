"""What a user gave: the nearest of the known names, and a value as the type that is wanted, or a sentence."""

import difflib
import math
import types
import typing
from collections.abc import Iterable
from typing import Any

LARGEST = 10**18  # a whole number that every reader of a file has
_LONGEST = 80  # characters of a wrong value that are repeated
_NOUNS = {float: "a number", int: "a whole number", bool: "true or false", str: "a word", type(None): "none"}
_NOTHING = object()  # the value of what does not convert


def nearest(name: str, known: Iterable[str]) -> str:
    """`did you mean 'bops'?`, or nothing where no known name is near."""
    near = difflib.get_close_matches(str(name), list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def suggest(name: str, known: Iterable[str]) -> str:
    """The nearest of the known names, if one is near, and all of them."""
    known = list(known)
    return f"{nearest(name, known)} Known: {', '.join(known) or '(none)'}".lstrip()


def shown(value: Any) -> str:
    """A wrong value in a message, cut where it is long."""
    if isinstance(value, int) and abs(value) > LARGEST:
        return f"a whole number of {value.bit_length() * 3 // 10 + 1} digits or so"
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def is_encodable(text: str) -> bool:
    """Whether it has no half of a surrogate pair, as a cut-off emoji in JSON is: no character, and in no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_plain(value: Any) -> Any:
    """A number of NumPy as one of Python, all else as it is."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def coerce(value: Any, annotation: Any, where: str) -> Any:
    """The value as one of the annotated types, nothing lost on the way: 3 as 3.0, `1e-3` as a number, 4.0 as 4.

    An annotation with a richer type (a list, a callable) takes anything: the function itself is the judge.
    Errors: ValueError, beginning with `where`, if no type fits.
    """
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    allowed = typing.get_args(annotation) if union else (annotation,)
    value = as_plain(value)
    literals = [choice for a in allowed if typing.get_origin(a) is typing.Literal for choice in typing.get_args(a)]
    plain = [a for a in allowed if a in _NOUNS]
    if len(plain) + sum(typing.get_origin(a) is typing.Literal for a in allowed) < len(allowed):
        return value
    if literals and (match := [choice for choice in literals if choice == value and type(choice) is type(value)]):
        return match[0]
    if type(value) in plain and not (isinstance(value, float) and math.isnan(value)):
        return value
    for kind in (type(None), int, float, bool):
        if kind in plain and (converted := _converted(value, kind)) is not _NOTHING:
            return converted
    if literals:
        raise ValueError(f"{where} must be one of {', '.join(map(str, literals))}, got {shown(value)}")
    comma = isinstance(value, str) and _converted(value.replace(",", ".", 1), float) is not _NOTHING and "," in value
    remedy = f": write {value.replace(',', '.', 1)}" if comma else ""
    raise ValueError(f"{where} must be {' or '.join(_NOUNS[kind] for kind in plain)}, got {shown(value)}{remedy}")


def as_word(value: Any, annotation: Any) -> Any:
    """A number that the line's or a file's YAML made of what is annotated as a word, as that word."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    wanted = {*(typing.get_args(annotation) if union else (annotation,))} - {type(None)}
    return str(value) if wanted == {str} and isinstance(value, int | float) and not isinstance(value, bool) else value


def spelled(value: Any) -> str:
    """The value as a flag of the command line says it: true, none, query,value."""
    if isinstance(value, tuple):
        return ",".join(value)
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _converted(value: Any, kind: type) -> Any:
    """The value as `kind` where nothing is lost on the way, else _NOTHING."""
    text = value.strip().lower() if isinstance(value, str) else ""
    if kind is type(None):
        return None if text in ("none", "null") else _NOTHING
    if kind is bool:
        return {"true": True, "false": False}.get(text or "", _NOTHING)
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return _NOTHING
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return _NOTHING
    if math.isnan(number) or (kind is int and not number.is_integer()):  # is_integer is False for infinities
        return _NOTHING
    return kind(number)
