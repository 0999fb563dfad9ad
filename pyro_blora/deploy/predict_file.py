"""`pyro-blora predict`: a file of texts in, a file of answers out, in constant memory, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import torch

from ..files import replace, writing
from ..progress import phase
from ..run_lock import alone
from ..tasks.tabular.cells import as_text
from ..tasks.tabular.reading import Row, Table
from ..user_values import shown, suggest
from .answer_files import FORMATS, Rows, Types, open_answers, types_of
from .answering import Answers, Unreadable
from .opening import load_to_predict

CHUNK = 1024  # rows that are in memory together, and sorted by length
EVERY_COLUMN = "all"
_NAMED = 10  # skipped rows that are reported one by one
_REMEDY = "or leave such rows out with --on_error skip"


def predict_file(
    run: str | Path, source: str | Path, *, out: str | Path | None = None, format: str = "csv",
    text: Sequence[str] = (), keep: Sequence[str] = (), skip: bool = False, overwrite: bool = False,
    allow_code: Iterable[str] = (), backbone: str | None = None, revision: str | None = None, quiet: bool = False,
    **options: Any,
) -> int:  # fmt: skip
    """Predict every row of a table; returns how many were.

    source: what `tasks.tabular.reading.Table` reads, or `-` for the standard input, whose format is csv, tsv or jsonl.
    out: a new .csv, .jsonl or .parquet file; None: CSV on the standard output, as it is predicted. text: names of the
    text columns in the file, where they are not those of the run. keep: columns that go along; `all` for every one.
    skip: leave out malformed rows, those without text and those that the kind of outcome cannot read, and report them;
    else the first one ends the work.
    overwrite: replace a file that is there. allow_code, backbone, revision: as in `load`. options: as in
    `Model.predict`.
    quiet: of remarks, which go to stderr, only those on rows that were left out.
    Errors: ValueError with file, line and remedy; no file is left then. NotWritten for a full disk.
    """
    path = None if out is None else _free(Path(out).expanduser(), overwrite)
    suffix = ".csv" if path is None else path.suffix
    left_out = _LeftOut()
    streamed = str(source) == "-"
    table = Table(_stream() if streamed else source, format=format if streamed else None,
                  skipped=left_out if skip else None)  # fmt: skip
    for remark in () if quiet else table.remarks:
        _say(remark)
    with phase("loading the model"):
        model = load_to_predict(run, allow_code=allow_code, backbone=backbone, revision=revision)
        if torch.cuda.is_available():
            model.to("cuda")
    names, kept = _text_columns(table, tuple(text), model.text_columns), _kept(table, tuple(keep))
    answers = model.answers(**options)
    for remark in () if quiet else answers.remarks:
        _say(remark)
    rows, done = _texts(table, answers, names, kept, left_out if skip else None), 0
    types = _types_of_kept(source, table, kept) if suffix == ".parquet" else {}

    def write(target: Path | IO[str]) -> None:
        nonlocal done
        with phase(f"predicting {table.name}") as progress, contextlib.ExitStack() as opened:
            file, own = None, dict[str, str]()
            while given := [*itertools.islice(rows, CHUNK)]:
                chunk, found = _answered(given, table, answers, names, left_out if skip else None)
                if not chunk:
                    continue
                if file is None:
                    own = _own_names(kept, {table.unit, *found})
                    of_kept = {own[name]: type for name, type in types.items()}
                    file = opened.enter_context(open_answers(target, suffix, of_kept))
                columns = {own[name]: [cells[name] for _, cells in chunk] for name in own}
                file({table.unit: [number for number, _ in chunk]} | columns | found)
                done += len(chunk)
                progress.advance(len(chunk), note=f"{done:,} rows")
        if not done:
            raise ValueError(f"{table.name} has no rows to predict: give a table with a text in each row")

    if path is None:
        write(sys.stdout)
    else:
        with writing(path), alone(path, what="written", remedy="give another --out"):
            replace(_free(path, overwrite), write)  # another process may have written it meanwhile
    left_out.sum_up()
    return done


def _free(path: Path, overwrite: bool) -> Path:
    """Errors: ValueError for an output that could not be written, before anything is read."""
    if path.suffix not in FORMATS:
        raise ValueError(f"{path}: the ending must be one of {', '.join(FORMATS)}")
    if path.is_dir() or (path.exists() and not overwrite):
        raise ValueError(f"{path} exists already: give another --out, or --overwrite to replace it")
    if not path.parent.is_dir():
        raise ValueError(f"there is no folder {path.parent} for {path.name}: make it, or give another --out")
    return path


def _stream() -> IO[str]:
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape", newline="")
    return sys.stdin


def _text_columns(table: Table, given: tuple[str, ...], own: tuple[str, ...]) -> tuple[str, ...]:
    """The columns of the file that are the run's text columns.  Errors: ValueError for others."""
    if given and len(given) != len(own):
        raise ValueError(
            f"--text {','.join(given)}: the run's texts have {len(own)} columns, {', '.join(own)}: name each"
        )
    for name in given or own:
        if name not in table.columns:
            remedy = suggest(name, table.columns)
            which = "" if given else "the run's text column: name yours with --text COLUMN; "
            raise ValueError(f"{table.name} has no column {name!r}, {which}{remedy}")
    return given or own


