"""Bytes of a file that are cut out and replaced: what reads it says so in a sentence, or reads the same."""

from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


def damage_and_read(copy: Path, name: str, read: Callable[[Path], Tensor], examples: int) -> None:
    """Of a folder's copy, one file at many places; nothing else than what was read from it whole may come."""
    whole, expected = (copy / name).read_bytes(), read(copy)

    @given(place=st.floats(0, 1), size=st.integers(0, 40), new=st.binary(max_size=40))
    @settings(max_examples=examples, deadline=None)
    def damaged(place, size, new):
        start = int(place * len(whole))
        (copy / name).write_bytes(whole[:start] + new + whole[start + size :])
        try:
            found = read(copy)
        except ValueError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
        else:
            assert torch.equal(found, expected)

    damaged()
