"""A tiny pretrained-looking backbone on disk: a two-layer BERT with a word-level tokenizer of the demo's words."""

import dataclasses
import shutil
import string
from pathlib import Path

import huggingface_hub
import torch
import transformers
from models import _SMALL, tiny_bert
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

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


def save_tiny_decoder(folder: Path, kind: str = "gpt2", **settings) -> Path:
    """A decoder with the head of a language model, and a tokenizer of bytes without a token for padding.

    kind: `gpt2`, or another architecture of Llama's sizes, with grouped queries.
    """
    end, words = "<|endoftext|>", get_task("acceptability").load(n_train=100)["train"]["sentence"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[end], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(words, trainer)
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=end, eos_token=end, model_max_length=128
    ).save_pretrained(folder)
    own = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128} if kind == "gpt2" else {
        **_SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False,
    }  # fmt: skip
    sizes = {**own, "vocab_size": 400, "initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 0, **settings}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, **sizes)
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
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
