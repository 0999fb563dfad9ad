"""The encoding of a text file: UTF-8, UTF-16 or UTF-32 by their mark, else a guess that is reported."""

from __future__ import annotations

import codecs
import functools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from ...user_files import require_plain

_MARKS = {  # first bytes; UTF-32's begin with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
_USUAL = "cp1252"  # Windows' for western Europe and America; Latin-1 is a part of it
_LATIN = (_USUAL, "cp1250", "cp1254", "cp1257", "mac_roman")  # where most letters are ASCII: guesses are short of data
_FEW = 0.3  # of the bytes of lines that are not ASCII, which are letters beyond it in Latin scripts
_WIDE = ("utf_16", "utf_16_be", "utf_16_le", "utf_32", "utf_32_be", "utf_32_le", "utf_7")  # they would have NUL bytes
_SAMPLE = 1 << 18  # bytes of lines that are not ASCII, from which an encoding is guessed
LONGEST = 1 << 24  # characters of a line; a file without line ends is not read into memory
_SHOWN = 40  # characters of the excerpt that shows a guess


def encoding_of(path: Path) -> tuple[str, str]:
    """(Python's name of the encoding, a sentence where it is not UTF-8).

    Of the lines that are not ASCII, at least half must be valid for UTF-8 with broken lines.
    Errors: ValueError for a compressed file, and where no encoding fits.
    """
    require_plain(path)
    with path.open("rb") as file:
        head = file.read(4)
        for mark, name in _MARKS.items():
            if head.startswith(mark):
                return name, f"{path} is {name.upper()}, by its byte-order mark"
        file.seek(0)
        sample, valid, invalid = bytearray(), 0, 0
        for line in iter(functools.partial(file.readline, LONGEST), b""):
            if b"\0" in line:
                raise ValueError(f"{path} has NUL bytes, it is no text: save it as text in UTF-8")
            if not line.isascii():
                good = _is_utf8(line)
                valid, invalid = valid + good, invalid + (not good)
                if not good and len(sample) < _SAMPLE:
                    sample += line[:_SAMPLE]
    if valid >= invalid:
        return "utf-8-sig", ""
    return _guessed(path, bytes(sample))


def _guessed(path: Path, sample: bytes) -> tuple[str, str]:
    from charset_normalizer import from_bytes

    latin = sum(byte > 127 for byte in sample) < _FEW * len(sample)
    found = from_bytes(sample, cp_isolation=[*_LATIN] if latin else None, cp_exclusion=[*_WIDE])
    if (best := found.best()) is None:
        raise ValueError(f"{path} is no text in an encoding that is known: save it in UTF-8")
    usual = [match for match in found if match.encoding == _USUAL and match.chaos <= best.chaos]
    name = (usual or [best])[0].encoding
    line = next((x for x in sample.decode(name, "replace").splitlines() if not x.isascii()), "")
    start = max(0, next((i for i, x in enumerate(line) if not x.isascii()), 0) - _SHOWN // 2)
    excerpt = line[start : start + _SHOWN].strip()
    return name, f"{path} is not UTF-8, it was read as {name}, a guess ({excerpt!r}): save it in UTF-8 if that is wrong"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def lines_of(file: IO[str], where: str) -> Iterator[str]:
    """The lines with their ends, without a byte-order mark.

    Errors: ValueError for one that is too long, and for bytes that the encoding lacks.
    """
    number = 0
    try:
        for number, line in enumerate(iter(functools.partial(file.readline, LONGEST), ""), start=1):
            if len(line) == LONGEST:
                raise ValueError(f"{where}, line {number}: more than {LONGEST:,} characters: has it line ends?")
            yield line.removeprefix("\ufeff") if number == 1 else line
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}, after line {number}: a byte that is no {error.encoding}: save the text in UTF-8"
        ) from None


def broken_byte(cells: Iterable[str]) -> str:
    """A sentence for a byte that was no UTF-8 (read with `surrogateescape`); nothing where there is none."""
    for cell in cells:
        for letter in cell if not cell.isascii() else "":
            if "\udc80" <= letter <= "\udcff":
                return f"byte 0x{ord(letter) - 0xDC00:02x} is no UTF-8: correct it, or save the file in UTF-8"
    return ""
