"""The bit widths that a tensor can have: the rungs of its ladder, from the coarsest grid to the unquantized float."""

import itertools
from collections.abc import Sequence

from .user_values import shown

LADDER = (2, 4, 8, 16, 32)
_FINEST = 16  # bits of a grid: float32, in which a grid is computed, has 24 bits of mantissa
_COARSEST = 8  # bits that a ladder begins at, at most: more cost nothing, so there would be nothing to learn


def written(ladder: Sequence[int]) -> str:
    """As a configuration has it: `2,4,8,16,32`."""
    return ",".join(map(str, ladder))


_USUAL = written(LADDER)


def ladder_of(text: str | Sequence[int]) -> tuple[int, ...]:
    """The ladder of `2,3,4,6,8,16,32`, or of a list of these numbers.

    Errors: ValueError for what is no increasing list of grids of 2 to 16 bit, the first of at most 8, and 32.
    """
    parts = [part.strip() for part in text.split(",")] if isinstance(text, str) else [*text]
    try:
        found = tuple(int(str(part)) for part in parts)
    except ValueError:
        raise ValueError(
            f"bit_widths must be whole numbers separated by commas, got {shown(text)}: {_USUAL} is usual"
        ) from None
    grids = found[:-1]
    rises = all(low < high for low, high in itertools.pairwise(found))
    if not (grids and rises and found[-1] == 32 and 2 <= grids[0] <= _COARSEST and grids[-1] <= _FINEST):
        raise ValueError(
            f"bit_widths must rise from 2 to {_COARSEST} bit over at most {_FINEST} to 32, which is the unquantized "
            f"float, got {shown(text)}: {_USUAL} is usual"
        )
    return found
