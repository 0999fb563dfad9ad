"""Sums of codes are exact, and what is between products depends on no other row of a batch."""

import pytest
import torch
from models import batch, tiny_bert
from packed_models import allocated

from pyro_blora.adapters import use_gates
from pyro_blora.posterior import deployed
from pyro_blora.quantizer.packing import Scale
from pyro_blora.quantizer.products import Coded, product
from pyro_blora.quantizer.reproducible import gelu, reproducible


@pytest.mark.parametrize(("of_x", "of_w"), [(2, 8), (8, 8), (16, 4), (8, 16), (16, 16)])
def test_sums_of_codes_are_whole_numbers(of_x, of_w):
    generator = torch.Generator().manual_seed(0)
    n, steps = 3000, (2.0**-3, 2.0**-5)  # powers of two: only sums could be rounded
    largest = [2 ** (bits - 1) - 1 for bits in (of_x, of_w)]
    x, w = (torch.randint(-m, m + 1, (rows, n), generator=generator) for m, rows in zip(largest, (12, 15), strict=True))
    x[0], w[0] = largest  # the largest sum that there can be
    for codes in (x, w):  # and sums nearly as large, no multiple of what float32 has there
        codes[1:-1] = codes[0] - torch.randint(2, codes[1:-1].shape, generator=generator)
    found = product(
        Coded(x.float(), torch.tensor(steps[0]), of_x), Coded(w.float(), torch.full((15, 1), steps[1]), of_w)
    )
    whole = x @ w.T  # int64
    exact = whole.double() * steps[0] * steps[1]
    one_byte = of_x <= 8 and of_w <= 8
    assert torch.equal(found, exact.float()) if one_byte else torch.allclose(found.double(), exact, rtol=3e-7)


def test_a_factor_at_32_bit_is_summed_in_float64():
    x, w, bias = torch.randn(3, 2, 50), torch.randn(4, 50), torch.randn(4)
    at = Scale.of(torch.tensor(2.0), 4)
    coded = Coded.of(x, at, 4)
    assert torch.equal(coded.numbers, at.rounded(x))
    expected = (at.rounded(x).double() @ w.double().T).float() + bias
    assert torch.equal(product(coded, Coded(w), bias), expected)


def test_gelu_without_an_error_function():
    x = torch.linspace(-12, 12, 100001)
    assert (gelu(x) - torch.nn.functional.gelu(x.double())).abs().max() < 1e-6
    tanh = torch.nn.functional.gelu(x, approximate="tanh")
    assert torch.allclose(gelu(x, approximate="tanh"), tanh, rtol=1e-5, atol=1e-6)


def test_only_float32_goes_through_float64():
    with reproducible():
        x = torch.randn(4, 5)
        assert x.softmax(-1).dtype == torch.float32 and torch.equal(x.softmax(-1), x.double().softmax(-1).float())
        assert x.bfloat16().softmax(-1).dtype == torch.bfloat16 and x.long().sum().dtype == torch.int64


def test_what_says_that_it_is_float32_goes_through_float64_too():
    """As attention of transformers does: softmax(..., dtype=torch.float32)."""
    x = torch.randn(200, 64)
    softmax, mean = x.double().softmax(-1).float(), x.double().mean(-1).float()
    assert not torch.equal(x.softmax(-1, dtype=torch.float32), softmax)
    with reproducible():
        assert torch.equal(torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32), softmax)
        assert torch.equal(x.softmax(-1, torch.float32), softmax)
        assert torch.equal(x.mean(-1, dtype=torch.float32), mean)


@pytest.mark.usefixtures("eager")
def test_codes_of_weights_are_kept_only_where_weights_are():
    """Those of a sharded backbone would be all of it, in every process."""
    program, logits = allocated(tiny_bert, scope="encoder"), []
    inputs, _ = batch(2, 9)
    for keeps in (True, False):
        program.net.gate_context.keeps_weights = keeps
        with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
            logits.append(program.net.logits(**inputs))
            kept = program.net.gate_context._current().codes
        assert bool(kept) == keeps
    assert torch.equal(*logits)


@pytest.mark.usefixtures("eager")
def test_a_row_has_the_same_logits_in_every_batch():
    program = allocated(tiny_bert, scope="encoder")
    inputs, _ = batch(6, 21)
    with torch.no_grad(), use_gates(program.net, *deployed(program), exact=True):
        together = program.net.logits(**inputs)
        alone = torch.cat([program.net.logits(**{name: x[i : i + 1] for name, x in inputs.items()}) for i in range(6)])
        short = int(inputs["attention_mask"][-1].sum())
        unpadded = program.net.logits(**{name: x[-1:, :short] for name, x in inputs.items()})
    assert torch.equal(together, alone) and torch.equal(together[-1:], unpadded)
