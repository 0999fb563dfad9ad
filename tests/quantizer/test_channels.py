"""A range for every row of a weight: values and gradients against autograd in float64, the loops in C, the codes."""

import pytest
import torch
from torch.nn import functional as F

from pyro_blora.adapters.quantized_linear import Map, quantized_products
from pyro_blora.quantizer import (
    LADDER,
    Rows,
    cpu,
    fake_quantize,
    grids_of_rows,
    integer_codes,
    mixture_weights,
    quantize,
    quantize_on,
    rounded,
    squared_errors,
)

JUST_INSIDE = 1 - 1e-13  # of the range: a value at its edge rounds down, in float64
GATES = [1.0, 0.9, 0.5, 0.2, 0.1]


def plain(x, ranges, gates):
    """sum_b (z_b - z_next) Q_b(x) by autograd, with straight-through rounding; ranges of the rows (C,)"""
    edge = JUST_INSIDE * ranges[:, None]
    clipped = torch.minimum(torch.maximum(x, -edge), edge)
    out = gates[-1] * x
    for bits, gate, above in zip(LADDER[:-1], gates[:-1], gates[1:], strict=True):
        scale = 2 * ranges[:, None] / (2**bits - 1)
        steps = clipped / scale
        out = out + (gate - above) * scale * (steps + (steps.round() - steps).detach())
    return out


def several(*sizes, dtype=torch.float64):
    """Ranges of tensors of so many rows, 1: of the whole tensor; weights of their ladders; where they stand."""
    ranges = (0.5 + torch.rand(sum(sizes), dtype=dtype)).requires_grad_()
    gates = torch.rand(len(sizes), len(LADDER), dtype=dtype).cumprod(-1).requires_grad_()
    owner = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    order, at = [], 0
    for i, size in enumerate(sizes):
        weights = len(ranges) + i * len(LADDER)
        order += [*range(at, at + size), *range(weights, weights + len(LADDER))]
        at += size
    return ranges, gates, Rows(sizes, owner, torch.tensor(order))


@pytest.mark.parametrize("shape", [(5, 40), (3, 5, 8), (5, 1)], ids=str)
def test_values_and_gradients_are_those_of_autograd(shape):
    torch.manual_seed(0)
    x = (0.8 * torch.randn(shape, dtype=torch.float64)).requires_grad_()  # (3, 5, 8): one weight per example
    ranges = (0.5 + torch.rand(5, dtype=torch.float64)).requires_grad_()
    gates, upstream = torch.tensor(GATES, dtype=torch.float64, requires_grad=True), torch.randn_like(x)
    ours, theirs = quantize(x, ranges, gates), plain(x, ranges, gates)
    torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=0)
    slopes, expected = (torch.autograd.grad((y * upstream).sum(), (x, ranges, gates)) for y in (ours, theirs))
    for slope, true in zip(slopes, expected, strict=True):
        torch.testing.assert_close(slope, true, atol=1e-10, rtol=1e-10)


def test_grids_of_many_tensors_are_those_of_each_alone():
    torch.manual_seed(1)
    ranges, gates, rows = several(1, 4, 1, 2)
    xs = [torch.randn(size, 9, dtype=torch.float64) for size in (3, 4, 2, 2)]
    grids = grids_of_rows(ranges, mixture_weights(gates), rows)
    together = [quantize_on(x, grid) for x, grid in zip(xs, grids, strict=True)]
    of_each = ranges.split(rows.sizes)
    alone = [quantize(x, r if len(r) > 1 else r[0], z) for x, r, z in zip(xs, of_each, gates, strict=True)]
    slopes, expected = (
        torch.autograd.grad(sum((y * y.detach().cos()).sum() for y in ys), (ranges, gates)) for ys in (together, alone)
    )
    for found, true in zip((*together, *slopes), (*alone, *expected), strict=True):
        torch.testing.assert_close(found, true, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("learns", [True, False])
def test_products_of_such_weights_have_the_gradients_of_each_part_alone(learns):
    torch.manual_seed(2)
    ranges, gates, rows = several(1, 6)
    x = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(6, 5, dtype=torch.float64, requires_grad=learns)
    on_x, on_weight = grids_of_rows(ranges, mixture_weights(gates), rows)
    (y,) = quantized_products(x, on_x, [Map(weight, on_weight)])
    expected = F.linear(quantize(x, ranges[0], gates[0]), quantize(weight, ranges[1:], gates[1]))
    torch.testing.assert_close(y, expected, atol=1e-12, rtol=0)
    upstream, learned = torch.randn_like(y), [x, ranges, gates, *([weight] if learns else [])]
    slopes, true = (torch.autograd.grad((out * upstream).sum(), learned, retain_graph=True) for out in (y, expected))
    for a, b in zip(slopes, true, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("of_x", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 7), (384, 8), (6, 5000)], ids=str)
def test_the_loops_in_c_have_the_eager_values_and_the_same_sums(shape, of_x):
    try:
        cpu.loops()
    except OSError as error:
        pytest.skip(str(error))
    torch.manual_seed(3)
    ranges, gates, rows = several(shape[0], dtype=torch.float32)
    c = grids_of_rows(ranges.detach(), mixture_weights(gates.detach()), rows)[0].constants.view(shape[0], -1)
    for examples in (1, 2):  # one weight per example: the rows' ranges again
        x, grad = (torch.randn(examples * shape[0], shape[1]).to(of_x) for _ in range(2))
        assert torch.equal(cpu.forward(x, c), fake_quantize._forward(x, c))
        slope, sums = cpu.backward(grad, x, c)
        assert torch.equal(slope, fake_quantize._backward(grad, x, c)[0])
        exact = fake_quantize._backward_of_gates(grad.double(), x.double(), c.double()).float()
        torch.testing.assert_close(sums, exact, rtol=1e-4, atol=1e-2)
        assert torch.equal(sums, cpu.backward_of_gates(grad, x, c))


def test_every_row_has_at_most_the_values_of_its_width():
    torch.manual_seed(4)
    ranges = torch.tensor([1e-3, 0.4, 1.7])
    x = ranges[:, None] * torch.randn(3, 2000)
    for bits in LADDER[:-1]:
        value = quantize(x, ranges, torch.tensor([float(b <= bits) for b in LADDER]))
        codes, scale = integer_codes(x, ranges, bits)
        assert scale.shape == (3, 1) and torch.equal(value, codes * scale) and int(codes.abs().max()) < 2 ** (bits - 1)
        assert torch.equal(value, rounded(x, ranges, bits))
        assert all(len(row.unique()) <= 2**bits - 1 for row in value)


def test_errors_by_row_are_those_of_each_row_alone():
    torch.manual_seed(5)
    x, weights, ranges = torch.randn(4, 50), torch.rand(4, 50), 0.3 + torch.rand(4, 6)
    alone = torch.stack([squared_errors(*each) for each in zip(x, ranges, weights, strict=True)])
    torch.testing.assert_close(squared_errors(x, ranges, weights), alone)


@pytest.mark.parametrize("ranges", [[1.0, -1.0], [1.0, 2.0, 3.0]])
def test_ranges_that_fit_no_rows_or_are_not_positive_are_refused(ranges):
    with pytest.raises(ValueError, match="one number > 0, or one for each row"):
        quantize(torch.ones(2, 3), torch.tensor(ranges), torch.tensor(GATES))
