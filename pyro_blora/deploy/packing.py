"""A packed model out: the deployed allocation with every tensor at its learned width, read back and compared.

packed.py has what the files are. What is written predicts what the program predicts with its deployed gates, equal to
the bit in float32, or nothing is written.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import adapters
from ..config.run_config import RunConfig
from ..files import new_folder
from ..models.architectures import example_rows
from ..models.conv1d import to_linear
from ..models.embeddings import bits_of, is_tied, range_of, require_bits, rounded_to, tables, untie
from ..models.names import commit_of, public_name
from ..models.quiet_loading import quiet
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..quantizer.packing import packed
from ..tasks.outcomes import described
from . import cards
from .about import About
from .held_out import HeldOut, answer_of
from .manifest import content_sum, write_manifest
from .model_card import write_card
from .packed import EXACT, MANIFEST, SCHEMA, UNSMOOTHED, VERSION, WEIGHTS, load_packed
from .peft import plain_backbone, save_tokenizer
from .widths import Widths

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OUT = ("auto_map", "quantization_config", "_name_or_path", "attn_implementation", "_attn_implementation")


@torch.no_grad()
def pack(
    program: BayesianLoRA, folder: str | Path, *, rows: dict[str, Tensor] | None = None, tokenizer=None,
    config: RunConfig | None = None, reference: bool = False, merged: bool = False, embeddings: int = EXACT,
    held_out: HeldOut | None = None,
) -> Path:  # fmt: skip
    """Write the deployed model to `folder`, which must not exist: codes of as many bits as were learned.

    rows: inputs on which what was written is compared with the program; None: ordinary tokens of the vocabulary.
    tokenizer, config: of the run; the tokenizer is saved too. reference: leave out what the base has, and name it with
    its revision and a hash; it is read from there by `load`. held_out: of the run, on which it is measured.
    Two options give up the equality. merged: the adapter is added to the dequantized base, and the sum rounded again.
    embeddings: their bits, with a range for every row; 32 leaves them as they were in the run.
    Errors: FileExistsError; ValueError for a network that has no such form; RuntimeError if what was written does not
    predict what the program predicts (nothing is left behind then).
    """
    folder, net = Path(folder).expanduser(), program.net
    _require_form(net)
    if merged and (reference or not net.layout.adapted):
        raise ValueError("a merged base is not the one to refer to, and needs an adapter: drop one of the two options")
    require_bits(embeddings)
    with new_folder(folder, "a model") as partial:
        plain = plain_backbone(net)
        to_linear(plain, [p.name for p in net.layout.projections])
        at_32, widths = _state(plain), Widths.of(program, merged)
        if any(is_tied(plain, p.name) for p in net.layout.projections):  # its codes stand beside the embedding
            untie(plain)
        state, trained = _state(plain), bits_of(plain)
        exact = embeddings in (EXACT, trained)
        coded = _embeddings(plain, state, trained if exact else embeddings)
        for index, projection in enumerate(net.layout.projections):
            state |= widths.packed(index, state.pop(f"{projection.name}.weight"))
        content: dict[str, Any] = {
            "schema": SCHEMA, "version": UNSMOOTHED if widths.smoothing is None else VERSION, "made_by": made_by(),
            "architecture": _architecture(plain), "task": described_task(program, config),
            "projections": {p.name: widths.entry(index) for index, p in enumerate(net.layout.projections)},
            "embeddings": coded,
        }  # fmt: skip
        if reference:
            content["base"] = _refer(plain, state, [p.name for p in net.layout.projections])
        _save(state, partial / WEIGHTS)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        write_manifest(partial / MANIFEST, content)
        written = load_packed(partial, backbone=plain.name_or_path if reference else None)
        if not merged and exact:
            require_equal(program, written, rows)
        measured = None if held_out is None else held_out.measure(answer_of(written, program))
        about, share = About.of(program, plain, config), share_of_disk(plain, at_32, state)
        others = None if exact else embeddings
        card = cards.packed(about, is_merged=merged, share=share, reference=reference, embeddings=others)
        write_card(partial, about, card, measured)
    return folder


def described_task(program: BayesianLoRA, config: RunConfig | None) -> dict[str, Any]:
    """What a manifest says of the task."""
    return {
        "name": config.task if config else None, "text_columns": list(program.text_columns),
        "outcome": described(program.likelihood), "max_length": config.max_length if config else None,
        "log_scale": program.log_scale.item(),
    }  # fmt: skip


def _require_form(net: adapters.GatedModel) -> None:
    """Errors: ValueError for a network that packed.py could not build."""
    import transformers

    if net.layout.adapted and not net.layers():
        raise ValueError(
            "this adapter quantizes nothing, so there is nothing to pack: export it as an adapter (--format peft), or "
            "merged (--format merged)"
        )
    kind = type(net.backbone)
    if getattr(transformers, kind.__name__, None) is not kind:
        raise ValueError(
            f"{kind.__name__} is no model of transformers, and a packed folder holds no code: export an adapter, "
            "--format peft"
        )


def _state(plain: PreTrainedModel) -> dict[str, Tensor]:
    """The plain model's tensors by name, each weight once."""
    tied = getattr(plain, "all_tied_weights_keys", None) or {}
    state = {name: x.detach().cpu() for name, x in plain.state_dict().items()}
    return {name: x for name, x in state.items() if tied.get(name) not in state}


