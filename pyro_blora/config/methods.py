"""Methods by name: what a method fixes of a run's configuration, and what it only proposes.

`bayesian_lora` is everything as configured. The others are what it is compared with, in the same loop, data order, head
and report. Most are a prior/guide pair of the same program; AdaLoRA and EVA's initialization are PEFT's.
Keys are the command line's flags: `prior.bits` is a setting of the prior. A method is data, as a preset is: what else
goes with a part that it names is declared where that part is registered.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..user_values import spelled

_LORA = {"prior": "fixed", "prior.bits": 32}  # nothing random, nothing quantized


@dataclasses.dataclass(frozen=True)
class Method:
    """line: what it is, with its source. fixes: flags that make the method what it is. proposes: its own defaults."""

    line: str
    fixes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    proposes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


METHODS = {
    "bayesian_lora": Method("gates of bits and ranks, learned under the chosen prior and guide"),
    "lora": Method("plain LoRA: 32 bit, every rank (Hu et al., 2021)", _LORA),
    "no_dropout": Method(
        "plain LoRA without dropout from where the gates of the others start: they have none there, either",
        {**_LORA, "gated_dropout": False},
    ),
    "qat_lora": Method(
        "LoRA trained at one bit width, straight-through (Jacob et al., 2018)",
        {"prior": "fixed"}, {"prior.bits": 8},
    ),
    "bayesian_bits": Method("bit gates only, every rank (van Baalen et al., Bayesian Bits, 2020)", {"prior.g": "off"}),
    "rank_gates": Method("rank gates only, 32 bit", {"prior.z": "off"}),
    "dylora": Method(
        "LoRA whose rank, one for all adapters, is drawn uniformly in every step, evaluated at every rank "
        "(Valipour et al., DyLoRA, 2023)",
        {"prior": "depth", "prior.z": "off", "guide": "uniform_rank", "estimator": "straight_through"},
        {"kl_warmup": 0.0},
    ),
    "adalora": Method(
        "PEFT's AdaLoRA: from `rank` everywhere to an average of --guide.target_rank (Zhang et al., 2023)",
        {"prior": "depth", "prior.z": "off", "guide": "allocated", "adapter": "adalora"},
    ),
    "eva": Method(
        "LoRA that starts at the principal components of its inputs, PEFT's EVA (Paischer et al., 2024)",
        {**_LORA, "init_lora_weights": "eva"},
    ),
    "full": Method(
        "full fine-tuning: no adapter, every weight of the backbone learns", {**_LORA, "adapter": "none"},
        {"lr": 5e-5, "lr_head": 1e-3},
    ),
    "ptq": Method(
        "LoRA quantized after training, ranges fitted to the data (Nagel et al., 2021)",
        {"prior": "fixed", "kl_warmup": 1.0}, {"prior.bits": 8},
    ),
    "mc_dropout": Method(
        "LoRA whose predictions average over dropout masks (Gal and Ghahramani, 2016)",
        {**_LORA, "average_over": "dropout"},
    ),
}  # fmt: skip
_OWNERS = {method.fixes["adapter"]: name for name, method in METHODS.items() if "adapter" in method.fixes}


def require_consistent(name: str, stated: Mapping[str, Any]) -> None:
    """Errors: ValueError for a flag that was stated on the line or in a file and contradicts the method."""
    for flag, value in METHODS[name].fixes.items() if name in METHODS else ():
        if flag in stated and not _same(stated[flag], value):
            said, own = spelled(stated[flag]), spelled(value)
            raise ValueError(f"--{flag} {said} contradicts --method {name}, which is {flag} {own}: drop one")


def _same(stated: Any, value: Any) -> bool:
    """Whether a word of the line or of a file is the value: `1` is 1.0, and YAML reads `off` as False."""
    if isinstance(value, str):
        return stated == value or (stated is False and value == "off")
    if isinstance(value, bool):
        return spelled(stated).lower() == spelled(value)
    try:
        return float(stated) == value
    except (TypeError, ValueError):
        return False


def resolved(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that a method adds to those `given` (which differ from the configuration's own defaults).

    Errors: ValueError for a flag that contradicts the method, and for an adapter that belongs to another method.
    """
    method = METHODS[name]
    require_consistent(name, given)
    owner = _OWNERS.get(given.get("adapter"), name)
    if owner != name:
        raise ValueError(f"adapter {given['adapter']!r} is part of a method: give --method {owner} in its place")
    return {flag: value for flag, value in {**method.proposes, **method.fixes}.items() if flag not in given}


def left_open(name: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those flags of a preset, or of a grid's base, that do not give way to the method which replaces theirs."""
    method = METHODS.get(name, METHODS["bayesian_lora"])
    says = {**method.proposes, **method.fixes}
    owned = tuple(f"{flag}{end}" for flag in says for end in (".", "_settings"))  # of a part that is replaced
    return {flag: value for flag, value in flags.items() if flag not in says and not flag.startswith(owned)}


def proposed_settle(proposed: float, kl_warmup: float, given: Mapping[str, Any]) -> float:
    """A prior's `settle`, which gives way to a longer start, and to who says how the gates learn.

    That is a user, or a run's file, which has the estimator; so a run from before --settle is still one whose gates
    learned to the end.
    """
    learning = {"rest", "estimator", "estimator_settings", "gate_optimizer", "lr_gates", "guide.open_logit"}
    left = 1 - kl_warmup
    if given.keys() & learning or not 0 <= left <= 1:  # the latter is refused by who asked
        return 0.0
    return round(min(proposed, left), 12)  # 1 - .55 is .45
