"""AdapterLayout: which linear maps of a model carry gates, and what they cost. Plain data, no model inside.

It is the pivot of the package: priors see costs through it, guides take their shapes from it, BOPs, ArviZ coordinates
and export read the same fields. `AdapterLayout.of(model, ...)` reads it off a Hugging Face model.

Shape letters: L gated projections, T = 5 tensors each, K = 4 random bit gates (the 2-bit rung is always open), R ranks
(the first is always open). Units: MACs are for one forward of batch 1 at `sequence_length` tokens, measured by
PyTorch's flop counter on the meta device. DeBERTa's positional stream passes through `query` and `key` a second time
(512 positions, whatever the sentence length); it is counted, so `tokens` exceeds the sequence length there.
"""

import copy
import dataclasses
import re
from collections.abc import Iterable
from functools import cached_property

import regex  # its matches have a time limit
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

TENSORS = ("input", "base", "lora_A", "lora_B", "hidden")
INPUT, BASE, LORA_A, LORA_B, HIDDEN = range(len(TENSORS))  # their places in the T dimension
LADDER = (2, 4, 8, 16, 32)
SCOPES = ("adapted", "encoder")
_LONGEST_MATCH = 1.0  # seconds of a regular expression on one name, which takes microseconds
_READ_ALIKE = ("query", "key", "value")  # types of projections that read the same input

