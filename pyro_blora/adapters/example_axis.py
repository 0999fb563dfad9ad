"""Find out whether the first dimension of a layer's tensors is the example: in most networks, not in all.

OPT flattens (B, T, n) to (B T, n) before its feed-forward, XLNet carries (T, B, n), DeBERTa passes a table of positions
shared by all examples. Code that computes per example checks this first.
"""

import torch
from torch import Tensor

from .gate_context import Observer
from .gated_model import GatedModel, observed

_CHARACTERS = 1 << 16  # of a model without a vocabulary


class _Trace(Observer):
    """Follows the values that are nan because the first of `batch` examples was: (layer, leads with it, has it)."""

    def __init__(self, batch: int):
        self.batch = batch
        self.calls: list[tuple[int, bool, bool]] = []

    def product(self, projection: int, tensor: int, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        marked = x.detach().isnan()
        leads = len(x) == self.batch and bool(marked[0].any()) and not bool(marked[1:].any())
        self.calls.append((projection, leads, bool(marked.any())))
        return super().product(projection, tensor, x, weight, bias)


def leads_with_examples(net: GatedModel, inputs: dict) -> bool:
    """Whether every call of every projection leads with the example; found once per network."""
    if net.leads_with_examples is None:
        net.leads_with_examples = not net.head.windows and not without_examples(net, inputs, every_call=True)
    return net.leads_with_examples


def without_examples(net: GatedModel, inputs: dict, *, every_call: bool = False) -> list[str]:
    """The projections, by name, whose input mixes the examples or has none of them.

    Found by one forward of at most three rows in which the first row's embeddings are nan.
    inputs: a batch as the network takes it. every_call: also projections that have a further call without examples.
    """
    tokens = inputs["input_ids"]
    rows = min(2 if tokens.shape[-1] == 3 else 3, len(tokens))  # unlike the number of tokens
    if rows < 2:
        return []
    inputs = {key: x[:rows].clone() for key, x in inputs.items()}
    vocabulary = getattr(net.backbone.config, "vocab_size", None) or _CHARACTERS
    marker = _unused(inputs["input_ids"], vocabulary)
    inputs["input_ids"][0, 0] = marker  # one is enough, and others are looked for (by T5 and BART, the last)
    trace = _Trace(rows)

    def mark(module, args, settings, output):
        """Whatever turns tokens into vectors: T5 has a table for each side, CANINE hashes what it takes."""
        for x in (*args, *settings.values()):
            if isinstance(x, Tensor) and not x.is_floating_point() and _are_vectors_of(output, x):
                return output.masked_fill((x == marker)[..., None], torch.nan)
        return None

    hooks = [module.register_forward_hook(mark, with_kwargs=True) for module in net.backbone.modules()]
    try:
        with torch.no_grad(), observed(net, trace):
            net(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = set()
    for index in range(len(net.layout.projections)):
        calls = [(leads, marked) for projection, leads, marked in trace.calls if projection == index]
        mixed = any(marked and not leads for leads, marked in calls)
        if mixed or not any(leads for leads, _ in calls) or (every_call and not all(leads for leads, _ in calls)):
            found.add(index)
    return [net.layout.projections[i].name for i in sorted(found)]


def _are_vectors_of(output: object, tokens: Tensor) -> bool:
    if not isinstance(output, Tensor) or not output.is_floating_point():
        return False
    return output.dim() == tokens.dim() + 1 and output.shape[:-1] == tokens.shape


def _unused(tokens: Tensor, vocabulary: int) -> int:
    """The last token that the rows do not have."""
    present = set(tokens.flatten().tolist())
    return next(token for token in reversed(range(vocabulary)) if token not in present)
