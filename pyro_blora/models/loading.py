"""Backbones by name: a hub name, a local folder, `demo` (the MiniLM encoder that installs as a Python package),
`demo-deberta` (the same, converted into DeBERTaV3's architecture), `demo-decoder` (SmolLM2, which installs as a
package too), or a function of the user's, `file.py:function`, which takes the number of outputs and returns (model,
tokenizer).

What transformers reports about the loading is read: only the head and the pooler may be new. No code of a backbone's
runs but that function's.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import nn

from ..registry import Registry
from ..tasks.heads import SEQUENCE, Head
from ..tasks.likelihoods import Likelihood
from .architectures import head_modules, is_pooler_new
from .embeddings import EXACT, round_tables
from .names import backbone_path
from .quiet_loading import quiet
from .tokenization import require_vocabulary, settle_padding

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_OWN = Registry("backbone")  # nothing is registered: it finds functions in files
_OWN_TOKENIZERS: dict[str, PreTrainedTokenizerBase] = {}  # made with a model, for the next one who asks
_NAMED = 3  # tensors that a message names; more are counted
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")


def load_backbone(
    name: str, kind: int | Likelihood, *, revision: str | None = None, embedding_bits: int = EXACT
) -> nn.Module:
    """A pretrained model with the head of a kind of outcome, in float32.

    The head is untrained, or a pretrained one of as many outputs: one with the same labels in another order has its
    outputs put into this order.
    kind: a task's `likelihood`; a number is that of outputs of a sequence classifier without names. revision: of a
    name on the hub. embedding_bits: see embeddings.py.
    Errors: ValueError for a name that neither the hub nor the disk has, a hub out of reach, and for files that are
    damaged or hold another model.
    """
    import transformers  # now, as it takes seconds

    if isinstance(kind, Likelihood):
        head, outputs, labels, settings = kind.head, kind.outputs, kind.names, kind.head_settings
    else:
        head, outputs, labels, settings = SEQUENCE, kind, (), {"num_labels": kind, "problem_type": None}
    if is_function(name):
        _refuse_revision(name, revision)
        model, _OWN_TOKENIZERS[name] = _own(name, outputs)
    else:
        model, report = _load(
            getattr(transformers, head.auto_class), name, revision, **settings, dtype="float32",
            output_loading_info=True, ignore_mismatched_sizes=True,  # a head of another task is replaced
        )  # fmt: skip
        _require_pretrained(model, report, name, head)
        model.pooler_is_new = is_pooler_new(model, report["missing_keys"])
        model.config._commit_hash = _commit(name, revision)
    _require_finite(model, name)
    if getattr(model.config, "pad_token_id", None) is None and head.is_new:
        model.config.pad_token_id = _padding(name, revision)
    if labels:
        _name_labels(model, labels)
    round_tables(model, embedding_bits)
    return model


def load_tokenizer(name: str, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The backbone's tokenizer.  Errors: ValueError, as above, and for one that has no words."""
    from transformers import AutoTokenizer

    if is_function(name):
        tokenizer = _OWN_TOKENIZERS.pop(name, None) or _own(name, 2)[1]
        settle_padding(tokenizer, name)
        return tokenizer
    tokenizer = _load(AutoTokenizer, name, revision)
    require_vocabulary(tokenizer, name, backbone_path(name))
    settle_padding(tokenizer, name)
    return tokenizer


def _padding(name: str, revision: str | None) -> int | None:
    """By the tokenizer: a decoder's class is read from its last token before the padding.  None without a tokenizer."""
    with contextlib.suppress(ValueError):
        tokenizer = _OWN_TOKENIZERS[name] if is_function(name) else load_tokenizer(name, revision=revision)
        settle_padding(tokenizer, name)
        return int(tokenizer.pad_token_id)
    return None


def is_function(name: str) -> bool:
    """Whether the name is of a function in a file."""
    return name.rpartition(":")[0].endswith(".py")


def _commit(name: str, revision: str | None) -> str | None:
    """That of the files in the hub's cache, which were just read."""
    if Path(backbone_path(name)).is_dir():
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(found).parent.name if isinstance(found, str) else None


def _own(name: str, num_labels: int) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    pair = _OWN.resolve(name)(num_labels)
    kinds = (PreTrainedModel, PreTrainedTokenizerBase)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(isinstance, pair, kinds))):
        raise ValueError(
            f"backbone {name!r} must return (model, tokenizer) as transformers has them, got "
            f"{type(pair).__name__} {[type(x).__name__ for x in pair] if isinstance(pair, tuple) else ''}".rstrip()
        )
    pair[0].config._commit_hash = None  # a function's model is not read again from the hub, whatever it came from
    return pair[0].float(), pair[1]


