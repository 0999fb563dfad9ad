"""Ladders of any bit widths: the mixture of plain grids against autograd in float64, and its loops in C."""

import pytest
import torch

from pyro_blora.quantizer import (
    cpu,
    fake_quantize,
    grids,
    integer_codes,
    mixture_weights,
    quantize,
    rounded,
    squared_errors,
)

LADDERS = [(2, 3, 4, 6, 8, 16, 32), (3, 32), (5, 6, 7, 32), (*range(2, 17), 32)]
JUST_INSIDE = 1 - 1e-13  # of the range: a value at its edge rounds down, in float64


def soft(ladder, dtype=torch.float64):
    """A relaxed ladder: falling, from 0.9."""
    return (0.9 * torch.linspace(1.0, 0.1, len(ladder), dtype=dtype)).requires_grad_()


def at(bits, ladder):
    return torch.tensor([float(width <= bits) for width in ladder])


def plain(x, value_range, gates, ladder):
    """sum_b (z_b - z_next) Q_b(x) by autograd, with straight-through rounding."""
    edge = JUST_INSIDE * value_range
    clipped = torch.minimum(torch.maximum(x, -edge), edge)
    out = gates[-1] * x
    for bits, gate, above in zip(ladder[:-1], gates[:-1], gates[1:], strict=True):
        scale = 2 * value_range / (2**bits - 1)
        steps = clipped / scale
        out = out + (gate - above) * scale * (steps + (steps.round() - steps).detach())
    return out


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_a_mixture_of_any_grids_has_the_values_and_gradients_of_autograd(ladder):
    torch.manual_seed(1)
    x = (torch.randn(7, 101, dtype=torch.float64) * 0.7).requires_grad_()
    value_range, gates = torch.tensor(1.05, dtype=torch.float64, requires_grad=True), soft(ladder)
    ours, theirs = quantize(x, value_range, gates, ladder), plain(x, value_range, gates, ladder)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    upstream = torch.randn_like(x)
    slopes, expected = (torch.autograd.grad((out * upstream).sum(), (x, value_range, gates)) for out in (ours, theirs))
    for slope, true in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, true, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("ladder", LADDERS, ids=str)
def test_the_loops_in_c_are_compiled_for_any_number_of_grids(ladder):
    try:
        cpu.loops(len(ladder) - 1)
    except OSError as error:
        pytest.skip(str(error))
    torch.manual_seed(2)
    x, grad = 2 * torch.randn(5003), torch.randn(5003)
    c = grids(torch.tensor(1.7), mixture_weights(soft(ladder, torch.float32).detach()), ladder)[0].constants
    assert torch.equal(cpu.forward(x, c), fake_quantize._forward(x, c))
    slope, sums = cpu.backward(grad, x, c)
    assert torch.equal(slope, fake_quantize._backward(grad, x, c)[0])
    exact = fake_quantize._backward_of_gates(grad.double(), x.double(), c.double()).float()
    torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-3)


def test_every_width_has_at_most_its_number_of_values():
    torch.manual_seed(3)
    ladder, beta = (*range(2, 17), 32), torch.tensor(0.73)
    x = torch.cat([torch.randn(4000), torch.linspace(-1, 1, 41)]) * beta
    for bits in ladder[:-1]:
        value = quantize(x, beta, at(bits, ladder), ladder)
        codes, scale = integer_codes(x, beta, bits)
        assert len(value.unique()) <= 2**bits - 1 and int(codes.abs().max()) <= 2 ** (bits - 1) - 1
        assert torch.equal(value, codes * scale) and torch.equal(value, rounded(x, beta, bits))


def test_errors_of_a_ladder_are_those_of_its_widths():
    torch.manual_seed(4)
    ladder, x, weights = (2, 3, 6, 32), torch.randn(200), torch.rand(200)
    ranges = torch.tensor([0.4, 1.3])
    found = squared_errors(x, ranges, weights, ladder)
    expected = [
        [((quantize(x, beta, at(bits, ladder), ladder) - x).square() * weights).mean() for bits in ladder]
        for beta in ranges
    ]
    torch.testing.assert_close(found, torch.tensor(expected), atol=1e-7, rtol=1e-4)
