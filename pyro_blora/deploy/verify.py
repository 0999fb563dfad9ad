"""What was exported, read back and compared with the program."""

import copy
import warnings
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from .. import adapters
from ..adapters.gate_context import ADAPTER
from ..gates import Gates
from ..layout import ACTIVATIONS, BASE
from ..models.architectures import example_rows
from ..posterior.draws import deployed
from ..program import BayesianLoRA

Module = TypeVar("Module", bound=nn.Module)
_GAP = 1e-4  # largest relative difference of logits between the exported adapter and its network, in float32


def read_back(plain: nn.Module, ranks: dict[str, int], folder: Path) -> nn.Module:
    """The adapter as PEFT reads it."""
    import peft

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # as above
        reloaded: Any = peft.PeftModel.from_pretrained(copied(plain), str(folder))
    modules = dict(reloaded.base_model.model.named_modules())
    wrong = [name for name, rank in ranks.items() if modules[name].r[ADAPTER] != rank]
    if wrong:
        raise RuntimeError(f"the exported adapter lost the rank of {wrong[0]}")
    return reloaded


def copied(module: Module) -> Module:
    """A deep copy that shares what is frozen: a backbone is in memory once."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters() if not p.requires_grad})


def verify(
    program: BayesianLoRA, reloaded: nn.Module, rows: dict[str, Tensor] | None, gates: Gates[Tensor] | None = None,
    theta: Tensor | None = None,
) -> None:  # fmt: skip
    """What was written, against the gated network with activations and base weights at 32 bit.

    gates: None for the deployed ones. theta: a draw of the weights, (D,).
    """
    device, net = program.net.log_range.device, program.net
    reloaded.eval().to(device)
    z, g = gates or deployed(program)
    z, random = z.clone(), None if theta is None else program.weights.split(theta)
    z[:, [BASE, *map(program.layout.tensors.index, ACTIVATIONS)]] = 1.0
    tokens = min(32, net.layout.sequence_length)
    rows = net.head.rows(rows) if rows else net.head.example(example_rows(net.backbone, 2, tokens, varied=True))
    batch = {key: value.to(device) for key, value in rows.items()}
    training = program.training
    program.eval()
    with adapters.use_gates(net, z, g, random):
        expected = net.head.read(net.peft_model(**batch)).float()  # not under autocast, as PEFT will run it
    program.train(training)
    found = net.head.read(reloaded(**batch)).float()
    gap = (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())
    if not gap <= _GAP:
        raise RuntimeError(f"the exported model's logits differ by {gap:.2g} from the program's: please report this")
