"""Which linear maps of a backbone are adapted: a preset of each architecture, or names of the user's; and their roles.

The presets are the maps that read the input of an attention layer, which are those that the paper adapts.
docs/reference/architectures.md has the same table, with what is special about each architecture.
"""

import collections
import re
from collections.abc import Iterable

import regex  # its matches have a time limit
import torch
from torch import Tensor, nn

from ..tasks.heads import SEQUENCE, Head
from .architectures import encoder_linears, example_rows, outside_the_head
from .conv1d import is_linear
from .macs import evaluated

_LONGEST_MATCH = 1.0  # seconds of a regular expression on one name, which takes microseconds
_TOKENS = 16  # of the forward that finds the maps of an architecture without a preset

ALL_LINEAR = "all-linear"  # as PEFT calls every linear map of the encoder
_QUERY_KEY_VALUE = ("query", "key", "value")
_PROJ = ("q_proj", "k_proj", "v_proj")
_LIN = ("q_lin", "k_lin", "v_lin")
TARGETS = {
    "albert": _QUERY_KEY_VALUE,
    "bert": _QUERY_KEY_VALUE,
    "big_bird": _QUERY_KEY_VALUE,
    "bloom": ("query_key_value",),  # fused, a head's query, key and value after each other
    "camembert": _QUERY_KEY_VALUE,
    "convbert": _QUERY_KEY_VALUE,
    "data2vec-text": _QUERY_KEY_VALUE,
    "deberta": ("in_proj",),  # fused, a head's query, key and value after each other
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": _LIN,
    "electra": _QUERY_KEY_VALUE,
    "ernie": _QUERY_KEY_VALUE,
    "esm": _QUERY_KEY_VALUE,
    "esmc": _PROJ,
    "eurobert": _PROJ,
    "flaubert": _LIN,
    "funnel": ("q_head", "k_head", "v_head"),
    "gpt2": ("c_attn",),  # fused
    "gpt_neox": ("query_key_value",),  # fused as BLOOM's
    "gte": _PROJ,
    "jina_embeddings_v3": _PROJ,
    "llama": _PROJ,
    # the first token, from which a class is read, attends to the others through the maps of global attention alone
    "longformer": (*_QUERY_KEY_VALUE, "query_global", "key_global", "value_global"),
    "megatron-bert": _QUERY_KEY_VALUE,
    "mistral": _PROJ,
    "mobilebert": _QUERY_KEY_VALUE,
    "modernbert": ("Wqkv",),  # fused
    "mpnet": ("q", "k", "v"),
    "mt5": ("q", "k", "v"),
    "nomic_bert": _PROJ,
    "nystromformer": _QUERY_KEY_VALUE,
    "opt": _PROJ,
    "qwen2": _PROJ,
    "qwen3": _PROJ,
    "rembert": _QUERY_KEY_VALUE,
    "roberta": _QUERY_KEY_VALUE,
    "roberta-prelayernorm": _QUERY_KEY_VALUE,
    "roformer": _QUERY_KEY_VALUE,
    "t5": ("q", "k", "v"),
    "umt5": ("q", "k", "v"),
    "xlm": _LIN,
    "xlm-roberta": _QUERY_KEY_VALUE,
    "xlm-roberta-xl": _QUERY_KEY_VALUE,
}

_ROLES = {
    **{q + end: role for role in _QUERY_KEY_VALUE for q in (role, role[0]) for end in ("", "_proj", "_lin", "_head")},
    **dict.fromkeys(("attn.Wo", "o", "o_proj", "out_lin", "out_proj", "post_proj"), "attention.output"),
    **dict.fromkeys(("in_proj", "Wqkv", "c_attn", "query_key_value"), "qkv"), "attn.c_proj": "attention.output",
    **dict.fromkeys(("mlp.Wi", "c_fc"), "intermediate"), **dict.fromkeys(("mlp.Wo", "mlp.c_proj"), "output"),
}  # fmt: skip


