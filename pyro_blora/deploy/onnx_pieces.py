"""An ONNX file that sums in float32 against the packed model, piece by piece.

There a value at the border between two codes may take the other one, and the layers above amplify that, in some rows
to half of the largest logit; float32 in PyTorch does as much. So logits alone do not tell a right file from a wrong
one. Its pieces do: each low-bit layer, and what the network computes between them, is compared where the
packed model is given the very input that it had in the file. A wrong scale, of one channel, too, is seen in every row;
another code in the few rows that have it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..program import BayesianLoRA
from .held_out import answer_of
from .low_bit import LowBitLinear
from .onnx_modules import OnnxLinear

_LEAST = 1e-12  # of a largest value
_MOST = 0.95  # of the rows: another code is in one of a thousand


class Observed(nn.Module):
    """A network whose outputs are followed by the input and the output of each low-bit layer, call by call."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.seen: list[Tensor] = []
        for module in network.modules():
            if isinstance(module, OnnxLinear):
                module.register_forward_hook(lambda _, taken, y: self.seen.extend((*taken, y)))

    def forward(self, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
        self.seen.clear()
        logits = self.network(inputs)
        return logits, *self.seen


def gap_by_piece(
    session: Any, inputs: Sequence[str], packed: nn.Module, program: BayesianLoRA, batches: Iterable[dict[str, Tensor]]
) -> float:
    """The largest difference of a piece, of its largest value, in all but a twentieth of the rows of tokens.

    session: of a file that was made from an `Observed`; inputs: names of what it takes. packed: as `load_packed` gives.
    """
    compared = _Compared(session, inputs, packed, program)
    layers = [module for module in packed.modules() if isinstance(module, LowBitLinear)]
    hooks = [layer.register_forward_pre_hook(compared.enter) for layer in layers]
    hooks += [layer.register_forward_hook(compared.leave) for layer in layers]
    answer = answer_of(compared, program)
    for batch in batches:
        answer(batch)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(rows).quantile(_MOST) for rows in compared.gaps.values()]).max().item()


class _Compared(nn.Module):
    """A packed model that runs on what the file's layers took and gave.

    gaps: of each piece, call by call, the largest difference of every row.
    """

    def __init__(self, session: Any, inputs: Sequence[str], packed: nn.Module, program: BayesianLoRA):
        super().__init__()
        self.session, self.inputs, self.packed, self.read = session, inputs, packed, program.net.head.read
        self.gaps: dict[int, list[Tensor]] = {}

    def forward(self, **rows: Any) -> Any:
        found = self.session.run(None, {name: rows[name].numpy() for name in self.inputs})
        logits, *seen = map(torch.from_numpy, found)
        self.in_file = iter([*enumerate(seen), (len(seen), logits)])
        output = self.packed(**rows)
        self._next(self.read(output))
        return output

    def enter(self, _: nn.Module, taken: tuple[Tensor]) -> tuple[Tensor]:
        return (self._next(*taken),)

    def leave(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        return self._next(y)

    def _next(self, x: Tensor) -> Tensor:
        """What the file has for x; how far x is from it is kept."""
        piece, found = next(self.in_file)
        largest = found.abs().max().clamp(min=_LEAST)
        self.gaps.setdefault(piece, []).append(((x - found).abs() / largest).flatten(0, -2).amax(-1))
        return found