def _architecture(plain: PreTrainedModel) -> dict[str, Any]:
    config = {key: x for key, x in plain.config.to_dict().items() if key not in _LEFT_OUT}
    attention = plain.config._attn_implementation
    return {"class": type(plain).__name__, "attention": attention if attention == "eager" else "sdpa", "config": config}


def _embeddings(plain: PreTrainedModel, state: dict[str, Tensor], bits: int) -> dict[str, Any]:
    """Put every embedding's table into codes, a range for each row; returns their entries of the manifest."""
    entries: dict[str, Any] = {}
    for name, module in () if bits == EXACT else tables(plain):
        if name in state:
            x, (trained, own) = state.pop(name), rounded_to(module)
            value_range = own.cpu() if own is not None and bits == trained else range_of(x)
            state |= {f"{name}.codes": packed(x, value_range, bits), f"{name}.codes.range": value_range}
            entries[name] = {"shape": list(x.shape), "bits": bits}
    return entries


def share_of_disk(plain: PreTrainedModel, at_32: dict[str, Tensor], state: dict[str, Tensor]) -> str:
    """Bytes of what is stored, and of it without embeddings, in % of the plain model's at 32 bit."""
    embeddings = {f"{path}.weight" for path, module in plain.named_modules() if isinstance(module, nn.Embedding)}

    def sizes(tensors: dict[str, Tensor]) -> tuple[int, int]:
        own = {name: x.numel() * x.element_size() for name, x in tensors.items()}
        of_embeddings = sum(size for name, size in own.items() if name.partition(".codes")[0] in embeddings)
        return sum(own.values()), sum(own.values()) - of_embeddings

    (stored, without), (whole, rest) = sizes(state), sizes(at_32)
    return (
        f"{stored / 1e6:.1f} MB, {100 * stored / whole:.0f} % of the model at 32 bit; without embeddings "
        f"{without / 1e6:.1f} MB, {100 * without / rest:.0f} %"
    )


def _refer(plain: PreTrainedModel, state: dict[str, Tensor], projections: list[str]) -> dict[str, Any]:
    """Take out of the state what the base has as it is; what it lacks, the head and a new pooler, stays.

    Errors: ValueError for a base that cannot be read again.
    """
    name = public_name(plain)
    if not plain.name_or_path:
        raise ValueError("this backbone has no name to refer to: leave the base packed in")
    with quiet(), torch.random.fork_rng(devices=[]):
        again: Any = type(plain).from_pretrained(
            plain.name_or_path, config=plain.config, dtype=torch.float32, ignore_mismatched_sizes=True,
            revision=commit_of(plain) or "main", trust_remote_code=False,
        )  # fmt: skip
    to_linear(again, projections)
    base, own, kept = again.state_dict(), plain.state_dict(), {}
    for key, x in base.items():
        path = key.removesuffix(".weight")
        if torch.equal(x, own[key].cpu()) and (key in state or path in projections):
            kept[key] = x
            state.pop(f"{path}.base" if path in projections and key.endswith(".weight") else key)
    if not kept:
        raise ValueError(f"nothing is left of {name} in this model: leave the base packed in")
    return {"name": name, "revision": commit_of(plain), "tensors": sorted(kept), "sha256": content_sum(kept)}


def _save(state: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: x.contiguous().clone() for name, x in state.items()}, path)


def made_by() -> str:
    try:
        return f"pyro_blora {importlib.metadata.version('pyro-blora')}"
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "pyro_blora"


@torch.no_grad()
def require_equal(program: BayesianLoRA, written: nn.Module, rows: dict[str, Tensor] | None) -> None:
    """Errors: RuntimeError where a network's outputs are not those of the program's deployed allocation, to the bit."""
    net, device = program.net, program.net.log_range.device
    written.to(device)
    tokens = min(32, net.layout.sequence_length)
    rows = net.head.rows(rows) if rows else net.head.example(example_rows(net.backbone, 2, tokens, varied=True))
    batch = {key: value.to(device) for key, value in rows.items()}
    settings = {"use_cache": False} if net.has_cache else {}
    training = program.training
    program.eval()
    with adapters.use_gates(net, *deployed(program), exact=True):
        expected = net.head.read(net(**batch, **settings))
    program.train(training)
    found = net.head.read(written(**batch, **settings))
    written.to("cpu")
    if not torch.equal(found, expected):
        gap = (found - expected).abs().max().item()
        raise RuntimeError(f"the packed model's logits differ by {gap:.2g} from the program's: please report this")
