"""What a model costs and the longest input that it takes, by forwards of the model itself.

In evaluation mode, without gradients, on rows of one token with an attention mask: so both are right wherever a forward
is. A model on the meta device is counted there, without a mask, since reading one needs data.

Units: MACs are multiplications of matrix products and convolutions, as PyTorch's flop counter has them, per example.
What a layer does once a batch (DeBERTa's positions) is shared by the examples of a batch of stated size.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ..tasks.heads import SEQUENCE, Head
from .architectures import encoder_linears, example_rows, settle_attention, vocabulary_map
from .conv1d import sizes

_LONGEST = 2048  # tokens of a forward that is counted; costs of longer ones follow from a half, a quarter and 3/4 of it
_COUNTED = ("eager", "sdpa")  # implementations of attention whose products the counter sees


def _attention_flops(query: torch.Size, key: torch.Size, value: torch.Size, *_, **__) -> int:
    """Both products of fused attention, (B, heads, tokens, size) each; groups of queries may share a key."""
    return 2 * query[:-1].numel() * key[-2] * (query[-1] + value[-1])


def _grouped_flops(rows: torch.Size, weights: torch.Size, *_, **__) -> int:
    """Of a mixture's experts: rows (tokens, size), each times the weights (experts, size, out) of one of them."""
    return 2 * rows.numel() * weights[-1]


# the counter has fused attention of GPUs only, and no grouped products
_FUSED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._grouped_mm: _grouped_flops,
}


class Cost(NamedTuple):
    """tokens: vectors through each linear map, per example. model_macs: of all products of a forward, per example.

    uses: how often a forward passes an example through each map, more than once where layers share their weights.
    reaching: the maps whose output takes part in the logits, with a gradient.
    """

    tokens: dict[str, float]
    model_macs: float
    uses: dict[str, int]
    reaching: frozenset[str]


