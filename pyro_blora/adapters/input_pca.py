"""The principal components of the projections' inputs: what they explain, for a prior, and where lora_A may start."""

import contextlib
import io
from collections.abc import Iterable

import torch
from torch import Tensor

from ..layout import INPUT
from .gate_context import Observer
from .gated_model import GatedModel, observed


class _Moments(Observer):
    """Count, sum and sum of squares of each wanted projection's input, over batches, examples and tokens.

    Projections that read one tensor, as query, key and value do, have one entry: its matrix is the largest thing here.
    """

    def __init__(self, wanted: set[int]):
        self.wanted = wanted
        self.owner: dict[int, int] = {}  # of a projection's entry, the first one of its readers in the first batch
        self.counts: dict[int, int] = {}
        self.sums: dict[int, Tensor] = {}  # (n,)
        self.products: dict[int, Tensor] = {}  # (n, n)
        self._read: tuple[Tensor, int] | None = None  # what was read last, and its entry

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if tensor != INPUT or projection not in self.wanted:
            return x
        same = self._read[1] if self._read is not None and self._read[0] is x else projection
        owner = self.owner.setdefault(projection, same)
        if owner == projection:
            rows = x.detach().flatten(0, -2).double()  # a mean's square is taken off; autocast leaves it alone
            self.counts[owner] = self.counts.get(owner, 0) + len(rows)
            self.sums[owner] = self.sums.get(owner, 0.0) + rows.sum(0)
            self.products[owner] = self.products.get(owner, 0.0) + rows.mT @ rows
        self._read = x, owner
        return x

    def ratios(self, components: int) -> dict[int, Tensor]:
        """Shares of the variance of every projection's input, falling, (components,); 0 beyond the input's width."""
        each = {owner: self._ratios(owner, components) for owner in self.counts}
        return {projection: each[owner] for projection, owner in self.owner.items()}

    def _ratios(self, owner: int, components: int) -> Tensor:
        count = max(1, self.counts[owner])
        mean = self.sums[owner] / count
        variances = torch.linalg.eigvalsh(self.products.pop(owner) / count - torch.outer(mean, mean)).flip(0)
        shares = variances.clamp(min=0) / variances.clamp(min=0).sum().clamp(min=torch.finfo(variances.dtype).tiny)
        return torch.nn.functional.pad(shares, (0, max(0, components - len(shares))))[:components]


@torch.no_grad()
def explained_variances(net: GatedModel, batches: Iterable[dict]) -> Tensor:
    """Explained variance ratios of the R leading components of every adapted projection's input.

    Padding counts as any other token. Shapes: (L, R); rows of projections without an adapter are 0.
    Errors: ValueError without any batch.
    Source: principal components of layer inputs as in EVA (Paischer et al., 2024), here from the covariance itself.
    """
    owners = net.layout.input_owner.tolist()  # the observer sees a shared input once
    adapted = {i: owners[i] for i, p in enumerate(net.layout.projections) if p.adapted}
    moments = _Moments({*adapted.values()})
    with observed(net, moments):
        for batch in batches:
            net(**batch)
    if not all(moments.counts.get(moments.owner.get(i, i)) for i in moments.wanted):
        raise ValueError("explained variances need at least one batch of training examples, got none")
    ratios = moments.ratios(net.layout.rank)
    rows = torch.zeros(len(net.layout.projections), net.layout.rank, device=net.log_range.device)
    for projection, owner in adapted.items():
        rows[projection] = ratios[owner]
    return rows


class _Readers(Observer):
    """The projections whose input has a row for every token of the batch."""

    def __init__(self, mask: Tensor):
        self.shape, self.found = mask.shape, set[int]()

    def activation(self, projection: int, tensor: int, x: Tensor) -> Tensor:
        if tensor == INPUT and x.shape[:2] == self.shape:
            self.found.add(projection)
        return x


def _mask(inputs: dict[str, Tensor]) -> Tensor:
    """Whether a token is no padding, of the rows that layers see, (rows, T): an example may be several (B, C, T)."""
    return inputs["attention_mask"].bool().flatten(0, -2)


def _tokens(inputs: tuple[Tensor, ...], mask: Tensor, name: str) -> Tensor:
    """Rows of a layer's input that are tokens of the batch, (tokens, n); none of another shape's."""
    x = inputs[0] if isinstance(inputs, tuple | list) else inputs
    return x[mask] if x.shape[:2] == mask.shape else x.new_zeros(0, x.shape[-1])


@torch.no_grad()
def start_eva(net: GatedModel, batches: Iterable[dict]) -> None:
    """Start lora_A at the leading principal components of its layer's inputs, by PEFT's incremental PCA.

    batches: passed over again until the components have settled. Padding and DeBERTa's table of positions, which its
    projections see too, do not count. Every adapter keeps its rank.
    Errors: ValueError where every batch has fewer tokens than the adapter ranks, or a layer reads something else than
    the texts: PEFT would pass over them forever.
    Source: Paischer et al., EVA (2024).
    """
    import peft

    batches = [net.head.rows(inputs) for inputs in batches]
    learning = {name: p.requires_grad for name, p in net.named_parameters()}
    if max((int(_mask(inputs).sum()) for inputs in batches), default=0) < net.layout.rank:
        raise ValueError(f"EVA needs {net.layout.rank} tokens in a batch, as many as ranks: raise --batch_size")
    first = {name: x.to(net.log_range.device) for name, x in batches[0].items()}  # as PEFT does
    with observed(net, readers := _Readers(_mask(first))):
        net(**first)
    readers_of = zip(net.layout.projections, net.layout.input_owner.tolist(), strict=True)
    if missing := [p.name for p, owner in readers_of if p.adapted and owner not in readers.found]:
        raise ValueError(
            f"EVA starts an adapter from the tokens that its layer reads, and {missing[0]} reads none of the text: "
            "drop --init_lora_weights eva, or choose other --target_modules"
        )
    with observed(net, Observer()), contextlib.redirect_stdout(io.StringIO()):  # PEFT prints what it leaves out
        peft.initialize_lora_eva_weights(
            net.peft_model, batches, show_progress_bar=False, gather_distributed_inputs=False,
            prepare_model_inputs_fn=lambda inputs, config: _mask(inputs),
            prepare_layer_inputs_fn=_tokens,
        )  # fmt: skip
    for name, parameter in net.named_parameters():  # PEFT lets the pooler learn when it puts its adapter back
        parameter.requires_grad_(learning[name])
