"""What the checks of all kinds have in common: how they refuse, what they try a part on, how it moves."""

import copy
from collections.abc import Callable
from typing import Any, NoReturn, Protocol, TypeVar

import torch
from pyro.distributions import validation_enabled
from torch import nn

from ..layout import AdapterLayout, Projection
from ..registry import Registry

Part = TypeVar("Part", bound=nn.Module)
MOVES: tuple[dict[str, Any], ...] = ({"device": "meta"}, {"dtype": torch.float64})
REGISTER = "hold its tensors with self.register_buffer or nn.Parameter, and make new ones from those"


class Refuse(Protocol):
    def __call__(self, what: str) -> NoReturn:
        """Raise ValueError with the part's name, what is wrong with it, and the remedy."""


def refusing(registry: Registry, part: Any) -> Refuse:
    """For a part by its name, `file.py:function`, or the function itself."""

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"{registry.kind} {registry.called(part)!r}: {what}")

    return refuse


def tried(call: Callable[[], Any], what: str, refuse: Refuse) -> Any:
    """What a call of the user's code gives; whatever it raises becomes a sentence, which a ValueError is already."""
    try:
        return call()
    except ValueError:
        raise
    except Exception as error:
        refuse(f"{what} fails: {type(error).__name__}: {' '.join(str(error).split())}")


def when_moved(module: Part, move: dict[str, Any], call: Callable[[Part], Any], refuse: Refuse) -> Any:
    """What a call gives once a copy of the module has moved to another device or dtype."""
    try:
        with validation_enabled(False):  # it reads values, which the meta device does not have
            return call(copy.deepcopy(module).to(**move))
    except RuntimeError as error:  # of tensors on two devices, or of two types: the part's fault, said as such
        (to,) = move.values()
        refuse(f"it fails after .to({to}) ({str(error).splitlines()[0]}): {REGISTER}")


def example_layout(*, layers: int = 2, rank: int = 4) -> AdapterLayout:
    """Query, key and value of a small encoder, and a feed-forward map without an adapter: all cases of a layout."""
    kinds = {"query": (8, 8), "key": (8, 8), "value": (8, 8), "intermediate": (8, 32)}
    projections = tuple(
        Projection(name=f"{layer}.{kind}", type=kind, layer=layer, in_features=n, out_features=m, tokens=16,
                   adapted=kind != "intermediate")
        for layer in range(layers) for kind, (n, m) in kinds.items()
    )  # fmt: skip
    macs = sum(p.in_features * p.out_features * p.tokens for p in projections)
    return AdapterLayout(
        architecture="example", projections=projections, rank=rank, alpha=2.0 * rank, scope="encoder",
        sequence_length=16, model_macs=2 * macs,
    )  # fmt: skip