def _kept(table: Table, given: tuple[str, ...]) -> tuple[str, ...]:
    if given == (EVERY_COLUMN,):
        return tuple(table.columns)
    for name in given:
        if name not in table.columns:
            raise ValueError(f"--keep: {table.name} has no column {name!r}: {suggest(name, table.columns)}")
    return given


def _texts(
    table: Table, answers: Answers, names: tuple[str, ...], kept: tuple[str, ...],
    left_out: Callable[[str], None] | None,
) -> Iterator[Row]:  # fmt: skip
    """The rows that have texts."""
    for number, cells in table.rows([*dict.fromkeys((*names, *kept))]):
        wrong = next((name for name in names if not answers.kind.is_text(as_text(cells[name]))), None)
        if wrong is None:
            yield number, cells
            continue
        sentence = f"{table.where(number)}: {shown(cells[wrong])} in column {wrong!r} is no text"
        if left_out is None:
            raise ValueError(f"{sentence}: correct it, {_REMEDY}")
        left_out(sentence)


def _answered(
    chunk: Sequence[Row], table: Table, answers: Answers, names: tuple[str, ...],
    left_out: Callable[[str], None] | None,
) -> tuple[Sequence[Row], Rows]:  # fmt: skip
    """The rows that can be read, and their answers."""
    columns = zip(answers.columns, names, strict=True)
    texts = {own: [as_text(cells[name]) for _, cells in chunk] for own, name in columns}
    try:
        found = answers.table(texts)
        return chunk, {str(name): found[name].tolist() for name in found}
    except Unreadable:
        if not (wrong := answers.unreadable(texts)):
            raise
    for place, reason in wrong.items():
        sentence = f"{table.where(chunk[place][0])}: {reason}"
        if left_out is None:
            raise ValueError(f"{sentence}, {_REMEDY}")
        left_out(sentence)
    rest = [row for place, row in enumerate(chunk) if place not in wrong]
    return _answered(rest, table, answers, names, left_out) if rest else ([], {})


def _own_names(kept: Sequence[str], taken: set[str]) -> dict[str, str]:
    """What kept columns are called among the answers: one of a name that is taken has `input_` before it."""
    own: dict[str, str] = {}
    for name in sorted(kept, key=taken.__contains__):  # those that keep their names first
        free = name
        while free in taken or free in own.values():
            free = f"input_{free}"
        own[name] = free
    return {name: own[name] for name in kept}


def _types_of_kept(source: Any, table: Table, kept: tuple[str, ...]) -> Types:
    """For Parquet: of a source that has types those, of another file what all of its cells are, of a stream text."""
    import pyarrow as pa

    if not kept:
        return {}
    if table.features is not None:
        schema = table.features.arrow_schema
        return {name: schema.field(name).type for name in kept}
    if str(source) == "-":
        return dict.fromkeys(kept, pa.string())
    rows = Table(source, skipped=lambda _: None).rows(kept)
    with phase(f"reading {table.name}", still=True):
        chunks = iter(lambda: [*itertools.islice(rows, CHUNK)], [])
        return types_of({name: [cells[name] for _, cells in chunk] for name in kept} for chunk in chunks)


class _LeftOut:
    """Reports the first rows that are left out, and counts all."""

    count = 0

    def __call__(self, sentence: str) -> None:
        self.count += 1
        if self.count <= _NAMED:
            _say(f"left out: {sentence}")

    def sum_up(self) -> None:
        if self.count > _NAMED:
            _say(f"left out: {self.count:,} rows in all")


def _say(sentence: str) -> None:
    print(f"pyro-blora: {sentence}", file=sys.stderr)
