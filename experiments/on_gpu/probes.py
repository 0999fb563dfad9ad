"""What only a GPU can tell: whether Triton's kernels are right there, and what a step takes without its host."""

import torch
import transformers
from torch import Tensor

from experiments.bench.networks import Setting, gated_step, lora_step, program_of
from experiments.bench.timing import Row, compared, in_turn
from pyro_blora import quantizer
from pyro_blora.non_finite import unvalidated

_GATES = ((1, 0.9, 0.7, 0.2, 0.1), (1, 0, 0, 0, 0), (1, 1, 0, 0, 0), (1, 1, 1, 1, 0))
_SIZES = (1, 1000, 768 * 768, 4096 * 768 + 5)


def graphed(setting: Setting, seconds: float) -> list[Row]:
    """Forward, backward and optimizer as one CUDA graph, for a batch of one shape."""
    functions = {
        "gated, as a CUDA graph": _as_graph(setting), "gated": gated_step(setting), "PEFT LoRA": lora_step(setting),
    }  # fmt: skip
    taken = in_turn(functions, seconds=seconds, device=setting.device)
    pairs = (("gated, as a CUDA graph", "gated"), ("gated, as a CUDA graph", "PEFT LoRA"))
    return [compared("CUDA graphs", taken, *pair) for pair in pairs]


def _as_graph(setting: Setting):
    """The gated step captured; DeBERTa's relative positions, which it copies from the host, are computed before."""
    modeling = transformers.models.deberta_v2.modeling_deberta_v2
    build, known = modeling.build_relative_position, {}

    def remembered(query, key, **settings):
        place = query.size(-2), key.size(-2)
        if place not in known:
            known[place] = build(query, key, **settings)
        return known[place]

    modeling.build_relative_position = remembered
    program, (inputs, labels) = program_of(setting), setting.examples()
    learning = [p for p in program.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-3, fused=True, capturable=True)
    program.train()

    def step():
        with unvalidated():
            loss, _ = program(inputs, labels, 0.3)
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in learning if p.grad is not None], 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def kernels(setting: Setting, seconds: float) -> list[dict]:
    """Triton's kernels against the eager functions: values to the bit, the same sums twice, their relative errors."""
    from pyro_blora import quantizer_triton  # where there is a GPU

    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in _SIZES:
            generator = torch.Generator().manual_seed(n)
            x, grad = ((2 * torch.randn(n, generator=generator)).cuda().to(dtype) for _ in range(2))
            for gates in _GATES:
                weights = quantizer.mixture_weights(torch.tensor(gates, dtype=torch.float32, device="cuda"))
                c = quantizer.grids(torch.tensor(2.5, device="cuda"), weights)[0].constants
                of_x, sums = quantizer._backward(grad, x, c)
                of_x_there, sums_there = quantizer_triton.backward(grad, x, c)
                again = quantizer_triton.backward_of_gates(grad, x, c)
                differ = [(quantizer._forward(x, c), quantizer_triton.forward(x, c)), (of_x, of_x_there),
                          (again, sums_there)]  # fmt: skip
                exact = quantizer._backward(grad.double(), x.double(), c.double())[1]
                rows.append({
                    "section": f"{dtype} {n}", "subject": str(gates), "rival": "eager", "unit": "values differ",
                    "value": [float(sum((a != b).sum() for a, b in differ))], "rival_value": None, "goal": 0,
                    "ratio": [_error(sums_there, exact), _error(sums, exact), 0.0],
                })  # fmt: skip
    return rows


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())
