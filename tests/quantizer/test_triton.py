"""The kernels for CUDA against the eager functions, run by Triton's interpreter where Triton is installed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton comes with PyTorch for CUDA: pip install triton")

SCRIPT = """
import torch
from pyro_blora.quantizer import fake_quantize as q, triton as t

for n in (1, 7, 1024, 5000, 3 * 4096 + 5):
    torch.manual_seed(n)
    x, grad = 2 * torch.randn(n), torch.randn(n)
    for gates in ([1, 0.9, 0.7, 0.2, 0.1], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]):
        c = q.grids(torch.tensor(2.5), q.mixture_weights(torch.tensor(gates, dtype=torch.float32)))[0].constants
        assert torch.equal(q._forward(x, c), t.forward(x, c)), (n, gates)
        (of_x, sums), (of_x_there, sums_there) = q._backward(grad, x, c), t.backward(grad, x, c)
        assert torch.equal(of_x, of_x_there), (n, gates)
        assert torch.allclose(sums, sums_there, rtol=1e-4, atol=1e-4 * n**0.5), (n, gates, sums, sums_there)
        assert torch.equal(sums_there, t.backward_of_gates(grad, x, c)), (n, gates)
for ladder in ((2, 3, 4, 6, 8, 16, 32), (3, 32)):
    torch.manual_seed(0)
    x, grad = 2 * torch.randn(3000), torch.randn(3000)
    weights = q.mixture_weights(torch.linspace(0.9, 0.1, len(ladder)))
    c = q.grids(torch.tensor(2.5), weights, ladder)[0].constants
    assert torch.equal(q._forward(x, c), t.forward(x, c)), ladder
    (of_x, sums), (of_x_there, sums_there) = q._backward(grad, x, c), t.backward(grad, x, c)
    assert torch.equal(of_x, of_x_there) and torch.allclose(sums, sums_there, rtol=1e-4, atol=1e-2), ladder

for sizes in ((3, 500), (2, 7), (40, 8), (2, 3000), (1, 5)):  # a range for every row; of one weight per example, too
    for examples in (1, 2):
        torch.manual_seed(1)
        x, grad = 2 * torch.randn(examples * sizes[0], sizes[1]), torch.randn(examples * sizes[0], sizes[1])
        rows = q.Rows((sizes[0],), torch.zeros(sizes[0], dtype=torch.long), torch.arange(sizes[0] + 5))
        weights = q.mixture_weights(torch.tensor([1, 0.9, 0.7, 0.2, 0.1]))
        c = q.grids_of_rows(0.5 + torch.rand(sizes[0]), weights, rows)[0].constants.view(-1, 20)
        assert torch.equal(q._forward(x, c), t.forward(x, c)), sizes
        (of_x, sums), (of_x_there, sums_there) = q._backward(grad, x, c), t.backward(grad, x, c)
        assert torch.equal(of_x, of_x_there) and torch.allclose(sums, sums_there, rtol=1e-4, atol=1e-2), sizes
        assert torch.equal(sums_there, t.backward_of_gates(grad, x, c)), sizes
print("the same")
"""


def test_values_are_the_eager_ones_and_sums_agree():
    root = str(Path(__file__).resolve().parents[2])
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([root, *sys.path])}
    told = subprocess.run([sys.executable, "-c", SCRIPT], env=variables, capture_output=True, text=True)
    assert told.stdout.strip() == "the same", told.stderr
