"""What a model of transformers is made of: its linear maps, its head, inputs of its kind.

Nothing is read off an architecture's name but the preset of targets.
"""

import inspect
import re
from collections.abc import Iterable
from typing import Any

import regex  # its matches have a time limit
import torch
from torch import Tensor, nn

_LONGEST_MATCH = 1.0  # seconds of a regular expression on one name, which takes microseconds

# The attention inputs of each architecture, the ones the paper adapts.
TARGETS = {
    "bert": ("query", "key", "value"),
    "deberta": ("query_proj", "key_proj", "value_proj"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "roberta": ("query", "key", "value"),
    "xlm-roberta": ("query", "key", "value"),
}
_TYPES = {
    "query_proj": "query", "key_proj": "key", "value_proj": "value",
    "q_lin": "query", "k_lin": "key", "v_lin": "value",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_lin": "attention.output",
}  # fmt: skip


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the task head, which stays at 32 bit: what stands beside the base model, and a pooler inside it."""
    prefix = str(model.base_model_prefix)
    beside = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    pooler = getattr(getattr(model, prefix, model), "pooler", None)
    return (*beside, f"{prefix}.pooler") if pooler is not None else tuple(beside)


def _outside_the_head(model: nn.Module) -> dict[str, nn.Module]:
    head = head_modules(model)
    return {name: m for name, m in model.named_modules() if not any(f"{name}.".startswith(f"{h}.") for h in head)}


def encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the task head's, by path: the head is trained whole, a target may not be in it."""
    return {name: module for name, module in _outside_the_head(model).items() if isinstance(module, nn.Linear)}


def _other_maps(model: nn.Module) -> str:
    """Layers that have a matrix of weights and are neither linear nor a table, as `Conv1D (c_attn, c_proj)`."""
    found: dict[str, set[str]] = {}
    for name, module in _outside_the_head(model).items():
        weight, of_table = getattr(module, "weight", None), hasattr(module, "num_embeddings")
        if isinstance(weight, Tensor) and weight.dim() > 1 and not of_table and not isinstance(module, nn.Linear):
            found.setdefault(type(module).__name__, set()).add(name.rsplit(".", 1)[-1])
    return "; ".join(f"{kind} ({', '.join(sorted(ends))})" for kind, ends in sorted(found.items()))


def _matching(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that a regular expression matches as a whole.  Errors: ValueError also for one that takes for ever."""
    try:
        re.compile(pattern)
        compiled = regex.compile(pattern)
        return {name for name in names if compiled.fullmatch(name, timeout=_LONGEST_MATCH)}
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"target_modules {pattern!r} is no regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"target_modules {pattern!r} takes more than {_LONGEST_MATCH:g} s to match one name: write it without "
            "repetitions inside repetitions, such as (a+)+, or list the names"
        ) from None


def matched(model: nn.Module, targets: str | Iterable[str] | None, architecture: str) -> set[str]:
    """Paths of the linear layers that the targets name.  Errors: ValueError listing what there is."""
    linears = encoder_linears(model)
    if not linears:
        raise ValueError(
            f"the encoder of {type(model).__name__} has no torch.nn.Linear, and layers of other kinds cannot be "
            f"adapted: {_other_maps(model)}. Choose another backbone"
        )
    if targets is None:
        if architecture not in TARGETS:
            raise ValueError(
                f"no preset of target modules for the architecture {architecture!r}: pass target_modules "
                f"(names or a regular expression). {_listed(model)}. Presets: {', '.join(TARGETS)}"
            )
        targets = TARGETS[architecture]
    if isinstance(targets, str):
        found = _matching(targets, linears)
        missing = [] if found else [targets]
    else:
        hits = {t: {name for name in linears if name == t or name.endswith("." + t)} for t in targets}
        missing = [t for t, names in hits.items() if not names]
        found = set().union(*hits.values())
    if missing or not found:
        kind = " (one string is a regular expression for the whole path)" if isinstance(targets, str) else ""
        raise ValueError(
            f"target_modules {', '.join(map(repr, missing)) or '()'}{kind} match no linear layer of the "
            f"encoder. {_listed(model)}"
        )
    return found


def _listed(model: nn.Module) -> str:
    """The layers of an encoder by the ends of their names, for a user to choose from."""
    ends, others = sorted({name.rsplit(".", 1)[-1] for name in encoder_linears(model)}), _other_maps(model)
    linear = f"Its linear layers end in: {', '.join(ends)}"
    return f"{linear}. Layers of other kinds, which cannot be adapted: {others}" if others else linear


def type_of(name: str) -> str:
    """The role of a projection, by its path: `query`, `intermediate`, ..."""
    path = re.split(r"\.\d+\.", name)[-1].removesuffix(".dense")
    last = path.rsplit(".", 1)[-1]
    return _TYPES.get(last, path if last == "output" else last)


def example_rows(model: nn.Module, size: int, length: int, *, varied: bool = False) -> dict[str, Tensor]:
    """Inputs of the model's own kind without padding: ordinary tokens, and its end-of-sequence token where it has one.

    varied: many tokens of the vocabulary in place of one.
    """
    config: Any = model.config
    device = next(model.parameters()).device
    special = {getattr(config, name, None) for name in vars(config) if name.endswith("_token_id")}
    vocabulary = getattr(config, "vocab_size", None) or 256
    ordinary = [token for token in range(min(vocabulary, 1000)) if token not in special][-512:] or [0]
    tokens = torch.full((size, length), ordinary[0], device=device)
    if varied:
        places = torch.arange(size * length, device=device).view(size, length) * 7919 % len(ordinary)
        tokens = torch.tensor(ordinary, device=device)[places]
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int) and 0 <= end < vocabulary:
        tokens[:, -1] = end
    rows = {"input_ids": tokens}
    if device.type != "meta" and "attention_mask" in inspect.signature(model.forward).parameters:
        rows["attention_mask"] = torch.ones_like(tokens)
    return rows


def settle_attention(model: nn.Module) -> bool:
    """Full attention in place of a sparse one that transformers leaves for good at the first short input (BigBird).

    Returns whether it was sparse. Else a network would change within a training, at a step that its batches decide.
    """
    base: Any = model.base_model
    config: Any = model.config
    if not hasattr(base, "set_attention_type") or getattr(base, "attention_type", None) != "block_sparse":
        return False
    with torch.random.fork_rng(devices=[]):  # its modules are made anew, with weights that are then replaced
        base.set_attention_type("original_full")
    config.attention_type = "original_full"
    return True
