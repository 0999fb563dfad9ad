"""A packed model out: the deployed allocation with every tensor at its learned width, read back and compared.

packed.py has what the files are. What is written predicts what the program predicts with its deployed gates, equal to
the bit in float32, or nothing is written.
"""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from .. import adapters
from ..config.run_config import RunConfig
from ..files import new_folder
from ..layout import BASE, HIDDEN, INPUT, LORA_A, LORA_B, Projection
from ..models.architectures import example_rows
from ..models.names import commit_of, public_name
from ..models.quiet_loading import quiet
from ..posterior.draws import deployed
from ..program import BayesianLoRA
from ..quantizer.packing import packed
from ..tasks.outcomes import described
from .manifest import content_sum, write_manifest
from .packed import EXACT, MANIFEST, SCHEMA, VERSION, WEIGHTS, load_packed
from .peft import plain_backbone, save_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LEFT_OUT = ("auto_map", "quantization_config", "_name_or_path", "attn_implementation", "_attn_implementation")


@torch.no_grad()
def pack(
    program: BayesianLoRA, folder: str | Path, *, rows: dict[str, Tensor] | None = None, tokenizer=None,
    config: RunConfig | None = None, reference: bool = False,
) -> Path:  # fmt: skip
    """Write the deployed model to `folder`, which must not exist: codes of as many bits as were learned.

    rows: inputs on which what was written is compared with the program; None: ordinary tokens of the vocabulary.
    tokenizer, config: of the run; the tokenizer is saved too. reference: leave out what the base has, and name it with
    its revision and a hash; it is read from there by `load`.
    Errors: FileExistsError; ValueError for a network that has no such form; RuntimeError if what was written does not
    predict what the program predicts (nothing is left behind then).
    """
    folder, net = Path(folder), program.net
    _require_form(net)
    with new_folder(folder, "a model") as partial:
        plain = plain_backbone(net)
        state, projections = _state(plain), {}
        widths = Widths.of(program)
        for index, projection in enumerate(net.layout.projections):
            state |= widths.packed(index, state.pop(f"{projection.name}.weight"))
            projections[projection.name] = widths.entry(index)
        content: dict[str, Any] = {
            "schema": SCHEMA, "version": VERSION, "made_by": _made_by(), "architecture": _architecture(plain),
            "task": {
                "name": config.task if config else None, "text_columns": list(program.text_columns),
                "outcome": described(program.likelihood), "max_length": config.max_length if config else None,
            },
            "projections": projections, "embeddings": {},
        }  # fmt: skip
        if reference:
            content["base"] = _refer(plain, state, [p.name for p in net.layout.projections])
        _save(state, partial / WEIGHTS)
        if tokenizer is not None:
            save_tokenizer(tokenizer, partial, config)
        write_manifest(partial / MANIFEST, content)
        require_equal(program, load_packed(partial, backbone=plain.name_or_path if reference else None), rows)
    return folder


class Widths(NamedTuple):
    """The deployed allocation of a program: bits (L, T), open ranks (L,), ranges (L, T)."""

    program: BayesianLoRA
    bits: Tensor
    ranks: Tensor
    ranges: Tensor

    @classmethod
    def of(cls, program: BayesianLoRA) -> Widths:
        net, (z, g) = program.net, deployed(program)
        layout = net.layout
        bits = torch.tensor(layout.ladder)[z.sum(-1).long().cpu()]
        ranges, owners = net.log_range.exp().cpu(), layout.input_owner
        bits[:, INPUT], ranges[:, INPUT] = bits[owners, INPUT], ranges[owners, INPUT]
        return cls(program, bits, 1 + g.sum(-1).long().cpu(), ranges)

    def _tensors(self, index: int) -> dict[str, int]:
        """Places of the tensors that a projection has."""
        adapted = self.program.layout.projections[index].adapted
        places = {"input": INPUT, "base": BASE}
        return places | ({"lora_A": LORA_A, "lora_B": LORA_B, "hidden": HIDDEN} if adapted else {})

    def entry(self, index: int) -> dict[str, Any]:
        """Of a projection in the manifest."""
        layout, rank = self.program.layout, int(self.ranks[index])
        projection: Projection = layout.projections[index]
        found: dict[str, Any] = {
            "shape": [projection.out_features, projection.in_features],
            "bits": {name: int(self.bits[index, t]) for name, t in self._tensors(index).items()},
        }
        if projection.adapted:
            found |= {"rank": layout.rank, "open": rank, "scale": layout.alpha / layout.rank}
        return found

    def packed(self, index: int, base: Tensor) -> dict[str, Tensor]:
        """Codes and ranges of a projection's tensors, by their names in the file."""
        projection, rank = self.program.layout.projections[index], int(self.ranks[index])
        weights = {"base": base.float()}
        if projection.adapted:
            down, up = self.program.net.low_rank(projection.name)
            weights |= {"lora_A": down[:rank], "lora_B": up[:, :rank]}
        found = {}
        for name, t in self._tensors(index).items():
            bits, value_range = int(self.bits[index, t]), self.ranges[index, t].clone()
            if bits < EXACT:
                found[f"{projection.name}.{name}.range"] = value_range
            if name in weights:
                x = weights[name].detach().cpu()
                found[f"{projection.name}.{name}"] = packed(x, value_range, bits) if bits < EXACT else x
        return found


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
    return {"class": type(plain).__name__, "attention": plain.config._attn_implementation, "config": config}


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


def _made_by() -> str:
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
    rows = rows or net.head.example(example_rows(net.backbone, 2, tokens, varied=True))
    batch = {key: value.to(device) for key, value in rows.items()}
    settings = {"use_cache": False} if net.has_cache else {}
    training = program.training
    program.eval()
    with adapters.use_gates(net, *deployed(program)):
        expected = net.head.read(net.peft_model(**batch, **settings))
    program.train(training)
    found = net.head.read(written(**batch, **settings))
    written.to("cpu")
    if not torch.equal(found, expected):
        gap = (found - expected).abs().max().item()
        raise RuntimeError(f"the packed model's logits differ by {gap:.2g} from the program's: please report this")
