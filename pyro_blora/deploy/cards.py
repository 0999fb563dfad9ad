"""What each kind of export says in its card: what it computes, what is simulated or left out, how it is read.

Only a packed model, and an ONNX file of one, computes the deployed allocation: an adapter of PEFT runs over a base of
32 bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..models.embeddings import EXACT, bits_of, is_tied
from .about import About, allocation, bops_ratio, deployed_widths
from .card_programs import ADAPTER, PACKED, of_backbone, of_draws, of_onnx, of_whole
from .model_card import Card

if TYPE_CHECKING:
    from .onnx_modules import Products

_IN_IT = (
    "**Smoothing**: each quantized projection divides its input, channel by channel, by scales that were learned, "
    "before it is rounded; the weights that read it, base and lora_A, were multiplied with them before they were."
)
_NOT_NEEDED = (
    "**Smoothing**: the run divides inputs, channel by channel, by learned scales and multiplies the weights that read "
    "them, so that both are rounded at less error. At 32 bit this changes nothing, so it is not in here{}."
)
_OF_LOW_RANK = ": lora_A was rounded with its scales, which were then divided out"
_NARROW = (
    "{} products have a weight of up to 8 bit and an input of more: com.microsoft's MatMulNBits, with the weight's "
    "codes in 2, 4 or 8 bits, in float32 (accuracy level 0). That saves disk and memory, **not time**: on the "
    "processor that was tried they take as long as a product in float32 at 4 bit, and several times as long at 2 and "
    "8. It needs onnxruntime 1.31 or later."
)
_OF_FAST = (
    ": onnxruntime sums in another order in float32, so a value at the border between two codes may take the other one."
)
_UNROUNDED = ": `pyro_blora.load` rounds those of the base, PEFT leaves them at 32 bit"
_OWN_FILE = (
    "`gates.safetensors` is the posterior in full rank, which `pyro_blora.load` reads with the run's config.json."
)


def adapter(about: About, ranks: dict[str, int]) -> Card:
    """Of PEFT. ranks: of adapted projections."""
    bits, opened = deployed_widths(about.program)
    tensors = [name for name in ("lora_A", "lora_B") if about.program.net.layers()]
    return Card(
        f"A LoRA adapter of {about.base or 'a model of its own'}",
        [
            f"{_ranks(ranks)} Its matrices are rounded to the bit widths that were learned; PEFT runs them, the base's "
            "weights and all inputs at 32 bit. This is **not** the low-bit model of the run: that has its base and "
            "inputs rounded too (`pyro-blora export RUN --to FOLDER --format packed`), and its decisions differ from "
            "these where that matters.",
            f"**Bit operations** of this adapter on its base: {_share(about, activations=32, weights=32)}.",
            f"**Bit widths** that its matrices are rounded to:\n\n{allocation(about.layout, bits, opened, tensors)}",
            *_rounded_tables(about, _UNROUNDED),
            *_smoothing(about, _NOT_NEEDED.format(_OF_LOW_RANK)),
            _OWN_FILE,
        ],
        of_backbone(about) + ADAPTER, "peft", ["lora", "bayesian"], "adapter",
    )  # fmt: skip


def draws(about: About, count: int) -> Card:
    """Of several adapters, a draw of the posterior each."""
    return Card(
        f"{count} LoRA adapters of {about.base or 'a model of its own'}, draws of one posterior",
        [
            f"Each folder `draw-0` to `draw-{count - 1}` is an adapter of PEFT: ranks, bit widths and, where they are "
            f"random, weights are one draw of the posterior. The mean of their {about.kind.averages} is the "
            "prediction; where they disagree, it is uncertain.",
            "Matrices are rounded to the bit widths of the draw; PEFT runs them, the base's weights and all inputs at "
            "32 bit, while the run's own averaged predictions have these rounded too.",
            *_rounded_tables(about, _UNROUNDED),
            *_smoothing(about, _NOT_NEEDED.format(_OF_LOW_RANK)),
        ],
        of_draws(about, count), "peft", ["lora", "bayesian", "ensemble"], "adapter",
    )  # fmt: skip


def _rounded_tables(about: About, then: str) -> list[str]:
    bits = bits_of(about.program.net)
    return [] if bits == EXACT else [f"**Embeddings** have {bits} bit in the run, a range for each row{then}."]


def whole(about: About) -> Card:
    """Of full fine-tuning, which has no adapter."""
    return Card(
        f"{about.base or 'A model'}, fully fine-tuned",
        [
            "Its weights and inputs are at 32 bit here, whatever bit widths were learned.",
            *_smoothing(about, _NOT_NEEDED.format("")),
            _OWN_FILE,
        ],
        of_whole(about), "transformers", ["bayesian"], "finetune",
    )  # fmt: skip


def merged(about: About) -> Card:
    """Of a base of 32 bit with the adapter in its weights."""
    return Card(
        f"{about.base or 'A model'} with a LoRA adapter merged into it",
        [
            "Weights are W0 + (alpha / R) B A, with A and B rounded to the bit widths that were learned; the base's "
            "weights and all inputs are at 32 bit. So this is **not** the low-bit model of the run, whose decisions "
            "differ where rounding the base and its inputs matters.",
            "**Bit operations**: those of the base model at 32 bit; the adapter costs nothing more.",
            *_smoothing(about, _NOT_NEEDED.format(_OF_LOW_RANK)),
        ],
        of_whole(about), "transformers", ["lora", "merged", "bayesian"], "merge",
    )  # fmt: skip


def packed(about: About, *, is_merged: bool, share: str, reference: bool, embeddings: int | None) -> Card:
    """Of the deployed model in codes. share: of the disk, in words. embeddings: bits that are not the run's."""
    bits, opened = deployed_widths(about.program)
    tensors = ["input", "base"] if is_merged or not about.layout.adapted else list(about.layout.tensors)
    kept = (
        "its logits are those of the run's deployed allocation, equal to the bit in float32"
        if embeddings is None else f"its embeddings have {embeddings} bit, row by row, which the run's have not"
    )  # fmt: skip
    if is_merged:
        kept = (
            "the adapter was added to the dequantized base and the sum rounded to the base's bit widths again, at the "
            "range of least squared error, so its logits are not those of the run's deployed allocation"
        )
    return Card(
        f"{about.base or 'A model'} at learned bit widths",
        [
            f"Every quantized tensor is stored at the bit width that was learned; {kept}.",
            "**Simulated**: PyTorch computes in float32 on numbers of these few bits. Disk is saved, not time.",
            f"**Bit operations** on hardware with such products: {_share(about, is_merged=is_merged)}.",
            f"**Disk**: {share}.",
            *(_rounded_tables(about, ", and here") if embeddings is None else []),
            *_smoothing(about, _IN_IT),
            f"**Bit widths**:\n\n{allocation(about.layout, bits, opened, tensors)}",
            *_untied(about, embeddings),
            *(["The base is not in this folder: it is read from the hub or a folder, and compared by hash."]
              if reference else []),
            "`packed.json` describes `packed.safetensors` and has the hashes of all files; loading runs no code.",
        ],
        PACKED.format(backbone=', backbone="PATH of the base"' if reference else ""), "pyro_blora",
        ["lora", "bayesian", "quantized"], "quantized",
    )  # fmt: skip