def matched(
    model: nn.Module, targets: str | Iterable[str] | None, architecture: str, head: Head = SEQUENCE
) -> set[str]:
    """Paths of the linear layers that the targets name: names, a regular expression, or `all-linear`.

    Errors: ValueError listing what there is.
    """
    linears = encoder_linears(model)
    if not linears:
        raise ValueError(
            f"the encoder of {type(model).__name__} has no torch.nn.Linear and no Conv1D, and layers of other "
            f"kinds cannot be adapted: {other_maps(model)}. Choose another backbone"
        )
    if targets is None:
        if architecture not in TARGETS:
            raise ValueError(
                f"no preset of target modules for the architecture {architecture!r}: pass target_modules, names or a "
                f"regular expression. {_listed(model, head)}"
            )
        targets = TARGETS[architecture]
    if targets in (ALL_LINEAR, (ALL_LINEAR,)):
        return {*linears}
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
            f"encoder. {_listed(model, head)}"
        )
    return found


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


def _listed(model: nn.Module, head: Head) -> str:
    """The layers of an encoder by the ends of their names, for a user to choose from, and what to choose."""
    ends, others = collections.Counter(map(_end, encoder_linears(model))), other_maps(model)
    text = f"Its linear layers end in: {', '.join(f'{end} ({count})' for end, count in sorted(ends.items()))}"
    if others:
        text += f". Layers of other kinds, which cannot be adapted: {others}"
    try:
        names = ",".join(attention_maps(model, head))
    except Exception as error:  # whatever a model raises that cannot be run on tokens alone
        return f"{text}. None is proposed, as the model cannot be run ({(str(error).splitlines() or [''])[0]})"
    if not names:
        return f"{text}. None is proposed, as none reads the input of an attention layer"
    return f"{text}. Those that read the input of its attention: --target_modules {names}"


def _end(name: str) -> str:
    return name.rpartition(".")[2]


def other_maps(model: nn.Module) -> str:
    """Layers that have matrices of weights and are neither linear nor a table, as `MixtralExperts (experts)`."""
    found: dict[str, set[str]] = {}
    for name, module in outside_the_head(model).items():
        if is_linear(module) or hasattr(module, "num_embeddings"):
            continue
        own = [getattr(module, "weight", None), *module.parameters(recurse=False)]  # of integers: a buffer
        if any(isinstance(x, Tensor) and x.dim() > 1 for x in own):
            found.setdefault(type(module).__name__, set()).add(_end(name))
    return "; ".join(f"{kind} ({', '.join(sorted(ends))})" for kind, ends in sorted(found.items()))


def attention_maps(model: nn.Module, head: Head = SEQUENCE) -> tuple[str, ...]:
    """Ends of the names of the linear layers that read what an attention layer is given, found by a forward.

    An attention layer is a module whose class or name says so. Ends that other layers have too are left out.
    Errors: whatever the model raises that cannot be run on tokens alone.
    """
    given: list[set[int]] = []  # what the attention layers that are being run have been given
    reads: dict[str, bool] = {}  # by path, of those that are run
    hooks = []

    def enter(_, args, settings):
        given.append({_memory(x) for x in (*args, *settings.values()) if isinstance(x, Tensor)})

    def leave(*_):
        given.pop()

    def reading(name: str):
        def hook(_, args):
            reads[name] = reads.get(name, False) or any(_memory(args[0]) in tensors for tensors in given)

        return hook

    for name, module in outside_the_head(model).items():
        if is_linear(module):
            hooks.append(module.register_forward_pre_hook(reading(name)))
        elif "att" in f"{type(module).__name__} {_end(name)}".lower():
            hooks.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.append(module.register_forward_hook(leave))
    try:
        with evaluated(model), torch.no_grad():
            model(**head.example(example_rows(model, 1, _TOKENS)))
    finally:
        for hook in hooks:
            hook.remove()
    others = {_end(name) for name, is_reading in reads.items() if not is_reading}
    return tuple(dict.fromkeys(_end(name) for name in reads if _end(name) not in others))


def _memory(x: Tensor) -> int:
    """Of a tensor and its views, on the meta device too."""
    return x.untyped_storage()._cdata


def type_of(name: str) -> str:
    """The role of a projection, by its path: `query`, `intermediate`; `qkv` of one that is all three."""
    path = re.split(r"\.\d+\.", name)[-1].removesuffix(".dense")
    last = _end(path)
    return _ROLES.get(path) or _ROLES.get(last) or (path if last == "output" else last)
