"""The optimizer of a training: AdamW over groups that have learning rates of their own."""

from typing import Any, cast

import torch

from ..config.run_config import RunConfig
from ..program import BayesianLoRA


def make_optimizer(program: BayesianLoRA, config: RunConfig) -> torch.optim.Optimizer:
    """AdamW over six groups: adapter, weights whose law is learned, its spread, head, gates (guide, prior), ranges."""
    net, decay = program.net, config.weight_decay
    random = program.weights.parameters_of_net
    fixed = [p for p in net.adapter_parameters() if all(p is not other for other in random)]
    gates = list(dict.fromkeys([*program.gate_guide.parameters(), *program.prior.parameters()]))
    groups: list[dict[str, Any]] = [
        {"name": "adapter", "params": fixed, "weight_decay": decay},
        {"name": "weights", "params": random, "weight_decay": 0},  # their prior does it
        {"name": "spread", "params": [*program.weights.parameters()], "weight_decay": 0},
        {"name": "head", "params": [*net.head_parameters(), program.log_scale], "weight_decay": decay},
        {"name": "gates", "params": gates, "weight_decay": 0},
        {"name": "ranges", "params": [net.log_range], "weight_decay": 0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=cast(float, config.lr), fused=True)
