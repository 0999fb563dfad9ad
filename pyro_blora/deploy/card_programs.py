"""The programs in cards: how an export is read, by transformers, PEFT, this package or onnxruntime."""

from __future__ import annotations

from typing import Any

from ..tasks.heads import SEQUENCE
from .about import About

_MODEL = """import transformers

answer = transformers.pipeline("{pipeline}", model="this folder")
"""
_MODEL_OF_NO_PIPELINE = """import transformers

model = transformers.{auto_class}.from_pretrained("this folder").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_BACKBONE = """import peft
import transformers

{labels}backbone = transformers.{auto_class}.from_pretrained(
    "{name}",{settings}
)
"""
ADAPTER = """model = peft.PeftModel.from_pretrained(backbone, "this folder").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_DRAWS = """names = [f"draw-{{i}}" for i in range({draws})]
model = peft.PeftModel.from_pretrained(backbone, "this folder/draw-0", adapter_name=names[0]).eval()
for name in names[1:]:
    model.load_adapter(f"this folder/{{name}}", adapter_name=name)
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_AVERAGE = """

def average(texts):
    inputs, each = tokenizer(texts, padding=True, truncation=True, return_tensors="pt"), []
    for name in names:
        model.set_adapter(name)
        with torch.no_grad():
            logits = model(**inputs).logits
        each.append({averaged})
    return torch.stack(each).mean(0)
"""
PACKED = """import torch
import transformers
from pyro_blora import load

model = load("this folder"{backbone})
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
with torch.no_grad():
    logits = model(**tokenizer(["a text"], truncation=True, return_tensors="pt")).logits
"""
_ONNX = """import json

import numpy as np
import onnxruntime
import tokenizers

folder = "this folder"
about = json.load(open(f"{{folder}}/onnx.json"))
session = onnxruntime.InferenceSession(f"{{folder}}/model.onnx")
tokenizer = tokenizers.Tokenizer.from_file(f"{{folder}}/tokenizer.json")
tokenizer.enable_truncation(about["task"]["max_length"] or 512)
tokenizer.enable_padding({padding})


def logits(texts):
    rows = tokenizer.encode_batch(texts)
    every = {{
        "input_ids": [row.ids for row in rows],
        "attention_mask": [row.attention_mask for row in rows],
        "token_type_ids": [row.type_ids for row in rows],
    }}
    return session.run(None, {{name: np.array(every[name], dtype=np.int64) for name in about["inputs"]}})[0]
"""
_OUTPUTS = "\n    num_labels={},"
_NAMED = "\n    id2label=dict(enumerate(labels)),\n    label2id={label: i for i, label in enumerate(labels)},"
_NEW = "\n    ignore_mismatched_sizes=True,  # its head is new, and replaced by the adapter's"
_PADDED = "\n    pad_token_id={},  # the end of a text, as its tokenizer has no token for padding"


def of_whole(about: About) -> str:
    """Of a model of transformers."""
    head = about.kind.head
    code = _MODEL if head.pipeline else _MODEL_OF_NO_PIPELINE
    return code.format(pipeline=head.pipeline, auto_class=head.auto_class)


def of_backbone(about: About) -> str:
    """Of the base that an adapter is put on."""
    head, outputs = about.kind.head, about.kind.head_settings.get("num_labels", 0)
    settings = (_OUTPUTS.format(outputs) if outputs else "") + (_NAMED if about.labels and outputs else "")
    code = _BACKBONE.format(
        labels=f"labels = {about.labels}\n" if outputs else "", name=about.base, auto_class=head.auto_class,
        settings=(f'\n    revision="{about.revision}",' if about.revision else "")
        + settings + (_NEW + _padding(about) if head.is_new else ""),
    )  # fmt: skip
    return code


def of_draws(about: About, count: int) -> str:
    """Of adapters that are draws of one posterior, and of what they average where that follows from logits."""
    code, averaged = of_backbone(about) + _DRAWS.format(draws=count), about.kind.averaged_in_code
    takes_rows = about.kind.head.example is SEQUENCE.example
    return f"import torch\n{code}{_AVERAGE.format(averaged=averaged)}" if averaged and takes_rows else code


def of_onnx(tokenizer: Any) -> str:
    """Of an ONNX file. tokenizer: whose padding is in the graph, as decoders end before it; None: not known."""
    pad_id = getattr(tokenizer, "pad_token_id", None)
    return _ONNX.format(padding="" if pad_id is None else f"pad_id={pad_id}, pad_token={tokenizer.pad_token!r}")


def _padding(about: About) -> str:
    """Of a decoder that has no token for it: its own configuration does not say which one was taken."""
    config = about.program.net.backbone.config
    token = getattr(config, "pad_token_id", None)
    return _PADDED.format(token) if token is not None and token == getattr(config, "eos_token_id", None) else ""
