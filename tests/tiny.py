"""A tiny pretrained-looking backbone on disk: a two-layer BERT with a word-level tokenizer of the demo's words."""

import dataclasses
import shutil
import string
from pathlib import Path

import huggingface_hub
import torch
import transformers
from models import tiny_bert
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pyro_blora.config import RunConfig
from pyro_blora.tasks import get_task


def save_tiny_backbone(folder: Path, *, letters: bool = False, **settings) -> Path:
    """letters: a tokenizer that also spells words it does not know, for the texts of other tasks."""
    words = sorted(
        {word for row in get_task("acceptability").load(n_train=400)["train"]["sentence"] for word in row.split()}
    )
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words])}
    model = models.WordLevel(vocabulary, unk_token="[UNK]")
    if letters:
        seen = set(vocabulary)
        spelt = [piece for letter in string.printable.split()[0] for piece in (letter, f"##{letter}")]
        vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(p for p in spelt if p not in seen)}
        model = models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=special
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    with torch.random.fork_rng():
        tiny_bert(vocab_size=len(vocabulary), **settings).save_pretrained(folder)
    return folder


def tiny_config(backbone: Path, **changes) -> RunConfig:
    """A run of eight steps."""
    values = {
        "task": "acceptability", "backbone": str(backbone), "max_train": 64, "epochs": 2, "batch_size": 16, "rank": 4,
        "draws": 3, "logging_steps": 1, "checkpoint_steps": 3, "max_length": 32,
    }  # fmt: skip
    return RunConfig(**{**values, **changes})


def tiny_grid(path: Path, backbone: Path, axes: str = "  seed: [0]\n") -> Path:
    """A grid file of such runs."""
    values = dataclasses.asdict(tiny_config(backbone))
    base = {key: values[key] for key in ("task", "backbone", "max_train", "epochs", "batch_size", "rank", "draws",
                                         "logging_steps", "checkpoint_steps", "max_length")}  # fmt: skip
    lines = "".join(f"  {key}: {value}\n" for key, value in base.items())
    path.write_text(f"base:\n{lines}axes:\n{axes}", encoding="utf-8")
    return path


def hub(tmp_path, monkeypatch, commits):
    """A cache as huggingface_hub leaves it; commits: (branch or None, commit, folder), the branch points to it."""
    repository = tmp_path / "hub" / "models--someone--tiny"
    for branch, commit, folder in commits:
        shutil.copytree(folder, repository / "snapshots" / commit)
        if branch:
            (repository / "refs").mkdir(exist_ok=True)
            (repository / "refs" / branch).write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
