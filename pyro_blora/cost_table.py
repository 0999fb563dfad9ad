"""A table of measured times of a machine: what `pyro-blora measure-costs` writes and the prior `budget` reads.

    {"schema": "costs", "version": 1, "made_by": "pyro_blora 0.1.0",
     "machine": {"processor": "...", "threads": 1, "onnxruntime": "1.32.0", "date": "2026-11-27"},
     "rows": 1024, "widths": [2, 4, 8, 16, 32],
     "rounding": [{"in": 384, "seconds": [2e-4, 2e-4, 1e-4, 9e-4, 0.0]}, ...],
     "products": [{"out": 1536, "in": 384, "seconds": [[...], ...]}, ...]}

Rounding is of a vector of `in` numbers to a width, the last of which is none; a product has a row of seconds for each
width of the input, a column for each of the weight. All are of `rows` vectors: the tokens of a batch.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .user_files import read_json

SCHEMA, VERSION = "costs", 1
_AGAIN = "measure it again: pyro-blora measure-costs --to FILE"
_SHOWN = 60  # characters of a value in a message
_SECONDS = {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 2}
_COUNT = {"type": "integer", "minimum": 1}
RULES: dict[str, Any] = {
    "type": "object",
    "required": ["schema", "version", "machine", "rows", "widths", "rounding", "products"],
    "properties": {
        "schema": {"const": SCHEMA},
        "version": {"const": VERSION},
        "machine": {"type": "object", "required": ["processor", "threads"]},
        "rows": _COUNT,
        "widths": {"type": "array", "items": _COUNT, "minItems": 2, "uniqueItems": True},
        "rounding": {"type": "array", "items": {
            "type": "object", "required": ["in", "seconds"], "properties": {"in": _COUNT, "seconds": _SECONDS},
        }},
        "products": {"type": "array", "minItems": 1, "items": {
            "type": "object", "required": ["out", "in", "seconds"],
            "properties": {"out": _COUNT, "in": _COUNT, "seconds": {"type": "array", "items": _SECONDS}},
        }},
    },
}  # fmt: skip


class Times:
    """A table by shape.  Errors: ValueError, one sentence, for a table that is not as above."""

    def __init__(self, content: Any):
        import jsonschema

        version = content.get("version") if isinstance(content, dict) else None
        if version != VERSION or content.get("schema") != SCHEMA:
            raise ValueError(f"the table of costs is none of version {VERSION} (its version is {version!r}): {_AGAIN}")
        error = jsonschema.exceptions.best_match(jsonschema.Draft202012Validator(RULES).iter_errors(content))
        if error is not None:
            place = "/".join(map(str, error.absolute_path)) or "the whole"
            raise ValueError(f"the table of costs, {place}: {error.message[:_SHOWN]}: {_AGAIN}")
        self.rows: int = content["rows"]
        self.widths: list[int] = content["widths"]
        self.machine: dict[str, Any] = content["machine"]
        self._rounding = {each["in"]: self._checked(each["seconds"], 1) for each in content["rounding"]}
        self._products = {(each["out"], each["in"]): self._checked(each["seconds"], 2) for each in content["products"]}

    def _checked(self, seconds: list[Any], dimensions: int) -> Tensor:
        shape = (len(self.widths),) * dimensions
        rows = seconds if dimensions == 2 else [seconds]
        if any(len(row) != len(self.widths) for row in rows) or (dimensions == 2 and len(rows) != len(self.widths)):
            raise ValueError(f"the table of costs has no {shape} seconds for its {len(self.widths)} widths: {_AGAIN}")
        return torch.tensor(seconds, dtype=torch.float64)

    def rounding(self, n: int) -> Tensor:
        """(D,) seconds by width."""
        if n not in self._rounding:
            raise ValueError(
                f"the table of costs has no input of {n} numbers, only of {self._known(self._rounding)}: it is of "
                f"another model or rank; {_AGAIN}"
            )
        return self._rounding[n]

    def product(self, m: int, n: int) -> Tensor:
        """(D, D) seconds by the widths of input and weight."""
        if (m, n) not in self._products:
            shapes = self._known(f"{m} x {n}" for m, n in self._products)
            raise ValueError(
                f"the table of costs has no product of {m} x {n}, only of {shapes}: it is of another model or rank; "
                f"{_AGAIN}"
            )
        return self._products[m, n]

    def places(self, ladder: tuple[int, ...]) -> list[int]:
        """Of the widths of a ladder."""
        if lacking := [width for width in ladder if width not in self.widths]:
            raise ValueError(
                f"the table of costs has no {lacking[0]} bit, only {self._known(self.widths)}: {_AGAIN} --bit_widths "
                f"{','.join(map(str, ladder))}"
            )
        return [self.widths.index(width) for width in ladder]

    @staticmethod
    def _known(names: Any) -> str:
        return ", ".join(map(str, names))


def of_file(path: str) -> dict[str, Any]:
    """The setting `times` from a JSON file.  Errors: ValueError for a file that is missing, or no such table."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"prior 'budget': there is no file {path}: pyro-blora measure-costs --to {path}")
    content = read_json(file)
    Times(content)
    return {"times": content}
