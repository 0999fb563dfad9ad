"""What only a GPU can tell: whether Triton's kernels are right there, and what a step takes without its host."""

import dataclasses

import torch
from torch import Tensor

from experiments.bench.networks import Setting, gated_step
from experiments.bench.timing import Row, compared, in_turn
from pyro_blora import quantizer
from pyro_blora.quantizer import fake_quantize

_GATES = ((1, 0.9, 0.7, 0.2, 0.1), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 1, 0))
_SIZES = (1, 1000, 768 * 768, 4096 * 768 + 5)


def graphed(setting: Setting, seconds: float) -> list[Row]:
    """The training step as one CUDA graph, against the same step kernel by kernel, at both scopes."""
    rows = []
    for scope in ("adapted", "encoder"):
        here = dataclasses.replace(setting, scope=scope)
        functions = {"as a CUDA graph": gated_step(here), "kernel by kernel": gated_step(here, graphs=False)}
        taken = in_turn(functions, seconds=seconds / 2, device=setting.device)
        rows.append(compared(f"CUDA graph of a step, scope {scope}", taken, *functions))
    return rows


def kernels(setting: Setting, seconds: float) -> list[dict]:
    """Triton's kernels against the eager functions: values to the bit, the same sums twice, their relative errors."""
    from pyro_blora.quantizer import triton  # where there is a GPU

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in _SIZES:
            generator = torch.Generator().manual_seed(n)
            x, grad = ((2 * torch.randn(n, generator=generator)).cuda().to(dtype) for _ in range(2))
            for gates in _GATES:
                weights = quantizer.mixture_weights(torch.tensor(gates, dtype=torch.float32, device="cuda"))
                c = quantizer.grids(torch.tensor(2.5, device="cuda"), weights)[0].constants
                of_x, sums = fake_quantize._backward(grad, x, c)
                of_x_there, sums_there = triton.backward(grad, x, c)
                again = triton.backward_of_gates(grad, x, c)
                differ = [(fake_quantize._forward(x, c), triton.forward(x, c)), (of_x, of_x_there),
                          (again, sums_there)]  # fmt: skip
                exact = fake_quantize._backward(grad.double(), x.double(), c.double())[1]
                rows.append({
                    "section": f"{dtype} {n}", "subject": str(gates), "rival": "eager", "unit": "values differ",
                    "value": [float(sum((a != b).sum() for a, b in differ))], "rival_value": None, "goal": 0,
                    "ratio": [_error(sums_there, exact), _error(sums, exact), 0.0],
                })  # fmt: skip
    return rows


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
