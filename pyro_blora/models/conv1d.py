"""transformers' `Conv1D` (GPT-2): a linear map y = x W' + b whose weight W' (n, m) is the transpose of nn.Linear's.

Gated layers have one form of a linear map, nn.Linear's. A projection that is a Conv1D is put into it when adapters are
attached, and back into its own when the network leaves the package, so files have the names and shapes of GPT-2's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class LinearOfConv1D(nn.Linear):
    """A Conv1D as a linear map: weight (m, n), contiguous."""


def is_conv1d(module: nn.Module) -> bool:
    from transformers.pytorch_utils import Conv1D  # now, as it takes seconds

    return isinstance(module, Conv1D)


def is_linear(module: nn.Module) -> bool:
    """Whether it is a linear map of vectors, in either form."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def sizes(linear: nn.Module) -> tuple[int, int]:
    """(n, m): of the vectors that go in, and of those that come out."""
    shape: tuple[int, int] = tuple(getattr(linear, "weight").shape)  # noqa: B009 (a module's attribute may be anything)
    return shape if is_conv1d(linear) else shape[::-1]


def to_linear(model: nn.Module, names: Iterable[str]) -> None:
    """Replace those of the named modules that are a Conv1D by the linear map that they are."""
    for name in names:
        module: Any = model.get_submodule(name)
        if is_conv1d(module):
            n, m = sizes(module)
            linear = LinearOfConv1D(n, m, device="meta")
            linear.weight, linear.bias = _transposed(module.weight), module.bias
            _replace(model, name, linear.train(module.training))


def to_conv1d(model: nn.Module) -> None:
    """Replace every LinearOfConv1D by the Conv1D that it was."""
    from transformers.pytorch_utils import Conv1D

    for name, module in list(model.named_modules()):
        if isinstance(module, LinearOfConv1D):
            conv = Conv1D(0, 0)
            conv.nf, conv.nx = module.out_features, module.in_features
            conv.weight, conv.bias = _transposed(module.weight), module.bias
            _replace(model, name, conv.train(module.training))


def _transposed(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().T.contiguous(), requires_grad=weight.requires_grad)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def transposed(model_class: type, config: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights (m, n) by name, as a model of transformers' class takes them: those of a Conv1D are (n, m)."""
    with torch.device("meta"):
        model = model_class(config)
    conv1d = {f"{name}.weight" for name, module in model.named_modules() if is_conv1d(module)}
    return {name: x.T.contiguous() if name in conv1d else x for name, x in weights.items()}