def _load(auto_class, name: str, revision: str | None, **settings):
    path = Path(backbone_path(name))
    if path.is_dir():
        _refuse_revision(name, revision)
        _require_model_folder(name, path)
    elif revision is not None:
        settings["revision"] = revision
    try:
        with quiet():
            return auto_class.from_pretrained(backbone_path(name), trust_remote_code=False, **settings)
    except SafetensorError as error:
        raise ValueError(
            f"the weights of backbone {name!r} are damaged ({error}): copy or download them again"
        ) from None
    except Exception as error:  # whatever a malformed file makes transformers raise
        first = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        if "weights only" in str(error).lower().replace("_", " "):  # torch's refusal of a pickle
            raise ValueError(
                f"the weights of backbone {name!r} are a pickle that is damaged or holds code: name a revision with "
                "safetensors, --backbone_revision"
            ) from None
        if "trust_remote_code" in str(error):
            raise ValueError(
                f"backbone {name!r} needs code of its own, which is not run: look at it, and load the model in a "
                "function of yours, --backbone file.py:function"
            ) from None
        raise ValueError(
            f"backbone {name!r} could not be loaded ({first}). Give a model name on the hub (needs the network once), "
            "a local folder with config.json, weights and tokenizer, or `demo`"
        ) from None


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise ValueError(f"backbone {name!r} is not read from the hub: drop --backbone_revision {revision}")


def _require_model_folder(name: str, path: Path) -> None:
    """Errors: ValueError for a folder that holds something else than a model, or its weights in a pickle only."""
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"backbone {name!r} is an adapter, not a model: {_instead(path)}")
    if (path / "summary.json").is_file() and (path / "adapter").is_dir():
        raise ValueError(f"backbone {name!r} is a run's folder, not a model: {_instead(path / 'adapter')}")
    pickles = sorted(file.name for file in path.glob("pytorch_model*.bin"))
    if pickles and not any((path / file).is_file() for file in _WEIGHTS):
        raise ValueError(
            f"backbone {name!r} has its weights in a pickle, {pickles[0]}, which can run code when it is read: write "
            "them as safetensors with transformers' save_pretrained, from a source you trust"
        )


def _instead(adapter: Path) -> str:
    """What to give as a backbone in place of an adapter."""
    if not (adapter / "adapter_config.json").is_file():
        return f"its model is --backbone {adapter}"
    files = (adapter.parent / "config.json", "backbone"), (adapter / "adapter_config.json", "base_model_name_or_path")
    base, is_run = None, (adapter.parent / "summary.json").is_file()
    for file, key in files if is_run else files[1:]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            base = base or json.loads(file.read_text("utf-8"))[key]
    goes_on = f"; pyro_blora.load({str(adapter.parent)!r}) gives what was learned" if is_run else ""
    return f"give --backbone the model that it adapts{f', {base}' if base else ''}{goes_on}"


def _require_pretrained(model: PreTrainedModel, report: dict, name: str, head: Head) -> None:
    """Errors: ValueError where anything but the head and the pooler is new, of another shape, or left over."""
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError(f"backbone {name!r} is an adapter, not a model: give --backbone the model that it adapts")
    new, base = tuple(f"{path}." for path in head_modules(model) if head.is_new), model.base_model
    prefix = f"{model.base_model_prefix}."
    buffers = {key.removeprefix(prefix) for key, _ in model.named_buffers()}  # files of old versions hold them

    def is_of_encoder(key: str) -> bool:
        inside = key.removeprefix(prefix)
        first = inside.partition(".")[0]
        return first in dict(base.named_children()) and first != "pooler" and inside not in buffers

    left_over = report["unexpected_keys"]  # heads of other tasks are
    found = {
        "missing": [key for key in report["missing_keys"] if not key.startswith(new)],
        "of another shape": [key for key, *_ in report["mismatched_keys"] if not key.startswith(new)],
        "of no layer": [key for key in left_over if is_of_encoder(key)],
    }
    wrong = [f"{_some(keys)} {'is' if len(keys) == 1 else 'are'} {what}" for what, keys in found.items() if keys]
    if wrong:
        has = (
            f"; the file has {_some(left_over)}" if found["missing"] and left_over and not found["of no layer"] else ""
        )
        raise ValueError(
            f"the weights of backbone {name!r} are not those of its config.json: {'; '.join(wrong)}{has}. Only head "
            "and pooler may be new, all else would be drawn at random: restore the folder"
        )


def _some(keys: Iterable[str]) -> str:
    keys = sorted(keys)
    more = len(keys) - _NAMED
    return ", ".join(keys[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _require_finite(model: nn.Module, name: str) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    wrong = [key for key, x in tensors if x.is_floating_point() and not x.is_meta and not bool(x.isfinite().all())]
    if wrong:
        raise ValueError(
            f"backbone {name!r} has weights that are no finite numbers ({_some(wrong)}): download it again"
        )


@torch.no_grad()
def _name_labels(model: PreTrainedModel, labels: tuple[str, ...]) -> None:
    """Put the task's labels into the configuration, and a head that knows them into their order."""
    words = [_word(label) for label in labels]
    known: dict = model.config.id2label or {}
    before = [_word(str(known.get(index))) for index in range(len(labels))]
    if before != words and sorted(before) == sorted(words) and len(set(words)) == len(words):
        last = [m for path in head_modules(model) for m in model.get_submodule(path).modules()
                if isinstance(m, nn.Linear) and m.out_features == len(labels)][-1:]  # fmt: skip
        order = torch.tensor([before.index(word) for word in words])
        for parameter in (p for linear in last for p in linear.parameters()):
            parameter.copy_(parameter[order])
    model.config.id2label = dict(enumerate(labels))
    model.config.label2id = {label: index for index, label in enumerate(labels)}


def _word(label: str) -> str:
    return "".join(letter for letter in label.casefold() if letter.isalnum())
