"""Laws of the nested grid, against the published residual ladder and against counting."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pyro_blora.quantizer import (
    LADDER,
    fake_quantize,
    grids,
    integer_codes,
    mixture_weights,
    quantize,
    quantize_mixture,
    quantize_on,
)

GRIDS = LADDER[:-1]
JUST_INSIDE = 1 - 1e-13  # of the range: a value at its edge rounds down, in float64


def chain_at(bits, dtype=torch.float32):
    return torch.tensor([float(b <= bits) for b in LADDER], dtype=dtype)


@pytest.fixture(params=["eager", "compiled"])
def mode(request, monkeypatch):
    """Both ways to run the two kernels; the choice is read once, so the cache is emptied before and after."""
    monkeypatch.setenv("PYRO_BLORA_COMPILE", "1" if request.param == "compiled" else "0")
    fake_quantize._kernels.cache_clear()
    if request.param == "compiled" and fake_quantize._kernels()[0] is fake_quantize._forward:
        fake_quantize._kernels.cache_clear()
        pytest.skip("no working compiler on this machine")
    yield request.param
    fake_quantize._kernels.cache_clear()


@pytest.fixture
def eager(monkeypatch):
    monkeypatch.setenv("PYRO_BLORA_COMPILE", "0")
    fake_quantize._kernels.cache_clear()
    yield
    fake_quantize._kernels.cache_clear()


# --- the mixture is the residual ladder -------------------------------------------------------------------------------


def straight_through_round(x):
    return x + (x.round() - x).detach()


def residual_ladder(x, value_range, c):
    """z_2 (x_2 + z_4 (e_4 + z_8 (e_8 + z_16 (e_16 + z_32 e_32)))) for conditional gates c, as published."""

    def on_grid(v, bits):
        scale = 2 * value_range / (2**bits - 1)
        return scale * straight_through_round(v / scale)

    clipped = torch.minimum(torch.maximum(x, -JUST_INSIDE * value_range), JUST_INSIDE * value_range)
    parts, value = [], torch.zeros_like(x)
    for bits in GRIDS:
        parts.append(on_grid(clipped - value, bits))
        value = value + parts[-1]
    out = x - value  # e_32: the rest up to the unquantized float
    for part, gate in zip(reversed(parts), reversed(c[1:]), strict=True):
        out = part + gate * out
    return c[0] * out


SOFT = [[1.0, 0.9, 0.7, 0.8, 0.3], [0.5, 0.5, 0.5, 0.5, 0.5], [1.0, 0.2, 0.99, 0.01, 0.6]]
BINARY = [[1.0] * d + [0.0] * (5 - d) for d in range(6)]


@pytest.mark.parametrize("gates", SOFT + BINARY, ids=str)
def test_mixture_equals_the_residual_ladder_with_all_its_gradients(mode, gates):
    torch.manual_seed(3)
    x = (torch.randn(7, 211, dtype=torch.float64) * 0.7).requires_grad_()  # about one in seven beyond the range
    value_range = torch.tensor(1.05, dtype=torch.float64, requires_grad=True)
    c = torch.tensor(gates, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn_like(x)
    ours = quantize(x, value_range, c.cumprod(-1))
    theirs = residual_ladder(x, value_range, c)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    slopes = torch.autograd.grad((ours * upstream).sum(), (x, value_range, c))
    expected = torch.autograd.grad((theirs * upstream).sum(), (x, value_range, c))
    for slope, true in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, true, atol=1e-10, rtol=1e-10)


def test_scales_nest_by_odd_integers():
    ratios = [(2**b - 1) / (2**a - 1) for a, b in itertools.pairwise(GRIDS)]
    assert ratios == [5, 17, 257]
    for coarse, fine in itertools.pairwise(GRIDS):
        x = torch.linspace(-1.5, 1.5, 4001, dtype=torch.float64)
        value_range = torch.ones((), dtype=torch.float64)
        on_coarse = quantize(x, value_range, chain_at(coarse, torch.float64))
        again = quantize(on_coarse, value_range, chain_at(fine, torch.float64))
        torch.testing.assert_close(again, on_coarse, atol=1e-15, rtol=0)


def test_float64_is_exact_at_32_bit_whatever_the_gates_dtype():
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64)
    for gates in (chain_at(32), chain_at(32).to(torch.int8)):
        assert torch.equal(quantize(x, 1.0, gates), x)


@pytest.mark.parametrize("gates", [[1, 0, 1, 0, 0], [2, 1, 1, 1, 1], [1, 1, 1, 1, -0.5], [1, 1, float("nan"), 0, 0]])
def test_gates_that_are_no_ladder_are_refused(gates):
    with pytest.raises(ValueError, match=r"must be a ladder in \[0, 1\], each at most the one before it"):
        quantize(torch.randn(4), 1.0, torch.tensor(gates))


def test_weights_of_a_chain_sum_to_its_first_gate_and_a_binary_chain_selects_one_width():
    chains = torch.tensor(SOFT).cumprod(-1)
    torch.testing.assert_close(mixture_weights(chains).sum(-1), chains[:, 0])
    for index, bits in enumerate(LADDER):
        assert mixture_weights(chain_at(bits)).tolist() == [float(i == index) for i in range(5)]


# --- the grid ---------------------------------------------------------------------------------------------------------


@given(
    value_range=st.floats(-15, 15).map(lambda power: 10.0**power),
    spread=st.floats(-3, 3).map(lambda power: 10.0**power),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=50, deadline=None)
def test_every_width_has_at_most_its_number_of_values(value_range, spread, seed):
    beta = torch.tensor(value_range)
    generator = torch.Generator().manual_seed(seed)
    smooth = torch.randn(1000, generator=generator) * beta * spread
    edges = torch.tensor([0.0, -0.0, 1.0, -1.0, 1 - 1e-7, 1e3, -1e6]) * beta
    ties = beta * torch.arange(-20, 21) / 3  # the midpoints of the 2-bit grid among them
    x = torch.cat([smooth, edges, ties])
    for bits in GRIDS:
        codes, scale = integer_codes(x, beta, bits)
        largest = 2 ** (bits - 1) - 1
        assert codes.dtype == (torch.int8 if bits <= 8 else torch.int16)
        assert int(codes.min()) >= -largest and int(codes.max()) <= largest
        value = quantize(x, beta, chain_at(bits))
        assert len(value.unique()) <= 2**bits - 1
        assert torch.equal(value, codes * scale)
        assert torch.equal(quantize(-x, beta, chain_at(bits)), -value)
        inside = x.abs() <= beta * (1 - 1 / 2**bits)
        assert bool(((value - x).abs()[inside] <= 0.51 * scale).all())  # the nearest point, up to float32


def test_integer_codes_give_the_value_bit_for_bit(mode):
    torch.manual_seed(0)
    x = torch.randn(257, 33) * 2
    for beta in (torch.tensor(0.37), torch.tensor(1.9)):
        for bits in GRIDS:
            codes, scale = integer_codes(x, beta, bits)
            assert torch.equal(quantize(x, beta, chain_at(bits)), codes * scale)


def test_all_codes_of_an_int8_are_reached_but_the_unpaired_one():
    codes, _ = integer_codes(torch.linspace(-2, 2, 10_001), torch.tensor(1.0), 8)
    assert codes.unique().tolist() == list(range(-127, 128))


def test_two_bits_are_three_values():
    value = quantize(torch.linspace(-5, 5, 1001), torch.tensor(1.5), chain_at(2))
    assert value.unique().tolist() == [-1, 0, 1]


def test_thirty_two_bits_are_the_identity_bit_for_bit(mode):
    torch.manual_seed(0)
    x = torch.cat([torch.randn(1000) * 10, torch.tensor([0.0, -0.0, 1e-38, 3e38, -1e-45])]).requires_grad_()
    beta = torch.tensor(0.5, requires_grad=True)
    out = quantize(x, beta, chain_at(32))
    assert torch.equal(out.view(torch.int32), x.view(torch.int32))
    upstream = torch.randn_like(out)
    slopes = torch.autograd.grad((out * upstream).sum(), (x, beta))
    assert torch.equal(slopes[0], upstream) and slopes[1] == 0


@pytest.mark.parametrize("bits", GRIDS)
def test_quantizing_twice_changes_nothing(eager, bits):
    torch.manual_seed(0)
    beta = torch.tensor(0.83)
    once = quantize(torch.randn(5000), beta, chain_at(bits))
    assert torch.equal(quantize(once, beta, chain_at(bits)), once)


def test_bfloat16_input_is_put_on_the_float32_grid(mode):
    torch.manual_seed(0)
    x = torch.randn(500).bfloat16().requires_grad_()
    beta = torch.tensor(1.1)
    for bits in LADDER:
        out = quantize(x, beta, chain_at(bits))
        assert out.dtype == torch.bfloat16
        assert torch.equal(out, quantize(x.float(), beta, chain_at(bits)).bfloat16())
        (slope,) = torch.autograd.grad(out.float().sum(), x)
        assert slope.dtype == torch.bfloat16 and bool(slope.isfinite().all())


@pytest.mark.parametrize("beta", [1e-30, 1.0, 1e30])
def test_zeros_stay_zero_at_any_range(eager, beta):
    assert quantize(torch.zeros(4), torch.tensor(beta), torch.tensor([1.0, 0.9, 0.8, 0.7, 0.6])).tolist() == [0] * 4


# --- shapes, memory, compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0,), (3, 0), (1,), (), (1, 1), (5,), (6,), (2, 3, 4)])
def test_any_shape_gives_its_own_shape_back(mode, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, requires_grad=True)
    gates = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1], requires_grad=True)
    beta = torch.tensor(1.0, requires_grad=True)
    out = quantize(x, beta, gates)
    assert out.shape == x.shape
    slopes = torch.autograd.grad(out.sum(), (x, beta, gates))
    assert [s.shape for s in slopes] == [x.shape, (), (5,)]
    assert all(bool(s.isfinite().all()) for s in slopes)


def test_a_non_contiguous_input_gives_the_same_values_and_gradients(mode):
    torch.manual_seed(0)
    x = torch.randn(30, 40).t()[::2].requires_grad_()
    gates, upstream = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1]), torch.randn(20, 30)
    plain = x.detach().contiguous().requires_grad_()
    outs = [quantize(v, torch.tensor(1.0), gates) for v in (x, plain)]
    assert not x.is_contiguous() and torch.equal(*outs)
    slopes = [torch.autograd.grad(out, v, upstream)[0] for out, v in zip(outs, (x, plain), strict=True)]
    assert torch.equal(*slopes)


def test_only_the_input_is_saved_for_the_backward_pass(mode):
    x = torch.randn(64, 32, requires_grad=True)
    sizes = []

    def pack(saved):
        sizes.append(saved.numel())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        quantize(x, torch.tensor(1.0, requires_grad=True), torch.full((5,), 0.5, requires_grad=True).cumprod(-1))
    assert [size for size in sizes if size > 20] == [x.numel()]  # and the 20 constants of its grid


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.bool, torch.long])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_gates_may_be_whole_numbers(kind, dtype, eager):
    x = torch.linspace(-2, 2, 9, dtype=dtype)
    expected = quantize(x, 0.7, chain_at(4, torch.promote_types(dtype, torch.float32)))
    assert torch.equal(quantize(x, 0.7, chain_at(4).to(kind)), expected)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf, [1.0, 2.0]])
def test_a_range_that_is_not_one_positive_number_is_refused(bad):
    with pytest.raises(ValueError, match="one number > 0"):
        quantize(torch.ones(3), torch.tensor(bad), chain_at(8))


@pytest.mark.parametrize("shape", [(4,), (1, 5), (6,)])
def test_a_chain_of_another_length_is_refused(shape):
    with pytest.raises(ValueError, match=r"shape \(5,\)"):
        quantize(torch.ones(3), torch.tensor(1.0), torch.ones(shape))


@pytest.mark.parametrize("bits", [32, 17, 1, 0])
def test_only_the_grids_have_integer_codes(bits):
    with pytest.raises(ValueError, match="have integer codes"):
        integer_codes(torch.ones(3), torch.tensor(1.0), bits)


def test_mixture_takes_a_range_of_another_precision(eager):
    out = quantize_mixture(torch.ones(2, 2), torch.tensor(1.5, dtype=torch.float64), mixture_weights(chain_at(2)))
    assert out.dtype == torch.float32 and out.tolist() == [[1, 1], [1, 1]]


def test_grids_of_many_tensors_are_those_of_each_alone():
    torch.manual_seed(0)
    ranges = (torch.rand(3, 2) + 0.5).requires_grad_()
    weights = mixture_weights(torch.rand(3, 2, 5).cumprod(-1)).requires_grad_()
    x, upstream = torch.randn(6, 40), torch.randn(6, 40)
    together = torch.stack([quantize_on(row, grid) for row, grid in zip(x, grids(ranges, weights), strict=True)])
    alone = [quantize_mixture(x[i], ranges.flatten()[i], weights.flatten(0, 1)[i]) for i in range(6)]
    assert torch.equal(together, torch.stack(alone))
    slopes, expected = (
        torch.autograd.grad((out * upstream).sum(), (ranges, weights)) for out in (together, torch.stack(alone))
    )
    for slope, true in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, true)


def test_a_frozen_tensor_gets_no_gradient_and_its_grid_the_same_one(mode):
    torch.manual_seed(0)
    x, upstream = torch.randn(33, 65), torch.randn(33, 65)
    found = []
    for learns in (False, True):
        value, beta = x.clone().requires_grad_(learns), torch.tensor(1.1, requires_grad=True)
        gates = torch.tensor([1.0, 0.9, 0.5, 0.2, 0.1], requires_grad=True)
        quantize(value, beta, gates).backward(upstream)
        assert (value.grad is not None) == learns
        found.append((beta.grad, gates.grad))
    for frozen, learned in zip(*found, strict=True):
        torch.testing.assert_close(frozen, learned)