def cost(model: nn.Module, sequence_length: int, batch_size: int, head: Head = SEQUENCE) -> Cost:
    """What a forward of `batch_size` examples of `sequence_length` tokens (each of their rows) costs an example.

    Every count is a part of the batch plus a part of each example, so forwards of one and of two rows give it at any
    size; of sequences longer than is cheap, it is the parabola through three shorter lengths.
    Errors: ValueError for a sequence longer than the model takes, naming the longest.
    """
    with evaluated(model):
        _require_length(model, sequence_length, head)
        lengths: tuple[int, ...] = (sequence_length,)
        if sequence_length > _LONGEST:
            lengths = _LONGEST // 4, _LONGEST // 2, 3 * _LONGEST // 4
        total: dict[str, float] = {}
        uses: dict[str, int] = {}
        for length, share in zip(lengths, _lagrange(lengths, sequence_length), strict=True):
            one, reaching = _count(model, length, 1, head, reach=True)
            two, _ = _count(model, length, 2, head)
            for name, calls in one.items():
                first, each = sum(calls), sum(two[name]) - sum(calls)
                total[name] = total.get(name, 0.0) + share * (each + (first - each) / batch_size)
                # a call for all examples alike is no use by one (DeBERTa's positions), nor is a part of the sequence
                grown = sum(b > a for a, b in zip(calls, two[name], strict=False))
                uses[name] = max(1, min(grown, each // length))
    total = {name: int(x) if x == int(x) else x for name, x in total.items()}
    uses.pop("")
    return Cost(total, total.pop(""), uses, reaching)


def _lagrange(nodes: tuple[int, ...], at: int) -> list[float]:
    """Weights of the values at `nodes` in that of their polynomial at `at`; 1 for one node."""
    weights = []
    for node in nodes:
        weight = 1.0
        for other in nodes:
            weight *= (at - other) / (node - other) if other != node else 1.0
        weights.append(weight)
    return weights


def _count(
    model: nn.Module, length: int, size: int, head: Head, *, reach: bool = False
) -> tuple[dict[str, list[int]], frozenset[str]]:
    """Vectors through each linear map that can be quantized, by call, and under "" MACs of the whole; the maps that
    reach the logits.

    A map reaches them if a zero that is added to its output does: the graph is followed, nothing is kept for a backward
    pass and none is run.
    """
    tokens: dict[str, list[int]] = {}
    zeros: dict[str, Tensor] = {}
    hooks = []

    def after(name, linear):
        _, width = sizes(linear)

        def hook(_, args, output):
            tokens[name].append(output.numel() // width)
            if not reach:
                return None
            if name not in zeros:
                zeros[name] = torch.zeros((), dtype=output.dtype, device=output.device, requires_grad=True)
            return output + zeros[name]

        return hook

    of_head = {} if head.is_new else vocabulary_map(model)
    for name, linear in {**encoder_linears(model), **of_head}.items():
        tokens[name] = []
        hooks.append(linear.register_forward_hook(after(name, linear)))
    nothing: Any = None  # in the place of tensors that no backward pass will ask for
    keeping_nothing = torch.autograd.graph.saved_tensors_hooks(lambda _: nothing, lambda _: nothing)
    counter = FlopCounterMode(display=False, custom_mapping=_FUSED)
    try:
        with counter, torch.set_grad_enabled(reach), keeping_nothing:
            logits = head.read(model(**head.example(example_rows(model, size, length))))
    finally:
        for hook in hooks:
            hook.remove()
    tokens[""] = [counter.get_total_flops() // 2]
    leaves = _leaves(logits) if reach else set()
    return tokens, frozenset(name for name, zero in zeros.items() if id(zero) in leaves)


def _leaves(tensor: Tensor) -> set[int]:
    """Identities of the leaves that a tensor's graph ends in."""
    found, seen, left = set(), set(), [tensor.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        found.add(id(getattr(node, "variable", None)))
        left.extend(following for following, _ in node.next_functions)
    return found


@contextlib.contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, with attention that can be counted; afterwards whatever it was before.

    Modules and plain attributes are put back as well: attention may be another one here (`settle_attention`).
    """
    plain = bool | int | float | str | None
    before = [
        (m, {k: v for k, v in vars(m).items() if isinstance(v, plain)}, dict(m._modules)) for m in model.modules()
    ]
    own: Any = model.config
    configs: list[Any] = [*{id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()]
    fields = [(config, dict(vars(config))) for config in configs]
    for config in configs:
        if getattr(config, "_attn_implementation", None) not in (None, *_COUNTED):
            config._attn_implementation = "eager"
    if getattr(own, "pad_token_id", None) is None or model.device.type == "meta":
        # a decoder wants one to find the last token by; on meta a warning would read the tokens to look for it
        own.pad_token_id = None if model.device.type == "meta" else -1
    learning = [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    settle_attention(model)
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for config, values in fields:
            vars(config).update(values)
        for module, values, children in before:
            vars(module).update(values)
            module._modules.clear()
            module._modules.update(children)


class _Arrived(Exception):
    """A forward has passed its embeddings."""


@torch.no_grad()
def _refusal(model: nn.Module, length: int, head: Head) -> Exception | None:
    """Why a forward of `length` tokens fails, None if it does not; of long ones up to the first layer only."""
    hooks = []
    if length > _LONGEST:
        linears = encoder_linears(model)
        in_layers = [linears[name] for name in linears if re.search(r"\.\d+\.", name)] or linears.values()
        hooks = [linear.register_forward_hook(_arrive) for linear in in_layers]
    try:
        model(**head.example(example_rows(model, 1, length)))
    except _Arrived:
        return None
    except (IndexError, RuntimeError, ValueError, AssertionError) as error:
        return error
    finally:
        for hook in hooks:
            hook.remove()
    return None


def _arrive(*_) -> None:
    raise _Arrived


def _require_length(model: nn.Module, length: int, head: Head) -> None:
    """Refuse a sequence that a forward refuses, with the longest that it takes."""
    error = _refusal(model, length, head)
    if error is None:
        return
    works, fails = min(8, length // 2), length
    if works < 1 or _refusal(model, works, head) is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be run on {length} tokens ({str(error).splitlines()[0]}): check its "
            "configuration, and that it takes input_ids"
        ) from error
    while fails - works > 1:
        middle = (works + fails) // 2
        if _refusal(model, middle, head) is None:
            works = middle
        else:
            fails = middle
    raise ValueError(
        f"the model takes at most {works} tokens, got a sequence length of {length}: lower it (sequence_length, or "
        "--max_length on the command line)"
    ) from error