# The attention inputs of each architecture, the ones the paper adapts.
TARGETS = {
    "bert": ("query", "key", "value"),
    "deberta": ("query_proj", "key_proj", "value_proj"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj"),
    "distilbert": ("q_lin", "k_lin", "v_lin"),
    "roberta": ("query", "key", "value"),
    "xlm-roberta": ("query", "key", "value"),
}
_TYPES = {
    "query_proj": "query", "key_proj": "key", "value_proj": "value",
    "q_lin": "query", "k_lin": "key", "v_lin": "value",
    "q_proj": "query", "k_proj": "key", "v_proj": "value", "out_lin": "attention.output",
}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Projection:
    """One linear map y = W x + b with W of shape (out_features, in_features).

    `tokens` is how many vectors pass through it in one forward, `adapted` whether it has a low-rank adapter.
    """

    name: str
    type: str
    layer: int
    in_features: int
    out_features: int
    tokens: int
    adapted: bool

    @property
    def macs(self) -> int:
        return self.tokens * self.in_features * self.out_features


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterLayout:
    """The gated projections of a model, in model order, and the MACs of everything.

    `model_macs` counts every matrix product of one forward of the plain model, attention products and head included.
    `share_inputs`: query, key and value of a layer share one chain for their input, that of the first of them.
    """

    architecture: str
    projections: tuple[Projection, ...]
    rank: int
    alpha: float
    scope: str
    sequence_length: int
    model_macs: int
    tensors: tuple[str, ...] = TENSORS
    ladder: tuple[int, ...] = LADDER
    share_inputs: bool = False

    @classmethod
    def of(
        cls,
        model: nn.Module,
        *,
        rank: int = 8,
        alpha: float = 16.0,
        target_modules: str | Iterable[str] | None = None,
        scope: str = "adapted",
        sequence_length: int = 128,
        share_inputs: bool = False,
    ) -> "AdapterLayout":
        """The layout of a Hugging Face model.

        target_modules: None for the architecture's preset (`TARGETS`), names (matched as the end of a module's path),
        or one regular expression (matched against the whole path).
        Errors: ValueError for targets that match nothing, a rank below 1 or above a target's size, an unknown scope.
        """
        if scope not in SCOPES:
            raise ValueError(f"unknown scope {scope!r}: known scopes are {', '.join(SCOPES)}")
        if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
            raise ValueError(f"rank must be a whole number of at least 1, got {rank}")
        if not hasattr(model, model.base_model_prefix):
            raise ValueError(
                f"{type(model).__name__} has no task head: load the backbone with a class such as "
                "AutoModelForSequenceClassification"
            )
        if sequence_length > _positions(model.config):
            raise ValueError(
                f"the model takes at most {_positions(model.config)} tokens, got a sequence length of "
                f"{sequence_length}: lower it (sequence_length, or --max_length on the command line)"
            )
        linears = _encoder_linears(model)
        targets = _match(linears, target_modules, getattr(model.config, "model_type", "unknown"))
        macs, model_macs = count_macs(model, sequence_length)
        projections = []
        for name, linear in linears.items():
            if name not in targets and scope != "encoder":
                continue
            n, m = linear.in_features, linear.out_features
            if name in targets and rank > min(n, m):
                raise ValueError(f"rank {rank} exceeds the size of {name} ({m} x {n}): choose at most {min(n, m)}")
            layer = re.search(r"\.(\d+)\.", name)
            projections.append(
                Projection(
                    name=name, type=_type_of(name), layer=int(layer[1]) if layer else 0, in_features=n,
                    out_features=m, tokens=macs.get(name, 0) // (n * m), adapted=name in targets,
                )
            )  # fmt: skip
        return cls(
            architecture=getattr(model.config, "model_type", type(model).__name__), projections=tuple(projections),
            rank=rank, alpha=float(alpha), scope=scope, sequence_length=sequence_length, model_macs=model_macs,
            share_inputs=share_inputs,
        )  # fmt: skip

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> "AdapterLayout":
        projections = tuple(Projection(**p) for p in data["projections"])
        tuples = {"tensors": tuple(data["tensors"]), "ladder": tuple(data["ladder"]), "projections": projections}
        return cls(**{**data, **tuples})

    def without_adapters(self) -> "AdapterLayout":
        """The same projections for full fine-tuning."""
        return dataclasses.replace(
            self, projections=tuple(dataclasses.replace(p, adapted=False) for p in self.projections)
        )

    @property
    def adapted(self) -> tuple[Projection, ...]:
        return tuple(p for p in self.projections if p.adapted)

    @property
    def z_shape(self) -> tuple[int, int, int]:
        """(L, T, K): the bit gates."""
        return len(self.projections), len(self.tensors), len(self.ladder) - 1

    @property
    def g_shape(self) -> tuple[int, int]:
        """(L, R - 1): the rank gates."""
        return len(self.projections), self.rank - 1

    @cached_property
    def g_mask(self) -> Tensor:
        """(L,) bool: the projections that have an adapter, hence rank gates."""
        return torch.tensor([p.adapted for p in self.projections])

    @cached_property
    def input_owner(self) -> Tensor:
        """(L,) the projection that has the input's chain: itself, or with `share_inputs` the first of its layer."""
        first, owners = {}, []
        for i, p in enumerate(self.projections):
            module = p.name.rpartition(".")[0], p.in_features
            owners.append(first.setdefault(module, i) if self.share_inputs and p.type in _READ_ALIKE else i)
        return torch.tensor(owners)

    @cached_property
    def z_mask(self) -> Tensor:
        """(L, T) bool: the chains that exist. A projection without an adapter has those of input and base only."""
        always = torch.tensor([t in ("input", "base") for t in self.tensors])
        mask = self.g_mask[:, None] | always
        mask[:, INPUT] = self.input_owner == torch.arange(len(self.projections))
        return mask

    @cached_property
    def macs(self) -> Tensor:
        """(L,) MACs of W x."""
        return torch.tensor([p.macs for p in self.projections], dtype=torch.float64)

    @cached_property
    def rank_macs(self) -> Tensor:
        """(L, 2) MACs that one open rank adds: in A x, and in B h; 0 where there is no adapter."""
        sizes = [(p.in_features, p.out_features) if p.adapted else (0, 0) for p in self.projections]
        tokens = torch.tensor([p.tokens for p in self.projections], dtype=torch.float64)
        return tokens[:, None] * torch.tensor(sizes, dtype=torch.float64)

    @cached_property
    def tensor_macs(self) -> Tensor:
        """(L, T) MACs of the products that each tensor takes part in, at full rank; a shared input in every one."""
        down, up = (self.rank * self.rank_macs).unbind(-1)
        read = torch.zeros_like(down).index_add(0, self.input_owner, self.macs + down)
        return torch.stack([read, self.macs, down, up, up], -1)


def _match(linears: dict[str, nn.Linear], targets, architecture: str) -> set[str]:
    if targets is None:
        if architecture not in TARGETS:
            raise ValueError(
                f"no preset of target modules for the architecture {architecture!r}: pass target_modules "
                f"(names or a regular expression). Presets: {', '.join(TARGETS)}"
            )
        targets = TARGETS[architecture]
    if isinstance(targets, str):
        found = _matched(targets, linears)
        missing = [] if found else [targets]
    else:
        hits = {t: {name for name in linears if name == t or name.endswith("." + t)} for t in targets}
        missing = [t for t, names in hits.items() if not names]
        found = set().union(*hits.values())
    if missing or not found:
        ends = sorted({name.rsplit(".", 1)[-1] for name in linears})
        kind = " (one string is a regular expression for the whole path)" if isinstance(targets, str) else ""
        raise ValueError(
            f"target_modules {', '.join(map(repr, missing)) or '()'}{kind} match no linear layer of the "
            f"encoder. Its linear layers end in: {', '.join(ends)}"
        )
    return found


def _matched(pattern: str, names: Iterable[str]) -> set[str]:
    """The names that a regular expression matches as a whole; one that takes for ever is refused."""
    try:
        re.compile(pattern)
        compiled = regex.compile(pattern)
        return {name for name in names if compiled.fullmatch(name, timeout=_LONGEST_MATCH)}
    except (re.error, regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"target_modules {pattern!r} is no regular expression: {error}") from None
    except TimeoutError:
        raise ValueError(
            f"target_modules {pattern!r} takes more than {_LONGEST_MATCH:g} s to match one name: write it without "
            "repetitions inside repetitions, such as (a+)+, or list the names"
        ) from None


def head_modules(model: nn.Module) -> tuple[str, ...]:
    """Paths of the task head, which stays at 32 bit: what stands beside the base model, and a pooler inside it."""
    prefix = model.base_model_prefix
    beside = [name for name, child in model.named_children() if name != prefix and list(child.parameters())]
    pooler = getattr(getattr(model, prefix, model), "pooler", None)
    return (*beside, f"{prefix}.pooler") if pooler is not None else tuple(beside)


def _positions(config) -> float:
    """The longest input; RoBERTa's table has two rows more than that, for padding."""
    table = getattr(config, "max_position_embeddings", None) or float("inf")
    return table - 2 if "roberta" in getattr(config, "model_type", "") else table


def _encoder_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the task head's, by path: the head is trained whole, a target may not be in it."""
    head = head_modules(model)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: m for name, m in linears.items() if not any(name == h or name.startswith(h + ".") for h in head)}


def _type_of(name: str) -> str:
    path = re.split(r"\.\d+\.", name)[-1].removesuffix(".dense")
    last = path.rsplit(".", 1)[-1]
    return _TYPES.get(last, path if last == "output" else last)


def count_macs(model: nn.Module, sequence_length: int) -> tuple[dict[str, int], int]:
    """MACs of each linear layer and of the whole model, for one forward of batch 1, from a weightless copy."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # fused attention kernels hide their products from the counter
    with torch.device("meta"):
        shadow = type(model)(config).eval()
        tokens = torch.zeros(1, sequence_length, dtype=torch.long)
    shadow.config.pad_token_id = None  # once built, it serves a warning only, which would read the tokens
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        shadow(input_ids=tokens)  # no attention mask: reading one needs data
    root = type(shadow).__name__ + "."
    per_module = {name.removeprefix(root): sum(ops.values()) // 2 for name, ops in counter.get_flop_counts().items()}
    return per_module, counter.get_total_flops() // 2
