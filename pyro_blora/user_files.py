"""Text, YAML and JSON that a user gives: what would end in a traceback, or in all of the memory, ends in a sentence.

Errors: ValueError, throughout, naming the file, the line where there is one, and the remedy.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

LARGEST_YAML = 1 << 18  # characters; a large grid has some thousands
LARGEST_JSON = 1 << 24  # characters; the summary of a thousand restarts has a million
DEEPEST = 30  # levels of tables and lists inside each other; a grid file has five
MOST_VALUES = 20_000  # of a YAML file when every alias is written out
MOST_DIGITS = 18  # of a whole number, so that it is one for every reader
_DIGITS = re.compile(r"[-+]?[\d_]+")
_MAGIC = {  # first bytes: (what they are of, remedy)
    b"\x1f\x8b": ("is compressed by gzip", "unpack it: gunzip FILE"),
    b"PK\x03\x04": ("is a ZIP archive or a spreadsheet", "unpack it, or save the sheet as text in UTF-8"),
    b"BZh": ("is compressed by bzip2", "unpack it: bunzip2 FILE"),
    b"\xfd7zXZ": ("is compressed by xz", "unpack it: unxz FILE"),
    b"\x28\xb5\x2f\xfd": ("is compressed by zstd", "unpack it: unzstd FILE"),
    b"\xd0\xcf\x11\xe0": ("is an old spreadsheet", "save the sheet as text in UTF-8"),
}
_UTF16 = "is UTF-16, not UTF-8 text: convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW"
_HEAD = 4096  # bytes in which a NUL tells UTF-16 without a mark, or no text at all


def require_plain(path: Path) -> bytes:
    """The first bytes of a file, which is neither compressed nor a spreadsheet."""
    with path.open("rb") as raw:
        head = raw.read(_HEAD)
    for magic, (what, remedy) in _MAGIC.items():
        if head.startswith(magic):
            raise ValueError(f"{path} {what}, not UTF-8 text: {remedy}")
    return head


@contextlib.contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A file of UTF-8 text, with a byte-order mark or without."""
    head = require_plain(path)
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(f"{path} {_UTF16}")
    if b"\0" in head:
        raise ValueError(f"{path} has NUL bytes, it is UTF-16 or no text: convert it: iconv -f UTF-16 -t UTF-8")
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except UnicodeDecodeError:
        raise ValueError(_not_utf8(path)) from None


def _not_utf8(path: Path) -> str:
    with path.open("rb") as raw:
        for number, line in enumerate(raw, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return (
                    f"{path}, line {number}: byte 0x{line[error.start]:02x} is no UTF-8: if the file is Latin-1 or "
                    "Windows-1252, convert it: iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
                )
    return f"{path} is no UTF-8 text: convert it with iconv"


def read_text(path: Path, largest: int = LARGEST_YAML) -> str:
    """A file of at most so many characters."""
    with open_text(path) as file:
        text = file.read(largest + 1)
    if len(text) > largest:
        raise ValueError(f"{path} has more than {largest:,} characters: give it in smaller files")
    return text


def compose_yaml(text: str, where: str) -> yaml.Node | None:
    """The nodes of a YAML text, small enough to be written out and shallow enough to be walked."""
    try:
        depth = 0
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > DEEPEST:
                line = f", line {event.start_mark.line + 1}" if event.start_mark else ""
                raise ValueError(f"{where}{line}: more than {DEEPEST} levels inside each other: flatten it")
        node = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{where} is not YAML: {' '.join(str(error).split())}") from None
    if node is not None and _size(node, {}, where) > MOST_VALUES:
        raise ValueError(
            f"{where} has more than {MOST_VALUES:,} values when its aliases are written out: give it in smaller files"
        )
    return node


def _size(node: yaml.Node, known: dict[int, int], where: str) -> int:
    """Values below a node, each alias counted as what it stands for."""
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:int" and len(node.value) > MOST_DIGITS and _DIGITS.fullmatch(node.value):
            raise ValueError(f"{where}, line {line}: a whole number of {len(node.value)} digits: at most {MOST_DIGITS}")
        return 1
    if known.get(id(node)) == 0:
        raise ValueError(f"{where}, line {line}: an alias that holds itself: write the values out")
    if id(node) not in known:
        known[id(node)] = 0  # while it is counted
        parts = [x for pair in node.value for x in pair] if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_size(part, known, where) for part in parts)
    return known[id(node)]


def value_of(node: yaml.Node | None, where: str) -> Any:
    """What composed nodes stand for; None for an empty text."""
    if node is None:
        return None
    loader = yaml.SafeLoader("")
    try:
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # a date that is none, a key that is a list
        raise ValueError(f"{where}, line {node.start_mark.line + 1}: {' '.join(str(error).split())}") from None
    finally:
        loader.dispose()


def load_yaml(text: str, where: str) -> Any:
    return value_of(compose_yaml(text, where), where)


def load_json(text: str, where: str) -> Any:
    """A JSON text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError(f"{where} has too many levels inside each other: flatten it") from None
    except ValueError as error:  # json.JSONDecodeError, and a number of thousands of digits
        raise ValueError(f"{where} is not JSON: {error}") from None


def read_json(path: Path) -> Any:
    return load_json(read_text(path, LARGEST_JSON), str(path))
