"""Packed codes: the grid of the quantizer to the bit, and as many bits on the disk as the width has."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_blora.quantizer import rounded
from pyro_blora.quantizer.packing import Scale, packed, packed_size, restored, unpacked


@given(
    bits=st.integers(2, 16), rows=st.integers(1, 5), columns=st.integers(1, 9), by_row=st.booleans(),
    spread=st.sampled_from([1e-20, 0.3, 1.0, 1e10]), seed=st.integers(0, 999),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_codes_of_every_width_come_back(bits, rows, columns, by_row, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    x = spread * torch.randn(rows, columns, generator=generator)
    value_range = x.abs().amax(1, keepdim=True) * 0.9 if by_row else x.abs().max() * 0.9
    stored = packed(x, value_range, bits)
    assert stored.numel() == packed_size(x.numel(), bits) == -(-x.numel() * bits // 8)
    codes = unpacked(stored, bits, x.shape)
    assert codes.abs().max() <= 2 ** (bits - 1) - 1
    assert torch.equal(restored(stored, value_range, bits, x.shape), Scale.of(value_range, bits).rounded(x))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_the_grid_is_that_of_the_quantizer(bits):
    x, value_range = torch.randn(2000, generator=torch.Generator().manual_seed(0)) * 2, torch.tensor(1.7)
    x = torch.cat([x, value_range[None], -value_range[None], torch.zeros(1)])
    found = restored(packed(x, value_range, bits), value_range, bits, x.shape)
    assert torch.equal(found, rounded(x, value_range, bits))


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_zeros_come_back_whatever_the_range(bits):
    """Zero times the inverse of a step that is too small would be nan."""
    x, value_range = torch.zeros(2, 8), torch.tensor([[torch.finfo(torch.float32).tiny], [1.0]])
    assert not Scale.of(value_range, bits).rounded(x).any()  # nan counts as any
    assert not restored(packed(x, value_range, bits), value_range, bits, x.shape).any()


def test_a_tensor_larger_than_a_chunk_comes_back(monkeypatch):
    monkeypatch.setattr("pyro_blora.quantizer.packing._CHUNK", 16)
    x, value_range = torch.randn(7, 11, generator=torch.Generator().manual_seed(0)), torch.tensor(2.0)
    for bits in (2, 3, 6, 8, 16):
        found = restored(packed(x, value_range, bits), value_range, bits, x.shape)
        assert torch.equal(found, Scale.of(value_range, bits).rounded(x))


def test_what_are_no_codes_is_refused():
    for bits in (1, 17, 32):
        with pytest.raises(ValueError, match=f"2 to 16 bit, got {bits}"):
            Scale.of(torch.tensor(1.0), bits)
    with pytest.raises(ValueError, match=r"5 codes of 2 bit take 2 bytes, not 1"):
        unpacked(torch.zeros(1, dtype=torch.uint8), 2, (5,))
    with pytest.raises(ValueError, match="a code of 2 bit is 3, above the highest, 2"):
        unpacked(torch.full((1,), 255, dtype=torch.uint8), 2, (4,))