def onnx(
    about: About, products: Products, gaps: dict[str, float], size: int, fast: bool, *, tokenizer: Any = None
) -> Card:
    """Of the deployed model for onnxruntime. gaps: of logits, of the largest. tokenizer: in the folder."""
    bits, opened = deployed_widths(about.program)
    is_float = fast or products.narrow > 0
    return Card(
        f"{about.base or 'A model'} at learned bit widths, for onnxruntime",
        [
            f"The deployed allocation of the run, with its learned scales. {products.integer} of the {products.all} "
            "matrix products of the quantized projections have two factors of codes: onnxruntime runs them on int8 "
            "kernels. Codes of fewer than 8 bits are bytes, too, so they cost the time and the disk of 8; those of "
            f"more are two. All else is {'float32' if fast else 'float64, rounded to float32'}.",
            f"Compared with the packed model, logits differ by {gaps['logit_gap_mean']:.1g} of the largest on average, "
            f"and by up to {gaps['logit_gap_largest']:.1g}{_OF_FAST if is_float else '.'}",
            *([_NARROW.format(products.narrow)] if products.narrow else []),
            "On x86 processors without VNNI, which are older than 2019, onnxruntime's int8 kernels overflow at weights "
            "of 8 bit: compare there before use.",
            f"**Bit operations** on hardware with products of every width: {_share(about)}. On int8 kernels, widths "
            "below 8 bit save nothing more.",
            f"**Disk**: {size / 1e6:.1f} MB.",
            *_smoothing(about, _IN_IT),
            f"**Bit widths**:\n\n{allocation(about.layout, bits, opened, list(about.layout.tensors))}",
            *_untied(about),
            "`onnx.json` names inputs, labels and the hashes of all files. The program below needs onnxruntime, numpy "
            "and tokenizers, neither torch nor pyro_blora.",
        ],
        of_onnx(tokenizer), "onnxruntime", ["onnx", "lora", "bayesian", "quantized"], "quantized",
    )  # fmt: skip


def _untied(about: About, embeddings: int | None = None) -> list[str]:
    """A sentence on an output matrix that was the input embedding, if it is quantized."""
    backbone = about.program.net.backbone
    bits = embeddings or bits_of(backbone)
    names = [p.name for p in about.layout.projections if not p.adapted and is_tied(backbone, p.name)]
    return [
        f"The base's `{name}` and its input embedding are one matrix. Here they are two: the embedding at {bits} "
        f"bit, and `{name}` at its own bit width, at which bit operations count its products."
        for name in names
    ]


def _smoothing(about: About, told: str) -> list[str]:
    """What a card says of a run with smoothed inputs."""
    return [told] if about.program.net.smoothing is not None else []


def _share(about: About, *, activations: int | None = None, weights: int | None = None, is_merged: bool = False) -> str:
    ratio = bops_ratio(about.program, activations=activations, weights=weights, is_merged=is_merged)
    return f"{100 * ratio:.1f} % of those of the model at 32 bit with adapters of rank {about.layout.rank}"


def _ranks(ranks: dict[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return f"{len(ranks)} projections have ranks {f'from {low} to {high}' if low < high else f'of {low}'}."
