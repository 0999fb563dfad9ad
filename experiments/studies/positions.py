"""MACs of DeBERTa's positional stream: counted by forwards, and by the formula.

A DeBERTa layer projects the embeddings of 2 x span relative positions by the query and key projections of the content,
once a forward, and multiplies both with the content (c2p and p2c). The same configuration without relative attention
has neither, so what the layouts of the two models differ in is the stream. Models are on the meta device.
Shape letters: d hidden size, S tokens of an example, P = 2 x span positions, B examples of a forward, N layers.
Units: MACs per example.   Source: He et al., DeBERTa (2021), section 3 and equation 4.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from pyro_blora.layout import BATCH_SIZE, AdapterLayout

if TYPE_CHECKING:
    from transformers import PretrainedConfig

SMALLER = (16, 1)  # sizes of batches beside that of the layouts: the one that trains, and a single example
KINDS = ("query", "key", "value")
CALLED_TWICE = ("query", "key")  # one matrix for content and positions: share_att_key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stream:
    """content and positions: of each kind of projection, all layers; products: c2p and p2c; model: the whole forward.

    vectors: the positions that pass a projection of each kind, per example.
    """

    model: float
    content: dict[str, float]
    positions: dict[str, float]
    products: float
    vectors: dict[str, float]

    def share(self, kind: str) -> float:
        """Of the MACs of a kind of projection, those of its positional call."""
        return self.positions[kind] / (self.positions[kind] + self.content[kind])


def counted(config: PretrainedConfig, length: int, batch_size: int = BATCH_SIZE) -> Stream:
    """From the layouts of the model and of the same one without relative attention."""
    config = copy.deepcopy(config)
    whole = _layout(config, length, batch_size)
    config.relative_attention = False
    plain = _layout(config, length, batch_size)
    content, positions, vectors = Counter(), Counter(), {}
    for with_positions, without in zip(whole.projections, plain.projections, strict=True):
        content[without.type] += without.macs
        positions[without.type] += with_positions.macs - without.macs
        vectors[without.type] = with_positions.tokens - without.tokens
    products = whole.model_macs - plain.model_macs - positions.total()
    return Stream(model=whole.model_macs, content=content, positions=positions, products=products, vectors=vectors)


def by_formula(config: PretrainedConfig, length: int, batch_size: int = BATCH_SIZE) -> Stream:
    """Projections N d^2 S of content and N d^2 P / B of positions, products 2 N S P d, and what a BERT has besides."""
    d, layers, wide = config.hidden_size, config.num_hidden_layers, config.intermediate_size
    rows = 2 * (config.position_buckets if config.position_buckets > 0 else config.max_relative_positions)
    vectors = {kind: rows / batch_size if kind in CALLED_TWICE else 0 for kind in KINDS}
    content = {kind: layers * d * d * length for kind in KINDS}
    positions = {kind: layers * d * d * count for kind, count in vectors.items()}
    products = 2 * layers * length * rows * d
    layer = length * (4 * d * d + 2 * d * wide) + 2 * length * length * d  # q, k, v, output; feed-forward; attention
    model = layers * layer + d * d + d * config.num_labels + sum(positions.values()) + products
    return Stream(model=model, content=content, positions=positions, products=products, vectors=vectors)


def _layout(config: PretrainedConfig, length: int, batch_size: int) -> AdapterLayout:
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config)
    return AdapterLayout.of(model, rank=1, sequence_length=length, batch_size=batch_size)


def streams(configs: dict[str, PretrainedConfig], lengths: Iterable[int]) -> list[tuple]:
    """(model, length, counted, by formula, by formula at batches of SMALLER) for every model and length."""
    return [
        (name, length, counted(config, length), by_formula(config, length),
         [by_formula(config, length, size) for size in SMALLER])
        for name, config in configs.items() for length in lengths
    ]  # fmt: skip


def projections_table(rows: list[tuple]) -> str:
    """A line for each model, length and kind of projection."""
    smaller = " | ".join(f"of {size}, formula" for size in SMALLER)
    head = (
        "| model | tokens | projection | positions per example, counted | formula | MACs of content | "
        f"MACs of positions, counted | formula | share of positions, batch of {BATCH_SIZE}, counted | {smaller} |"
    )
    lines = [head, f"|{'---|' * (9 + len(SMALLER))}"]
    for name, length, found, formula, others in rows:
        for kind in KINDS:
            shares = " | ".join(f"{stream.share(kind):.1%}" for stream in (found, *others))
            lines.append(
                f"| {name} | {length} | {kind} | {found.vectors[kind]:g} | {formula.vectors[kind]:g} | "
                f"{found.content[kind]:,.0f} | {found.positions[kind]:,.0f} | {formula.positions[kind]:,.0f} | "
                f"{shares} |"
            )
    return "\n".join(lines)


def model_table(rows: list[tuple]) -> str:
    """A line for each model and length: what the stream is of a whole forward."""
    head = (
        "| model | tokens | MACs of the model, counted | formula | share of positions through query and key | "
        "c2p and p2c, counted | formula | share of c2p and p2c | share of the stream |"
    )
    lines = [head, f"|{'---|' * 9}"]
    for name, length, found, formula, _ in rows:
        projected = sum(found.positions.values())
        lines.append(
            f"| {name} | {length} | {found.model:,.0f} | {formula.model:,.0f} | {projected / found.model:.1%} | "
            f"{found.products:,.0f} | {formula.products:,.0f} | {found.products / found.model:.1%} | "
            f"{(projected + found.products) / found.model:.1%} |"
        )
    return "\n".join(lines)
