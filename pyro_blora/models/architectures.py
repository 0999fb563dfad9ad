"""What a model of transformers is made of: its linear maps, its head, inputs of its kind.

Nothing is read off an architecture's name.
"""

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from .conv1d import is_linear


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the task head: what stands beside the base model, and a pooler inside it.

    It stays at 32 bit, but for a language model's output matrix where that is asked for (`vocabulary_map`).
    """
    prefix = str(model.base_model_prefix)
    beside = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    pooler = getattr(getattr(model, prefix, model), "pooler", None)
    return (*beside, f"{prefix}.pooler") if pooler is not None else tuple(beside)


def is_pooler_new(model: nn.Module, missing: Iterable[str]) -> bool:
    """Whether a checkpoint that lacks the tensors of these names has no pooler, as training on masked words leaves."""
    return any(key.startswith(f"{model.base_model_prefix}.pooler.") for key in missing)


def outside_the_head(model: nn.Module) -> dict[str, nn.Module]:
    """Every module but those of the task head, by path."""
    head = head_modules(model)
    return {name: m for name, m in model.named_modules() if not any(f"{name}.".startswith(f"{h}.") for h in head)}


def encoder_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer but the task head's, by path, `nn.Linear` or `Conv1D`: a target may not be in the head."""
    return {name: module for name, module in outside_the_head(model).items() if is_linear(module)}


def vocabulary_map(model: nn.Module) -> dict[str, nn.Module]:
    """A language model's linear map to the logits of its vocabulary, by path; empty where it has none."""
    whole: Any = model
    output = whole.get_output_embeddings()
    return {name: module for name, module in model.named_modules() if module is output and is_linear(module)}


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
