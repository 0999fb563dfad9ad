"""The optimizer of a training: AdamW over groups with separate learning rates."""

from typing import Any, cast

import torch

from ..config.run_config import RunConfig
from ..program import BayesianLoRA
from .natural_gradient import is_natural


def forget_moments(optimizer: torch.optim.Optimizer, program: BayesianLoRA) -> None:
    """Of guide and prior: while gates are held their gradients are zeros, which would count as steps."""
    for parameter in (*program.gate_guide.parameters(), *program.prior.parameters()):
        optimizer.state.pop(parameter, None)


def make_optimizer(program: BayesianLoRA, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW over six groups: adapter, random weights (means), their spread, head, gates (guide, prior), ranges."""
    net, decay = program.net, config.weight_decay
    random = program.weights.parameters_of_net
    fixed = [p for p in net.adapter_parameters() if all(p is not other for other in random)]
    gates = list(dict.fromkeys([*program.gate_guide.parameters(), *program.prior.parameters()]))
    if is_natural(program, config):  # which the log Bayes factors do not need
        gates = [*program.prior.parameters()]
    groups: list[dict[str, Any]] = [
        {"name": "adapter", "params": fixed, "weight_decay": decay},
        {"name": "weights", "params": random, "weight_decay": 0},  # their prior replaces it
        {"name": "spread", "params": [*program.weights.parameters()], "weight_decay": 0},
        {"name": "head", "params": [*net.head_parameters(), program.log_scale], "weight_decay": decay},
        {"name": "gates", "params": gates, "weight_decay": 0},
        {"name": "ranges", "params": net.grid_parameters(), "weight_decay": 0},
    ]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=cast(float, config.lr), fused=True)
    if program.starting_log_scale:
        _decay_to(program.starting_log_scale, program.log_scale, optimizer)
    return optimizer


def _decay_to(start: float, log_scale: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> None:
    """Weight decay draws `log_scale` to `start`: to 0, as all else in its group, is to one of the labels' unit."""

    @torch.no_grad()
    def drawn(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        (group,) = (group for group in optimizer.param_groups if group["name"] == "head")
        taken = 1 - getattr(optimizer, "found_inf", torch.zeros(()))  # 0 where the step was left out
        log_scale.add_(group["lr"] * group["weight_decay"] * start * taken)

    optimizer.register_step_post_hook(drawn)
